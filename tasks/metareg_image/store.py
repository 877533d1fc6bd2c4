"""A cache of decoded images: a memory-mapped file of uint8 pixels, class after class, and an index of classes."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from metareg import MetaregError, UnreadableImageError, UsageError, cache_folder, load_image, sync_folder

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

_FORMAT = 3
_INDEX, _PIXELS, _LOCK = "index.json", "pixels.u8", ".lock"
_SECONDS_TO_LOCK = 60
"""After this time, a builder has locked what it began."""
_TRIES = 3

log = logging.getLogger("metareg")


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
"""The names of the classes and their numbers of images, by split."""


@dataclass(frozen=True)
class ClassImages:
    """A class of a data set: its split, its name, and its images, which are decoded one after the other."""

    split: str
    name: str
    images: Iterable[Source]


@dataclass(frozen=True)
class SplitIndex:
    """The classes of one split: their names and their rows in the pixel file."""

    names: tuple[str, ...]
    starts: np.ndarray
    counts: np.ndarray


class DamagedStoreError(Exception):
    """A store is damaged."""


class ImageStore:
    """The images of a data set as uint8 ``[images, height, width, channels]``, memory-mapped.

    Args:
        folder: the folder of the store.
        build: rebuilds the folder if it is damaged.

    Raises:
        MetaregError: it is damaged, and the cache cannot be written.
    """

    def __init__(self, folder: Path, build: Callable[[], None]) -> None:
        self.folder = folder
        self._build = build
        try:
            self._open()
        except DamagedStoreError:
            self._rebuild()

    def _open(self) -> None:
        shape, self.splits, self._checksums = _read_index(self.folder / _INDEX)
        path = self.folder / _PIXELS
        if not path.is_file() or path.stat().st_size != math.prod(shape):
            raise DamagedStoreError
        self.pixels: np.ndarray = np.memmap(path, np.uint8, "r", shape=shape)
        self._starts, self._counts = (
            np.concatenate([getattr(index, part) for index in self.splits.values()]) for part in ("starts", "counts")
        )
        self._unchecked = self._counts > 0

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read some images; on a class's first use, compare its images with their checksum.

        Args:
            rows: the images' rows in the file, of any shape.

        Returns:
            Pixels ``[*rows.shape, height, width, channels]``.

        Raises:
            MetaregError: the images are damaged, and the cache cannot be written.
        """
        if self._unchecked.any() and not self._are_whole(np.searchsorted(self._starts, rows, side="right") - 1):
            self._rebuild()
        return np.asarray(self.pixels[rows])

    def read_split(self, split: str) -> Iterator[np.ndarray]:
        """Yield the images ``[images, height, width, channels]`` of each class of a split."""
        index = self.splits[split]
        for start, count in zip(index.starts, index.counts, strict=True):
            yield self.read(np.arange(start, start + count))

    def _are_whole(self, classes: np.ndarray) -> bool:
        for number in np.unique(classes[self._unchecked[classes]]).tolist():
            start = self._starts[number]
            if zlib.crc32(self.pixels[start : start + self._counts[number]].data) != self._checksums[number]:
                return False
            self._unchecked[number] = False
        return True

    def _rebuild(self) -> None:
        """Rebuild a damaged store."""
        for _ in range(_TRIES):
            log.warning("The image cache %s is damaged; rebuilding it.", self.folder)
            _remove(self.folder)
            self._build()
            with suppress(DamagedStoreError):  # another process can be doing the same
                return self._open()
        raise MetaregError(f"The image cache {self.folder} is still damaged; choose another folder with METAREG_CACHE.")

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
        """Load the store of a data set, or build it if it is missing or damaged.

        Args:
            name: the data set's name.
            identity: everything that the pixels depend on; other values give another store.
            classes: the data set's classes, called if the store has to be built.
            size: height, width, channels.
            decode: returns an image's pixels in that shape.
            check: called with the classes and image counts by split before the store is kept; raises if they are wrong.

        Raises:
            UsageError: images cannot be read; the message names them.
            MetaregError: the cache cannot be written.
        """
        key = json.dumps({"format": _FORMAT, "size": size, **identity}, sort_keys=True)
        digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        folder = cache_folder() / "images" / f"{name}-{'x'.join(map(str, size))}-{digest}"

        def build() -> None:
            _build(folder, classes(), size, decode, check)

        if not folder.is_dir():
            build()
        return cls(folder, build)


