"""A report as one HTML page that needs nothing beside itself: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from markdown_it import MarkdownIt

from metareg._version import __version__
from metareg.comparison.statistics import Verdict
from metareg.reporting import figures, summary, tables
from metareg.reporting.analysis import Pair, Report
from metareg.reporting.tables import Table, verdict_note

__all__ = ["render"]

_MOST_ACROSS = 4
"""How many augmenters a page has room for side by side."""

_SIGNS = {Verdict.BETTER: "▲", Verdict.WORSE: "▼", Verdict.NOT_SHOWN: "○", Verdict.NOT_TESTED: "–"}

# Text, links and code. No headings, which would disturb the page's own; no HTML; no pictures, which would be fetched.
_NOTES = MarkdownIt("zero", {"html": False}).enable(
    ["escape", "entity", "backticks", "emphasis", "link", "autolink", "newline", "list", "fence", "code", "blockquote"]
)


def render(report: Report) -> str:
    """The page."""
    gaps, environment = tables.gaps(report), tables.environment(report)
    sections = [
        ("summary", "Summary", _summary(report)),
        ("differences", "Paired differences", _differences(report)),
        ("results", "Results", _tables("Results", [tables.results(report, task) for task in report.tasks])),
        ("inner-steps", "Inner steps", _inner_steps(report)),
        ("curves", "Learning curves", _curves(report)),
        ("costs", "Time and memory", _costs(report)),
        ("settings", "Chosen settings", _tables("Settings", [tables.settings(task) for task in report.results.tasks])),
        ("missing", "Missing runs", _table(gaps, gaps.title) if gaps else ""),
        ("commands", "Commands", _commands(report)),
        ("environment", "Environment", _table(environment, environment.title) if environment.rows else ""),
    ]
    present = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in present)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{content}</section>'
        for name, title, content in present
    )
    notes = report.results.plan.config.notes.strip()
    folder = report.results.plan.folder.resolve().name
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta name="generator" content="metareg {__version__}">\n'
        # Stands for a picture of its own, without which browsers ask the server for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{_css()}</style>\n</head>\n<body>\n"
        f'<header><p class="kind">Comparison report</p><h1>{escape(report.title)}</h1>'
        f'<p class="facts">{escape(folder)} · {report.results.finished} of {report.results.planned} runs · metareg '
        f"{__version__}</p></header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>\n'
        + (f'<div class="notes">{_NOTES.render(notes)}</div>\n' if notes else "")
        + f"{body}\n</main>\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------------------------------------------------- sections


def _summary(report: Report) -> str:
    parts = [f'<p class="lead">{escape(summary.overview(report))}</p>']
    if report.results.gaps:
        count = len({gap.path for gap in report.results.gaps})
        parts.append(
            f'<p class="warning">{count} run{"" if count == 1 else "s"} missing, diverged, broken or damaged: '
            '<a href="#missing">which, and why</a>.</p>'
        )
    parts.append(_verdicts(report))
    for finding in summary.findings(report):
        items = "".join(f"<li>{escape(line)}</li>" for line in finding.tasks)
        parts.append(f"<h3>{escape(finding.augmenter)}</h3><p>{escape(finding.sentence)}</p><ul>{items}</ul>")
    return "".join([*parts, f'<p class="note">{escape(summary.caveats(report))}</p>'])


def _verdicts(report: Report) -> str:
    """Every pair's verdict at a glance: algorithms down, augmenters across, or many augmenters down."""
    if not report.pairs:
        return ""
    cells = {(pair.task, pair.algorithm, pair.augmenter): pair for pair in report.pairs}
    down = list(dict.fromkeys(pair.algorithm for pair in report.pairs))
    across = list(dict.fromkeys(pair.augmenter for pair in report.pairs))
    transposed = len(across) > _MOST_ACROSS
    if transposed:
        down, across = across, down
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in across)
    body = ""
    for task, scale in {pair.task: pair.scale for pair in report.pairs}.items():
        unit = f'<span class="ends">{escape(scale.metric)}, {scale.better}</span>'
        title = f'<th scope="rowgroup" colspan="{len(across) + 1}">{escape(task)} {unit}</th>'
        body += f'<tbody><tr class="task">{title}</tr>'
        for name in down:
            found = [cells.get((task, other, name) if transposed else (task, name, other)) for other in across]
            row = "".join("<td></td>" if pair is None else f"<td>{_verdict_cell(pair)}</td>" for pair in found)
            body += f'<tr><th scope="row">{_name(name)}</th>{row}</tr>'
        body += "</tbody>"
    table = (
        '<table class="verdicts"><caption class="unseen">Each augmenter against none</caption>'
        f'<thead><tr><th scope="col">{"augmenter" if transposed else "algorithm"}</th>{head}</tr></thead>{body}</table>'
    )
    note = (
        "Each augmenter against none: the mean paired difference; in brackets its 95 % interval over two or more seeds, "
        "each by itself."
    )
    return f'{_box(table, "Verdicts")}<p class="note">{note}</p>'


