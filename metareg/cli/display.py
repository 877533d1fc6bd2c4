"""What a person sees in the terminal: progress, tables and pages. Without a terminal, plain lines."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.logging import RichHandler
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from metareg.contract.hookspecs import hookimpl
from metareg.runs.folder import RESULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metareg.comparison.pool import Outcome
    from metareg.comparison.reproduction import Recipe
    from metareg.comparison.runner import Comparison
    from metareg.contract.evaluation import Evaluation
    from metareg.contract.tasks import Dataset
    from metareg.registry.plugins import Entry
    from metareg.reporting.tables import Table as ReportTable
    from metareg.runs.run import Run
    from metareg.testing import Check

__all__ = [
    "ComparisonProgress",
    "Progress",
    "check_line",
    "comparison_report",
    "datasets_table",
    "doctor_page",
    "evaluation_table",
    "plugin_page",
    "plugins_table",
    "recipes_table",
    "report",
]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Observer: a live bar with loss, validation metric, steps per second and time left.

    Where the console is no terminal it prints a line at the start, one about every ten seconds, and one per validation.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._validation = ""
        self._printed = 0.0

    def __enter__(self) -> Progress:
        handler = RichHandler(console=self._console, show_time=False, show_path=False, show_level=False)
        if not self._console.is_terminal:
            handler = logging.StreamHandler(self._console.file)  # type: ignore[assignment]
        self._handler = handler
        logger = logging.getLogger("metareg")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        logging.getLogger("metareg").removeHandler(self._handler)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        config = run.config
        names = [config.algo.name, *(choice.name for choice in config.augment)]
        self._say(f"{' + '.join(names)} on {config.task.name}, seed {config.seed} → {run.path}")
        compiling = run.learner.strategy == "compiled"
        self._task = self._bar.add_task("training", total=config.steps, numbers="compiling …" if compiling else "")
        self._bar.start()

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        numbers = f"loss {logs['loss']:.4g}{self._validation} · {_speed(logs['steps_per_second'])} steps/s"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self._say(f"step {step}: {numbers}")

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        if split == "test":
            self._bar.stop()
            return
        inner_steps = evaluation.inner_steps[-1]
        mean, width = evaluation.mean(inner_steps), evaluation.ci95(inner_steps)
        self._validation = f" · validation {evaluation.metric} {mean:.4g}"
        if not self._console.is_terminal:
            self._say(f"step {step}: validation {evaluation.metric} {mean:.4g} ± {width:.2g}")

    @hookimpl
    def on_run_end(self) -> None:
        self._bar.stop()

    def _say(self, line: str) -> None:
        self._console.print(escape(line), soft_wrap=True)


class ComparisonProgress:
    """Watches a comparison: a live table of what runs, what is left and when it ends.

    Where the console is no terminal it prints a line for each run that ends.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._log: logging.Handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)

    def __enter__(self) -> ComparisonProgress:
        if not self._console.is_terminal:
            self._log = logging.StreamHandler(self._console.file)
        logging.getLogger("metareg").addHandler(self._log)
        logging.getLogger("metareg.tuning").setLevel(logging.INFO)  # what is searched, and what was chosen
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        logging.getLogger("metareg").removeHandler(self._log)

    def look(self, comparison: Comparison) -> None:
        """Show where the comparison stands."""
        if self._console.is_terminal:
            self._live.update(self._table(comparison), refresh=True)

    def ended(self, comparison: Comparison, outcome: Outcome) -> None:
        """Say what a run that ended came to."""
        done, left = comparison.finished, comparison.left
        if outcome.error is not None:
            how = "[yellow]failed[/]" if outcome.again else "[yellow]diverged[/]"
            if outcome.run.path in comparison.broken:
                how = "[red]broken[/]"
            self._console.print(f"{how} {escape(f'{outcome.run}: {outcome.error}')}", soft_wrap=True)
        elif not self._console.is_terminal:
            line = f"finished {outcome.run} ({done} of {done + left}{_time_left(comparison)})"
            self._console.print(escape(line), soft_wrap=True)

    def _table(self, comparison: Comparison) -> RenderableType:
        from metareg.comparison.runner import progress_of

        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("running", "seed", "step", "steps/s", "since"):
            table.add_column(column, justify="left" if column == "running" else "right")
        for run, began in comparison.running.values():
            step, speed = progress_of(run)
            chosen_by = "" if run.is_final else f" ({run.path.parent.name})"
            table.add_row(
                escape(f"{run.arm}{chosen_by}"), str(run.seed), str(step) if step else "…",
                _speed(speed) if speed else "", _duration(time.monotonic() - began),
            )  # fmt: skip
        done, left, broken = comparison.finished, comparison.left, len(comparison.broken)
        words = Text.assemble(
            (f"{done} of {done + left + broken} runs", "bold"),
            (f", {broken} broken" if broken else "", "red"),
            _time_left(comparison),
        )
        return Group(ProgressBar(total=done + left + broken, completed=done, width=48), words, table)


