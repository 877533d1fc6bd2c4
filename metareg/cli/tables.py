"""What trainings, tests and comparisons came to, for the terminal; and tables of data and recipes."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from metareg.contract.splits import TEST
from metareg.runs.folder import RESULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metareg.comparison.reproduction import Recipe
    from metareg.comparison.runner import Comparison
    from metareg.contract.evaluation import Evaluation
    from metareg.contract.tasks import Dataset
    from metareg.reporting.tables import Table as ReportTable
    from metareg.runs.run import Run

__all__ = [
    "create_dataset_table",
    "create_evaluation_table",
    "create_recipe_table",
    "create_table",
    "print_comparison",
    "print_results",
]


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The end of a comparison: its tables, its page, and what is missing."""
    from metareg.reporting import write_report
    from metareg.reporting.analysis import analyze_comparison
    from metareg.reporting.tables import build_overview

    folder = comparison.plan.folder
    rows: list[tuple[str, object]] = [("comparison", folder)]
    if any(run.finished for run in comparison.plan.list_runs()):
        analysis = analyze_comparison(folder)
        for task in analysis.tasks:
            console.print(_create_short_table(build_overview(analysis, task)))
            console.print()
        rows.append(("page", write_report(folder, "html")))
    for label, value in rows:
        console.print(f"[dim]{label:<12}[/]{escape(str(value))}", soft_wrap=True)
    for outcome in comparison.broken.values():
        console.print(f"[red]broken[/]      {escape(f'{outcome.run}: {outcome.error}')}", soft_wrap=True)
    if comparison.broken:
        again = f"`metareg compare --out {shlex.quote(str(folder))}` tries them again."
        console.print(escape(again), soft_wrap=True)


def _create_short_table(content: ReportTable) -> Table:
    """A table of a report for the terminal."""
    table = create_table(title=content.title, title_justify="left", caption=content.note, caption_justify="left")
    for number, column in enumerate(content.columns):
        words = content.is_text(number)
        table.add_column(column, justify="left" if words else "right", no_wrap=words)
    for row in content.rows:
        table.add_row(*map(escape, row))
    return table


def create_table(*columns: str, **layout: Any) -> Table:
    """A table without lines, whose columns fold."""
    folding = (Column(name, overflow="fold") for name in columns)
    return Table(*folding, box=None, header_style="bold", pad_edge=False, **layout)


def print_results(run: Run, console: Console) -> None:
    """The end of a training: the table of the test, and where everything is."""
    assert run.evaluation is not None
    console.print(create_evaluation_table(run.evaluation, run.config.test_split))
    plots = (("plot", path) for path in run.plots)
    for label, value in (("run", run.path), ("results", run.path / RESULTS), *plots):
        console.print(f"[dim]{label:<8}[/]{escape(str(value))}", soft_wrap=True)


def create_evaluation_table(evaluation: Evaluation, split: str = TEST) -> Table:
    """The metric before and after each number of inner steps."""
    better = "higher" if evaluation.higher_is_better else "lower"
    statistics = "" if evaluation.bn_statistics == "none" else f", BatchNorm {evaluation.bn_statistics}"
    table = Table(
        title=f"{split.capitalize()} over {evaluation.tasks} tasks ({better} is better{statistics})",
        title_justify="left",
    )
    table.add_column("inner steps", justify="right")
    table.add_column(evaluation.metric, justify="right")
    table.add_column("95 % interval", justify="right")
    for k in evaluation.inner_steps:
        mean, width = evaluation.mean(k), evaluation.ci95(k)
        table.add_row("0 (before)" if k == 0 else str(k), f"{mean:.4f}", f"± {width:.4f}")
    return table


def create_dataset_table(rows: Sequence[tuple[str, Dataset | str]]) -> RenderableType:
    """The data of some tasks, one a row; a text stands for a task that cannot be asked."""
    table = create_table("task", "there", "where it is, or how to get it")
    for name, dataset in rows:
        if isinstance(dataset, str):
            table.add_row(escape(name), "?", escape(dataset), style="red")
            continue
        location = "" if dataset.location is None else str(dataset.location)
        if dataset.present:
            table.add_row(escape(name), "[green]yes[/]", escape(location or dataset.obtain))
        else:
            fetch = f" metareg data {name} --download puts it into" if dataset.download else " It belongs into"
            table.add_row(escape(name), "no", escape(f"{dataset.obtain}{fetch} {location}."))
    return table


def create_recipe_table(recipes: Sequence[Recipe]) -> RenderableType:
    """Recipes, one a row: what they need, what they are expected to reach, and about how long they take."""
    table = create_table("recipe", "needs", "expected (95 %)", "on one CPU core")
    table.columns[0].no_wrap = True  # a name is to be copied
    for recipe in recipes:
        needs = ", ".join(filter(None, (recipe.data, "a GPU" if recipe.gpu else None)))
        expected = f"{recipe.metric} unknown"
        if recipe.expected is not None:
            value, interval = (
                recipe.format_value(recipe.expected.mean),
                recipe.format_interval(recipe.expected.interval),
            )
            expected = f"{recipe.metric} {value} ({interval})"
        times = f"{len(recipe.seeds)} × " if len(recipe.seeds) > 1 else ""
        table.add_row(
            *map(escape, (recipe.name, needs or "nothing", expected, times + _format_minutes(recipe.minutes)))
        )
    return table


def _format_minutes(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 60 * 48 else f"{minutes / 60 / 24:.1f} days"
