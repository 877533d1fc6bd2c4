"""A report in Markdown, as GitHub shows it."""

from __future__ import annotations

import re

from markupsafe import Markup

from metareg.reporting import summary, tables
from metareg.reporting.analysis import Report
from metareg.reporting.templating import load_template

__all__ = ["render"]


def render(report: Report) -> str:
    """Render the whole report; the comparison's notes are Markdown already."""
    return load_template("report.md", escape).render(
        report=report,
        notes=Markup(report.results.plan.config.notes.strip()),
        overview=summary.describe_runs(report),
        findings=summary.list_findings(report),
        caveats=summary.describe_tests(report),
        tables=tables.build_all(report),
        others=[table for table in (tables.build_gaps(report), tables.build_environment(report)) if table],
    )


def escape(text: str) -> str:
    """Make Markdown show text as it is; GitHub takes dollars for formulas."""
    return re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", " ".join(text.split()))
