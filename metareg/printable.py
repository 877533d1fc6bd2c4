"""Safe and readable output: untrusted text cannot control a terminal or a spreadsheet; counts agree with nouns."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterable, Sequence

__all__ = ["format_count", "format_csv", "guard_logs", "show_controls"]

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\N{SYMBOL FOR DELETE}"}
_UNSHOWN = (
    *range(0x80, 0xA0),  # C1
    *(0x200E, 0x200F, 0x2028, 0x2029),
    *range(0x202A, 0x202F),  # this range and the next change the writing direction
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),  # surrogates for bytes of file names that are not UTF-8
)
_REPLACED = _PICTURES | dict.fromkeys(_UNSHOWN, "\N{REPLACEMENT CHARACTER}")
del _REPLACED[ord("\t")], _REPLACED[ord("\n")]
_FORMULA = re.compile(r"\s*[=+\-@]")
_NUMBER = re.compile(r"\s*[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?\s*|\s*[+-]?(inf|nan)\s*", re.IGNORECASE)


def show_controls(text: str) -> str:
    """Replace every character that a terminal would interpret instead of showing.

    These are the control characters C0 (except tabs and line feeds), DEL and C1, characters that change the writing
    direction, and surrogates. C0 and DEL become Unicode's control pictures, the others U+FFFD.
    """
    return text if text.isascii() and text.isprintable() else text.translate(_REPLACED)


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Format a number with its noun: ``1 image``, ``12,000 images``.

    Args:
        number: the number.
        noun: the counted noun, in the singular.
        plural: its plural; by default, the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def guard_logs(*names: str) -> None:
    """Replace control characters in everything that is logged under some names, for all handlers."""

    def show(record: logging.LogRecord) -> bool:
        record.msg, record.args = show_controls(record.getMessage()), None
        return True

    for name in names:
        logging.getLogger(name).addFilter(show)


def format_csv(rows: Iterable[Sequence[object]]) -> str:
    """Format rows as CSV in which no cell is a formula for a spreadsheet.

    A text that begins with ``=``, ``+``, ``-`` or ``@`` and is not a number gets a leading apostrophe (OWASP: CSV
    injection). Control characters are replaced.
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([_quote_formula(cell) for cell in row] for row in rows)
    return buffer.getvalue()


def _quote_formula(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    shown = show_controls(cell)
    return f"'{shown}" if _FORMULA.match(shown) and not _NUMBER.fullmatch(shown) else shown
