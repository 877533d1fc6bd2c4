"""Images decoded once: a memory-mapped file of uint8 pixels, class after class, and the list of its classes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metareg import MetaregError, UnreadableImageError, UsageError, cache_folder, load_image

__all__ = [
    "SPLITS",
    "ClassImages",
    "Cut",
    "ImageStore",
    "SplitIndex",
    "Splits",
    "decode_all",
    "read_pixels",
]

SPLITS = ("train", "validation", "test")

_FORMAT = 2
_INDEX, _PIXELS = "index.json", "pixels.u8"


@dataclass(frozen=True)
class Cut:
    """The part of an image file inside a box (left, top, right, bottom), right and bottom not included."""

    path: Path
    box: tuple[int, int, int, int]

    def __call__(self) -> Image.Image:
        return load_image(self.path, 3).crop(self.box)


Source = Path | Image.Image | np.ndarray | Callable[[], Image.Image]
"""An image file, a decoded image, pixels ``[height, width]`` or ``[height, width, 3]``, or a function that decodes one."""


Splits = Mapping[str, list[tuple[str, int]]]
"""The names of the classes and how many images each has, by split."""


@dataclass(frozen=True)
class ClassImages:
    """One class of a data set: its split, its name, and its images, which are decoded one after the other."""

    split: str
    name: str
    images: Iterable[Source]


@dataclass(frozen=True)
class SplitIndex:
    """The classes of one split: names, and the rows of the pixel file that each has."""

    names: tuple[str, ...]
    starts: np.ndarray
    counts: np.ndarray


class ImageStore:
    """The images of a data set as uint8 ``[images, height, width, channels]``, memory-mapped.

    Args:
        folder: what `build` wrote.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        self.pixels: np.ndarray = np.memmap(folder / _PIXELS, np.uint8, "r", shape=tuple(index["shape"]))
        self.splits: dict[str, SplitIndex] = {}
        start = 0
        for split in SPLITS:
            classes = index["splits"][split]
            counts = np.array([count for _, count in classes], dtype=np.int64)
            starts = start + np.cumsum(counts) - counts
            self.splits[split] = SplitIndex(tuple(name for name, _ in classes), starts, counts)
            start += int(counts.sum())

    @classmethod
    def load_or_build(
        cls,
        name: str,
        identity: Mapping[str, Any],
        classes: Callable[[], Iterable[ClassImages]],
        size: tuple[int, int, int],
        decode: Callable[[Source], np.ndarray],
        check: Callable[[Splits], None],
    ) -> ImageStore:
        """The store of a data set, built if it is not in the cache.

        Args:
            name: the data set's.
            identity: all that the pixels depend on; a change makes another store.
            classes: the data set's classes, called if the store has to be built.
            size: height, width, channels.
            decode: an image's pixels in that shape.
            check: looks at the classes and image counts by split before the store is kept, and raises where they are
                not what they should be.

        Raises:
            UsageError: images cannot be read; the message names them.
            MetaregError: the cache cannot be written.
        """
        key = json.dumps({"format": _FORMAT, "size": size, **identity}, sort_keys=True)
        digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        folder = cache_folder() / "images" / f"{name}-{'x'.join(map(str, size))}-{digest}"
        if not (folder / _INDEX).is_file():
            _build(folder, classes(), size, decode, check)
        return cls(folder)


def _build(
    folder: Path,
    classes: Iterable[ClassImages],
    size: tuple[int, int, int],
    decode: Callable[[Source], np.ndarray],
    check: Callable[[Splits], None],
) -> None:
    """Write a store aside and rename it."""
    aside: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        with (aside / _PIXELS).open("wb") as file:
            splits = decode_all(classes, decode, check, lambda image: file.write(image.tobytes()))
            file.flush()
            os.fsync(file.fileno())
        total = sum(count for listed in splits.values() for _, count in listed)
        index = {"shape": [total, *size], "splits": splits}
        (aside / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / _INDEX).is_file():  # else another process was faster: its store is the same
                raise
    except OSError as error:
        raise MetaregError(
            f"The image cache {folder} cannot be written: {error.strerror or error}; METAREG_CACHE names another place."
        ) from error
    finally:
        if aside is not None:
            with suppress(OSError):
                shutil.rmtree(aside)


def decode_all(
    classes: Iterable[ClassImages],
    decode: Callable[[Source], np.ndarray],
    check: Callable[[Splits], None],
    keep: Callable[[np.ndarray], object] = lambda _: None,
) -> Splits:
    """Decode every image, split after split, and hand it to `keep`.

    Returns:
        The classes and image counts by split.

    Raises:
        UsageError: images cannot be read; the message names them. Or what `check` raises.
    """
    splits: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    unreadable: list[str] = []
    for each in sorted(classes, key=lambda each: SPLITS.index(each.split)):
        count = 0
        for image in _decode(each.images, decode, unreadable):
            keep(image)
            count += 1
        splits[each.split].append((each.name, count))
    _refuse_unreadable(unreadable)
    check(splits)
    return splits


def _decode(
    images: Iterable[Source], decode: Callable[[Source], np.ndarray], unreadable: list[str]
) -> Iterator[np.ndarray]:
    for image in images:
        try:
            yield decode(image)
        except UnreadableImageError as error:
            unreadable.append(f"{error.path} ({error.reason})")


def _refuse_unreadable(names: list[str]) -> None:
    if names:
        count = f"{len(names)} images" if len(names) > 1 else "An image"
        more = f", and {len(names) - 5} more" if len(names) > 5 else ""
        raise UsageError(f"{count} cannot be read: {'; '.join(names[:5])}{more}. Repair or remove them.")


def read_pixels(source: Source, channels: int, resize: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """An image's pixels as uint8 ``[height, width, channels]``: grey, or red, green and blue."""
    if isinstance(source, np.ndarray):
        source = Image.fromarray(source)
    elif not isinstance(source, Path | Image.Image):
        source = source()
    array = np.asarray(resize(load_image(source, channels)), dtype=np.uint8)
    return array[..., None] if channels == 1 else array
