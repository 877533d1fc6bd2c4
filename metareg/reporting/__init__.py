"""Reports of a comparison: Markdown, one HTML page, LaTeX tables and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from metareg.comparison.archive import ARCHIVE_SUFFIX
from metareg.errors import UnknownNameError, UsageError
from metareg.printable import show_controls
from metareg.reporting import formats
from metareg.reporting.analysis import analyze_comparison
from metareg.util.files import write_text

__all__ = ["FORMATS", "infer_format", "report", "write_report"]

FORMATS = {"markdown": ".md", "html": ".html", "latex": ".tex", "csv": ".csv"} | {
    "scores": ".scores.csv", "pairs": ".pairs.csv",
}  # fmt: skip
"""The formats, with the suffixes of their files."""
LAYOUTS = ("page", "paper")


def report(
    folder: str | Path,
    format: str = "markdown",
    *,
    inner_steps: int | None = None,
    baseline: str | None = None,
    layout: str = "page",
    over: str = "seeds",
) -> str:
    """Render the report of a comparison, finished or not.

    Args:
        folder: the comparison's folder, or the file with its raw results (``metareg report DIR --archive FILE``).
        format: one of `FORMATS`, or the suffix of its files (``"md"``).
        inner_steps: compare after this number of inner steps; by default, as configured in the comparison. Without that,
            and for tasks not tested after it, after the largest number at which all arms were tested.
        baseline: an augmenter, algorithm or variant to compare the others with, or ``"all"`` for all pairs; by default,
            as configured in the comparison.
        layout: ``"page"``, or ``"paper"`` for one table of methods and tasks with the best in bold, in LaTeX or Markdown.
        over: for paper tables, intervals over ``"seeds"`` or ``"tasks"``.

    Raises:
        UsageError: there is no comparison or no finished run in it, the format or baseline is unknown, or no run was
            tested after `inner_steps`.
    """
    format = find_format(format)
    if layout not in LAYOUTS:
        raise UnknownNameError("layout", layout, LAYOUTS)
    if over not in ("seeds", "tasks"):
        raise UnknownNameError("interval", over, ("seeds", "tasks"), "Intervals are over seeds, or over tasks.")
    if layout == "page" and over != "seeds":
        raise UsageError("Intervals over tasks alone are for the layout 'paper'; pages show both.")
    if layout == "paper" and format not in ("latex", "markdown"):
        raise UsageError(f"The layout 'paper' is a table in latex or markdown, not in {format}.")
    analysis = analyze_comparison(folder, inner_steps, baseline)
    if layout == "paper":
        return show_controls(formats.render_paper(analysis, format, cast(Literal["seeds", "tasks"], over)))
    render = getattr(formats, f"render_{format}")
    return show_controls(render(analysis))


def find_format(name: str) -> str:
    """Find a format by its name or its files' suffix: ``md`` is markdown.

    Raises:
        UnknownNameError: there is no such format.
    """
    suffixes = {suffix.removeprefix("."): known for known, suffix in FORMATS.items()}
    if name not in FORMATS and name not in suffixes:
        raise UnknownNameError("format of reports", name, FORMATS)
    return name if name in FORMATS else suffixes[name]


def infer_format(out: Path | None) -> str:
    """Infer the format from a file's suffix; Markdown without a suffix, a `UsageError` for an unknown one."""
    suffixes = {suffix: name for name, suffix in FORMATS.items()} | {"": "markdown", ".htm": "html"}
    suffix = out.suffix.lower() if out else ""
    double = "".join(out.suffixes[-2:]).lower() if out else ""
    if double in suffixes:
        return suffixes[double]
    if suffix not in suffixes:
        raise UsageError(
            f"No format's files end in {suffix}; use {', '.join(FORMATS.values())}, or choose the format with --format."
        )
    return suffixes[suffix]


def write_report(
    folder: str | Path,
    format: str,
    out: Path | None = None,
    *,
    inner_steps: int | None = None,
    baseline: str | None = None,
    layout: str = "page",
    over: str = "seeds",
) -> Path:
    """Write a report into a file and return its path.

    By default, it is ``report`` with the format's suffix, in the comparison's folder or beside the file with raw
    results.
    """
    format = find_format(format)
    text = report(folder, format, inner_steps=inner_steps, baseline=baseline, layout=layout, over=over)
    path = _choose_file(Path(folder), FORMATS[format]) if out is None else out
    write_text(path, text)
    return path


def _choose_file(source: Path, suffix: str) -> Path:
    if source.is_file():
        return source.with_name(source.name.removesuffix(ARCHIVE_SUFFIX) + suffix)
    return source / f"report{suffix}"
