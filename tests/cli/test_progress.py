"""The progress bar of a training shows the current step, not that of the last report to observers."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import torch

from metareg import Evaluation
from metareg.cli.progress import Progress
from metareg.cli.terminal import Terminal

VALIDATION = Evaluation("mse", False, (1,), torch.ones(2, 1), "none", "head")


class Training:
    """A run whose progress a test sets, and the terminal's display of it."""

    def __init__(
        self, *, begun_at: int = 0, strategy: str = "vectorized", terminal: bool = True, width: int = 80
    ) -> None:
        self.learner = SimpleNamespace(steps_done=begun_at, strategy=strategy)
        self.source = SimpleNamespace(scored=0, evaluated_split=None)
        config = SimpleNamespace(title="maml on x", steps=100, eval_every=50, test_tasks=600)
        self._file = io.StringIO()
        self.progress = Progress(Terminal(file=self._file, force_terminal=terminal, width=width))
        self.run: Any = SimpleNamespace(path="runs/x", config=config, learner=self.learner, source=self.source)

    def __enter__(self) -> Training:
        self.progress.__enter__()
        self.progress.on_run_start(self.run)
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.__exit__()

    def look(self, steps_done: int, evaluated_split: str | None = None) -> str:
        """Return the bar's text after some steps, optionally while a split is evaluated."""
        self.source.evaluated_split = evaluated_split
        self.learner.steps_done = steps_done
        self.progress._bar.refresh()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[━╸╺]", "", self._file.getvalue().rpartition("\r")[2]).strip()

    def all_that_was_printed(self) -> str:
        return self._file.getvalue()


def test_the_bar_shows_every_step_and_every_phase() -> None:
    with Training() as training:
        assert re.match(r"training +0/100", training.look(0))
        assert re.match(r"training +1/100", training.look(1))
        training.look(2)
        assert re.match(r"training +3/100 +[\d.]+ steps/s +\d+:\d\d", training.look(3))
        assert re.match(r"validating +50/100", training.look(50, "validation"))
        training.progress.on_evaluation(50, "validation", VALIDATION)
        assert training.source.evaluated_split is None
        training.progress.on_step(50, {"loss": 0.25, "steps_per_second": 12.0})
        assert re.match(r"training +51/100 loss 0.25 · validation mse 1 · 12 steps/s", training.look(51))
        assert re.match(r"validating +100/100", training.look(100, "validation"))
        training.progress.on_evaluation(100, "validation", VALIDATION)
        assert re.match(r"testing +0/600", training.look(100, "test"))
        training.source.scored = 200
        assert re.match(r"testing +200/600", training.look(100, "test"))
        training.progress.on_evaluation(100, "test", VALIDATION)


def test_a_narrow_terminal_cuts_nothing_that_is_shown() -> None:
    with Training(width=70) as training:
        training.progress.on_evaluation(0, "validation", VALIDATION)
        training.progress.on_step(1, {"loss": 0.25, "steps_per_second": 12.0})
        shown = training.look(1)
        assert "…" not in shown
        assert re.match(r"training +1/100 loss 0.25 · validation mse 1", shown)
        assert "steps/s" not in shown


def test_a_resumed_run_begins_where_it_stands() -> None:
    with Training(begun_at=50) as training:
        assert re.match(r"training +50/100", training.look(50))  # it was validated before it stopped


def test_compiling_is_a_phase() -> None:
    with Training(strategy="compiled") as training:
        assert re.match(r"compiling +0/100", training.look(0))
        assert re.match(r"training +1/100", training.look(1))


def test_lines_where_there_is_no_terminal() -> None:
    with Training(terminal=False) as training:
        training.progress.on_step(10, {"loss": 0.5, "steps_per_second": 3.25})
        training.progress.on_evaluation(50, "validation", VALIDATION)
        assert training.all_that_was_printed().splitlines() == [
            "maml on x → runs/x", "step 10: loss 0.5 · 3.2 steps/s", "step 50: validation mse 1 ± 0",
        ]  # fmt: skip


def test_a_resumed_run_without_steps_left_has_no_speed() -> None:
    with Training(begun_at=100, terminal=False) as training:
        training.progress.on_step(100, {"loss": 0.5, "steps_per_second": 0.0})
        assert training.all_that_was_printed().splitlines()[1:] == ["step 100: loss 0.5"]
