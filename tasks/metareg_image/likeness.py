"""Detection of letters that look alike, and selection of distinct ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from metareg_image.letters import centre

__all__ = ["SIMILAR", "find_alike", "find_similar", "picture_shapes", "select_distinct"]

SIMILAR = 0.38
"""Letters of different scripts look alike if their shapes (`picture_shapes`) differ by less than this: in DejaVu Sans,
T and τ, n and ռ, K and Ϗ, but neither c and e nor k and κ."""
_SIDE = 56
_REACH = 4
_BLOCK = 4
_ROWS = 256
_PAIRS = 512

Pairs = Iterator[tuple[int, int, float]]
"""The numbers of two letters, and their difference."""


def picture_shapes(letters: Iterable[Image.Image]) -> np.ndarray:
    """Draw letters for `find_similar`: float32 ``[letters, 1, side, side]``, slightly blurred."""
    images = np.stack([np.asarray(centre(letter, _SIDE), dtype=np.float32) for letter in letters])
    return gaussian_filter(images, (0, 1, 1))[:, None]


def find_similar(first: np.ndarray, second: np.ndarray, most: float = SIMILAR) -> Pairs:
    """Yield pairs of shapes (`picture_shapes`) that differ by less than `most` at the best of several small shifts."""
    return find_alike(first, second, most, _REACH)


def find_alike(first: np.ndarray, second: np.ndarray, most: float, reach: int = 0) -> Pairs:
    """Yield pairs of letters that differ by less than `most`, once for each shift at which they do.

    Two letters a and b differ by ‖a − b‖² / min(‖a‖², ‖b‖²), on average over the faces that both have.

    Args:
        first: ``[letters, faces, side, side]``, zero where a letter lacks a face; `side` is a multiple of 4.
        second: the letters to compare with, in the same faces.
        most: the exclusive bound.
        reach: the maximum shift of letters of `second`, in pixels to each side.
    """
    blocks, squares = _average_blocks(first), _square(second)
    for shift in itertools.product(range(-reach, reach + 1), repeat=2):
        moved = np.roll(second, shift, (2, 3)) if any(shift) else second
        moved_blocks = _average_blocks(moved)
        for start in range(0, len(first), _ROWS):
            rows = first[start : start + _ROWS]
            least = np.minimum(_square(rows)[:, None], squares)
            # Means over blocks are fewer than the pixels, and differ by no more.
            i, j = np.nonzero(_average(_measure(blocks[start : start + _ROWS], moved_blocks), least) < most)
            for part in range(0, len(i), _PAIRS):
                some = slice(part, part + _PAIRS)
                distances = _square(rows[i[some]].astype(np.float32) - moved[j[some]])
                values = _average(distances, least[i[some], j[some]])
                near = values < most
                yield from zip(
                    (start + i[some][near]).tolist(), j[some][near].tolist(), values[near].tolist(), strict=True
                )


def select_distinct(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Select the numbers below `count` that are not paired with a smaller selected number."""
    smaller: dict[int, set[int]] = {}
    for pair in pairs:
        smaller.setdefault(max(pair), set()).add(min(pair))
    selected: set[int] = set()
    for number in range(count):
        if selected.isdisjoint(smaller.get(number, ())):
            selected.add(number)
    return sorted(selected)


def _average_blocks(images: np.ndarray) -> np.ndarray:
    """``[letters, faces, side, side]`` → ``[letters, faces, blocks]``, scaled so that no distance grows."""
    letters, faces, side, _ = images.shape
    average = np.repeat(np.eye(side // _BLOCK, dtype=np.float32), _BLOCK, axis=0) / _BLOCK**0.5
    return np.stack([average.T @ each.astype(np.float32) @ average for each in images]).reshape(letters, faces, -1)


def _square(images: np.ndarray) -> np.ndarray:
    """Return the sums of squares ``[letters, faces]``."""
    flat = images.reshape(*images.shape[:2], -1)
    return np.einsum("lfn,lfn->lf", flat, flat, dtype=np.float32)


def _measure(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the squared distances ``[first, second, faces]`` of vectors ``[letters, faces, numbers]``."""
    products = np.moveaxis(first.swapaxes(0, 1) @ second.transpose(1, 2, 0), 0, -1)
    return (first**2).sum(-1)[:, None] + (second**2).sum(-1) - 2 * products


def _average(distances: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Average distances, relative to the smaller squares, over the faces (last) that both letters have."""
    shared = least > 0
    ratios = np.divide(distances, least, out=np.zeros_like(least), where=shared)
    count = shared.sum(-1)
    return np.where(count, ratios.sum(-1) / np.maximum(count, 1), np.inf)
