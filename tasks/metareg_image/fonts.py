"""Letters from users' fonts: any script, thousands of classes, no images to download."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from PIL import Image, features
from pydantic import Field, model_validator

from metareg import PathText, UsageError, draw_distinct, format_count, read_split_file, task_uniform
from metareg_image.base import Channels, ImageConfig, ImageTask
from metareg_image.characters import find_script, name_character, parse_characters, read_groups
from metareg_image.font_files import find_fonts, list_some, read_faces
from metareg_image.letters import Face, centre, draw_example, draw_letter, has_ink
from metareg_image.likeness import find_alike, find_similar, picture_shapes, select_distinct
from metareg_image.store import SPLITS, ClassImages

__all__ = ["FontFolder"]

log = logging.getLogger("metareg")

_MOST_FACES = 1000
_SAME = 0.2
"""Letters of one script, or of one split, look the same if they differ by less than this."""
_SIDE = 56
_COMPARED = 5
"""Number of faces, from light to bold, in which letters of one script are compared."""
_SAMPLE = 32
"""Number of letters on which a face's weight is measured."""

_Item = TypeVar("_Item")


class FontFolderConfig(ImageConfig):
    """Options of the font-folder task."""

    size: int = Field(28, ge=8, description="Height and width of the images, in pixels.")
    channels: Channels = Field(1, description="1 for grey images, 3 for colour.")
    query: int = Field(5, ge=1, description="Query images of each class in training.")
    characters: str | None = Field(
        None,
        description="Scripts and ranges of codes, such as 'HIRAGANA, U+4E00-9FFF'; by default, all letters of the fonts.",
    )
    faces: int = Field(4, ge=1, description="The minimum number of faces that must contain a character.")
    examples: int = Field(20, ge=2, description="Images of each class, from its faces in turn.")
    split_by: Literal["character", "script", "group"] = Field(
        "character", description="The unit of the split: single characters, whole scripts, or the groups in `groups`."
    )
    groups: PathText | None = Field(
        None,
        description="Table with lines character,group, or Unihan's text with lines kRSUnicode (radicals).",
    )
    split_file: PathText | None = Field(
        None,
        description="JSON or YAML {train: [name, …], validation: […], test: […]}, or CSV with lines name,split; names "
        "are characters, scripts or groups, as split_by says. By default, at random by the ratios.",
    )
    ratios: list[float] = Field(
        [0.6, 0.2, 0.2], min_length=3, max_length=3, description="Parts of the classes for train, validation, test."
    )
    split_seed: int = Field(0, ge=0, description="Seed of the split by ratios.")

    @model_validator(mode="after")
    def _check_split(self) -> FontFolderConfig:
        if min(self.ratios) < 0 or sum(self.ratios) <= 0:
            raise ValueError(f"ratios must not be negative, and not all zero, got {self.ratios}")
        if (self.split_by == "group") != (self.groups is not None):
            raise ValueError("split_by = 'group' and the file 'groups' require each other")
        return self


