"""BatchNorm with the statistics of the current batch and a cheap second derivative.

A second-order meta-gradient differentiates the backward pass of every layer. For BatchNorm, PyTorch composes this
derivative of more than a hundred operations, about forty of which read or write the whole batch. Written by hand, most
of it is another application of the backward pass; the rest is two products and a sum.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

__all__ = [
    "CheapBatchNorm2d", "SupportNorm", "add_gradient_of_statistics", "broadcast", "cheapen_second_derivative",
    "count_per_channel", "is_only_normalisation", "normalise_by_first", "run_as_channels", "sums_naively",
]  # fmt: skip

_ATEN = torch.ops.aten


def cheapen_second_derivative(layer: nn.Module) -> nn.Module:
    """Return a copy of a BatchNorm layer that computes the same with a cheap second derivative, and shares parameters.

    Args:
        layer: an `nn.BatchNorm1d`, `2d` or `3d` with weight and bias, without running statistics.
    """
    shell = copy.copy(layer)
    shell.__class__ = _CHEAP[type(layer)]
    return shell


def is_only_normalisation(layer: nn.Module) -> bool:
    """Return whether a BatchNorm layer computes what torch's own does; a subclass can do more, such as an activation."""
    return type(layer).forward in (nn.BatchNorm2d.forward, _CheapForward.forward)


class _CheapForward:
    """A forward pass for BatchNorm layers with a cheap second derivative."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dim() < 2 or count_per_channel(x) == 1:
            nn.BatchNorm2d.forward(self, x)  # raises an explanatory error, for all three classes
        outputs: Tensor = _Normalise.apply(x, self.weight, self.bias, self.eps)[0]
        return outputs


class _BatchNorm1d(_CheapForward, nn.BatchNorm1d):
    pass


class CheapBatchNorm2d(_CheapForward, nn.BatchNorm2d):
    """BatchNorm of images with a cheap second derivative."""


class _BatchNorm3d(_CheapForward, nn.BatchNorm3d):
    pass


_CHEAP: dict[type, type] = {
    nn.BatchNorm1d: _BatchNorm1d,
    nn.BatchNorm2d: CheapBatchNorm2d,
    nn.BatchNorm3d: _BatchNorm3d,
}


class SupportNorm(nn.Module):
    """BatchNorm with the statistics of the first `examples` rows, which are the support set."""

    def __init__(self, layer: Any, examples: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.examples = layer.weight, layer.bias, layer.eps, examples

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.weight, self.bias)

    def normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the outputs for these parameters."""
        normalised = normalise_by_first(self, (x,), self.examples)
        if weight is None or bias is None:
            return normalised
        return normalised * broadcast(weight, x) + broadcast(bias, x)


def normalise_by_first(layer: Any, inputs: tuple[Tensor], examples: int) -> Tensor:
    """Normalise a BatchNorm layer's inputs by the statistics of the first rows."""
    (x,) = inputs
    dims = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(x[:examples], dims, correction=0, keepdim=True)
    return (x - mean) * (variance + layer.eps).rsqrt()


