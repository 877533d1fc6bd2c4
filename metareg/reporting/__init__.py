"""Reports of a comparison: Markdown, one HTML page, LaTeX tables and CSV."""

from __future__ import annotations

import importlib
from pathlib import Path

from metareg.errors import UnknownNameError, UsageError
from metareg.reporting.analysis import analyse
from metareg.util.files import write_text

__all__ = ["FORMATS", "format_of", "report", "write"]

FORMATS = {"markdown": ".md", "html": ".html", "latex": ".tex", "csv": ".csv"}
"""The formats, with the suffixes of their files."""

_MODULES = {"csv": "tidy"}


def report(folder: str | Path, format: str = "markdown", *, inner_steps: int | None = None) -> str:
    """The report of a comparison, finished or not.

    Args:
        folder: the comparison's.
        format: one of `FORMATS`.
        inner_steps: compare after so many inner steps; by default, and for a task that was not tested after so many,
            after the last number that all its arms were tested after.

    Raises:
        UsageError: there is no comparison or no finished run in it, an unknown format, or no run was tested after
            `inner_steps`.
    """
    if format not in FORMATS:
        raise UnknownNameError("format of reports", format, FORMATS)
    module = importlib.import_module(f"metareg.reporting.{_MODULES.get(format, format)}")
    text: str = module.render(analyse(folder, inner_steps))
    return text


def format_of(out: Path | None) -> str:
    """The format that a file's name asks for; Markdown where it asks for none.

    Raises:
        UsageError: it asks for one that there is not.
    """
    suffixes = {suffix: name for name, suffix in FORMATS.items()} | {"": "markdown", ".htm": "html"}
    suffix = out.suffix.lower() if out else ""
    if suffix not in suffixes:
        raise UsageError(
            f"No format's files end in {suffix}, but {', '.join(FORMATS.values())}; --format says which it is."
        )
    return suffixes[suffix]


def write(folder: str | Path, format: str, out: Path | None = None, *, inner_steps: int | None = None) -> Path:
    """Write a report into a file, by default ``report.md`` and its like in the comparison's folder; return its path."""
    text = report(folder, format, inner_steps=inner_steps)
    path = Path(folder, f"report{FORMATS[format]}") if out is None else out
    write_text(path, text)
    return path
