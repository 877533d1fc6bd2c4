"""Tables that the commands print: results, plugins, data, recipes and the installation."""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from metareg.contract.splits import TEST
from metareg.printable import format_count
from metareg.runs.folder import RESULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metareg.comparison.recipe import Recipe
    from metareg.comparison.runner import Comparison
    from metareg.contract.evaluation import Evaluation
    from metareg.registry.inspection import DatasetFacts
    from metareg.registry.plugins import Entry
    from metareg.reporting.tables import Table as ReportTable
    from metareg.runs.adaptation import Analysis, Mean
    from metareg.runs.baselines import Baseline
    from metareg.runs.run import Run
    from metareg.testing import Check

__all__ = [
    "create_analysis_tables",
    "create_baseline_overview",
    "create_baseline_table",
    "create_dataset_table",
    "create_evaluation_table",
    "create_plugin_table",
    "create_recipe_overview",
    "create_recipe_table",
    "create_row_table",
    "describe_check",
    "describe_installation",
    "describe_plugin",
    "print_comparison",
    "print_results",
]

_PADDING = (0, 2, 0, 0)
_LEAST_VERDICT = 9
"""Minimum width of a table's last column, in characters."""


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a comparison's tables, the path of its page, and what is missing."""
    from metareg.reporting import write_report
    from metareg.reporting.analysis import analyze_comparison
    from metareg.reporting.tables import build_overview

    folder = comparison.plan.folder
    rows = [("comparison", folder)]
    if any(run.finished for run in comparison.plan.list_runs()):
        analysis = analyze_comparison(folder)
        for task in analysis.tasks:
            overview = build_overview(analysis, task)
            console.print(_create_short_table(overview, console.width))
            console.print(escape(overview.note), style="table.caption")
            console.print()
        rows.append(("page", write_report(folder, "html")))
    for label, value in rows:
        console.print(f"[dim]{label:<12}[/]{escape(str(value))}", soft_wrap=True)
    for outcome in comparison.broken.values():
        console.print(f"[red]broken[/]      {escape(f'{outcome.run}: {outcome.error}')}", soft_wrap=True)
    if comparison.broken:
        again = f"Run `metareg compare --out {shlex.quote(str(folder))}` to try them again."
        console.print(escape(again), soft_wrap=True)


def _create_short_table(content: ReportTable, width: int) -> Table:
    """Fit a report's table into `width` characters: only the last column, the verdict, wraps."""
    *wholes, _ = zip(content.columns, *content.rows, strict=True)
    taken = sum(max(map(len, cells)) + len("  ") for cells in wholes)
    # If the cells are too wide, put the part in brackets on a second line.
    separator = " (" if taken + _LEAST_VERDICT <= width else "\n("
    table = _create_table(title=content.title, title_justify="left")
    last = len(content.columns) - 1
    for number, column in enumerate(content.columns):
        justify: Literal["left", "right"] = "left" if content.is_text(number) else "right"
        table.add_column(column.replace(" (", separator), justify=justify, no_wrap=number < last)
    for row in content.rows:
        table.add_row(*(escape(cell.replace(" (", separator)) for cell in row[:last]), escape(row[last]))
    return table


def _create_table(*columns: str, **layout: Any) -> Table:
    """Create a table without lines, whose columns wrap."""
    folding = (Column(name, overflow="fold") for name in columns)
    return Table(*folding, box=None, header_style="bold", pad_edge=False, **layout)


def print_results(run: Run, console: Console) -> None:
    """Print the table of a run's test, and the paths of its files."""
    assert run.evaluation is not None
    console.print(create_evaluation_table(run.evaluation, run.config.test_split, run.evaluation_one_by_one))
    plots = (("plot", path) for path in run.plots)
    for label, value in (("run", run.path), ("results", run.path / RESULTS), *plots):
        console.print(f"[dim]{label:<8}[/]{escape(str(value))}", soft_wrap=True)