class _Normalise(Function):
    """``(y, mean, rstd)`` with y = weight · x̂ + bias and x̂ = (x − mean) · rstd, of x ``[examples, channels, …]``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        if sums_naively(x):
            mean, variance = _sum_in_parts(x)
            y = _ATEN.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
            return y, mean, torch.rsqrt(variance + eps)
        outputs: tuple[Tensor, Tensor, Tensor] = _ATEN.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.eps = inputs
        ctx.save_for_backward(x, weight, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        of_y, of_mean, of_rstd = grads
        to_x = to_weight = to_bias = None
        if of_y is not None:
            to_x, to_weight, to_bias = _NormaliseBackward.apply(of_y, x, weight, mean, rstd, ctx.eps)
        if of_mean is not None and of_rstd is not None:  # used only in second derivatives, and always together
            to_x = add_gradient_of_statistics(to_x, x, mean, rstd, of_mean, of_rstd)
        return to_x, to_weight, to_bias, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return run_as_channels(_Normalise, info.batch_size, in_dims, inputs)


class _NormaliseBackward(Function):
    """The gradients of x, weight and bias from g, the gradient of y; mean and rstd are separate arguments.

    With sums over the n numbers of a channel: to_bias = Σ g, to_weight = Σ g x̂ and
    to_x = weight · rstd · (g − to_bias / n − x̂ · to_weight / n).
    """

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The CPU kernel for vectors and channels-last maps ignores the strides of these three.
        weight, mean, rstd = (values.contiguous() for values in (weight, mean, rstd))
        outputs: tuple[Tensor, Tensor, Tensor] = _ATEN.native_batch_norm_backward(
            _match_layout(x, g), x, weight, None, None, mean, rstd, True, eps, [True, True, True]
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of Σ u · to_x + s · to_weight + t · to_bias."""
        g, x, weight, mean, rstd, to_weight, to_bias = ctx.saved_tensors
        u, s, t = grads
        n = count_per_channel(x)
        # to_x is linear in g and symmetric, so its transpose is the same function of u.
        like_x, sum_ux, sum_u = _NormaliseBackward.apply(u, x, weight, mean, rstd, ctx.eps)
        of_g = torch.addcmul(like_x + broadcast(t - s * rstd * mean, x), broadcast(s * rstd, x), x)  # + s x̂ + t
        scale = weight * rstd
        sum_ug = (u * g).sum([0, *range(2, x.dim())])
        inner = sum_ug - (sum_u * to_bias + sum_ux * to_weight) / n
        # The gradient of x̂ is by_u · u + by_g · g.
        by_u, by_g = -scale * to_weight / n, s - scale * sum_ux / n
        of_x = torch.addcmul(g * broadcast(rstd * by_g, x), broadcast(rstd * by_u, x), u)
        of_mean = -rstd * (by_u * sum_u + by_g * to_bias)
        of_rstd = weight * inner + (by_u * sum_ux + by_g * to_weight) / rstd
        return of_g, of_x, rstd * inner, of_mean, of_rstd, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return run_as_channels(_NormaliseBackward, info.batch_size, in_dims, inputs)


def sums_naively(x: Tensor) -> bool:
    """Return whether PyTorch's kernel sums a channel sequentially in float32: for channels last on a CPU.

    For 75 images of 84×84 pixels, bright on dark, its outputs are then wrong by 6e-3.
    """
    return x.device.type == "cpu" and x.dim() == 4 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _sum_in_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean and variance of each channel of channels-last images, first by column, then over columns."""
    columns = x.movedim(1, -1).flatten(2).flatten(0, 1)
    mean, variance = (each.view(-1, x.shape[1]) for each in torch.batch_norm_update_stats(columns, None, None, 0.0))
    whole = mean.mean(0)
    return whole, variance.mean(0) + (mean - whole).square().mean(0)


def _match_layout(x: Tensor, g: Tensor) -> Tensor:
    """Return the gradient in the memory order of x; otherwise, tracing would predict a wrong order of the result."""
    layouts = {4: (torch.contiguous_format, torch.channels_last), 5: (torch.contiguous_format, torch.channels_last_3d)}
    for layout in layouts.get(x.dim(), (torch.contiguous_format,)):
        if x.is_contiguous(memory_format=layout):
            return g.contiguous(memory_format=layout)
    return g


def add_gradient_of_statistics(
    to_x: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, of_mean: Tensor, of_rstd: Tensor
) -> Tensor:
    """Add the gradient of x through its mean and rstd, whose own gradients are given, to another gradient of x."""
    n = count_per_channel(x)
    slope = of_rstd * rstd**3 / -n
    shift = broadcast(of_mean / n - slope * mean, x)
    return torch.addcmul(shift if to_x is None else to_x + shift, broadcast(slope, x), x)


def count_per_channel(x: Tensor) -> int:
    """Count the numbers of a channel."""
    return x.numel() // x.shape[1]


def broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Reshape one value per channel to broadcast with x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def run_as_channels(
    function: type[Function], tasks: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Run the function for many tasks at once, with the channels of each task as separate channels."""
    merged: list[Any] = []
    for value, dim in zip(inputs, in_dims, strict=True):
        if isinstance(value, Tensor):
            stacked = value.expand(tasks, *value.shape) if dim is None else value.movedim(dim, 0)
            merged.append(stacked.flatten() if stacked.dim() == 2 else stacked.movedim(0, 1).flatten(1, 2))
        else:
            merged.append(value)
    results = function.apply(*merged)
    dims = tuple(0 if each.dim() == 1 else 1 for each in results)
    return tuple(each.unflatten(dim, (tasks, -1)) for each, dim in zip(results, dims, strict=True)), dims
