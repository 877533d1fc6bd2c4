"""Reports of a comparison: Markdown, one HTML page, LaTeX tables and CSV."""

from __future__ import annotations

from pathlib import Path

from metareg.comparison.archive import ARCHIVE_SUFFIX
from metareg.errors import UnknownNameError, UsageError
from metareg.printable import show_controls
from metareg.reporting import formats
from metareg.reporting.analysis import analyze_comparison
from metareg.util.files import write_text

__all__ = ["FORMATS", "infer_format", "report", "write_report"]

FORMATS = {"markdown": ".md", "html": ".html", "latex": ".tex", "csv": ".csv", "scores": ".scores.csv"}
"""The formats, with the suffixes of their files."""


def report(folder: str | Path, format: str = "markdown", *, inner_steps: int | None = None) -> str:
    """Render the report of a comparison, finished or not.

    Args:
        folder: the comparison's, or the file of its raw results (``metareg report DIR --archive FILE``).
        format: one of `FORMATS`.
        inner_steps: compare after so many inner steps; by default, and for a task that was not tested after so many,
            after the last number that all its arms were tested after.

    Raises:
        UsageError: there is no comparison or no finished run in it, an unknown format, or no run was tested after
            `inner_steps`.
    """
    if format not in FORMATS:
        raise UnknownNameError("format of reports", format, FORMATS)
    render = getattr(formats, f"render_{format}")
    return show_controls(render(analyze_comparison(folder, inner_steps)))


def infer_format(out: Path | None) -> str:
    """Infer the format from a file's suffix; Markdown without one, a `UsageError` for one that no format has."""
    suffixes = {suffix: name for name, suffix in FORMATS.items()} | {"": "markdown", ".htm": "html"}
    suffix = out.suffix.lower() if out else ""
    if out and out.name.lower().endswith(FORMATS["scores"]):
        return "scores"
    if suffix not in suffixes:
        raise UsageError(
            f"No format's files end in {suffix}, but {', '.join(FORMATS.values())}; --format says which it is."
        )
    return suffixes[suffix]


def write_report(folder: str | Path, format: str, out: Path | None = None, *, inner_steps: int | None = None) -> Path:
    """Write a report into a file and return its path.

    By default it is ``report.md`` and its like in the comparison's folder, or beside the file of raw results.
    """
    text = report(folder, format, inner_steps=inner_steps)
    path = _choose_file(Path(folder), FORMATS[format]) if out is None else out
    write_text(path, text)
    return path


def _choose_file(source: Path, suffix: str) -> Path:
    if source.is_file():
        return source.with_name(source.name.removesuffix(ARCHIVE_SUFFIX) + suffix)
    return source / f"report{suffix}"
