"""Letters drawn from fonts: one in the middle of an image, and examples of it, each changed a little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from metareg import task_uniform

__all__ = ["Face", "centre", "draw_example", "draw_letter", "has_ink", "load_font"]

_POINTS = 64
"""Size at which letters are rendered, in pixels per em, before they are scaled to the image."""
_INK = 0.72
"""The part of the image's side that the larger side of a letter takes."""
_LARGEST = 8 * _POINTS
"""Pixels of the larger side of a letter at most; a damaged font may ask for more than the memory holds."""
_OPEN_FONTS = 128
"""So many fonts stay open; an open font keeps its file open."""


@dataclass(frozen=True)
class Face:
    """A typeface of one weight and style: a font file, and its number where that is a collection of several."""

    path: Path
    number: int = 0


@lru_cache(maxsize=_OPEN_FONTS)
def load_font(face: Face) -> ImageFont.FreeTypeFont:
    """A face at the size at which letters are rendered.

    Raises:
        OSError: FreeType cannot read it.
    """
    return ImageFont.truetype(str(face.path), _POINTS, face.number, layout_engine=ImageFont.Layout.BASIC)


def has_ink(letter: str, face: Face) -> bool:
    """Whether a face draws a letter, which it may list and leave empty; False where it is damaged or beyond all size."""
    try:
        left, top, right, bottom = load_font(face).getbbox(letter)
        return max(right - left, bottom - top) <= _LARGEST and load_font(face).getmask(letter).getbbox() is not None
    # FreeType's errors, and Pillow's for numbers that no font should have, are of many kinds.
    except Exception:
        return False


def draw_letter(letter: str, face: Face) -> Image.Image:
    """A letter that `has_ink`, bright on dark, cut at its edges."""
    left, top, right, bottom = load_font(face).getbbox(letter)
    image = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=load_font(face))
    return image.crop(image.getbbox())


def centre(
    image: Image.Image, size: int, matrix: np.ndarray | None = None, shift: tuple[float, float] = (0, 0)
) -> Image.Image:
    """A letter in the middle of an image of ``size × size``, its larger side taking `_INK` of it, changed by an affine map.

    Args:
        image: the letter, cut at its edges.
        size: of the result.
        matrix: 2×2, applied around the centre.
        shift: in pixels of the result.
    """
    scale = max(image.size) / (_INK * size)
    inverse = scale * np.linalg.inv(np.eye(2) if matrix is None else matrix)
    middle = np.array(image.size) / 2
    # Pillow maps a pixel of the result to a place in the source.
    offset = middle - inverse @ (np.array([size, size]) / 2 + shift)
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    # Smaller first, so that the map does not skip pixels.
    shrink = max(1, int(scale))
    if shrink > 1:
        image = image.reduce(shrink)
        coefficients = tuple(value / shrink for value in coefficients)
    return image.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def draw_example(letter: str, faces: Sequence[Face], number: int, size: int) -> Image.Image:
    """An example of a letter: the next of its faces, turned, sheared, scaled and shifted a little."""
    turn, shear, scale, right, down = 2 * task_uniform(0, "glyphs", [ord(letter)], 5, str(number))[0] - 1
    angle = np.deg2rad(12 * turn)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = (1 + 0.15 * scale) * rotation @ np.array([[1, 0.2 * shear], [0, 1]])
    drawn = draw_letter(letter, faces[number % len(faces)])
    return centre(drawn, size, matrix, (0.06 * size * right, 0.06 * size * down))
