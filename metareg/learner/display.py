"""The progress display of training: a bar in a terminal, a bar and curves in a notebook, plain lines elsewhere."""

from __future__ import annotations

import base64
import html
import importlib
import io
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from metareg.contract.hookspecs import hookimpl
from metareg.contract.splits import TEST, VALIDATION
from metareg.errors import describe_error

if TYPE_CHECKING:
    from metareg.contract.evaluation import Evaluation
    from metareg.learner.config import Schedule
    from metareg.registry.task_source import TaskSource

__all__ = ["NotebookDisplay", "TerminalDisplay", "display_training", "display_training_in_notebook", "format_speed"]

log = logging.getLogger("metareg")

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_UPDATES = 0.5
_LEAST_BAR = 4
"""Minimum width of the bar itself, in characters."""
_REPORTS = 5
"""Number of reports that a notebook shows."""
_STEPS_TO_ESTIMATE_FROM = 3


class Status:
    """The current state of a training, between the reports to observers.

    Args:
        learner: the `metareg.MetaLearner` being trained.
        source: the source of its tasks.
        steps: the number of training steps.
        test_tasks: the number of tasks of the final test.
    """

    def __init__(self, learner: Any, source: TaskSource, steps: int, test_tasks: int = 0) -> None:
        self._learner, self._source = learner, source
        self._steps, self._test_tasks = steps, test_tasks
        self._began_at = learner.steps_done
        source.evaluated_split = None
        self.loss = self.validation = self.speed = ""

    @property
    def phase(self) -> str:
        """``"compiling"``, ``"training"``, ``"validating"`` or ``"testing"``."""
        if self._source.evaluated_split is not None:
            return "validating" if self._source.evaluated_split == VALIDATION else "testing"
        compiling = self._learner.strategy == "compiled" and self.done == self._began_at
        return "compiling" if compiling else "training"

    @property
    def done(self) -> int:
        """The number of finished steps, or of finished tasks of the test."""
        return self._source.scored if self._source.evaluated_split == TEST else self._learner.steps_done

    @property
    def total(self) -> int:
        """The total number of steps, or of tasks of the test."""
        return self._test_tasks if self._source.evaluated_split == TEST else self._steps

    def record_step(self, logs: dict[str, float]) -> None:
        """Record the numbers of a report."""
        speed = logs["steps_per_second"]  # 0 if a resumed run had nothing left to train
        self.loss, self.speed = f"loss {logs['loss']:.4g}", f"{format_speed(speed)} steps/s" if speed else ""

    def record_evaluation(self, split: str, evaluation: Evaluation) -> None:
        """Record a validation's result, or the end of the test."""
        self._source.evaluated_split = None
        if split != TEST:
            self.validation = f"validation {evaluation.metric} {evaluation.mean(evaluation.inner_steps[-1]):.4g}"


class TerminalDisplay:
    """Observer: a live bar with progress, loss, validation metric, steps per second and time left.

    If the console is not a terminal, prints a line at the start, one about every ten seconds, and one per validation.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
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
            # Long enough to estimate the speed of steps that take minutes.
            speed_estimate_period=1800,
        )

    def __enter__(self) -> TerminalDisplay:
        self._task = self._bar.add_task("preparing", total=None, count="", numbers="")
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, status: Status) -> None:
        """Show a training from now on."""
        self._bar.reset(self._task, total=status.total, completed=status.done)
        self._status = status

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        self._say(f"{run.config.title} → {run.path}")
        self.begin(Status(run.learner, run.source, run.config.steps, run.config.test_tasks))

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        assert self._status is not None
        self._status.record_step(logs)
        if not self._console.is_terminal and time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self._say(f"step {step}: {' · '.join(filter(None, (self._status.loss, self._status.speed)))}")

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        assert self._status is not None
        self._status.record_evaluation(split, evaluation)
        if split == TEST:
            self._bar.stop()
        elif not self._console.is_terminal:
            width = evaluation.ci95(evaluation.inner_steps[-1])
            self._say(f"step {step}: {self._status.validation} ± {width:.2g}")

    @hookimpl
    def on_run_end(self) -> None:
        self._bar.stop()

    def _look(self) -> None:
        """Update the bar to the current state."""
        if self._status is None:
            return
        status, task = self._status, self._bar.tasks[0]
        phase, done, total = status.phase, status.done, status.total
        if total != task.total:
            self._bar.reset(self._task, total=total, description=phase)
        count = f"{done:>{len(str(total))}}/{total}"
        numbers = self._choose_numbers(status, task)
        self._bar.update(self._task, completed=done, description=phase, count=count, numbers=numbers)

    def _choose_numbers(self, status: Status, task: Task) -> str:
        """Choose as many numbers as fit beside a short bar, the most important first."""
        if status.phase == "testing":
            return status.validation
        speed = status.speed or (f"{format_speed(task.speed)} steps/s" if task.speed else "")
        numbers = [each for each in (status.loss, status.validation, speed) if each]
        others = len(f"validating {_LEAST_BAR * '━'} {task.total}/{task.total}  0:00:00 ")
        while len(numbers) > 1 and len(" · ".join(numbers)) > self._console.width - others:
            numbers.pop()
        return " · ".join(numbers)

    def _say(self, line: str) -> None:
        self._console.print(escape(line), soft_wrap=True)


class _WatchingBar(Bar):
    """A bar that reads the current state before each refresh, several times a second."""

    def __init__(self, look: Callable[[], None], *columns: ProgressColumn, **options: Any) -> None:
        self._look = look
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the updated bar."""
        self._look()
        yield from super().get_renderables()


