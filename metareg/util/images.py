"""Users' folders of images, and the pixels of image files that Pillow can read."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from metareg.errors import UsageError
from metareg.util.files import refuse_special_file

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageFiles", "UnreadableImageError", "find_images", "load_image"]

log = logging.getLogger("metareg")

_NAMED = 3
"""Maximum number of names in a message, before it counts the rest."""
_LEAST_PIXELS, _MOST_PIXELS = 1 << 24, 100
"""Limits for an image: it may have this many pixels, or this many per byte of its file."""
_NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow only recognises, or renders with another program."""


class UnreadableImageError(UsageError):
    """A file that cannot be read as an image: `path` and `reason`."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read as an image: {reason}.")
        self.path, self.reason = path, reason


# -------------------------------------------------------------------------------------------------------- finding the files


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder and its subfolders, and what was ignored.

    Args:
        root: the folder.
        base: the folder that class names are relative to: `root`, or the only folder in it if that contains all others.
        by_folder: the sorted image files of each folder that has any, by the folder's path in `base`; ``""`` is `base`
            itself.
        other: the number of files with an extension that is not an image's, by extension.
        hidden: hidden files and folders, and metadata files of operating systems.
        repeated: links to folders that are already included, or that contain `root`.
        empty: folders without images.
    """

    root: Path
    base: Path
    by_folder: dict[str, list[Path]]
    other: Counter[str]
    hidden: list[str]
    repeated: list[str]
    empty: list[str]

    @cached_property
    def classes(self) -> dict[str, list[Path]]:
        """The image files of each class by its name: those of the folders inside `base`."""
        return {name: paths for name, paths in sorted(self.by_folder.items()) if name}

    def warn_of_left_out(self, *, of_classes: bool = True) -> None:
        """Log in one line what was ignored and why; including images in `base` itself if only class folders count."""
        loose = [path.name for path in self.by_folder.get("", ())] if of_classes else []
        reasons = {
            "files that are not read as images": [f"{count} {ending}" for ending, count in self.other.most_common()],
            "hidden": self.hidden,
            "images outside a class's folder": loose,
            "links to folders that are already included": self.repeated,
            "folders without images": self.empty,
        }
        said = [f"{reason}: {_list(names)}" for reason, names in reasons.items() if names]
        if said:
            log.warning("Ignored in %s: %s.", self.root, "; ".join(said))


def find_images(root: Path) -> ImageFiles:
    """Find the image files in a folder and its subfolders; each physical folder is visited once, wherever links lead.

    Raises:
        UsageError: a folder cannot be read, or a link is broken.
    """
    walk = _Walk(root)
    walk.visit_all()
    base, found = root, walk.images
    outer = {name.partition("/")[0] for name in found}
    if len(outer) == 1 and all("/" in name for name in found):
        base = root / outer.pop()
        found = {name.partition("/")[2]: paths for name, paths in found.items()}
    return ImageFiles(root, base, found, walk.other, walk.hidden, walk.repeated, walk.list_empty())


class _Walk:
    """Visits a folder and everything in it, links to folders last, so that each folder is found under its real name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._endings = frozenset(ending for ending, kind in _list_formats().items() if kind)
        self._visited: set[tuple[int, int]] = set()
        self._links: list[Path] = []
        self._folders: list[str] = []
        self._dangling: list[str] = []
        self.images: dict[str, list[Path]] = {}
        self.other: Counter[str] = Counter()
        self.hidden: list[str] = []
        self.repeated: list[str] = []

    def visit_all(self) -> None:
        around = {_identify(folder) for folder in self._root.resolve().parents}
        waiting = [self._root]
        while waiting or self._links:
            folder = waiting.pop() if waiting else self._links.pop(0)
            identity = _identify(folder)
            if identity in self._visited or identity in around:
                self.repeated.append(self._name(folder))
                continue
            self._visited.add(identity)
            waiting += reversed(self._visit(folder))
        if self._dangling:
            raise UsageError(f"{self._root} contains broken links: {_list(self._dangling)}. Fix or remove them.")

    def list_empty(self) -> list[str]:
        """List the topmost folders that contain no images at any depth."""
        full = {""} | {parent for name in self.images for parent in _list_parents(name)}
        empty = [name for name in self._folders if name not in full]
        return [name for name in empty if name.rpartition("/")[0] in full]

    def _visit(self, folder: Path) -> list[Path]:
        """Record a folder's content, and return its real subfolders."""
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UsageError(f"The folder {folder} cannot be read: {error.strerror}.") from error
        self._folders.append(self._name(folder))
        inside: list[Path] = []
        images: list[Path] = []
        for entry in listed:
            path = folder / entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                self.hidden.append(self._name(path))
            elif entry.is_dir():
                (self._links if entry.is_symlink() else inside).append(path)
            elif entry.is_symlink() and not path.exists():
                self._dangling.append(self._name(path))
            elif path.suffix.lower() in self._endings:
                images.append(path)
            else:
                self.other[path.suffix or "without an extension"] += 1
        if images:
            self.images[self._name(folder)] = images
        return inside

    def _name(self, path: Path) -> str:
        return "" if path == self._root else path.relative_to(self._root).as_posix()


