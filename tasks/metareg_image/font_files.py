"""Users' folders of fonts, and the faces in them."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fontTools.ttLib import TTFont
from fontTools.ttLib.sfnt import readTTCHeader

from metareg import UsageError
from metareg_image.letters import Face, load_font

__all__ = ["find_fonts", "list_some", "read_faces"]

_ENDINGS = frozenset({".ttf", ".otf", ".ttc", ".otc", ".woff", ".woff2"})
_LARGEST_FILE = 1 << 28
_NAMED = 3


def find_fonts(root: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """Find the font files in a folder and its subfolders, sorted, and the names of ignored files by reason.

    Raises:
        UsageError: a folder cannot be read.
    """
    files: list[Path] = []
    left_out: dict[str, list[str]] = {}
    known: set[tuple[int, int]] = set()
    endings: Counter[str] = Counter()
    # Files before links, so that a font is found under its real name.
    for path in sorted(_walk(root), key=lambda path: (path.is_symlink(), path)):
        reason = _find_reason(path, known)
        if reason == "other":
            endings[path.suffix or "without an extension"] += 1
        elif reason is not None:
            left_out.setdefault(reason, []).append(str(path.relative_to(root)))
        else:
            state = path.stat()
            known.add((state.st_dev, state.st_ino))
            files.append(path)
    if endings:
        left_out["files that are not fonts"] = [f"{count} {ending}" for ending, count in endings.most_common()]
    return sorted(files), left_out


def read_faces(files: Iterable[Path]) -> tuple[dict[Face, frozenset[int]], list[str]]:
    """Read the faces of font files with their characters' codes, and the files that cannot be read, with reasons."""
    faces: dict[Face, frozenset[int]] = {}
    unreadable: list[str] = []
    for path in files:
        try:
            faces |= _read_collection(path)
        # fontTools and FreeType raise many kinds of errors for damaged fonts.
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            unreadable.append(f"{path.name} ({reason})")
    return faces, unreadable


def list_some(names: Sequence[str]) -> str:
    """Join names to ``a, b, c``; list only the first of many."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, links to folders, and hidden folders, which are not searched."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"The folder {error.filename} cannot be read: {error.strerror}.")

    for folder, folders, names in os.walk(root, onerror=refuse):
        inside = [name for name in folders if not name.startswith(".") and not Path(folder, name).is_symlink()]
        yield from (Path(folder, name) for name in sorted({*names, *folders} - set(inside)))
        folders[:] = sorted(inside)


def _find_reason(path: Path, known: set[tuple[int, int]]) -> str | None:
    """Return why a path is ignored; None if it is a new font file."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "links to folders"
    if path.suffix.lower() not in _ENDINGS:
        return "other"
    if not path.is_file():
        return "not regular files"
    state = path.stat()
    if state.st_size > _LARGEST_FILE:
        return f"larger than {_LARGEST_FILE >> 20} MiB"
    return "links to fonts that are already included" if (state.st_dev, state.st_ino) in known else None


def _read_collection(path: Path) -> dict[Face, frozenset[int]]:
    """Read the faces of one file, which can contain several."""
    faces: dict[Face, frozenset[int]] = {}
    if not path.is_file():  # it can have changed since the folder was searched
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        count = readTTCHeader(file).numFonts if file.read(4) == b"ttcf" else 1
        for number in range(count):
            file.seek(0)
            charmap = TTFont(file, fontNumber=number, lazy=True).getBestCmap() or {}
            codes = frozenset(code for code in charmap if code <= sys.maxunicode)
            if not codes:
                raise ValueError("it has no table of Unicode characters")
            face = Face(path, number)
            load_font(face)
            faces[face] = codes
    return faces