def create_analysis_tables(found: Analysis) -> Iterator[Table]:
    """Create the tables of each layer's relative update, the metric with parts adapted, and the augmenters' angles."""

    def write(each: Mean) -> str:
        return f"{each.mean:.4g} ± {each.ci95:.2g}"

    last = found.inner_steps
    updates = _create_table(
        "layer",
        "part",
        "‖change‖ / ‖start‖",
        title=f"What {format_count(last, 'inner step')} change",
        title_justify="left",
    )
    for layer in found.layers:
        updates.add_row(escape(layer.layer), layer.part, write(layer.relative[-1]))
    yield updates
    better = "higher" if found.higher_is_better else "lower"
    title = f"{found.metric} over {found.tasks} tasks ({better} is better)"
    scores = _create_table("tasks", "adapted", "0 steps", format_count(last, "step"), title=title, title_justify="left")
    for name, means in found.adapting.items():
        scores.add_row("test", name, write(means[0]), write(means[-1]))
    scores.add_row("training", "all", write(found.train[0]), write(found.train[-1]))
    yield scores
    if found.angles:
        title = f"Outer gradient of {found.augmenters} against the algorithm's"
        angles = _create_table("part", "degrees", "length", title=title, title_justify="left")
        for angle in found.angles:
            angles.add_row(angle.part, write(angle.degrees), write(angle.ratio))
        yield angles


def create_evaluation_table(evaluation: Evaluation, split: str = TEST, one_by_one: Evaluation | None = None) -> Table:
    """Create the table of the metric before and after each number of inner steps.

    Args:
        evaluation: the test.
        split: its tasks' split.
        one_by_one: the same test with one prediction at a time, if that differs.
    """
    better = "higher" if evaluation.higher_is_better else "lower"
    statistics = "" if evaluation.bn_statistics == "none" else f", BatchNorm {evaluation.bn_statistics}"
    predictor = "" if evaluation.predictor == "head" else f", predicted by {evaluation.predictor}"
    title = f"{split.capitalize()} over {evaluation.tasks} tasks ({better} is better{statistics}{predictor})"
    table = Table(title=title, title_justify="left")
    table.add_column("inner steps", justify="right")
    table.add_column(evaluation.metric, justify="right")
    table.add_column("95 % interval", justify="right")
    shown = [evaluation]
    captions = []
    if one_by_one is not None:
        shown.append(one_by_one)
        table.add_column("one by one", justify="right")
        table.add_column("95 % interval", justify="right")
        captions.append(
            "One by one: BatchNorm uses the support set's statistics, as in `metareg predict` and `export`."
        )
    for k in evaluation.inner_steps:
        cells = [cell for each in shown for cell in _format_score(each, k)]
        table.add_row("0 (before)" if k == 0 else str(k), *cells)
        if diverged := max(each.count_diverged(k) for each in shown):
            captions.append(
                f"After {format_count(k, 'inner step')} {diverged} of {evaluation.tasks} tasks have no finite score."
            )
    table.caption, table.caption_justify = "\n".join(captions) or None, "left"
    return table


def _format_score(evaluation: Evaluation, inner_steps: int) -> tuple[str, str]:
    """Format the mean and its interval if every task has a finite score."""
    if evaluation.count_diverged(inner_steps):
        return "[red]diverged[/]", ""
    return f"{evaluation.mean(inner_steps):.4f}", f"± {evaluation.ci95(inner_steps):.4f}"


