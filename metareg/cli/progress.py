"""Trainings and comparisons as they go on: live in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from metareg.cli.terminal import LogHandler
from metareg.contract.hookspecs import hookimpl
from metareg.contract.splits import TEST

if TYPE_CHECKING:
    from metareg.comparison.pool import Outcome
    from metareg.comparison.runner import Comparison
    from metareg.contract.evaluation import Evaluation
    from metareg.runs.run import Run

__all__ = ["ComparisonProgress", "Progress", "show_messages"]

_SECONDS_BETWEEN_LINES = 10.0
_LEAST_BAR = 4
"""Columns that are left to the bar itself."""


class Progress:
    """Observer: a live bar with what is done, loss, validation metric, steps per second and time left.

    Where the console is no terminal it prints a line at the start, one about every ten seconds, and one per validation.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._run: Run | None = None
        self._logged: list[str] = []
        self._validation = ""
        self._began_at = self._validated = 0
        self._printed = 0.0
        self._bar = _WatchingBar(
            self._look,
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            # Long enough for an estimate from steps that take minutes.
            speed_estimate_period=1800,
        )

    def __enter__(self) -> Progress:
        self._handler = _add_handler(self._console)
        logging.getLogger("metareg").setLevel(logging.INFO)
        self._task = self._bar.add_task("preparing", total=None, count="", numbers="")
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        logging.getLogger("metareg").removeHandler(self._handler)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        self._say(f"{run.config.title} → {run.path}")
        self._began_at = self._validated = run.learner.steps_done
        self._bar.reset(self._task, total=run.config.steps, completed=self._began_at)
        self._run = run

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        self._logged = [f"loss {logs['loss']:.4g}", f"{_format_speed(logs['steps_per_second'])} steps/s"]
        if not self._console.is_terminal and time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self._say(f"step {step}: {' · '.join(self._logged)}")

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        self._validated = step
        if split == TEST:
            self._bar.stop()
            return
        inner_steps = evaluation.inner_steps[-1]
        mean, width = evaluation.mean(inner_steps), evaluation.ci95(inner_steps)
        self._validation = f"validation {evaluation.metric} {mean:.4g}"
        if not self._console.is_terminal:
            self._say(f"step {step}: validation {evaluation.metric} {mean:.4g} ± {width:.2g}")

    @hookimpl
    def on_run_end(self) -> None:
        self._bar.stop()

    def _look(self) -> None:
        """Bring the bar to where the training stands, which tells its observers only now and then."""
        if self._run is None:
            return
        run, task = self._run, self._bar.tasks[0]
        done = run.learner.steps_done
        phase = self._find_phase(run, done)
        if phase == "testing":
            if task.description != phase:
                self._bar.reset(self._task, total=run.config.test_tasks, description=phase)
            done = run.source.scored
        count = f"{done:>{len(str(task.total))}}/{task.total}"
        numbers = self._choose_numbers(task, phase)
        self._bar.update(self._task, completed=done, description=phase, count=count, numbers=numbers)

    def _find_phase(self, run: Run, done: int) -> str:
        config, strategy = run.config, run.learner.strategy
        if done != self._validated and (done == config.steps or done % (config.eval_every or config.steps) == 0):
            return "validating"
        if done == config.steps:
            return "testing"
        return "compiling" if strategy == "compiled" and done == self._began_at else "training"

    def _choose_numbers(self, task: Task, phase: str) -> str:
        """As many numbers as there is room for beside a short bar, the most telling first."""
        if phase == "testing":
            return self._validation
        loss, speed = self._logged or ("", f"{_format_speed(task.speed)} steps/s" if task.speed else "")
        numbers = [each for each in (loss, self._validation, speed) if each]
        others = len(f"validating {_LEAST_BAR * '━'} {task.total}/{task.total}  0:00:00 ")
        while len(numbers) > 1 and len(" · ".join(numbers)) > self._console.width - others:
            numbers.pop()
        return " · ".join(numbers)

    def _say(self, line: str) -> None:
        self._console.print(escape(line), soft_wrap=True)


class _WatchingBar(Bar):
    """A bar that looks before it is drawn, some times a second, rather than wait to be told."""

    def __init__(self, look: Callable[[], None], *columns: ProgressColumn, **options: Any) -> None:
        self._look = look
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, as things stand."""
        self._look()
        yield from super().get_renderables()


class ComparisonProgress:
    """Watches a comparison: a live table of what runs, what is left and when it ends.

    Where the console is no terminal it prints a line for each run that ends.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> ComparisonProgress:
        self._handler = _add_handler(self._console)
        logging.getLogger("metareg.tuning").setLevel(logging.INFO)  # what is searched, and what was chosen
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        logging.getLogger("metareg").removeHandler(self._handler)

    def on_progress(self, comparison: Comparison) -> None:
        """Show where the comparison stands."""
        if self._console.is_terminal:
            self._live.update(self._create_table(comparison), refresh=True)

    def on_run_end(self, comparison: Comparison, outcome: Outcome) -> None:
        """Say what a run that ended came to."""
        done, left = comparison.finished, comparison.left
        if outcome.error is not None:
            how = "[yellow]failed[/]" if outcome.again else "[yellow]diverged[/]"
            if outcome.run.path in comparison.broken:
                how = "[red]broken[/]"
            self._console.print(f"{how} {escape(f'{outcome.run}: {outcome.error}')}", soft_wrap=True)
        elif not self._console.is_terminal:
            line = f"finished {outcome.run} ({done} of {done + left}{_format_time_left(comparison)})"
            self._console.print(escape(line), soft_wrap=True)

    def _create_table(self, comparison: Comparison) -> RenderableType:
        from metareg.comparison.runner import read_progress

        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("running", "seed", "step", "steps/s", "since"):
            table.add_column(column, justify="left" if column == "running" else "right")
        for run, began in comparison.running.values():
            step, speed = read_progress(run)
            chosen_by = "" if run.is_final else f" ({run.path.parent.name})"
            table.add_row(
                escape(f"{run.arm}{chosen_by}"), str(run.seed), str(step) if step else "…",
                _format_speed(speed) if speed else "", _format_duration(time.monotonic() - began),
            )  # fmt: skip
        done, left, broken = comparison.finished, comparison.left, len(comparison.broken)
        words = Text.assemble(
            (f"{done} of {done + left + broken} runs", "bold"),
            (f", {broken} broken" if broken else "", "red"),
            _format_time_left(comparison),
        )
        head = Table.grid(padding=(0, 1))
        head.add_row(ProgressBar(total=done + left + broken, completed=done, width=24), words)
        return Group(head, table)


@contextmanager
def show_messages(console: Console) -> Iterator[None]:
    """Show on a console, for a block, what metareg logs."""
    log = logging.getLogger("metareg")
    handler = _add_handler(console)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _add_handler(console: Console) -> logging.Handler:
    """Show on a console what metareg logs."""
    handler = LogHandler(console)
    logging.getLogger("metareg").addHandler(handler)
    return handler


def _format_speed(steps_per_second: float) -> str:
    return f"{steps_per_second:.0f}" if steps_per_second >= 10 else f"{steps_per_second:.2g}"


def _format_time_left(comparison: Comparison) -> str:
    seconds = comparison.seconds_left
    if not seconds:
        return ""
    end = datetime.now() + timedelta(seconds=seconds)
    return f", about {_format_duration(seconds)} left, until {end:%H:%M}"


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
