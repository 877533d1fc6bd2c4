"""How tensors lie in memory, and that a gradient lies as its parameter does."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["copy_contiguous", "make_contiguous", "match_strides", "settle_layout"]


def make_contiguous(leaf: Tensor) -> Tensor:
    """A tensor in contiguous memory in its shape's order, dimensions of size 1 included."""
    strides, _ = _compute_strides(leaf.shape)
    if leaf.stride() == strides:
        return leaf
    # PyTorch calls a tensor contiguous whatever the strides of its dimensions of size 1, and leaves it as it is. By these
    # convolutions tell whether grey images lie channels last.
    return leaf.as_strided(leaf.shape, strides) if leaf.is_contiguous() else leaf.contiguous()


def settle_layout(leaf: Tensor) -> Tensor:
    """A tensor in contiguous memory: ``[…, C, H, W]`` channels last where it is so already, else in its shape's order."""
    strides, channels_last = _compute_strides(leaf.shape)
    if leaf.stride() in (strides, channels_last):
        return leaf
    if leaf.dim() >= 4 and leaf.stride(-3) == 1 and leaf.movedim(-3, -1).is_contiguous():
        return leaf.as_strided(leaf.shape, channels_last)
    return make_contiguous(leaf)


@lru_cache(maxsize=1024)
def _compute_strides(shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The strides of a contiguous tensor, and of one that lies channels last where it can."""
    strides = torch.empty(shape, device="meta").stride()
    if len(shape) < 4:
        return strides, strides
    *others, channels, height, width = shape
    return strides, torch.empty(*others, height, width, channels, device="meta").movedim(-1, -3).stride()


def copy_contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies without a graph, each in the order of its own shape, whatever the originals' strides."""
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def match_strides(grads: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients with the strides of their parameters, in memory of their own.

    The gradient of a convolution's weight comes channels last where its images do. Fused kernels walk through parameter,
    gradient and moments side by side in memory and never look at strides: an entry of one would be moved by another's
    gradient.

    Args:
        grads: gradients by name; the ones that lie otherwise are copied, and so are parameters themselves, which a plugin
            may give for gradients: the next step would change what the last one returned.
        params: contiguous parameters of the same names, shapes, types and devices.
    """
    return {
        name: grad
        if (grad := grads[name]).stride() == value.stride() and grad.data_ptr() != value.data_ptr()
        else torch.empty_like(value).copy_(grad)
        for name, value in params.items()
    }
