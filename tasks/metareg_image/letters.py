"""Letters drawn from fonts: centred in an image, and examples with small random changes."""

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
"""Size at which letters are rendered, in pixels per em, before scaling to the image."""
_INK = 0.72
"""The larger side of a letter, as a fraction of the image's side."""
_LARGEST = 8 * _POINTS
"""Maximum of a letter's larger side in pixels, because a damaged font can ask for more than the memory."""
_OPEN_FONTS = 128
"""Maximum number of open fonts, each of which keeps its file open."""


@dataclass(frozen=True)
class Face:
    """A typeface of one weight and style: a font file, and its number if the file is a collection."""

    path: Path
    number: int = 0


@lru_cache(maxsize=_OPEN_FONTS)
def load_font(face: Face) -> ImageFont.FreeTypeFont:
    """Load a face at the rendering size.

    Raises:
        OSError: FreeType cannot read it.
    """
    return ImageFont.truetype(str(face.path), _POINTS, face.number, layout_engine=ImageFont.Layout.BASIC)


def has_ink(letter: str, face: Face) -> bool:
    """Return whether a face draws a letter, which it can list but leave empty; False if it is damaged or too large."""
    try:
        left, top, right, bottom = load_font(face).getbbox(letter)
        return max(right - left, bottom - top) <= _LARGEST and load_font(face).getmask(letter).getbbox() is not None
    # FreeType, and Pillow for impossible numbers in a font, raise many kinds of errors.
    except Exception:
        return False


def draw_letter(letter: str, face: Face) -> Image.Image:
    """Draw a letter that `has_ink`, bright on dark, cropped to its edges."""
    left, top, right, bottom = load_font(face).getbbox(letter)
    image = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=load_font(face))
    return image.crop(image.getbbox())


def centre(
    image: Image.Image, size: int, matrix: np.ndarray | None = None, shift: tuple[float, float] = (0, 0)
) -> Image.Image:
    """Centre a letter in an image ``size × size``, with `_INK` as its larger side, and apply an affine map.

    Args:
        image: the letter, cropped to its edges.
        size: the side of the result.
        matrix: 2×2, applied around the centre.
        shift: in pixels of the result.
    """
    scale = max(image.size) / (_INK * size)
    inverse = scale * np.linalg.inv(np.eye(2) if matrix is None else matrix)
    middle = np.array(image.size) / 2
    # Pillow maps pixels of the result to positions in the source.
    offset = middle - inverse @ (np.array([size, size]) / 2 + shift)
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    # Shrink first, so that the map does not skip pixels.
    shrink = max(1, int(scale))
    if shrink > 1:
        image = image.reduce(shrink)
        coefficients = tuple(value / shrink for value in coefficients)
    return image.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def draw_example(letter: str, faces: Sequence[Face], number: int, size: int) -> Image.Image:
    """Draw an example of a letter: its next face, slightly rotated, sheared, scaled and shifted."""
    turn, shear, scale, right, down = 2 * task_uniform(0, "glyphs", [ord(letter)], 5, str(number))[0] - 1
    angle = np.deg2rad(12 * turn)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = (1 + 0.15 * scale) * rotation @ np.array([[1, 0.2 * shear], [0, 1]])
    drawn = draw_letter(letter, faces[number % len(faces)])
    return centre(drawn, size, matrix, (0.06 * size * right, 0.06 * size * down))
