"""The formats of a report: Markdown, one HTML page, LaTeX tables, and a CSV of the scores."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from metareg._version import __version__
from metareg.comparison.statistics import Verdict, over_tasks
from metareg.printable import format_csv
from metareg.reporting import tables
from metareg.reporting.analysis import Report, describe_runs, describe_tests, list_findings
from metareg.reporting.paper import build_paper_table
from metareg.reporting.tables import Table

__all__ = [
    "render_csv",
    "render_html",
    "render_latex",
    "render_markdown",
    "render_pairs",
    "render_paper",
    "render_scores",
]


def _render(name: str, report: Report, escape: Callable[[str], str], *, delimiters: Any = None, **values: Any) -> str:
    """Render a template; `escape` is applied to every inserted value that is not `Markup`."""

    def finalize(value: object) -> Markup:
        return value if isinstance(value, Markup) else Markup(escape(str(value)))

    environment = Environment(
        loader=PackageLoader("metareg.reporting"),
        autoescape=True,  # so that macros return markup
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **delimiters or {},
    )
    return environment.get_template(name).render(report=report, **values)


def _describe(report: Report) -> dict[str, Any]:
    """Return the values that the Markdown and HTML templates share."""
    return {
        "overview": describe_runs(report),
        "findings": list_findings(report),
        "caveats": describe_tests(report),
        "tables": tables.build_all(report),
        "gaps": tables.build_gaps(report),
        "environment": tables.build_environment(report),
    }


# ------------------------------------------------------------------------------------------------------------------ CSV

_CSV_COLUMNS = (
    "task", "algorithm", "augmenter", "variant", "seed", "inner_steps", "metric", "higher_is_better", "mean", "ci95",
    "tasks",
)  # fmt: skip


def render_csv(report: Report) -> str:
    """Render a row for every task, arm, seed and number of inner steps.

    `ci95` is half the 95 % interval over tasks (Student's t) of that seed's mean.
    """
    rows: list[Sequence[object]] = [_CSV_COLUMNS]
    for task in report.tasks:
        better = str(task.higher_is_better).lower()
        for each in task.arms:
            arm = (task.label, each.arm.algorithm, each.arm.augmenter, each.arm.variant)
            for number in each.inner_steps:
                for seed, scores in each.by_seed(number).items():
                    test = (float(scores.mean()), over_tasks([scores]).half, len(scores))
                    rows.append((*arm, seed, number, task.metric, better, *test))
    return format_csv(rows)


_SCORE_COLUMNS = ("task", "algorithm", "augmenter", "variant", "seed", "inner_steps", "test_task", "score")


def render_scores(report: Report) -> str:
    """Render the raw results: a row for every score; ``test_task`` counts a seed's test tasks from 0."""
    rows: list[Sequence[object]] = [_SCORE_COLUMNS]
    for task in report.tasks:
        for each in task.arms:
            for number in each.inner_steps:
                for seed, scores in each.by_seed(number).items():
                    run = (task.label, each.arm.algorithm, each.arm.augmenter, each.arm.variant, seed, number)
                    rows += ((*run, place, score) for place, score in enumerate(scores.tolist()))
    return format_csv(rows)


_PAIR_COLUMNS = (
    "task", "inner_steps", "method", "minus", "difference", "low", "high", "seeds", "in_favour", "p", "p_holm", "verdict",
)  # fmt: skip


def render_pairs(report: Report) -> str:
    """Render a row for every compared pair: the difference with its 95 % interval over seeds, and the test."""
    rows: list[Sequence[object]] = [_PAIR_COLUMNS]
    for pair in report.pairs:
        found, estimate = pair.difference, pair.difference.over_seeds
        names = (pair.arm.task, report.headline[pair.arm.task], pair.arm.name, pair.other.name)
        numbers = (estimate.mean, estimate.low, estimate.high, found.pairs, found.in_favour, found.p, pair.corrected)
        rows.append((*names, *numbers, pair.verdict.value))
    return format_csv(rows)


# ------------------------------------------------------------------------------------------------------------- Markdown


def render_markdown(report: Report) -> str:
    """Render the whole report for GitHub; the comparison's notes and plan are already Markdown."""
    config = report.results.plan.config
    notes, plan = Markup(config.notes.strip()), Markup(config.plan.strip())
    return _render("report.md", report, _escape_markdown, notes=notes, plan=plan, **_describe(report))


def _escape_markdown(text: str) -> str:
    """Escape text for Markdown, including dollars, which GitHub treats as formulas."""
    return re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", " ".join(text.split()))


# ----------------------------------------------------------------------------------------------------------------- HTML

_MOST_COLUMNS = 4
"""Maximum number of settings side by side on a page."""

_VERDICT_SIGNS = {Verdict.BETTER: "▲", Verdict.WORSE: "▼", Verdict.NOT_SHOWN: "○", Verdict.NOT_TESTED: "–"}

# Text, links and code, but no headings (they would mix with the page's), no HTML, and no images (they would be
# fetched).
_NOTES = MarkdownIt("zero", {"html": False}).enable(
    ["escape", "entity", "backticks", "emphasis", "link", "autolink", "newline", "list", "fence", "code", "blockquote"]
)


def render_html(report: Report) -> str:
    """Render one self-contained page, without external scripts, fonts and images."""
    from metareg.reporting import figures  # imports matplotlib, which other formats do not need

    def draw(name: str) -> list[tuple[str, Any]]:
        drawings = [(task, getattr(figures, f"draw_{name}")(report, task)) for task in report.tasks]
        return [(task.label, drawing) for task, drawing in drawings if drawing]

    single = {task.label for task in report.tasks if task.single}
    inner_steps = [
        (f"{label} (± over {'test tasks, one seed' if label in single else 'seeds'})", panels)
        for label, panels in draw("inner_steps")
    ]
    return _render(
        "report.html",
        report,
        html.escape,
        folder=report.results.plan.folder.resolve().name,
        version=__version__,
        notes=Markup(_NOTES.render(report.results.plan.config.notes.strip())),
        plan=Markup(_NOTES.render(report.results.plan.config.plan.strip())),
        missing=len({gap.path for gap in report.results.gaps}),
        verdicts=_arrange_verdicts(report),
        signs=_VERDICT_SIGNS,
        explain_verdict=tables.explain_verdict,
        differences=draw("differences"),
        inner_steps=inner_steps,
        ranking=draw("ranking"),
        curves=draw("learning_curves"),
        costs=draw("costs"),
        draw_key=partial(figures.draw_key, report),
        **_describe(report),
    )


def _arrange_verdicts(report: Report) -> dict[str, Any]:
    """Arrange every pair's verdict: algorithms as rows and settings as columns, or many settings as rows."""
    algorithms = list(dict.fromkeys(pair.arm.algorithm for pair in report.pairs))
    settings = list(dict.fromkeys(pair.arm.setting for pair in report.pairs))
    layout = {"tasks": {pair.arm.task: pair.scale for pair in report.pairs}}
    if len(settings) > _MOST_COLUMNS:
        pairs = {(pair.arm.task, pair.arm.setting, pair.arm.algorithm): pair for pair in report.pairs}
        return layout | {"corner": report.setting_heading, "rows": settings, "columns": algorithms, "pairs": pairs}
    pairs = {(pair.arm.task, pair.arm.algorithm, pair.arm.setting): pair for pair in report.pairs}
    return layout | {"corner": "algorithm", "rows": algorithms, "columns": settings, "pairs": pairs}


# ---------------------------------------------------------------------------------------------------------------- LaTeX

_DELIMITERS = {
    "block_start_string": "<%", "block_end_string": "%>", "variable_start_string": "<<", "variable_end_string": ">>",
    "comment_start_string": "<#", "comment_end_string": "#>",
}  # fmt: skip

_GREEK = "αβγδεζηθικλμνξπρστυφχψωςΓΔΘΛΞΠΣΥΦΨΩ"
_GREEK_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega "
    "varsigma Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
)
_LATEX_SIGNS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\ensuremath{<}", ">": r"\ensuremath{>}",
    "|": r"\textbar{}", '"': "''", "±": r"\ensuremath{\pm}", "\N{MINUS SIGN}": r"\ensuremath{-}",
    "–": "--", "×": r"\ensuremath{\times}", "…": r"\ldots{}", "→": r"\ensuremath{\to}", "←": r"\ensuremath{\gets}",
    "↑": r"\ensuremath{\uparrow}", "↓": r"\ensuremath{\downarrow}",
    "≤": r"\ensuremath{\le}", "≥": r"\ensuremath{\ge}", "≈": r"\ensuremath{\approx}", "∞": r"\ensuremath{\infty}",
    **{sign: rf"\ensuremath{{\{name}}}" for sign, name in zip(_GREEK, _GREEK_NAMES.split(), strict=True)},
    **dict(zip("οΑΒΕΖΗΙΚΜΝΟΡΤΧ", "oABEZHIKMNOPTX", strict=True)),
}  # fmt: skip