def _speed(steps_per_second: float) -> str:
    return f"{steps_per_second:.0f}" if steps_per_second >= 10 else f"{steps_per_second:.2g}"


def _time_left(comparison: Comparison) -> str:
    seconds = comparison.seconds_left
    if not seconds:
        return ""
    end = datetime.now() + timedelta(seconds=seconds)
    return f", about {_duration(seconds)} left, until {end:%H:%M}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def comparison_report(comparison: Comparison, console: Console) -> None:
    """The end of a comparison: its tables, its page, and what is missing."""
    from metareg.reporting import write
    from metareg.reporting.analysis import analyse
    from metareg.reporting.tables import overview

    folder = comparison.plan.folder
    rows: list[tuple[str, object]] = [("comparison", folder)]
    if any(run.finished for run in comparison.plan.runs()):
        analysis = analyse(folder)
        for task in analysis.tasks:
            console.print(_short_table(overview(analysis, task)))
            console.print()
        rows.append(("page", write(folder, "html")))
    for label, value in rows:
        console.print(f"[dim]{label:<12}[/]{escape(str(value))}", soft_wrap=True)
    for outcome in comparison.broken.values():
        console.print(f"[red]broken[/]      {escape(f'{outcome.run}: {outcome.error}')}", soft_wrap=True)
    if comparison.broken:
        again = f"`metareg compare --out {shlex.quote(str(folder))}` tries them again."
        console.print(escape(again), soft_wrap=True)


def _short_table(content: ReportTable) -> Table:
    """A table of a report for the terminal."""
    table = Table(
        box=None, header_style="bold", pad_edge=False, title=content.title, title_justify="left",
        caption=content.note, caption_justify="left",
    )  # fmt: skip
    for number, column in enumerate(content.columns):
        words = number < content.headers or number in content.texts
        table.add_column(column, justify="left" if words else "right", no_wrap=words)
    for row in content.rows:
        table.add_row(*map(escape, row))
    return table


def report(run: Run, console: Console) -> None:
    """The end of a training: the table of the test, and where everything is."""
    assert run.evaluation is not None
    console.print(evaluation_table(run.evaluation, run.config.test_split))
    for label, value in (
        ("run", run.path),
        ("results", run.path / RESULTS),
        *(("plot", path) for path in run.plots),
    ):
        console.print(f"[dim]{label:<8}[/]{escape(str(value))}", soft_wrap=True)


def check_line(check: Check, problem: str | None) -> Text:
    """What one check of a plugin found."""
    if problem is None:
        return Text.assemble(("passed  ", "green"), (f"{check.name:<20}", "bold"), check.summary)
    return Text.assemble(("failed  ", "red"), (f"{check.name:<20}", "bold"), problem)


def evaluation_table(evaluation: Evaluation, split: str = "test") -> Table:
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


def datasets_table(rows: Sequence[tuple[str, Dataset | str]]) -> RenderableType:
    """The data of some tasks, one a row; a text stands for a task that cannot be asked."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("task", "there", "where it is, or how to get it"):
        table.add_column(column, overflow="fold")
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


def recipes_table(recipes: Sequence[Recipe]) -> RenderableType:
    """Recipes, one a row: what they need, what they are expected to reach, and about how long they take."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("recipe", "needs", "expected (95 %)", "on one CPU core"):
        table.add_column(column, overflow="fold", no_wrap=column == "recipe")  # a name is to be copied
    for recipe in recipes:
        needs = ", ".join(filter(None, (recipe.data, "a GPU" if recipe.gpu else None)))
        expected = f"{recipe.metric} unknown"
        if recipe.expected is not None:
            value, interval = recipe.written(recipe.expected.mean), recipe.span(recipe.expected.interval)
            expected = f"{recipe.metric} {value} ({interval})"
        times = f"{len(recipe.seeds)} × " if len(recipe.seeds) > 1 else ""
        table.add_row(*map(escape, (recipe.name, needs or "nothing", expected, times + _about(recipe.minutes))))
    return table