class NotebookDisplay:
    """Observer: a bar and the last reports below a notebook's cell, and at the end the curves of loss and validation."""

    def __init__(self) -> None:
        self._status: Status | None = None
        self._title = ""
        self._losses: list[tuple[int, float]] = []
        self._validations: list[tuple[int, float, float]] = []
        self._metric = ""
        self._end = ""
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> NotebookDisplay:
        self._handle = importlib.import_module("IPython.display").display(
            _Html("preparing …", "preparing …"), display_id=f"metareg-{id(self)}"
        )
        self._watching.start()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._end = "trained" if error is None else "stopped after"
        self._ended.set()
        self._watching.join()
        try:
            curves = self._draw()
        except Exception as problem:  # a plot that fails must not end the training
            log.warning("The curves could not be drawn: %s", describe_error(problem))
            curves = ""
        self._handle.update(_Html(self._format() + curves, self._describe()))

    def begin(self, status: Status, title: str = "") -> None:
        """Show a training from now on."""
        self._status, self._title = status, title
        self._began, self._first = time.monotonic(), status.done

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        status = Status(run.learner, run.source, run.config.steps, run.config.test_tasks)
        self.begin(status, f"{run.config.title} → {run.path}")

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        assert self._status is not None
        self._status.record_step(logs)
        self._losses.append((step, logs["loss"]))

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        assert self._status is not None
        self._status.record_evaluation(split, evaluation)
        if split != TEST:
            last = evaluation.inner_steps[-1]
            self._metric = evaluation.metric
            self._validations.append((step, evaluation.mean(last), evaluation.ci95(last)))

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_UPDATES):
            self._handle.update(_Html(self._format(), self._describe()))

    def _describe(self) -> str:
        """Describe the progress, and the time taken or left."""
        status = self._status
        if status is None:
            return "preparing …"
        phase = self._end if self._ended.is_set() else status.phase
        return " · ".join([f"{phase} {status.done:,}/{status.total:,}", *self._describe_time(status)])

    def _format(self) -> str:
        """Format the bar and the last reports as HTML."""
        done, total = (0, 1) if self._status is None else (self._status.done, self._status.total)
        bar = f'<progress value="{done}" max="{max(total, 1)}" style="width: 20em"></progress>'
        validations = {step: f"{mean:.4g} ± {half:.2g}" for step, mean, half in self._validations}
        losses = {step: f"{loss:.4g}" for step, loss in self._losses}
        rows = [
            f"<tr><td>{step:,}</td><td>{losses.get(step, '')}</td><td>{validations.get(step, '')}</td></tr>"
            for step in sorted({*losses, *validations})[-_REPORTS:]
        ]
        heading = f"<tr><th>step</th><th>loss</th><th>validation {html.escape(self._metric)}</th></tr>"
        table = f"<table>{heading}{''.join(rows)}</table>" if rows else ""
        return f"<div>{html.escape(self._title)}</div><div>{bar} {html.escape(self._describe())}</div>{table}"

    def _describe_time(self, status: Status) -> list[str]:
        """Describe the time taken, or an estimate of the time left once a few steps are done."""
        seconds, steps = time.monotonic() - self._began, status.done - self._first
        if self._ended.is_set():
            return [f"{seconds:.0f} s"]
        if status.phase == "testing" or steps < _STEPS_TO_ESTIMATE_FROM:
            return []
        left = math.ceil((status.total - status.done) * seconds / steps)
        return [f"{format_speed(steps / seconds)} steps/s", f"about {left:,} s left"]

    def _draw(self) -> str:
        """Draw the curves as an image; empty if there are none."""
        if len(self._losses) + len(self._validations) < 2:
            return ""
        from matplotlib import rc_context
        from matplotlib.ticker import MaxNLocator

        from metareg.util.plotting import COLOURS, STYLE, create_axes

        with rc_context(STYLE):
            figure, axes = create_axes(6, 3.2)
            axes.plot(*zip(*self._losses, strict=True), color=COLOURS[0], label="training loss")
            if self._validations:
                steps, means, halves = zip(*self._validations, strict=True)
                label = f"validation {self._metric}"
                axes.errorbar(steps, means, halves, fmt="o-", ms=4, capsize=3, color=COLOURS[1], label=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("training step")
            axes.legend()
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=100)
        return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


class _Html:
    """An object that a notebook shows as HTML, or as text if it does not support HTML."""

    def __init__(self, content: str, text: str) -> None:
        self._content, self._text = content, text

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return self._content


def is_notebook() -> bool:
    """Return whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")


@contextmanager
def display_training(learner: Any, source: TaskSource, schedule: Schedule, wanted: bool) -> Iterator[list[Any]]:
    """Show the progress of `MetaLearner.fit` while the block runs; yields the observers to use, if `wanted`."""
    if not wanted:
        yield []
        return
    display = NotebookDisplay() if is_notebook() else TerminalDisplay(Console(stderr=True, highlight=False))
    with display:
        display.begin(Status(learner, source, schedule.steps))
        yield [display]


@contextmanager
def display_training_in_notebook() -> Iterator[list[Any]]:
    """Show a run in a notebook while the block runs; yields the observers to use, none outside notebooks."""
    if not is_notebook():
        yield []
        return
    with NotebookDisplay() as display:
        yield [display]


def format_speed(steps_per_second: float) -> str:
    """Format a speed with two significant digits, or with all digits of its whole part."""
    return f"{steps_per_second:.0f}" if steps_per_second >= 10 else f"{steps_per_second:.2g}"
