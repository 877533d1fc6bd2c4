"""Random changes of training images, a batch at a time, with torchvision's transforms.

Callers pass the random numbers, which depend only on the seed, the split and the task.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metareg_image.vision import import_torchvision

__all__ = ["crop", "flip"]


def flip(images: Tensor, uniform: np.ndarray) -> Tensor:
    """Mirror each image left to right with probability ½.

    Args:
        images: ``[tasks, ways, each, channels, height, width]``.
        uniform: one number in [0, 1) per image ``[tasks, ways × each]``.
    """
    mirrored = torch.from_numpy(uniform.reshape(images.shape[:3]) < 0.5)
    images[mirrored] = import_torchvision("flips").transforms.v2.functional.horizontal_flip(images[mirrored])
    return images


def crop(images: Tensor, padding: int, uniform: np.ndarray) -> Tensor:
    """Pad each image by `padding` pixels, mirrored at its edges, and crop it to its size at a random position.

    Args:
        images: ``[tasks, ways, each, channels, height, width]``.
        padding: pixels on every side, fewer than the image has.
        uniform: two numbers in [0, 1) per image ``[tasks, 2 × ways × each]``.
    """
    shape, (height, width) = images.shape, images.shape[-2:]
    functional = import_torchvision("crops").transforms.v2.functional
    padded = functional.pad(images.flatten(0, 2), [padding], padding_mode="reflect")
    top, left = torch.from_numpy((uniform * (2 * padding + 1)).astype(np.int64)).reshape(-1, 2).T
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    image = torch.arange(len(padded))[:, None, None, None]
    channel = torch.arange(shape[3])[None, :, None, None]
    return padded[image, channel, rows, columns].reshape(shape)
