"""How tensors lie in memory, and that a gradient lies as its parameter does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["channels_last_or_contiguous", "contiguous_copies", "like_parameters"]


def channels_last_or_contiguous(leaf: Tensor) -> Tensor:
    """A tensor in contiguous memory: ``[…, C, H, W]`` channels last where it is so already, else in its shape's order."""
    last = leaf.movedim(-3, -1) if leaf.dim() >= 4 else leaf
    return leaf if last.is_contiguous() else leaf.contiguous()


def contiguous_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies without a graph, each in the order of its own shape, whatever the originals' strides."""
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def like_parameters(grads: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients with the strides of their parameters.

    The gradient of a convolution's weight comes channels last where its images do. Fused kernels walk through parameter,
    gradient and moments side by side in memory and never look at strides: an entry of one would be moved by another's
    gradient.

    Args:
        grads: gradients by name; the ones that lie otherwise are copied.
        params: contiguous parameters of the same names, shapes, types and devices.
    """
    return {
        name: grads[name] if grads[name].stride() == value.stride() else torch.empty_like(value).copy_(grads[name])
        for name, value in params.items()
    }
