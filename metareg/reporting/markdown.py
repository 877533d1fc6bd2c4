"""A report in Markdown, as GitHub shows it."""

from __future__ import annotations

import re

from markupsafe import Markup

from metareg.reporting import summary, tables
from metareg.reporting.analysis import Report
from metareg.reporting.templating import load_template

__all__ = ["render"]


def render(report: Report) -> str:
    """The whole report; the notes of the comparison stand in it as they are."""
    return load_template("report.md", escape).render(
        report=report,
        notes=Markup(report.results.plan.config.notes.strip()),
        overview=summary.overview(report),
        findings=summary.findings(report),
        caveats=summary.caveats(report),
        tables=tables.collect(report),
        others=[table for table in (tables.gaps(report), tables.environment(report)) if table],
    )


def escape(text: str) -> str:
    """Make Markdown show text as it is; GitHub takes dollars for formulas."""
    return re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", " ".join(text.split()))
