"""Texts made fit to be printed: what strangers wrote can steer no terminal and no spreadsheet, and counts are in order."""

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
    *range(0x202A, 0x202F),  # these and the next turn the direction of what follows
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),  # what stands for a byte of a file's name that is no UTF-8
)
_REPLACED = _PICTURES | dict.fromkeys(_UNSHOWN, "\N{REPLACEMENT CHARACTER}")
del _REPLACED[ord("\t")], _REPLACED[ord("\n")]
_FORMULA = re.compile(r"\s*[=+\-@]")
_NUMBER = re.compile(r"\s*[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?\s*|\s*[+-]?(inf|nan)\s*", re.IGNORECASE)


def show_controls(text: str) -> str:
    """Replace every character that a terminal would obey instead of showing.

    These are the control characters C0 (but tabs and line feeds), DEL and C1, those that turn the direction of writing, and
    halves of surrogate pairs. C0 and DEL become the pictures that Unicode has of them, the others U+FFFD.
    """
    return text if text.isascii() and text.isprintable() else text.translate(_REPLACED)


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: ``1 image``, ``12,000 images``.

    Args:
        number: the number.
        noun: the counted noun, in the singular.
        plural: its plural; by default, the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def guard_logs(*names: str) -> None:
    """Show the control characters in all that is logged under some names, whoever listens."""

    def show(record: logging.LogRecord) -> bool:
        record.msg, record.args = show_controls(record.getMessage()), None
        return True

    for name in names:
        logging.getLogger(name).addFilter(show)


def format_csv(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV text, in which no cell is a formula to a spreadsheet.

    A text that begins with ``=``, ``+``, ``-`` or ``@`` and is no number gets an apostrophe before it (OWASP: CSV
    injection); control characters are shown.
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([_quote_formula(cell) for cell in row] for row in rows)
    return buffer.getvalue()


def _quote_formula(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    shown = show_controls(cell)
    return f"'{shown}" if _FORMULA.match(shown) and not _NUMBER.fullmatch(shown) else shown
