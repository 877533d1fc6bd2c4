"""BatchNorm with the activation and pooling that follow it, as one operation, for channels-last images on a CPU.

Normalisation, activation and pooling do little arithmetic; they take the time of reading and writing whole maps. One
operation reads the convolution's output and writes the pooled map. Its derivatives find the maxima again instead of
keeping other maps and indices.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from metareg.engine.normalisation import (
    CheapBatchNorm2d,
    SupportNorm,
    add_gradient_of_statistics,
    broadcast,
    count_per_channel,
    run_as_channels,
    sums_naively,
)
from metareg.util.native import load_library
from metareg.util.torch_internals import copy_shell, has_hooks, list_places

__all__ = ["Block", "fuse_blocks"]

_SOURCE = Path(__file__).with_suffix(".cpp")
_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
"""Those of images; the numbers per channel of images in bfloat16 are in float32."""
_LAYER, _WINDOW = "Tensor weight, Tensor bias, Tensor mean, Tensor rstd", "int window, float slope"
_AFFINE = "Tensor factor, Tensor constant, Tensor slant"


def fuse_blocks(module: nn.Module) -> nn.Module:
    """Return a copy in which BatchNorm also computes the layers after it; the copy shares parameters.

    This applies to layers that an `nn.Sequential` runs one after the other: BatchNorm of images with a cheap second
    derivative; then `nn.MaxPool2d(2)`, `nn.ReLU` or `nn.LeakyReLU`, or a pooling and an activation in any order. Layers
    with hooks and users' subclasses stay as they are.
    """
    layers = _list_layers(module)
    replaced: dict[str, nn.Module] = {}
    for number, (place, layer) in enumerate(layers):
        if type(layer) is not CheapBatchNorm2d or has_hooks(layer):
            continue
        after = layers[number + 1 : number + 3]
        after = after[: _count_included([each for _, each in after])]
        if after:
            replaced[place] = Block.create(layer, [each for _, each in after])
            replaced |= {other: nn.Identity() for other, _ in after}
    return _replace_places(module, replaced)


class Block(CheapBatchNorm2d):
    """A BatchNorm layer, under the names of its parameters, and the layers after it."""

    followers: Sequence[nn.Module]
    window: int
    slope: float

    @classmethod
    def create(cls, norm: CheapBatchNorm2d, followers: Sequence[Any]) -> Block:
        """Create a block that shares the parameters of its layers."""
        block: Any = copy.copy(norm)
        block.__class__ = cls
        block.followers = tuple(followers)
        block.window = 2 if any(isinstance(each, nn.MaxPool2d) for each in followers) else 1
        activation = next((each for each in followers if not isinstance(each, nn.MaxPool2d)), None)
        block.slope = 1.0 if activation is None else float(getattr(activation, "negative_slope", 0.0))
        return block

    def forward(self, x: Tensor) -> Tensor:
        if _suits(x, self.weight, self.window):
            outputs: Tensor = _Normalise.apply(x, self.weight, self.bias, self.eps, self.window, self.slope)[0]
            return outputs
        return _apply(self.followers, super().forward(x))

    def use_support_statistics(self, examples: int) -> nn.Module:
        """Return a copy that uses the statistics of the first `examples` images."""
        return _SupportBlock(self, examples)


class _SupportBlock(SupportNorm):
    """A block that normalises with the statistics of the first `examples` images."""

    def __init__(self, block: Block, examples: int) -> None:
        super().__init__(block, examples)
        self.followers, self.window, self.slope = block.followers, block.window, block.slope

    def forward(self, x: Tensor) -> Tensor:
        if _suits(x, self.weight, self.window) and 0 < self.examples <= len(x):
            (outputs,) = _NormaliseBySupport.apply(x, self.weight, self.bias, self)
            return outputs
        return self.run_layers(x, self.weight, self.bias)

    def run_layers(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the outputs of the layers one by one, for these parameters."""
        return _apply(self.followers, self.normalise(x, weight, bias))


def _suits(x: Tensor, weight: Tensor, window: int) -> bool:
    """Return whether the operation computes this; all other cases, and errors, are left to the layers."""
    if not sums_naively(x) or x.dtype not in _TYPES or x.dtype != weight.dtype:
        return False
    sizes = x.shape
    if not all(type(size) is int for size in sizes):  # a program for any number of examples must run without metareg
        return False
    images, channels, height, width = sizes
    return (
        channels == len(weight)
        and min(height, width) >= window
        and images * height * width > 1
        and load_library(_SOURCE) is not None
    )


