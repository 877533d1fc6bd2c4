"""The selection of characters, their scripts, and groups of characters such as radicals."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from fontTools import unicodedata as scripts

from metareg import UnknownNameError, UsageError, read_table

__all__ = ["find_script", "name_character", "parse_characters", "read_groups"]

_LETTERS = frozenset({"Lu", "Ll", "Lt", "Lo"})
_CODES = re.compile(r"(?:U\+)?([0-9A-F]{1,6})(?:-(?:U\+)?([0-9A-F]{1,6}))?", re.IGNORECASE)
_CODE = re.compile(r"U\+([0-9A-F]{4,6})", re.IGNORECASE)
_RADICAL = re.compile(r"^U\+([0-9A-F]{4,6})\tkRSUnicode\t(\d+)", re.MULTILINE)
"""A line of Unihan: the character and the number of its radical, followed by a sign and the number of other strokes."""
_LARGEST_UNIHAN = 1 << 28


def find_script(character: str) -> str:
    """Return the Unicode script of a character, such as ``"HAN"`` or ``"OLD ITALIC"``."""
    return scripts.script_name(scripts.script(character)).replace("_", " ").upper()


def name_character(character: str) -> str:
    """Return a class's name: the character's Unicode name, or its code if the name only repeats it."""
    name = unicodedata.name(character, "")
    code = f"{ord(character):04X}"
    return f"U+{code}" if not name or name.endswith(code) else name.capitalize()


def parse_characters(text: str | None) -> Callable[[str], bool]:
    """Parse a selection such as ``"HIRAGANA, U+4E00-9FFF"`` to a function that says whether it contains a character.

    Args:
        text: scripts and ranges of codes, separated by commas; None for the letters of all scripts. A script means its
            letters, except those that Unicode treats as another letter or several (é, fullwidth A). A range means all
            characters that can be drawn.

    Raises:
        UsageError: a part is neither a script nor a range.
    """
    if text is None:
        return _is_letter
    named: set[str] = set()
    ranges: list[range] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part.upper().startswith("U+"):
            ranges.append(_parse_range(part))
        else:
            named.add(_find_name(part))
    if not named and not ranges:
        raise UsageError("'characters' is empty; write, for example, HIRAGANA or U+4E00-9FFF.")

    def is_meant(character: str) -> bool:
        in_range = any(ord(character) in each for each in ranges) and unicodedata.category(character)[0] in "LNPS"
        return in_range or (_is_letter(character) and find_script(character) in named)

    return is_meant


def read_groups(path: Path) -> dict[str, str]:
    """Read the group of each character from a file.

    Args:
        path: a table with the columns ``character`` (itself or as ``U+4E00``) and ``group``, with or without a header;
            or a text of the Unihan database, whose lines kRSUnicode name radicals, of which the first counts.

    Raises:
        UsageError: the file cannot be read, has another format, or puts a character into two groups.
    """
    if not path.is_file():
        raise UsageError(f"There is no file {path}.")
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_UNIHAN).decode("utf-8", "replace")
    except OSError as error:
        raise UsageError(f"The file {path} cannot be read: {error.strerror}.") from error
    if radicals := _RADICAL.findall(text):
        return {chr(int(code, 16)): radical for code, radical in radicals if int(code, 16) <= 0x10FFFF}
    table = read_table(path, is_data=lambda cells: len(cells) == 2 and _parse_character(cells[0]) is not None)
    if len(table.names) != 2 or (table.named and set(table.names) != {"character", "group"}):
        raise UsageError(
            f"{path} must be a table with the columns 'character' and 'group', or a text of Unihan with lines kRSUnicode; "
            f"it has the columns {', '.join(table.names)}."
        )
    first, second = ("character", "group") if table.named else table.names
    groups: dict[str, str] = {}
    for row, (cell, group) in enumerate(zip(table.get_texts(first), table.get_texts(second), strict=True)):
        character = _parse_character(cell)
        if character is None:
            raise UsageError(
                f"{table.locate(row, first)} contains '{cell}' instead of one character, or U+ and its code."
            )
        if groups.setdefault(character, group) != group:
            raise UsageError(f"{path} puts the character '{character}' into '{groups[character]}' and into '{group}'.")
    return groups


def _is_letter(character: str) -> bool:
    return unicodedata.category(character) in _LETTERS and not unicodedata.decomposition(character)


def _parse_range(part: str) -> range:
    matched = _CODES.fullmatch(part)
    first, last = (int(code, 16) for code in (matched[1], matched[2] or matched[1])) if matched else (1, 0)
    if first > last:
        raise UsageError(f"'{part}' in 'characters' is not a range of codes; write, for example, U+4E00-9FFF.")
    return range(first, last + 1)


def _find_name(part: str) -> str:
    """Find a script by name, ignoring case, with spaces or underscores, or by its ISO 15924 code of four letters."""
    known = {name.replace("_", " ").upper(): code for code, name in scripts.Scripts.NAMES.items()}
    wanted = part.replace("_", " ").upper()
    by_code = {code.upper(): name for name, code in known.items()}
    if wanted not in known and wanted not in by_code:
        raise UnknownNameError("script (in 'characters')", part, sorted(known))
    return by_code.get(wanted, wanted)


def _parse_character(cell: str) -> str | None:
    matched = _CODE.fullmatch(cell)
    if matched and int(matched[1], 16) <= 0x10FFFF:
        return chr(int(matched[1], 16))
    return cell if len(cell) == 1 else None