def _verdict_cell(pair: Pair) -> str:
    over_seeds = pair.difference.over_seeds
    lines = []
    if over_seeds.count:
        by = pair.scale.signed(over_seeds) + (" points" if pair.scale.percent else "")
        ends = f' <span class="ends">({pair.scale.interval(over_seeds)})</span>' if over_seeds.count > 1 else ""
        lines.append(f'<span class="by">{by}{ends}</span>')
    note = verdict_note(pair)
    if note:
        lines.append(f'<span class="by ends">{escape(note)}</span>')
    return _chip(pair.verdict) + "".join(lines)


def _chip(verdict: Verdict) -> str:
    name = verdict.name.lower().replace("_", "-")
    return f'<span class="chip {name}"><span aria-hidden="true">{_SIGNS[verdict]}</span> {verdict.value}</span>'


def _differences(report: Report) -> str:
    groups = [("", [panel for task in report.tasks if (panel := figures.draw_differences(report, task))])]
    caption = (
        "Augmenter minus none. Large mark: mean over seeds; line: its 95 % interval over seeds, with an arrow where it "
        "goes on, or dashed the one over test tasks where there is one seed; dots below: the seeds. The mark is filled "
        "where the corrected test calls the augmenter better or worse, hollow where it does not."
    )
    found = [tables.differences(report, task) for task in report.tasks]
    return _figure(report, groups, caption, [], wide=True) + _tables("Paired differences", found)


def _inner_steps(report: Report) -> str:
    caption = (
        "The metric on test tasks. Bars: 95 % intervals, with an arrow where they go on. Numbers of inner steps are evenly "
        "spaced."
    )
    groups = [
        (
            f"{task.label} (± over {'test tasks, one seed' if task.single else 'seeds'})",
            figures.draw_inner_steps(report, task),
        )
        for task in report.tasks
    ]
    return _figure(report, groups, caption, report.augmenters)


def _curves(report: Report) -> str:
    caption = (
        "The metric in validation: the mean over seeds, and its 95 % interval over seeds as a band, which extends further "
        "where the frame cuts it."
    )
    groups = [(task.label, figures.draw_learning_curves(report, task)) for task in report.tasks]
    figure = _figure(report, groups, caption, report.augmenters)
    return figure + _tables("Validation", [tables.validations(task) for task in report.tasks]) if figure else ""


def _costs(report: Report) -> str:
    caption = (
        "Bars of time: the mean over seeds; the thin line at a bar's end: from the least to the most of the seeds. Bars of "
        "memory: the least of the seeds."
    )
    groups = [(task.label, figures.draw_costs(report, task)) for task in report.tasks]
    figure = _figure(report, groups, caption, [])
    return figure + _tables("Time and memory", [tables.costs(task) for task in report.tasks]) if figure else ""