def _about(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 60 * 48 else f"{minutes / 60 / 24:.1f} days"


def plugins_table(rows: list[dict[str, Any]], checked: bool) -> RenderableType:
    """The installed plugins, one a row."""
    if not rows:
        return Text("No plugin is installed or enabled.")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("kind", "name", "distribution", "version", *(("works", "what it is") if checked else ())):
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = [row["kind"], row["name"], row["distribution"], row["version"]]
        if checked:
            cells += ["no", row["broken"]] if row["broken"] else ["yes", row["summary"]]
        table.add_row(*map(escape, cells), style="red" if row["broken"] else None)
    return table


def plugin_page(entry: Entry, cls: type) -> RenderableType:
    """All that there is to know of a plugin."""
    from metareg.contract.search import describe_search_space
    from metareg.registry.dispatch import list_hooks

    parts: list[RenderableType] = [
        Text.assemble((entry.name, "bold"), f"  {entry.distribution} {entry.version}, {entry.target}"),
        Padding(Text(_dedented(cls.__doc__ or "It has no description.")), (1, 0, 1, 2)),
        Text.assemble(("hooks: ", "bold"), ", ".join(list_hooks(cls)) or "none"),
    ]
    fields = getattr(getattr(cls, "Config", None), "model_fields", {})
    if fields:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        searched = entry.kind in ("algorithms", "augmenters")
        for column in ("option", "default", "allowed", *(("a search tries",) if searched else ()), "what it is"):
            table.add_column(column, overflow="fold")
        for name, field in fields.items():
            default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
            cells = [name, default, _allowed(field), field.description or ""]
            if searched:
                cells.insert(
                    3, describe_search_space(f"{entry.kind.removesuffix('s')} '{entry.name}'", name, field) or "nothing"
                )
            table.add_row(*map(escape, cells))
        parts += [Text(), table]
    wishes = getattr(cls, "recommended", {})
    if wishes and isinstance(wishes, Mapping):
        parts += [Text(), _recommended_table(wishes)]
    return Group(*parts)


def _recommended_table(wishes: Mapping[str, Any]) -> Table:
    """What a plugin recommends: options of the run, then those of each owner, then what is for one algorithm alone."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("recommends", "value", "for"):
        table.add_column(column, overflow="fold")
    alone = {name: value for name, value in wishes.items() if isinstance(value, Mapping)}
    general = {key: value for key, value in wishes.items() if key not in alone}
    for algorithm, options in (("", general), *alone.items()):
        for key in sorted(options, key=lambda key: key.rpartition(".")[0]):
            table.add_row(*map(escape, (key, str(options[key]), algorithm or "any algorithm")))
    return table


def doctor_page(rows: list[dict[str, Any]]) -> RenderableType:
    """The state of the installation."""
    import torch

    from metareg.engine.strategies import find_compiler
    from metareg.runs import environment

    machine = environment.describe_machine()
    compiler = find_compiler()
    facts = {
        "metareg": f"{machine['metareg']}, plugin contract {machine['contract']}",
        "python": f"{machine['python']} on {platform.system()} {machine['processor']}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads",
        "GPU": ", ".join(machine["gpus"]) or "none",
        "C++ compiler": compiler or "none: the strategy 'compiled' cannot be used on the CPU",
        **machine["libraries"],
    }
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(name, escape(str(value)))
    broken = sum(bool(row["broken"]) for row in rows)
    verdict = f"{broken} of {len(rows)} plugins do not work." if broken else f"All {len(rows)} plugins work."
    return Group(
        table, Text(), plugins_table(rows, checked=True), Text(), Text(verdict, "bold red" if broken else "green")
    )


def _allowed(field: Any) -> str:
    """The type and bounds of a configuration field, as a reader would write them."""
    kind = getattr(field.annotation, "__name__", str(field.annotation))
    if not isinstance(field.annotation, type):
        kind = str(field.annotation).replace("typing.", "").removeprefix("Literal")
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥", "max_length": "length ≤"}
    bounds = [
        f"{sign} {value}"
        for constraint in field.metadata
        for key, sign in signs.items()
        if (value := getattr(constraint, key, None)) is not None
    ]
    return " ".join([kind, *bounds])


def _dedented(text: str) -> str:
    import inspect

    return inspect.cleandoc(text)