class FontFolder(ImageTask):
    """Characters drawn from the fonts in your folder: a class is a character, an example one of its faces.

    It reads .ttf, .otf, .ttc, .otc and .woff files, and .woff2 if Pillow supports it, in the folder and its subfolders.
    Each image has a small random affine transformation that is always the same. Characters, whole scripts, or groups
    such as radicals are split into train, validation and test by a file or at random by ratios. Of characters that look
    alike, only one is kept: the test's before the validation's before the training's. Images are drawn at first use and
    cached.
    """

    Config = FontFolderConfig
    config: FontFolderConfig
    name = "font-folder"
    folder = "font-folder"
    obtain = "Put font files into it."
    too_few_classes = (
        "ask for fewer ways, or choose more characters, fewer faces, or another split (ratios, split_file)"
    )
    recommended: ClassVar[Mapping[str, Any]] = {
        **ImageTask.recommended,
        "steps": 10_000,
        "outer_lr": 2e-3,
        "model.width": 16,
        "anil": {"inner_steps": 5},
    }

    def fingerprint(self) -> str:
        config = self.config
        chosen = config.model_dump(include={"characters", "faces", "examples", "split_by", "ratios", "split_seed"})
        digest = hashlib.blake2b(json.dumps([chosen, features.version("freetype2")]).encode(), digest_size=16)
        if self.location.is_dir():
            for path in self._files:
                state = path.stat()
                line = f"{path.relative_to(self.location)} {state.st_size} {state.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
        for name in (config.groups, config.split_file):
            digest.update(b"" if name is None else _read_quietly(Path(name)))
        return digest.hexdigest()

    def classes(self) -> Iterable[ClassImages]:
        faces_of = self._find_characters()
        split_of = self._split(faces_of)
        letters = sorted(split_of, key=lambda letter: (-SPLITS.index(split_of[letter]), ord(letter)))
        kept = [letters[number] for number in self._select(letters, split_of, faces_of)]
        for letter in sorted(kept):
            faces = _spread(faces_of[letter], self.config.examples)
            images = [partial(draw_example, letter, faces, n, self.config.size) for n in range(self.config.examples)]
            yield ClassImages(split_of[letter], name_character(letter), images)

    # ------------------------------------------------------------------------------------------------------------ fonts

    @cached_property
    def _files(self) -> list[Path]:
        """The font files, sorted; logs once what was ignored."""
        files, left_out = find_fonts(self.location)
        said = [f"{reason}: {list_some(names)}" for reason, names in left_out.items()]
        if said:
            log.warning("Ignored in %s: %s.", self.location, "; ".join(said))
        if not files:
            raise UsageError(f"There are no fonts in {self.location}; put .ttf, .otf, .ttc or .woff files there.")
        return files

    def _find_characters(self) -> dict[str, list[Face]]:
        """Find the characters in enough faces, and these faces."""
        is_meant = parse_characters(self.config.characters)
        known, damaged = read_faces(self._files)
        if damaged:
            log.warning("Ignored in %s because they cannot be read: %s.", self.location, list_some(damaged))
        if not known:
            raise UsageError(f"None of the fonts in {self.location} can be read.")
        if len(known) > _MOST_FACES:
            raise UsageError(
                f"{self.location} contains {format_count(len(known), 'face')}; the maximum is {_MOST_FACES}."
            )
        meant = {letter for letter in map(chr, frozenset().union(*known.values())) if is_meant(letter)}
        drawn: dict[str, list[Face]] = {letter: [] for letter in sorted(meant)}
        for face, codes in known.items():
            for letter in meant.intersection(map(chr, codes)):
                if has_ink(letter, face):
                    drawn[letter].append(face)
        enough = {letter: faces for letter, faces in drawn.items() if len(faces) >= self.config.faces}
        if len(enough) < len(drawn):
            log.warning(
                "Left out: %s characters that are in fewer than %s of the %s faces; %s remain.",
                f"{len(drawn) - len(enough):,}", self.config.faces, len(known), f"{len(enough):,}",
            )  # fmt: skip
        if not enough:
            raise UsageError(
                f"None of the chosen characters is in {self.config.faces} of the {len(known)} faces in "
                f"{self.location}: choose other characters, or lower 'faces'."
            )
        return enough

    # ------------------------------------------------------------------------------------------------------------ split

    def _split(self, letters: Iterable[str]) -> dict[str, str]:
        """Return the split of each assigned character."""
        unit_of = self._find_units(list(letters))
        sizes = Counter(unit_of.values())
        if self.config.split_file is not None:
            what = "character" if self.config.split_by == "character" else self.config.split_by
            split = read_split_file(Path(self.config.split_file), sizes, what)
        else:
            split = self._split_at_random(sizes)
        without = sorted(sizes.keys() - split.keys())
        if without:
            log.warning("Left out: %s, which %s does not name.", list_some(without), self.config.split_file)
        return {letter: split[unit] for letter, unit in unit_of.items() if unit in split}

    def _find_units(self, letters: Sequence[str]) -> dict[str, str]:
        """Return each character's unit of the split: itself, its script or its group; omit those without a group."""
        if self.config.split_by == "character":
            return {letter: letter for letter in letters}
        if self.config.split_by == "script":
            return {letter: find_script(letter) for letter in letters}
        groups = read_groups(Path(str(self.config.groups)))
        without = [letter for letter in letters if letter not in groups]
        if without:
            log.warning("Left out: %s characters that are in no group of %s.", f"{len(without):,}", self.config.groups)
        return {letter: groups[letter] for letter in letters if letter in groups}

    def _split_at_random(self, sizes: Mapping[str, int]) -> dict[str, str]:
        """Split the units at random, so that the numbers of classes have the configured ratios."""
        units = sorted(sizes)
        order = draw_distinct(task_uniform(self.config.split_seed, "classes", [0], len(units)), len(units))[0]
        counts = np.array([sizes[units[place]] for place in order])
        middles = (np.cumsum(counts) - counts / 2) / counts.sum()
        ends = np.cumsum(self.config.ratios)[:2] / sum(self.config.ratios)
        parts = np.searchsorted(ends, middles, side="right")
        return {units[place]: SPLITS[part] for place, part in zip(order, parts, strict=True)}

    # ------------------------------------------------------------------------------------------------------ those alike

    def _select(
        self, letters: Sequence[str], split_of: Mapping[str, str], faces_of: Mapping[str, Sequence[Face]]
    ) -> list[int]:
        """Select the letters that do not look like an earlier one; logs the number of the others."""
        inside: list[tuple[int, int]] = []
        across: list[tuple[int, int]] = []
        for i, j in _find_pairs(letters, split_of, faces_of):
            (inside if split_of[letters[i]] == split_of[letters[j]] else across).append((i, j))
        distinct = select_distinct(len(letters), inside)
        kept = select_distinct(len(letters), [*inside, *across])
        log.info(
            "%s is split: %s characters. Left out because they look like another character: %s of the same split, %s "
            "of another.",
            self.location,
            "/".join(f"{sum(split_of[letters[n]] == split for n in kept):,}" for split in SPLITS),
            f"{len(letters) - len(distinct):,}",
            f"{len(distinct) - len(kept):,}",
        )
        return kept