def _commands(report: Report) -> str:
    parts = ["<p>Each trains one run of an arm; SEED stands for the seed.</p>"]
    for task in report.results.tasks:
        rows = "".join(
            f"<dt>{escape(each.arm.name)}</dt><dd><code>{_unbroken(each.command)}</code></dd>" for each in task.arms
        )
        parts.append(f'<h3>{escape(task.label)}</h3><dl class="commands">{rows}</dl>')
    return "".join(parts)


# ------------------------------------------------------------------------------------------------------------- elements


def _unbroken(command: str) -> str:
    """A command whose lines break between options, not within one."""
    return " ".join(f"<span>{escape(part)}</span>" for part in re.split(r" (?=--)", command))


def _tables(section: str, found: Sequence[Table | None]) -> str:
    """Tables below their titles, and once below them what all of them share."""
    present = [table for table in found if table]
    keys = dict.fromkeys(table.key for table in present if table.key)
    return "".join(
        [f"<h3>{escape(table.title)}</h3>{_table(table, f'{section}: {table.title}')}" for table in present]
        + [f'<p class="note">{escape(key)}</p>' for key in keys]
    )


def _table(table: Table, label: str) -> str:
    """A table whose first cell names the row, so that it can stay in sight while the others are scrolled.

    Args:
        table: the table.
        label: what it is called without the headings above, unlike any other of the page.
    """
    places = range(table.headers, len(table.columns))
    kinds = {place: ' class="text"' if place in table.texts else "" for place in places}
    head = "".join(f'<th scope="col"{kinds[place]}>{escape(table.columns[place])}</th>' for place in places)
    rows, before = [], None
    for row in table.rows:
        new_group = table.headers > 1 and before not in (None, row[0])
        before = row[0]
        cells = "".join(f"<td{kinds[place]}>{_words(row[place])}</td>" for place in places)
        name = f'<th scope="row">{_names(row[: table.headers])}</th>'
        rows.append(f"<tr{' class=next' if new_group else ''}>{name}{cells}</tr>")
    corner = f'<th scope="col">{_names(table.columns[: table.headers])}</th>'
    # The note stays where it is while the table is scrolled; the caption is for those who do not see the heading above.
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = f"<thead><tr>{corner}{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return _box(f'<table><caption class="unseen">{escape(label)}</caption>{body}</table>', label) + note


def _words(text: str) -> str:
    """A cell's text, with better and worse in their colours."""
    words = f"{Verdict.BETTER.value}|{Verdict.WORSE.value}"
    return re.sub(rf"^({words})(?= \(|$)", r'<b class="\1">\1</b>', escape(text))


def _names(names: Sequence[str]) -> str:
    return " ".join(f"<span>{_name(name)}</span>" for name in names)


def _name(name: str) -> str:
    """A name that breaks between the augmenters of a chain where there is no room for it."""
    return escape(name).replace("+", "+<wbr>")


def _box(table: str, label: str) -> str:
    """A box that scrolls by itself where the table is wider than the page; with the keyboard too."""
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">{table}</div>'


def _figure(
    report: Report,
    groups: Sequence[tuple[str, Sequence[str]]],
    caption: str,
    augmenters: Sequence[str],
    *,
    wide: bool = False,
) -> str:
    """Panels below the names of their tasks, between one legend and one caption; nothing without a panel."""
    kind = "panels wide" if wide else "panels"
    drawn = "".join(
        '<div class="group">'
        + (f"<h3>{escape(name)}</h3>" if name else "")
        + f'<div class="{kind}">{"".join(panels)}</div></div>'
        for name, panels in groups
        if panels
    )
    keys = "".join(
        f'<li class="key">{figures.draw_key(report, name, caption)} {escape(name)}</li>' for name in augmenters
    )
    legend = f'<ul class="legend" aria-label="Augmenters">{keys}</ul>' if keys else ""
    return f"<figure>{legend}{drawn}<figcaption>{escape(caption)}</figcaption></figure>" if drawn else ""


def _css() -> str:
    return files("metareg.reporting").joinpath("page.css").read_text(encoding="utf-8")