_LATEX_KNOWN = frozenset("¡¿£¥€§¶©®°·²³µ†‡•‘’“”—ßÆæØøŒœŁłı")
"""Characters that LaTeX sets unchanged in all its fonts, in addition to accented letters."""

_OMITTED_COLUMNS = {"95 % over tasks", "p"}
_SHORT_HEADINGS = {"95 % over seeds": "95 %", "seeds in favour": "in favour"}
"""Omitted columns and short headings with which the table of paired differences fits on paper."""


def render_latex(report: Report) -> str:
    """Render the results, differences and costs of every task as tables for ``\\input``; they need booktabs and graphicx."""
    entries = []
    first: dict[str, str] = {}
    """For every key, the label of the first table with it, to which the others refer."""
    for number, task in enumerate(report.tasks, 1):
        differences = tables.build_differences(report, task)
        for name, what, table in (
            ("results", "Results", tables.build_results(report, task)),
            ("differences", "Paired differences", differences and _fit_on_paper(differences)),
            ("ranking", "Ranking", tables.build_ranking(report, task)),
            ("costs", "Time and memory", tables.build_costs(report, task)),
        ):
            if table is not None:
                label = f"tab:{name}-{number}"
                entries.append((what, label, table, first.setdefault(table.key, label)))
    return _render("report.tex", report, _escape_latex, delimiters=_DELIMITERS, entries=entries)


