"""Letters of many scripts, rendered from fonts that every installation has: few-shot images without a download."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from metareg import Dataset, UsageError, task_uniform
from metareg_image.base import Channels, ImageConfig, ImageTask
from metareg_image.store import ClassImages

__all__ = ["Glyphs"]

_SCRIPTS = {
    "train": ("LATIN", "CYRILLIC", "CANADIAN", "ARABIC", "LISU", "OLD", "COPTIC"),
    "validation": ("ARMENIAN", "LAO"),
    "test": ("GREEK", "GEORGIAN", "HEBREW"),
}
_FACES = [
    f"DejaVu{family}{style}"
    for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
]
_FEWEST_FACES = 4
_EXAMPLES = 20
_POINTS = 64
"""Size at which letters are rendered, in pixels per em, before they are scaled to the image."""
_INK = 0.72
"""The part of the image's side that the larger side of a letter takes."""
_ALIKE = 0.4
"""Two letters look the same where ‖a − b‖² is less than this part of the smaller of ‖a‖² and ‖b‖²."""


class GlyphsConfig(ImageConfig):
    """Options of the glyphs task: small images and few query images make training steps short."""

    size: int = Field(20, ge=8, description="Height and width of the images, in pixels.")
    query: int = Field(5, ge=1, description="Query images of each class in training.")
    channels: Channels = Field(1, description="1 for grey images, 3 for colour.")
    data: None = Field(None, description="Not used: the images are drawn.")


class Glyphs(ImageTask):
    """Letters of twelve scripts, drawn from the twelve DejaVu faces that come with matplotlib; nothing to download.

    A class is a letter, an example one of its faces with a small random affine change. Training takes Latin, Cyrillic,
    Canadian syllabics, Arabic, Lisu, Old Italic and Coptic, validation Armenian and Lao, the test Greek, Georgian and
    Hebrew: all test classes are of scripts that were not trained on. Left out are letters with marks that Unicode writes
    as a letter and the mark, those that fewer than four faces have, and those that look like an earlier one (A in Greek
    like A in Latin). 20×20 grey images, ink bright, 20 examples a class. Drawn at the first use, then kept.
    """

    Config = GlyphsConfig
    name = "glyphs"
    folder = "glyphs"
    obtain = "It is drawn from matplotlib's fonts at the first use."
    recommended: ClassVar[Mapping[str, Any]] = {
        **ImageTask.recommended,
        "steps": 4000,
        "outer_lr": 2e-3,
        "model.width": 16,
        "anil": {"inner_steps": 5},
    }

    def is_complete(self) -> bool:
        return True

    @property
    def dataset(self) -> Dataset | None:
        return Dataset(None, True, self.obtain, None, self.verify)

    def fingerprint(self) -> str:
        return matplotlib.__version__

    def classes(self) -> Iterable[ClassImages]:
        charmaps = {face: set(FT2Font(str(_find_font(face))).get_charmap()) for face in _FACES}
        letters = [
            (split, chr(code), faces)
            for split, scripts in _SCRIPTS.items()
            for script in scripts
            for code in sorted(set().union(*charmaps.values()))
            if _is_letter_of(chr(code), script)
            and len(faces := [face for face in _FACES if code in charmaps[face]]) >= _FEWEST_FACES
        ]
        for number in _find_distinct([_centre(_draw_letter(letter, faces[0])) for _, letter, faces in letters]):
            split, letter, faces = letters[number]
            images = [partial(_draw_example, letter, faces, example, self.config.size) for example in range(_EXAMPLES)]
            yield ClassImages(split, unicodedata.name(letter).capitalize(), images)


def _is_letter_of(letter: str, script: str) -> bool:
    return (
        unicodedata.category(letter) in ("Lu", "Ll", "Lo")
        and unicodedata.name(letter, "").split(" ")[0] == script
        and not unicodedata.decomposition(letter)
    )


def _find_font(face: str) -> Path:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    if not path.is_file():
        raise UsageError(
            f"matplotlib's font {path} is missing, from which the task 'glyphs' is drawn; reinstall matplotlib."
        )
    return path


@cache
def _load_font(face: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_find_font(face)), _POINTS, layout_engine=ImageFont.Layout.BASIC)


def _draw_letter(letter: str, face: str) -> Image.Image:
    """A letter, bright on dark, cut at its edges."""
    left, top, right, bottom = _load_font(face).getbbox(letter)
    image = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=_load_font(face))
    return image.crop(image.getbbox())


def _centre(
    image: Image.Image, size: int = 28, matrix: np.ndarray | None = None, shift: tuple[float, float] = (0, 0)
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
    centre = np.array(image.size) / 2
    # Pillow maps a pixel of the result to a place in the source.
    offset = centre - inverse @ (np.array([size, size]) / 2 + shift)
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    # Smaller first, so that the map does not skip pixels.
    shrink = max(1, int(scale))
    if shrink > 1:
        small = image.reduce(shrink)
        coefficients = tuple(value / shrink for value in coefficients)
        image = small
    return image.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def _draw_example(letter: str, faces: list[str], number: int, size: int) -> Image.Image:
    """An example of a letter: the next of its faces, turned, sheared, scaled and shifted a little."""
    turn, shear, scale, right, down = 2 * task_uniform(0, "glyphs", [ord(letter)], 5, str(number))[0] - 1
    angle = np.deg2rad(12 * turn)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = (1 + 0.15 * scale) * rotation @ np.array([[1, 0.2 * shear], [0, 1]])
    return _centre(
        _draw_letter(letter, faces[number % len(faces)]), size, matrix, (0.06 * size * right, 0.06 * size * down)
    )


def _find_distinct(images: list[Image.Image]) -> Iterator[int]:
    """The numbers of the images that do not look like one that was kept before."""
    flat = np.stack([np.asarray(image, dtype=np.float32).ravel() for image in images])
    squares = (flat**2).sum(1)
    distances = squares[:, None] + squares - 2 * flat @ flat.T
    alike = distances < _ALIKE * np.minimum(squares[:, None], squares)
    kept: list[int] = []
    for number in range(len(images)):
        if squares[number] and not alike[number, kept].any():
            kept.append(number)
            yield number