def _read_index(path: Path) -> tuple[tuple[int, ...], dict[str, SplitIndex], list[int]]:
    """Read the shape of all pixels, the classes by split, and the checksum of each class's pixels.

    Raises:
        DamagedStoreError: the file is damaged.
    """
    if not path.is_file():
        raise DamagedStoreError
    try:
        checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != checksum:
            raise DamagedStoreError
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise DamagedStoreError from error
    splits: dict[str, SplitIndex] = {}
    checksums: list[int] = []
    start = 0
    for split in SPLITS:
        listed = content["splits"][split]
        names, counted, sums = zip(*listed, strict=True) if listed else ((), (), ())
        counts = np.array(counted, dtype=np.int64)
        starts = start + np.cumsum(counts) - counts
        splits[split] = SplitIndex(names, starts, counts)
        checksums += sums
        start += int(counts.sum())
    return tuple(content["shape"]), splits, checksums


def _build(
    folder: Path,
    classes: Iterable[ClassImages],
    size: tuple[int, int, int],
    decode: Callable[[Source], np.ndarray],
    check: Callable[[Splits], None],
) -> None:
    """Write a store under a temporary name, then rename it."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        aside.mkdir()
        with FileLock(aside / _LOCK):
            _write(aside, classes, size, decode, check)
            (aside / _LOCK).unlink()
            try:
                aside.rename(folder)
            except OSError:
                if not (folder / _INDEX).is_file():  # otherwise another process was faster, with an equal store
                    raise
        sync_folder(folder.parent)
    except OSError as error:
        raise MetaregError(
            f"The image cache {folder} cannot be written: {error.strerror or error}; choose another folder with "
            "METAREG_CACHE."
        ) from error
    finally:
        _remove(aside)


def _write(
    folder: Path,
    classes: Iterable[ClassImages],
    size: tuple[int, int, int],
    decode: Callable[[Source], np.ndarray],
    check: Callable[[Splits], None],
) -> None:
    """Write pixels and index, and flush them to disk."""
    with (folder / _PIXELS).open("wb") as file:
        checksums: list[int] = []

        def keep(image: np.ndarray, first: bool) -> None:
            content = image.tobytes()
            file.write(content)
            if first:
                checksums.append(0)
            checksums[-1] = zlib.crc32(content, checksums[-1])

        splits = decode_all(classes, decode, check, keep)
        file.flush()
        os.fsync(file.fileno())
    total = sum(count for listed in splits.values() for _, count in listed)
    each = iter(checksums)
    listed = {
        split: [(name, count, next(each) if count else 0) for name, count in found] for split, found in splits.items()
    }
    text = json.dumps({"shape": [total, *size], "splits": listed})
    with (folder / _INDEX).open("w", encoding="utf-8") as file_of_text:
        file_of_text.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        file_of_text.flush()
        os.fsync(file_of_text.fileno())
    sync_folder(folder)


def _sweep(parent: Path) -> None:
    """Remove what killed builders left; a living builder holds a lock, or has only just begun."""
    for path in parent.glob(".*-*"):
        with suppress(OSError, Timeout):
            if time.time() - path.stat().st_mtime > _SECONDS_TO_LOCK:
                with FileLock(path / _LOCK, timeout=0):
                    _remove(path)


def _remove(folder: Path) -> None:
    """Rename and remove a store; a partial rest under the other name is never taken for a store."""
    trash = (
        folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.{secrets.token_hex(4)}-damaged")
    )
    with suppress(OSError):
        if trash != folder:
            folder.rename(trash)
        shutil.rmtree(trash)


def decode_all(
    classes: Iterable[ClassImages],
    decode: Callable[[Source], np.ndarray],
    check: Callable[[Splits], None],
    keep: Callable[[np.ndarray, bool], object] = lambda _image, _first: None,
) -> Splits:
    """Decode every image, split after split, and pass it to `keep`, with whether it is the first of its class.

    Returns:
        The classes and image counts by split.

    Raises:
        UsageError: images cannot be read (the message names them), or `check` raises it.
    """
    splits: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    unreadable: list[str] = []
    for each in sorted(classes, key=lambda each: SPLITS.index(each.split)):
        count = 0
        for image in _decode(each.images, decode, unreadable):
            keep(image, not count)
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
        count, them = (f"{len(names)} images", "them") if len(names) > 1 else ("An image", "it")
        more = f", and {len(names) - 5} more" if len(names) > 5 else ""
        raise UsageError(f"{count} cannot be read: {'; '.join(names[:5])}{more}. Repair or remove {them}.")


def read_pixels(source: Source, channels: int, resize: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Return an image's pixels as uint8 ``[height, width, channels]``: grey, or red, green and blue."""
    if isinstance(source, np.ndarray):
        source = Image.fromarray(source)
    elif not isinstance(source, Path | Image.Image):
        source = source()
    array = np.asarray(resize(load_image(source, channels)), dtype=np.uint8)
    return array[..., None] if channels == 1 else array