def render_paper(report: Report, format: str, over: Literal["seeds", "tasks"]) -> str:
    """Render one table of methods and tasks in LaTeX or Markdown."""
    latex = format == "latex"
    escape, bold = (_escape_latex, (r"\textbf{", "}")) if latex else (_escape_markdown, ("**", "**"))
    table = build_paper_table(report, over)
    rows = [
        (name, [cell.mark_up(escape, bold) for cell in cells])
        for name, cells in zip(table.methods, table.cells, strict=True)
    ]
    name, delimiters = ("paper.tex", _DELIMITERS) if latex else ("paper.md", None)
    return _render(name, report, escape, delimiters=delimiters, table=table, rows=rows)


def _fit_on_paper(differences: Table) -> Table:
    table = differences.without(_OMITTED_COLUMNS)
    return replace(table, columns=[_SHORT_HEADINGS.get(column, column) for column in table.columns])


def _escape_latex(text: str) -> str:
    """Escape text for LaTeX."""
    return "".join(_LATEX_SIGNS.get(sign) or _replace_unknown(sign) for sign in " ".join(text.split()))


def _replace_unknown(sign: str) -> str:
    """Return a character as it is, or as its number if LaTeX would fail."""
    parts = unicodedata.normalize("NFD", sign)
    accented = sign < "\u0180" and parts[0].isascii() and "\N{COMBINING OGONEK}" not in parts
    return sign if accented or sign in _LATEX_KNOWN else f"[U+{ord(sign):04X}]"
