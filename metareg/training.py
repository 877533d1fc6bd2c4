"""The training loop: steps, logging, validation, and the observers that hear of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch.utils import _pytree as pytree

from metareg.config import PluginConfig
from metareg.episodes import Episodes
from metareg.registry import Plugin, resolve
from metareg.sources import TaskSource
from metareg.stages import plugin_manager

if TYPE_CHECKING:
    from metareg.learner import MetaLearner

__all__ = ["Schedule", "fit", "observed"]

Observer = Any
_PREFETCHED_BYTES = 4 << 20
_PREFETCHED_STEPS = 100


class Schedule(PluginConfig):
    """When what happens in training."""

    steps: int = Field(ge=1, description="Train until so many steps are done.")
    meta_batch: int = Field(ge=1, description="Tasks per step.")
    log_every: int = Field(100, ge=1, description="Steps between two calls of on_step.")
    eval_every: int | None = Field(None, ge=1, description="Steps between validations.")
    eval_tasks: int = Field(100, ge=2, description="Validation tasks each time.")


def observed(observers: Sequence[Any]) -> Any:
    """The hooks of some observers, objects or plugins, as one caller: ``observed([…]).on_step(step=…, logs=…)``."""
    plugins = [each if isinstance(each, Plugin) else resolve("observers", each) for each in observers]
    return plugin_manager(plugins)[0].hook


def fit(learner: MetaLearner, source: TaskSource, schedule: Schedule, observers: Sequence[Any] = ()) -> None:
    """Train a learner on the split ``"train"`` until `schedule.steps` steps are done.

    Step n takes the tasks n·meta_batch … (n+1)·meta_batch − 1, so that a training that goes on from a step sees what an
    uninterrupted one sees.

    Raises:
        DivergenceError: a loss or gradient is not finite; the learner is as it was before that step.
    """
    hooks = observed(observers)
    learner.choose_strategy(schedule.meta_batch, schedule.steps, source.stackable)
    window = _Window()
    for episodes in _training_batches(learner, source, schedule):
        gradient = learner.take_step(episodes)
        window.add(gradient.loss, gradient.logs)
        step = learner.steps_done
        if step % schedule.log_every == 0 or step == schedule.steps:
            learner.logs = window.means()
            hooks.on_step(step=step, logs=learner.logs)
        if schedule.eval_every and (step % schedule.eval_every == 0 or step == schedule.steps):
            evaluation = learner.evaluate(
                source, schedule.eval_tasks, split="validation", inner_steps=(learner.config.inner_steps,)
            )
            hooks.on_evaluation(step=step, split="validation", evaluation=evaluation)


def _training_batches(learner: MetaLearner, source: TaskSource, schedule: Schedule) -> Iterator[list[Episodes]]:
    """The batches of the steps to come, drawn in blocks: many small tasks cost little more at once than one."""
    seed, size = learner.config.seed, schedule.meta_batch

    def drawn(step: int, steps: int) -> list[Episodes]:
        return source.episodes("train", range(step * size, (step + steps) * size), seed)

    step, block = learner.steps_done, 1
    while step < schedule.steps:
        block = min(block, schedule.steps - step)
        batches = drawn(step, block)
        if len(batches) == 1:
            for start in range(0, block * size, size):
                yield [batches[0][start : start + size]]
        else:  # tasks of unequal sizes come in groups, where a step's own tasks stand only if it is drawn alone
            yield from (drawn(each, 1) for each in range(step, step + block))
        step += block
        block = _steps_to_prefetch(batches, size) if len(batches) == 1 else 1


def _steps_to_prefetch(batches: list[Episodes], size: int) -> int:
    leaves = pytree.tree_leaves(batches[0].parts)
    bytes_per_step = sum(leaf.numel() * leaf.element_size() for leaf in leaves) * size // len(batches[0])
    return max(1, min(_PREFETCHED_STEPS, _PREFETCHED_BYTES // max(1, bytes_per_step)))


class _Window:
    """Means of the logged tensors since the last report."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        self._since = time.perf_counter()

    def add(self, loss: torch.Tensor, logs: dict[str, torch.Tensor]) -> None:
        if self._sums:
            self._sums["loss"] += loss
            for name, value in logs.items():
                self._sums[name] += value
        else:
            self._sums = {"loss": loss.clone()} | {name: value.clone() for name, value in logs.items()}
        self._count += 1

    def means(self) -> dict[str, float]:
        now = time.perf_counter()
        means = {name: value.item() / self._count for name, value in self._sums.items()}
        means["steps_per_second"] = self._count / (now - self._since)
        self._sums, self._count, self._since = {}, 0, now
        return means