def create_baseline_table(run: Run, baselines: Sequence[Baseline]) -> Table:
    """Create the table of baselines on a run's test tasks, and of the run's advantage, paired by task."""
    from metareg.util.intervals import compute_half_width

    assert run.evaluation is not None
    tested = run.evaluation
    own = run.config.inner_steps if run.config.inner_steps in tested.inner_steps else tested.inner_steps[-1]
    better = "higher" if tested.higher_is_better else "lower"
    table = Table(title=f"Baselines on the same {tested.tasks} tasks ({better} is better)", title_justify="left")
    for heading in ("", "steps", "step size", tested.metric, "95 % interval", f"{run.config.algo.name} is better by"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_row(run.config.algo.name, str(own), "", f"{tested.mean(own):.4g}", f"± {tested.ci95(own):.4g}", "")
    sign = 1 if tested.higher_is_better else -1
    for each in baselines:
        found = each.evaluation
        gain = sign * (tested.get_scores(own) - found.get_scores(each.steps))
        cells = f"{found.mean(each.steps):.4g}", f"± {found.ci95(each.steps):.4g}"
        difference = f"{gain.mean().item():.4g} ± {compute_half_width(gain.numpy()):.4g}"
        table.add_row(each.name, str(each.steps), f"{each.rate:g}", *cells, difference)
    return table


def create_baseline_overview(measured: Sequence[tuple[str, Sequence[Baseline]]]) -> Table:
    """Create the table of baselines on a comparison's tasks: means over seeds.

    Args:
        measured: for each seed, the task and its baselines.
    """
    import numpy as np

    from metareg.util.intervals import compute_half_width

    scores: dict[tuple[str, str, str], list[float]] = {}
    for task, baselines in measured:
        for each in baselines:
            better = "higher" if each.evaluation.higher_is_better else "lower"
            key = (task, each.name, f"{each.evaluation.metric} ({better} is better)")
            scores.setdefault(key, []).append(each.evaluation.mean(each.steps))
    table = Table(title="Baselines on the same test tasks, over seeds", title_justify="left")
    for heading in ("task", "baseline", "metric", "mean", "95 % interval", "seeds"):
        table.add_column(heading, justify="left" if heading in ("task", "baseline", "metric") else "right")
    for (task, name, metric), means in scores.items():
        values = np.array(means)
        half = f"± {compute_half_width(values):.4g}" if len(means) > 1 else ""
        table.add_row(escape(task), name, metric, f"{values.mean():.4g}", half, str(len(means)))
    return table


def create_dataset_table(rows: Sequence[tuple[str, DatasetFacts | str]]) -> RenderableType:
    """Create the table of tasks' data, one task per row; a string is the error of a task that does not work."""
    table = _create_table("task", "there", "location, or how to get it")
    for name, dataset in rows:
        if isinstance(dataset, str):
            table.add_row(escape(name), "?", escape(dataset), style="red")
            continue
        location = dataset.location or ""
        if dataset.present:
            table.add_row(escape(name), "[green]yes[/]", escape(location or dataset.obtain))
        else:
            fetch = f"metareg data {name} --download downloads it to" if dataset.downloadable else " It belongs in"
            table.add_row(escape(name), "no", escape(f"{dataset.obtain}{fetch} {location}."))
    return table


def create_recipe_overview(recipes: Sequence[Recipe]) -> RenderableType:
    """Create the table of recipes with a row per task: their number, methods, requirements and approximate times."""
    from metareg.comparison.plan import Arm

    table = _create_table("task", "recipes", "methods", "needs", "one CPU core", padding=_PADDING)
    table.columns[0].no_wrap = True  # users copy the name
    table.columns[1].justify = "right"
    by_task: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        by_task.setdefault(recipe.task, []).append(recipe)
    for task, found in by_task.items():
        methods = dict.fromkeys(Arm(recipe.algo, recipe.augment, task).name for recipe in found)
        needs = dict.fromkeys(recipe.data or "nothing" for recipe in found)
        gpus = sum(recipe.gpu for recipe in found)
        if gpus:
            needs["a GPU" if gpus == len(found) else f"a GPU for {gpus}"] = None
        minutes = sorted(recipe.minutes for recipe in found if recipe.minutes is not None)
        times = " to ".join(dict.fromkeys([_format_minutes(minutes[0]), _format_minutes(minutes[-1])]))
        table.add_row(*map(escape, (task, str(len(found)), ", ".join(methods), ", ".join(needs), times)))
    return Group(table, Text("\n`metareg reproduce --task TASK` lists the recipes of a task."))


def create_recipe_table(recipes: Sequence[Recipe]) -> RenderableType:
    """Create the table of a task's recipes, one per row: expected value and approximate time, and what they need."""
    gpus = {recipe.gpu for recipe in recipes}
    columns = ["recipe", f"{recipes[0].metric} (95 %)", "one CPU core", *(["needs"] if len(gpus) > 1 else [])]
    table = _create_table(*columns, padding=_PADDING)
    table.columns[0].no_wrap = True  # users copy the name
    for recipe in recipes:
        expected = "unknown"
        if recipe.expected is not None:
            expected = recipe.format_value(recipe.expected.mean)
            if recipe.expected.interval is not None:
                expected += f" ({recipe.format_interval(recipe.expected.interval)})"
        times = f"{len(recipe.seeds)} × " if len(recipe.seeds) > 1 else ""
        needs = ["a GPU" if recipe.gpu else ""][: len(gpus) - 1]
        table.add_row(*map(escape, (recipe.name, expected, times + _format_minutes(recipe.minutes), *needs)))
    shared = dict.fromkeys([*(recipe.data for recipe in recipes), "a GPU" if gpus == {True} else None])
    all_need = " and ".join(filter(None, shared)) or "no data"
    return Group(table, Text(f"\nThey need {all_need}. The values are the expected ones, with their 95 % intervals."))


def create_row_table(rows: Mapping[str, Recipe]) -> RenderableType:
    """Create the table of a comparison's rows: the value of each, and the approximate time of its runs."""
    table = _create_table("row", "value (95 %)", "one CPU core")
    table.columns[0].no_wrap = True  # users copy the name
    for name, recipe in rows.items():
        value = "not finite"
        if recipe.expected is not None:
            value = recipe.format_value(recipe.expected.mean)
            if recipe.expected.interval is not None:
                value += f" ± {recipe.format_value(recipe.expected.interval[1] - recipe.expected.mean)}"
        table.add_row(*map(escape, (name, value, f"{len(recipe.seeds)} × {_format_minutes(recipe.minutes)}")))
    return table


def _format_minutes(minutes: float | None) -> str:
    if minutes is None:
        return "unknown"
    if minutes < 1:
        return f"{max(1, round(60 * minutes))} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 60 * 48 else f"{minutes / 60 / 24:.1f} days"


def describe_check(check: Check, problem: str | None) -> Text:
    """Describe the result of one check of a plugin."""
    result = ("passed  ", "green") if problem is None else ("failed  ", "red")
    return Text.assemble(result, (f"{check.name:<20}", "bold"), problem or check.summary)


def create_plugin_table(rows: list[dict[str, Any]], checked: bool) -> RenderableType:
    """Create the table of plugins, one per row; if `checked`, with summaries, and with errors below the table."""
    if not rows:
        return Text("No plugin is installed or enabled.")
    if not checked:
        columns = ("kind", "name", "distribution", "version")
        table = _create_table(*columns)
        for row in rows:
            table.add_row(*(escape(row[column]) for column in columns))
        return table
    table = _create_table("kind", "name", "works", padding=_PADDING, expand=True)
    table.add_column("what it is", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        works, summary = ("no", "see below") if row["broken"] else ("yes", row["summary"])
        table.add_row(row["kind"], escape(row["name"]), works, escape(summary), style="red" if row["broken"] else None)
    return Group(table, *(Text(f"\n{row['broken']}", "red") for row in rows if row["broken"]))


def describe_plugin(entry: Entry, cls: type) -> RenderableType:
    """Describe a plugin: its docstring, hooks, options and recommendations."""
    parts: list[RenderableType] = [
        Text.assemble((entry.name, "bold"), f"  {entry.distribution} {entry.version}, {entry.target}"),
        Padding(_reflow(inspect.cleandoc(str(cls.__doc__ or "") or "It has no description.")), (1, 0, 1, 2)),
        *(Text.assemble((f"{label}: ", "bold"), value) for label, value in _describe_nature(entry, cls).items()),
    ]
    fields = getattr(getattr(cls, "Config", None), "model_fields", {})
    if fields:
        parts += [Text(), Text("options", "bold"), *_describe_options(entry, fields)]
    recommended = getattr(cls, "recommended", {})
    if recommended and isinstance(recommended, Mapping):
        parts += [Text(), _create_recommendation_table(recommended)]
    return Group(*parts)


def _describe_nature(entry: Entry, cls: type) -> dict[str, str]:
    """Return the hooks, and for an algorithm also what it adapts, its order and its costs."""
    from metareg.registry.costs import SETTING, describe_order, find_cost
    from metareg.registry.dispatch import list_hooks

    hooks = {"hooks": ", ".join(list_hooks(cls)) or "none"}
    if entry.kind != "algorithms":
        return hooks
    cost = find_cost(entry)
    beside_maml = f"{cost} ({SETTING})" if cost else "not measured"
    return {
        "adapts": getattr(cls, "adapts", "all"),
        "order": describe_order(cls),
        "cost relative to MAML": beside_maml,
        **hooks,
    }


def _describe_options(entry: Entry, fields: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield, for each option, a line with its default and allowed values, then its description."""
    from metareg.cli.option_types import describe_type
    from metareg.contract.search import describe_search_space

    for name, field in fields.items():
        default = "required" if field.is_required() else _format_value(field.get_default(call_default_factory=True))
        facts = [describe_type(field)]
        if entry.kind in ("algorithms", "augmenters"):
            searched = describe_search_space(f"{entry.kind.removesuffix('s')} '{entry.name}'", name, field)
            facts += [f"a search tries {searched}"] if searched else []
        yield Text.assemble((name, "bold"), f" = {default}  ", (f"({'; '.join(facts)})", "dim"))
        yield Padding(Text(field.description or ""), (0, 0, 0, 4))


def _format_value(value: Any) -> str:
    """Format a value in the syntax of ``--set``."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _reflow(text: str) -> RenderableType:
    """Join each paragraph and list item of a docstring into one line, so that the console wraps it."""
    paragraphs: list[tuple[int, str]] = []
    open_to = None
    for line in text.splitlines():
        words, indent = line.strip(), len(line) - len(line.lstrip())
        if words and indent == open_to and not words.startswith(("- ", ">>>", "=")):
            paragraphs[-1] = (paragraphs[-1][0], f"{paragraphs[-1][1]} {words}")
            continue
        paragraphs.append((indent, words))
        open_to = None if not words else indent + 2 * words.startswith("- ")
    return Group(*(Padding(Text(words), (0, 0, 0, indent)) for indent, words in paragraphs))


def _create_recommendation_table(recommended: Mapping[str, Any]) -> Table:
    """Create the table of a plugin's recommendations: for the run, for its plugins, and for single algorithms."""
    table = _create_table("recommends", "value", "for", padding=_PADDING)
    alone = {name: value for name, value in recommended.items() if isinstance(value, Mapping)}
    general = {key: value for key, value in recommended.items() if key not in alone}
    for algorithm, options in (("", general), *alone.items()):
        for key in sorted(options, key=lambda key: key.rpartition(".")[0]):
            table.add_row(*map(escape, (key, str(options[key]), algorithm or "any algorithm")))
    return table


_DEVELOPMENT_EXTRAS = {"bench", "dev", "docs", "test"}


def _describe_extras() -> str:
    """Say which extras of metareg lack a package: plugins that need one are listed, but cannot be used without it."""
    from metareg.runs.environment import find_version

    missing = set()
    for requirement in importlib.metadata.requires("metareg") or []:
        found = re.fullmatch(r"([\w.-]+).*\bextra == ['\"](\w+)['\"]", requirement)
        if found is not None and found[2] not in _DEVELOPMENT_EXTRAS and find_version(found[1]) is None:
            missing.add(found[2])
    return f"not installed: {', '.join(sorted(missing))} (pip install 'metareg[NAME]')" if missing else "all installed"


def describe_installation(rows: list[dict[str, Any]]) -> RenderableType:
    """Describe the installation: versions, hardware and plugins."""
    from metareg.runs.environment import describe_machine

    machine = describe_machine()
    facts = {
        "metareg": f"{machine['metareg']}, plugin contract {machine['contract']}",
        "python": f"{machine['python']} on {platform.system()} {machine['processor']}",
        "torch": f"{machine['torch']}, {machine['torch_threads']} of {machine['cpu_count']} CPU threads",
        "GPU": ", ".join(machine["gpus"]) or "none",
        "C++ compiler": machine["compiler"]
        or "none: on a CPU, the strategy 'compiled' cannot be used, and image models train more slowly",
        **machine["libraries"],
        "extras": _describe_extras(),
    }
    table = _create_table(show_header=False, padding=_PADDING)
    for name, value in facts.items():
        table.add_row(name, escape(str(value)))
    broken = sum(bool(row["broken"]) for row in rows)
    verdict = (
        f"{broken} of {format_count(len(rows), 'plugin')} cannot be used."
        if broken
        else f"All {len(rows)} plugins work."
    )
    style = "bold red" if broken else "green"
    return Group(table, Text(), create_plugin_table(rows, checked=True), Text(), Text(verdict, style))
