"""A report as one HTML page that needs nothing beside itself: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import html
from functools import partial
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

from metareg._version import __version__
from metareg.comparison.statistics import Verdict
from metareg.reporting import figures, summary, tables
from metareg.reporting.analysis import Report
from metareg.reporting.templating import load_template

__all__ = ["render"]

_MOST_COLUMNS = 4
"""How many augmenters a page has room for side by side."""

_SIGNS = {Verdict.BETTER: "▲", Verdict.WORSE: "▼", Verdict.NOT_SHOWN: "○", Verdict.NOT_TESTED: "–"}

# Text, links and code. No headings, which would disturb the page's own; no HTML; no pictures, which would be fetched.
_NOTES = MarkdownIt("zero", {"html": False}).enable(
    ["escape", "entity", "backticks", "emphasis", "link", "autolink", "newline", "list", "fence", "code", "blockquote"]
)


def render(report: Report) -> str:
    """Render the page."""
    differences = [(task.label, figures.draw_differences(report, task)) for task in report.tasks]
    inner_steps = [
        (f"{task.label} (± over {'test tasks, one seed' if task.single else 'seeds'})", panels)
        for task in report.tasks
        if (panels := figures.draw_inner_steps(report, task))
    ]
    curves = [(task.label, figures.draw_learning_curves(report, task)) for task in report.tasks]
    costs = [(task.label, figures.draw_costs(report, task)) for task in report.tasks]
    return load_template("report.html", html.escape).render(
        report=report,
        folder=report.results.plan.folder.resolve().name,
        version=__version__,
        notes=Markup(_NOTES.render(report.results.plan.config.notes.strip())),
        overview=summary.describe_runs(report),
        findings=summary.list_findings(report),
        caveats=summary.describe_tests(report),
        missing=len({gap.path for gap in report.results.gaps}),
        verdicts=_arrange_verdicts(report),
        signs=_SIGNS,
        explain_verdict=tables.explain_verdict,
        differences=[(title, panel) for title, panel in differences if panel],
        inner_steps=inner_steps,
        curves=[(title, panels) for title, panels in curves if panels],
        costs=[(title, panels) for title, panels in costs if panels],
        draw_key=partial(figures.draw_key, report),
        tables=tables.build_all(report),
        gaps=tables.build_gaps(report),
        environment=tables.build_environment(report),
    )


def _arrange_verdicts(report: Report) -> dict[str, Any]:
    """Lay out every pair's verdict: algorithms down and augmenters across, or many augmenters down."""
    algorithms = list(dict.fromkeys(pair.algorithm for pair in report.pairs))
    augmenters = list(dict.fromkeys(pair.augmenter for pair in report.pairs))
    layout = {"tasks": {pair.task: pair.scale for pair in report.pairs}}
    if len(augmenters) > _MOST_COLUMNS:
        pairs = {(pair.task, pair.augmenter, pair.algorithm): pair for pair in report.pairs}
        return layout | {"corner": "augmenter", "rows": augmenters, "columns": algorithms, "pairs": pairs}
    pairs = {(pair.task, pair.algorithm, pair.augmenter): pair for pair in report.pairs}
    return layout | {"corner": "algorithm", "rows": algorithms, "columns": augmenters, "pairs": pairs}
