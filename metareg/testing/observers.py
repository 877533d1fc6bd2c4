"""Checks of observers."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from metareg.contract.episodes import Episodes
from metareg.contract.hookspecs import hookimpl
from metareg.contract.tasks import Task, TaskSpec
from metareg.registry.dispatch import find_hook
from metareg.runs.run import Run
from metareg.runs.training import train
from metareg.testing.benches import Descent
from metareg.testing.check import Subject, are_equal, fail, refuse_global_randomness
from metareg.util.seeding import task_uniform

__all__ = ["check_observer", "check_observer_logs"]


class _Lines(Task):
    """Tasks of lines through the origin, for runs in which only the observer matters."""

    contract = 1
    name = "lines"
    loss = "mse"
    recommended: ClassVar[dict[str, Any]] = {}

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec((1,), (1,))

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> Episodes:
        drawn = torch.from_numpy(task_uniform(seed, split, indices, 9)).float().unsqueeze(-1)
        x, y = drawn[:, 1:], drawn[:, :1] * drawn[:, 1:]
        return Episodes(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])


class _Line:
    """The model for these tasks."""

    contract = 1
    name = "line"

    @hookimpl
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))


def check_observer(subject: Subject) -> None:
    """It observes a complete run, changes nothing, and writes only into the run's folder."""
    results = []
    for observers in ([], [subject.resolve()]):
        with _enter_empty_folder() as folder, refuse_global_randomness(subject, "do not draw random numbers."):
            run = _train_briefly(folder / "run", observers)
            results.append({name: value.clone() for name, value in run.learner.meta_parameters.items()})
            stray = [path.name for path in folder.iterdir() if path.name != "run"]
            if stray:
                fail(
                    f"The {subject.label} wrote '{stray[0]}' outside the run's folder.",
                    "write to run.path, which on_run_start provides.",
                )
    if not are_equal(*results):
        fail(
            f"The {subject.label} changes the weights that a run ends with.",
            "do not change the hooks' arguments.",
        )


def check_observer_logs(subject: Subject) -> None:
    """It accepts logs and evaluations as they are, and does not change them."""
    names = ("loss", "query_loss", "mse", "grad_norm", "steps_per_second", "cml.colearner_metric")
    logs = {name: float(number) for number, name in enumerate(names)}
    plugin = subject.resolve()
    on_step = find_hook(plugin, "on_step")
    if on_step is None:
        return
    with _enter_empty_folder() as folder:
        start = find_hook(plugin, "on_run_start")
        if start is not None:
            start(run=_train_briefly(folder / "run", []))
        given = copy.deepcopy(logs)
        on_step(step=10, logs=given)
        end = find_hook(plugin, "on_run_end")
        if end is not None:
            end(run=_train_briefly(folder / "other", []))
    if given != logs:
        fail(f"The {subject.label} changes the logs that on_step receives.", "copy them: dict(logs).")


def _train_briefly(path: Path, observers: Sequence[Any]) -> Run:
    return train(
        Descent, task=_Lines, model=_Line, out=path, observers=observers, steps=4, meta_batch=2, log_every=2, eval_every=2,
        eval_tasks=2, test_tasks=2, test_inner_steps=[0, 1], device="cpu",
    )  # fmt: skip


@contextmanager
def _enter_empty_folder() -> Iterator[Path]:
    """Create a temporary folder, and make it the working directory while the block runs."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)
