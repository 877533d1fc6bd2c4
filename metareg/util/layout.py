"""Memory layouts of tensors, and gradients with the layout of their parameters."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["copy_contiguous", "make_channels_last", "make_contiguous", "match_strides", "settle_layout"]


def make_contiguous(leaf: Tensor) -> Tensor:
    """Return a tensor in contiguous memory, with contiguous strides also for dimensions of size 1."""
    strides, _ = _compute_strides(leaf.shape)
    if leaf.stride() == strides:
        return leaf
    # PyTorch ignores the strides of dimensions of size 1 when it checks contiguity, but convolutions use them to decide
    # whether grey images are channels last.
    return leaf.as_strided(leaf.shape, strides) if leaf.is_contiguous() else leaf.contiguous()


def settle_layout(leaf: Tensor) -> Tensor:
    """Return a tensor in contiguous memory; keep ``[…, C, H, W]`` channels last if it already is."""
    strides, channels_last = _compute_strides(leaf.shape)
    if leaf.stride() in (strides, channels_last):
        return leaf
    if leaf.dim() >= 4 and leaf.stride(-3) == 1 and leaf.movedim(-3, -1).is_contiguous():
        return leaf.as_strided(leaf.shape, channels_last)
    return make_contiguous(leaf)


def make_channels_last(images: Tensor) -> Tensor:
    """Return images ``[…, examples, C, H, W]`` channels last in memory."""
    _, channels_last = _compute_strides(images.shape)
    if images.stride() == channels_last:
        return images
    return images.movedim(-3, -1).contiguous().movedim(-1, -3).as_strided(images.shape, channels_last)


@lru_cache(maxsize=1024)
def _compute_strides(shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the strides of a contiguous tensor, and of a channels-last one if the shape allows it."""
    strides = _accumulate(shape)
    if len(shape) < 4:
        return strides, strides
    *others, channels, height, width = shape
    *outer, of_height, of_width, of_channels = _accumulate((*others, height, width, channels))
    return strides, (*outer, of_channels, of_height, of_width)


def _accumulate(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    sizes = (max(size, 1) for size in reversed(shape[1:]))
    return tuple(accumulate(sizes, operator.mul, initial=1))[::-1] if len(shape) else ()


def copy_contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detached, contiguous copies, whatever the originals' strides."""
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def match_strides(grads: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients with the strides of their parameters, in separate memory.

    If images are channels last, so is the gradient of a convolution's weight. Fused kernels read parameter, gradient
    and moments in memory order and ignore strides, so they would apply gradients to the wrong entries.

    Args:
        grads: gradients by name. Gradients with other strides are copied. Parameters that a plugin returns as gradients
            are copied too, because the next step would change them.
        params: contiguous parameters with the same names, shapes, types and devices.
    """
    return {
        name: grad
        if (grad := grads[name]).stride() == value.stride() and grad.data_ptr() != value.data_ptr()
        else torch.empty_like(value).copy_(grad)
        for name, value in params.items()
    }