def _apply(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _list_layers(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module | None]]:
    """List layers by dotted name in the order in which they run; a None separates those whose order is unknown."""
    in_order = type(module).forward is nn.Sequential.forward and not has_hooks(module)
    found: list[tuple[str, nn.Module | None]] = [] if in_order else [("", None)]
    for name, child in list_places(module).items():
        if child is not None:
            own = f"{prefix}{name}"
            found += _list_layers(child, f"{own}.") if list_places(child) else [(own, child)]
        if not in_order:
            found.append(("", None))
    return found


def _count_included(layers: Sequence[nn.Module | None]) -> int:
    """Count the layers that a block can include: one activation, one pooling, or both."""
    kinds = [_find_kind(layer) for layer in layers]
    if not kinds or kinds[0] is None:
        return 0
    return 2 if set(kinds) == {"activation", "pooling"} else 1


def _find_kind(layer: Any) -> str | None:
    if layer is None or has_hooks(layer):
        return None
    if type(layer) is nn.ReLU or (type(layer) is nn.LeakyReLU and 0 <= layer.negative_slope <= 1):
        return "activation"
    if type(layer) is not nn.MaxPool2d or layer.ceil_mode or layer.return_indices:
        return None
    options = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    pairs = [each if isinstance(each, tuple) else (each, each) for each in options]
    return "pooling" if pairs == [(2, 2), (2, 2), (0, 0), (1, 1)] else None


