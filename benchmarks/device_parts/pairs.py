"""MAML against MAML with CML, paired by seed, as many seeds side by side as the device holds.

Conv4-64 on omniglot-small by the CML authors' recipe: 28×28 pixels, 5-way 1-shot, 15 queries, batches of 4 tasks, one inner
step of 0.5, Adam with 1e-3 that forgets its moments every 100 steps, γ = 1, validation every 100 steps, the weights of the
best validation. How many steps there are is decided by the time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from device_parts.jobs import Job, Row
from metareg import MetaLearner, UsageError
from metareg.comparison.statistics import over_seeds
from metareg.registry.plugins import Plugin, resolve

__all__ = ["ARMS", "INNER_STEPS", "choose_task", "list_jobs", "summarise"]

ARMS: Mapping[str, Sequence[Any]] = {"none": (), "cml": (("cml", {"gamma": 1.0}),)}
INNER_STEPS = (1, 5, 10)
"""After which the test measures."""
_TASK = {"ways": 5, "shots": 1, "query": 15, "size": 28, "channels": 1}
_META_BATCH, _VALIDATE_EVERY, _VALIDATION_TASKS = 4, 100, 100
_CHUNK = 20
"""Tasks of an evaluation at once: what many seeds need together stays within the memory."""
_LEARNER: Mapping[str, Any] = {"inner_lr": 0.5, "inner_steps": 1, "outer_lr": 1e-3, "reset_optimizer_every": 100}


@dataclass(frozen=True)
class Size:
    """How much of the recipe: the authors' width and validations, or a few steps that show that it runs."""

    width: int = 64
    validate_every: int = _VALIDATE_EVERY
    validation_tasks: int = _VALIDATION_TASKS
    test_every: int = 500
    test_tasks: int = 300


def choose_task() -> str:
    """omniglot-small, or glyphs where its data is not at hand."""
    try:
        resolve("tasks", "omniglot-small", _TASK).instance.episodes("train", [0], 0)
    except UsageError:
        return "glyphs"
    return "omniglot-small"


def list_jobs(seeds: Sequence[int], task: str, size: Size, strategy: str, device: str, seconds: float) -> list[Job]:
    """A job for each seed, which trains both arms in turns for so many seconds."""
    arguments = {
        "task": task, "size": size, "strategy": strategy, "device": device, "seconds": seconds, "share": 0.85 / len(seeds),
    }  # fmt: skip
    return [Job({"seed": seed}, train_pair, {"seed": seed, **arguments}, seconds + 60) for seed in seeds]


def train_pair(
    seed: int, task: str, size: Size, strategy: str, device: str, seconds: float, share: float
) -> Iterator[Row]:
    """Rows of validations, and of tests with the weights of the best validation until then."""
    began = time.monotonic()
    if torch.device(device).type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share)
    source = resolve("tasks", task, _TASK)
    arms = {name: _Arm(_create_learner(source, name, size, seed, strategy, device), source, size) for name in ARMS}
    longest_block = longest_test = 0.0
    while True:
        block = time.monotonic()
        for arm in arms.values():
            arm.train()
        step = next(iter(arms.values())).learner.steps_done
        row: Row = {"step": step, "validation": {name: arm.scores[-1] for name, arm in arms.items()}}
        longest_block = max(longest_block, time.monotonic() - block)
        left = seconds - (time.monotonic() - began)
        last = left < 1.2 * longest_block + 1.5 * longest_test
        # The first test shows how long one takes.
        if last or not longest_test or step % size.test_every == 0:
            test = time.monotonic()
            row["test"] = {name: arm.test() for name, arm in arms.items()}
            row["best_step"] = {name: arm.best_step for name, arm in arms.items()}
            longest_test = max(longest_test, time.monotonic() - test)
        yield row | {"status": "done" if last else "training", "seconds": round(time.monotonic() - began, 1)}
        if last:
            return


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The differences at each seed's last test, which both its arms took after the same steps; in points of accuracy.

    Args:
        rows: those with a test.
    """
    tests: dict[int, dict[int, Row]] = {}
    for row in rows:
        tests.setdefault(row["seed"], {})[row["step"]] = row
    last = [of_seed[max(of_seed)] for _, of_seed in sorted(tests.items())]
    summary: dict[str, Any] = {"seeds": [row["seed"] for row in last], "steps": [row["step"] for row in last]}
    for steps in INNER_STEPS:
        scores = {name: [100 * row["test"][name][str(steps)] for row in last] for name in ARMS}
        differences = [cml - none for none, cml in zip(scores["none"], scores["cml"], strict=True)]
        estimate = over_seeds(differences)
        summary[f"after {steps}"] = {
            **{name: over_seeds(values).mean for name, values in scores.items()}, "difference": estimate.mean,
            "half": estimate.half, "in_favour": sum(each > 0 for each in differences), "pairs": len(differences),
            "by_seed": differences,
        }  # fmt: skip
    return summary


class _Arm:
    """A training, the weights of its best validation, and its scores."""

    def __init__(self, learner: MetaLearner, source: Plugin, size: Size) -> None:
        self.learner, self.scores = learner, list[float]()
        self.best_step = 0
        self._source, self._size = source.instance, size
        self._best_state: Mapping[str, Any] = {}

    def train(self) -> None:
        """A block of steps and the validation after it."""
        self.learner.fit(self._source, self._size.validate_every, meta_batch=_META_BATCH)
        evaluation = self.learner.evaluate(
            self._source, self._size.validation_tasks, split="validation", inner_steps=(1,)
        )
        if evaluation.mean(1) > max(self.scores, default=-1.0):
            self.best_step = self.learner.steps_done
            self._best_state = _copy_state(self.learner)
        self.scores.append(evaluation.mean(1))

    def test(self) -> dict[str, float]:
        """The accuracy of the best weights after each of `INNER_STEPS`; the training goes on from where it was."""
        state = _copy_state(self.learner)
        self.learner.load_state(self._best_state)
        evaluation = self.learner.evaluate(self._source, self._size.test_tasks, inner_steps=INNER_STEPS)
        self.learner.load_state(state)
        return {str(steps): evaluation.mean(steps) for steps in INNER_STEPS}


def _copy_state(learner: MetaLearner) -> dict[str, Any]:
    return copy.deepcopy(learner.state())


def _create_learner(source: Plugin, arm: str, size: Size, seed: int, strategy: str, device: str) -> MetaLearner:
    return MetaLearner(
        "conv4", "maml", ARMS[arm], spec=source.instance.spec, model_options={"width": size.width}, seed=seed,
        strategy=strategy, chunk=_CHUNK, device=device, **_LEARNER,
    )  # fmt: skip
