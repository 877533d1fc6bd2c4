"""Letters of many scripts, drawn from fonts that every installation has: few-shot images without a download."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from metareg import Dataset, UsageError
from metareg_image.base import Channels, ImageConfig, ImageTask
from metareg_image.letters import Face, centre, draw_example, draw_letter
from metareg_image.likeness import find_alike, find_similar, picture_shapes, select_distinct
from metareg_image.store import SPLITS, ClassImages

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
_ALIKE = 0.4
"""Letters of one split, drawn in `_SIDE` pixels, look the same if they differ by less than this."""
_SIDE = 28


class GlyphsConfig(ImageConfig):
    """Options of the glyphs task: small images and few query images make training steps short."""

    size: int = Field(20, ge=8, description="Height and width of the images, in pixels.")
    query: int = Field(5, ge=1, description="Query images of each class in training.")
    channels: Channels = Field(1, description="1 for grey images, 3 for colour.")
    data: None = Field(None, description="Not used: the images are drawn.")


class Glyphs(ImageTask):
    """Letters of twelve scripts, drawn from the twelve DejaVu faces that come with matplotlib; nothing to download.

    A class is a letter, and an example is one of its faces with a small random affine transformation. Training uses
    Latin, Cyrillic, Canadian syllabics, Arabic, Lisu, Old Italic and Coptic; validation Armenian and Lao; the test
    Greek, Georgian and Hebrew. All test classes are from scripts not used in training. Excluded are letters with marks
    that Unicode decomposes into a letter and the mark, letters in fewer than four faces, and letters that look like
    another: within a split, the first is kept; between splits, the test's before the validation's before the training's
    (A in Greek, not in Latin; τ, not T). 20×20 grey images, ink bright, 20 examples per class. Drawn at first use and
    cached.
    """

    Config = GlyphsConfig
    name = "glyphs"
    folder = "glyphs"
    version = 2
    obtain = "It is drawn from matplotlib's fonts at first use."
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
        import matplotlib  # other image tasks do not need it

        return matplotlib.__version__

    def classes(self) -> Iterable[ClassImages]:
        from matplotlib.ft2font import FT2Font

        faces = {name: Face(_find_font(name)) for name in _FACES}
        charmaps = {name: set(FT2Font(str(face.path)).get_charmap()) for name, face in faces.items()}
        letters = [
            (split, chr(code), having)
            # Test classes first, because only the first of similar letters is kept.
            for split in reversed(SPLITS)
            for script in _SCRIPTS[split]
            for code in sorted(set().union(*charmaps.values()))
            if _is_letter_of(chr(code), script)
            and len(having := [faces[name] for name in _FACES if code in charmaps[name]]) >= _FEWEST_FACES
        ]
        for number in _select(letters):
            split, letter, having = letters[number]
            images = [partial(draw_example, letter, having, example, self.config.size) for example in range(_EXAMPLES)]
            yield ClassImages(split, unicodedata.name(letter).capitalize(), images)


def _select(letters: Sequence[tuple[str, str, Sequence[Face]]]) -> list[int]:
    """Select the letters (split, letter, faces) that do not look like an earlier one, in any split."""
    drawn = [draw_letter(letter, faces[0]) for _, letter, faces in letters]
    small = np.stack([np.asarray(centre(each, _SIDE)) for each in drawn])[:, None]
    shapes = picture_shapes(drawn)
    splits = [np.flatnonzero([split == each for split, _, _ in letters]) for each in SPLITS]
    pairs = [
        (rows[i], rows[j]) for rows in splits for i, j, _ in find_alike(small[rows], small[rows], _ALIKE) if i != j
    ]
    for one, other in itertools.combinations(splits, 2):
        pairs += [(one[i], other[j]) for i, j, _ in find_similar(shapes[one], shapes[other])]
    return select_distinct(len(letters), pairs)


def _is_letter_of(letter: str, script: str) -> bool:
    return (
        unicodedata.category(letter) in ("Lu", "Ll", "Lo")
        and unicodedata.name(letter, "").split(" ")[0] == script
        and not unicodedata.decomposition(letter)
    )


def _find_font(face: str) -> Path:
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    if not path.is_file():
        raise UsageError(f"matplotlib's font {path}, which the task 'glyphs' needs, is missing; reinstall matplotlib.")
    return path