def _replace_places(module: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy with the submodules of some dotted names replaced; the copy shares parameters."""
    children: dict[str, dict[str, nn.Module]] = {}
    for place, new in replaced.items():
        name, _, rest = place.partition(".")
        children.setdefault(name, {})[rest] = new
    places = list_places(module)
    return copy_shell(
        module,
        {
            name: inner[""] if "" in inner else _replace_places(places[name] or nn.Identity(), inner)
            for name, inner in children.items()
        },
    )


class _Normalise(Function):
    """``(y, mean, rstd)`` of x ``[images, channels, height, width]``, where y are the block's outputs."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, eps: float, window: int, slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor] = _OPS.block(x, weight, bias, eps, len(x), window, slope)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, ctx.window, ctx.slope = inputs
        ctx.save_for_backward(x, weight, bias, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        of_y, of_mean, of_rstd = grads
        to_x = to_weight = to_bias = None
        if of_y is not None:
            to_x, to_weight, to_bias = _NormaliseBackward.apply(
                of_y, x, weight, bias, mean, rstd, ctx.window, ctx.slope
            )
        if of_mean is not None and of_rstd is not None:  # used only in second derivatives, and always together
            to_x = add_gradient_of_statistics(to_x, x, mean, rstd, of_mean, of_rstd)
        return to_x, to_weight, to_bias, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return run_as_channels(_Normalise, info.batch_size, in_dims, inputs)


class _NormaliseBySupport(Function):
    """The outputs of a `_SupportBlock`; evaluation does not differentiate them, so the layers' derivative will do."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, block: _SupportBlock) -> tuple[Tensor]:
        y, *_ = _OPS.block(x, weight, bias, block.eps, block.examples, block.window, block.slope)
        return (y,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        *tensors, ctx.block = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, pull, *_ = torch.func.vjp(ctx.block.run_layers, *ctx.saved_tensors)
        return *pull(grads[0]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return run_as_channels(_NormaliseBySupport, info.batch_size, in_dims, inputs)


class _NormaliseBackward(Function):
    """The gradients of x, weight and bias from g, the gradient of y.

    With G = g at the maxima of the windows, times the activation's slope, and 0 elsewhere, these are the gradients of
    `metareg.engine.normalisation` for G.
    """

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, window: int, slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor] = _OPS.block_backward(g, x, weight, bias, mean, rstd, window, slope)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.window, ctx.slope = inputs
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of Σ u · to_x + s · to_weight + t · to_bias."""
        g, x, weight, bias, mean, rstd, to_weight, to_bias = ctx.saved_tensors
        u, s, t = grads
        n = count_per_channel(x)
        layer, block = (weight, bias, mean, rstd), (ctx.window, ctx.slope)
        sum_ux, sum_u = _Sums.apply(u, x, *layer, 1, 1.0)
        scale = weight * rstd
        # to_x is linear in G and symmetric, so its transpose is the same function of u, taken at the maxima; + s x̂ + t.
        slant = rstd * (s - scale * sum_ux / n)
        constant = t - scale * sum_u / n - slant * mean
        (of_g,) = _Gather.apply(u, x, *layer, scale, constant, slant, *block)
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        (picked,) = _Gather.apply(u, x, *layer, one, zero, zero, *block)
        inner = (picked * g).sum([0, 2, 3]) - (sum_u * to_bias + sum_ux * to_weight) / n
        # The gradient of x̂ is by_u · u + by_g · G.
        by_u, by_g = -scale * to_weight / n, s - scale * sum_ux / n
        (of_x,) = _Scatter.apply(g, x, u, *layer, rstd * by_g, zero, rstd * by_u, *block)
        of_mean = -rstd * (by_u * sum_u + by_g * to_bias)
        of_rstd = weight * inner + (by_u * sum_ux + by_g * to_weight) / rstd
        return of_g, of_x, rstd * inner, None, of_mean, of_rstd, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return run_as_channels(_NormaliseBackward, info.batch_size, in_dims, inputs)


class _Sums(Function):
    """``(Σ G x̂, Σ G)`` of each channel."""

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, window: int, slope: float
    ) -> tuple[Tensor, Tensor]:
        sums: tuple[Tensor, Tensor] = _OPS.block_sums(g, x, weight, bias, mean, rstd, window, slope)
        return sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.window, ctx.slope = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, bias, mean, rstd, sum_gx, sum_g = ctx.saved_tensors
        s, t = grads
        layer, block, zero = (weight, bias, mean, rstd), (ctx.window, ctx.slope), torch.zeros_like(s)
        slant = s * rstd
        (of_g,) = _Gather.apply(x, x, *layer, zero, t - slant * mean, slant, *block)
        (of_x,) = _Scatter.apply(g, x, x, *layer, slant, zero, zero, *block)
        return of_g, of_x, None, None, -slant * sum_g, s * sum_gx / rstd, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return run_as_channels(_Sums, info.batch_size, in_dims, inputs)


class _Gather(Function):
    """factor · v + constant + slant · x at the maxima of the windows, times the activation's slope there."""

    @staticmethod
    def forward(v: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor]:
        return (_OPS.block_gather(v, x, *arguments),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        *tensors, ctx.window, ctx.slope = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, x, *layer, factor, _, slant = ctx.saved_tensors
        (h,) = grads
        block, zero, one = (ctx.window, ctx.slope), torch.zeros_like(factor), torch.ones_like(factor)
        (of_v,) = _Scatter.apply(h, x, x, *layer, factor, zero, zero, *block)
        (of_x,) = _Scatter.apply(h, x, x, *layer, slant, zero, zero, *block)
        of_factor, of_slant = (
            (h * _Gather.apply(each, x, *layer, one, zero, zero, *block)[0]).sum([0, 2, 3]) for each in (v, x)
        )
        of_constant = _Sums.apply(h, x, *layer, *block)[1]
        return of_v, of_x, None, None, None, None, of_factor, of_constant, of_slant, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return run_as_channels(_Gather, info.batch_size, in_dims, inputs)


class _Scatter(Function):
    """factor · G + constant + slant · v."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor]:
        return (_OPS.block_scatter(g, x, v, *arguments),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        *tensors, ctx.window, ctx.slope = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, x, v, *layer, factor, _, slant = ctx.saved_tensors
        (h,) = grads
        block, zero, one = (ctx.window, ctx.slope), torch.zeros_like(factor), torch.ones_like(factor)
        (picked,) = _Gather.apply(h, x, *layer, one, zero, zero, *block)
        of_factor, of_constant, of_slant = (picked * g).sum([0, 2, 3]), h.sum([0, 2, 3]), (h * v).sum([0, 2, 3])
        of_g, of_v = broadcast(factor, x) * picked, broadcast(slant, x) * h
        return of_g, None, of_v, None, None, None, None, of_factor, of_constant, of_slant, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return run_as_channels(_Scatter, info.batch_size, in_dims, inputs)


# The operations below are opaque to tracing. Their kernels are in blocks.cpp.


def _compute_block(x: Tensor, weight: Tensor, bias: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    eps, examples, window, slope = options
    outputs = _allocate_block(x, weight, bias, *options)
    _run("forward", x, window, (eps, slope), _lay(x), weight, bias, *outputs, examples=examples)
    return outputs


def _allocate_block(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _create_maps(x, arguments[-2]), *_create_numbers(x, weight)


def _compute_backward(g: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *layer, window, slope = arguments
    outputs = _allocate_backward(g, x, *arguments)
    _run("backward", x, window, (slope,), _lay(g), _lay(x), *layer, *outputs)
    return outputs


def _allocate_backward(g: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return _create_maps(x, 1), *_create_numbers(x, weight)


def _compute_sums(g: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *layer, window, slope = arguments
    sums = _allocate_sums(g, x, *arguments)
    _run("sums", x, window, (slope,), _lay(g), _lay(x), *layer, *sums)
    return sums


def _allocate_sums(g: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _create_numbers(x, weight)


def _compute_gather(v: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    *vectors, window, slope = arguments
    out = _allocate_gather(v, x, *arguments)
    _run("gather", x, window, (slope,), _lay(v), _lay(x), *vectors, out)
    return out


def _allocate_gather(v: Tensor, x: Tensor, *arguments: Any) -> Tensor:  # noqa: ARG001
    return _create_maps(x, arguments[-2])


def _compute_scatter(g: Tensor, x: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    *vectors, window, slope = arguments
    out = _allocate_scatter(g, x, v, *arguments)
    _run("scatter", x, window, (slope,), _lay(g), _lay(x), _lay(v), *vectors, out)
    return out


def _allocate_scatter(g: Tensor, x: Tensor, v: Tensor, *arguments: Any) -> Tensor:  # noqa: ARG001
    return _create_maps(x, 1)


def _lay(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _create_maps(x: Tensor, window: int) -> Tensor:
    """Create uninitialised channels-last maps with one number for each window."""
    images, channels, height, width = x.shape
    return x.new_empty(images, height // window, width // window, channels).movedim(-1, 1)


def _create_numbers(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Create two uninitialised numbers for each channel."""
    dtype = _find_arithmetic(x)
    return torch.empty_like(weight, dtype=dtype), torch.empty_like(weight, dtype=dtype)


def _find_arithmetic(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.bfloat16 else x.dtype


def _run(
    kernel: str, x: Tensor, window: int, numbers: Sequence[float], *tensors: Tensor, examples: int | None = None
) -> None:
    """Run a kernel on tensors whose memory has the order that it expects."""
    library = load_library(_SOURCE)
    images, channels, height, width = x.shape
    threads, counted = torch.get_num_threads(), images if examples is None else examples
    shape = (ctypes.c_int64 * 7)(images, height, width, channels, window, threads, counted)
    kept = [value.to(_find_arithmetic(x)).contiguous() if value.dim() == 1 else value for value in tensors]
    pointers = [ctypes.c_void_p(value.data_ptr()) for value in kept]
    getattr(library, f"metareg_{kernel}_{_TYPES[x.dtype]}")(shape, *map(ctypes.c_double, numbers), *pointers)


_TWO, _THREE = "(Tensor, Tensor)", "(Tensor, Tensor, Tensor)"
_LIBRARY = torch.library.Library("metareg", "DEF")
for _name, _arguments, _result, _compute, _allocate in (
    ("block", "Tensor x, Tensor weight, Tensor bias, float eps, int examples", _THREE, _compute_block, _allocate_block),
    ("block_backward", f"Tensor g, Tensor x, {_LAYER}", _THREE, _compute_backward, _allocate_backward),
    ("block_sums", f"Tensor g, Tensor x, {_LAYER}", _TWO, _compute_sums, _allocate_sums),
    ("block_gather", f"Tensor v, Tensor x, {_LAYER}, {_AFFINE}", "Tensor", _compute_gather, _allocate_gather),
    ("block_scatter", f"Tensor g, Tensor x, Tensor v, {_LAYER}, {_AFFINE}", "Tensor", _compute_scatter, _allocate_scatter),
):  # fmt: skip
    _LIBRARY.define(f"{_name}({_arguments}, {_WINDOW}) -> {_result}")
    _LIBRARY.impl(_name, _compute, "CPU")
    torch.library.register_fake(f"metareg::{_name}", _allocate, lib=_LIBRARY)
_OPS = torch.ops.metareg