def _read_quietly(path: Path) -> bytes:
    """Read a file's bytes; empty if it cannot be read, which is reported when the file is used."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError:
        return b""


def _find_pairs(
    letters: Sequence[str], split_of: Mapping[str, str], faces_of: Mapping[str, Sequence[Face]]
) -> Iterator[tuple[int, int]]:
    """Yield the numbers of letters that look alike.

    Readers of a script can distinguish its letters, so letters of one script count as alike only if they are nearly the
    same in the compared faces. Letters of different scripts can be one letter by origin (T and τ), which counts if they
    are in different splits.
    """
    weights = _weigh(faces_of)
    by_script: dict[str, list[int]] = {}
    for number, letter in enumerate(letters):
        by_script.setdefault(find_script(letter), []).append(number)
    for rows in by_script.values():
        images = _draw_in_shared_faces([letters[row] for row in rows], faces_of, weights)
        yield from ((rows[i], rows[j]) for i, j, _ in find_alike(images, images, _SAME) if i < j)
    shapes = picture_shapes(_draw_in_one_face(letters, faces_of, weights))
    scripts = list(by_script.values())
    for number, rows in enumerate(scripts[:-1]):
        others = list(itertools.chain(*scripts[number + 1 :]))
        for i, j, distance in find_similar(shapes[rows], shapes[others]):
            if distance < _SAME or split_of[letters[rows[i]]] != split_of[letters[others[j]]]:
                yield rows[i], others[j]


def _weigh(faces_of: Mapping[str, Sequence[Face]]) -> dict[Face, float]:
    """Measure the mean ink of a letter in each face."""
    letters_of: dict[Face, list[str]] = {}
    for letter, faces in faces_of.items():
        for face in faces:
            letters_of.setdefault(face, []).append(letter)
    return {
        face: float(
            np.mean([np.asarray(centre(draw_letter(letter, face), _SIDE)) for letter in _spread(letters, _SAMPLE)])
        )
        for face, letters in letters_of.items()
    }


def _draw_in_shared_faces(
    letters: Sequence[str], faces_of: Mapping[str, Sequence[Face]], weights: Mapping[Face, float]
) -> np.ndarray:
    """Draw letters in some of the faces with most letters, light to bold: uint8 ``[letters, faces, side, side]``."""
    counts = Counter(face for letter in letters for face in faces_of[letter])
    frequent = [face for face, count in counts.items() if 2 * count >= max(counts.values())]
    faces = _spread(sorted(frequent, key=lambda face: weights[face]), _COMPARED)
    images = np.zeros((len(letters), len(faces), _SIDE, _SIDE), np.uint8)
    for (row, letter), (column, face) in itertools.product(enumerate(letters), enumerate(faces)):
        if face in faces_of[letter]:
            images[row, column] = np.asarray(centre(draw_letter(letter, face), _SIDE))
    return images


def _draw_in_one_face(
    letters: Sequence[str], faces_of: Mapping[str, Sequence[Face]], weights: Mapping[Face, float]
) -> Iterator[Image.Image]:
    """Draw each letter in the face that has most letters and is nearest to the middle weight."""
    counts = Counter(face for letter in letters for face in faces_of[letter])
    middle = float(np.median([weights[face] for face in counts]))
    ranks = {face: (-count, abs(weights[face] - middle)) for face, count in counts.items()}
    for letter in letters:
        yield draw_letter(letter, min(faces_of[letter], key=ranks.__getitem__))


def _spread(items: Sequence[_Item], most: int) -> list[_Item]:
    """Select at most `most` items, evenly spread."""
    wanted = min(most, len(items))
    return [items[(2 * number + 1) * len(items) // (2 * wanted)] for number in range(wanted)]