def _identify(folder: Path) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino


def _list_parents(name: str) -> Iterable[str]:
    """``a/b/c`` → ``a/b/c``, ``a/b``, ``a``."""
    while name:
        yield name
        name = name.rpartition("/")[0]


def _list(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return f"{', '.join(listed[:_NAMED])}{more}"


# ------------------------------------------------------------------------------------------------------------ their pixels


def load_image(source: Path | Image, channels: int) -> Image:
    """Load an image with 8 bits per channel, rotated by its EXIF data, with white for transparent pixels.

    16-bit values are scaled from their range, 0 to 65535, floating-point values from 0 to 1. Animations give their
    first frame.

    Args:
        source: the file, or an image opened by Pillow.
        channels: 1 for grey, 3 for red, green and blue.

    Raises:
        UnreadableImageError: the file is not an image, is damaged, or has values of unknown range.
    """
    from PIL import Image, UnidentifiedImageError

    if not isinstance(source, Path):
        return _convert(source, channels)
    try:
        refuse_special_file(source)
        with Image.open(source, formats=sorted(filter(None, set(_list_formats().values())))) as image:
            _refuse_bombs(image, source.stat().st_size)
            return _convert(image, channels)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(source, "it is not an image") from error
    # Pillow's readers raise many kinds of errors for damaged files.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImageError(source, reason) from error


def _refuse_bombs(image: Image, size: int) -> None:
    """Refuse an image that has far more pixels than its file size justifies; decoding needs several bytes per pixel."""
    width, height = image.size
    if width * height > max(_LEAST_PIXELS, _MOST_PIXELS * size):
        raise ValueError(f"it has {width}×{height} pixels in a file of {size} bytes; save it with fewer pixels")


@cache
def _list_formats() -> dict[str, str | None]:
    """Map extensions that Pillow knows to the format's name, or to None if it is not an image format."""
    from PIL import Image

    known = Image.registered_extensions()
    return {ending: kind if kind in Image.OPEN and kind not in _NO_PICTURES else None for ending, kind in known.items()}


def _convert(image: Image, channels: int) -> Image:
    from PIL import Image, ImageOps

    image = _scale_to_bytes(ImageOps.exif_transpose(image))
    if image.mode == "LAB":
        image = image.convert("RGB")  # the only conversion that Pillow has from this mode
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _scale_to_bytes(image: Image) -> Image:
    """Scale an image with 16 or more bits per value to 8 bits, from the range of its type."""
    import numpy as np
    from PIL import Image

    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not wide and image.mode not in ("I", "F"):
        return image
    if image.mode == "I" and not wide:
        raise ValueError("it contains 32-bit integers, whose range is unknown; save it with 8 or 16 bits")
    values, most = np.asarray(image), 65535 if wide else 1
    if not (values >= 0).all() or not (values <= most).all():
        raise ValueError(
            f"it contains floating-point numbers from {values.min():.4g} to {values.max():.4g}, but they must be "
            "between 0 and 1; scale it, or save it with 8 or 16 bits"
        )
    grey = Image.fromarray(np.rint(values * (255 / most)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
