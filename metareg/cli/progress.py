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
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.progress_bar import ProgressBar
from rich.table import Table
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


class Progress:
    """Observer: a live bar with what is done, loss, validation metric, steps per second and time left.

    Where the console is no terminal it prints a line at the start, one about every ten seconds, and one per validation.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._run: Run | None = None
        self._numbers = self._validation = ""
        self._began_at = self._validated = 0
        self._printed = 0.0
        self._bar = _WatchingBar(
            self._look,
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Progress:
        self._handler = _add_handler(self._console)
        logging.getLogger("metareg").setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        logging.getLogger("metareg").removeHandler(self._handler)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        self._say(f"{run.config.title} → {run.path}")
        self._began_at = self._validated = run.learner.steps_done
        self._task = self._bar.add_task("", total=run.config.steps, completed=self._began_at, numbers="")
        self._run = run
        self._bar.start()

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        speed = _format_speed(logs["steps_per_second"])
        self._numbers = f"loss {logs['loss']:.4g}{self._validation} · {speed} steps/s"
        if not self._console.is_terminal and time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self._say(f"step {step}: {self._numbers}")

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        self._validated = step
        if split == TEST:
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

    def _look(self) -> None:
        """Bring the bar to where the training stands, which tells its observers only now and then."""
        if self._run is None:
            return
        done = self._run.learner.steps_done
        speed = self._bar.tasks[0].speed
        numbers = self._numbers or (f"{_format_speed(speed)} steps/s" if speed else "")
        self._bar.update(self._task, completed=done, description=self._describe_phase(self._run, done), numbers=numbers)

    def _describe_phase(self, run: Run, done: int) -> str:
        config, strategy = run.config, run.learner.strategy
        if done != self._validated and (done == config.steps or done % (config.eval_every or config.steps) == 0):
            return "validating"
        if done == config.steps:
            return "testing"
        return "compiling" if strategy == "compiled" and done == self._began_at else "training"

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
        return Group(ProgressBar(total=done + left + broken, completed=done, width=48), words, table)


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
