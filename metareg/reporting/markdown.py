"""A report in Markdown, as GitHub shows it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from metareg.reporting import summary, tables
from metareg.reporting.analysis import Report
from metareg.reporting.tables import Table

__all__ = ["render"]


def render(report: Report) -> str:
    """The whole report; the notes of the comparison stand in it as they are."""
    lines = [f"# {_escaped(report.title)}", ""]
    notes = report.results.plan.config.notes.strip()
    if notes:
        lines += [notes, ""]
    lines += ["## Summary", "", _escaped(summary.overview(report)), ""]
    for finding in summary.findings(report):
        lines += [f"**{_escaped(finding.augmenter)}**: {_escaped(finding.sentence)}", ""]
        lines += [f"- {_escaped(line)}" for line in finding.tasks]
        lines.append("")
    lines += [_escaped(summary.caveats(report)), ""]
    lines += _section("Results", [tables.results(report, task) for task in report.tasks])
    lines += _section("Paired differences", [tables.differences(report, task) for task in report.tasks])
    lines += _section("Time and memory", [tables.costs(task) for task in report.tasks])
    lines += _section("Settings chosen on validation tasks", [tables.settings(task) for task in report.results.tasks])
    lines += _section("", [tables.gaps(report), tables.environment(report)])
    lines += ["## Commands", "", "SEED stands for the seed; each trains one run of an arm.", "", "```sh"]
    lines += [each.command for task in report.results.tasks for each in task.arms]
    return "\n".join([*lines, "```", ""])


def _section(title: str, parts: Sequence[Table | None]) -> list[str]:
    """Tables under a heading, each with its own below that; without a title, each with one of the upper level."""
    found = [table for table in parts if table is not None]
    lines = [f"## {title}", ""] if title and found else []
    for table in found:
        lines += [f"{'###' if title else '##'} {_escaped(table.title)}", "", *_table(table), ""]
        lines += [_escaped(table.note), ""] if table.note else []
    for key in dict.fromkeys(table.key for table in found if table.key):
        lines += [_escaped(key), ""]
    return lines


def _table(table: Table) -> list[str]:
    numbers = [number >= table.headers and number not in table.texts for number in range(len(table.columns))]
    rule = ["---:" if number else "---" for number in numbers]
    return [_row(table.columns), f"|{'|'.join(rule)}|", *map(_row, table.rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is; GitHub takes dollars for formulas."""
    return re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", " ".join(text.split()))
