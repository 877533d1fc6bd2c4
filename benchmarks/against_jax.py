"""Times the same training steps in metareg and in JAX: ``python benchmarks/against_jax.py [--only NAME …]``.

Model, meta-parameters, optimiser and number of steps are the same. Before anything is timed, the meta-gradient of one batch
and the weights after some steps on the same tasks are compared in float64. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import torch
from core import image_tasks
from harness import RESULTS, Row, check_same_gradient, interleaved_clocks, machine, paired, report, save
from jax_loops import JaxTraining, conv4, cross_entropy, draw_sinusoids, mse, to_jax, to_torch
from jax_loops import mlp as jax_mlp
from loops import Conv4, Tasks, mlp

from metareg import Episodes, MetaLearner
from metareg.registry.task_source import TaskSource

_CHECKED_STEPS = 20
_STEPS = 1000
"""Steps per turn on sinusoids; with few, the milliseconds in which metareg starts a training would count."""
_TOLERANCE = 1e-9
"""The allowed relative difference of gradients and weights in float64."""


class Stored:
    """Precomputed tasks: `steps` batches that repeat."""

    def __init__(self, tasks: Tasks, batch: int) -> None:
        self.parts, self.batch = tasks, batch

    @property
    def steps(self) -> int:
        return len(self.parts[0]) // self.batch

    def episodes(self, indices: Sequence[int]) -> Episodes:
        count = len(self.parts[0])
        first = indices[0] % count
        chosen = slice(first, first + len(indices))
        if chosen.stop > count:  # the repetition begins among them
            return Episodes(*(part[[index % count for index in indices]] for part in self.parts))
        return Episodes(*(part[chosen] for part in self.parts))

    def for_jax(self) -> Any:
        """Return the same batches as arrays ``[steps, tasks, …]``."""
        return tuple(to_jax(part.unflatten(0, (self.steps, self.batch))) for part in self.parts)


@dataclass(frozen=True)
class Setting:
    """A model, an algorithm and tasks.

    Args:
        create: the model, in float32.
        forward: the same in JAX.
        tasks: batches of `batch` tasks.
        algorithm: its name; `adapts` says the same for JAX.
        draws: whether the tasks are sinusoids, which either side can draw itself.
        at_once: as that of `JaxTraining`.
    """

    create: Callable[[], torch.nn.Module]
    forward: Any
    loss: str
    tasks: Tasks
    batch: int
    inner_lr: float
    inner_steps: int = 1
    algorithm: str = "maml"
    adapts: Sequence[str] = ("",)
    draws: bool = False
    at_once: bool = True
    strategy: str = "compiled"

    def create_learner(self, dtype: torch.dtype, strategy: str | None = None) -> MetaLearner:
        torch.manual_seed(0)
        return MetaLearner(
            self.create().to(dtype), self.algorithm, loss=self.loss, inner_lr=self.inner_lr, inner_steps=self.inner_steps,
            strategy=strategy or self.strategy, head="4" if self.draws else None,
        )  # fmt: skip

    def create_training(self, learner: MetaLearner) -> JaxTraining:
        return JaxTraining(
            learner.meta_parameters, self.forward, {"mse": mse, "cross_entropy": cross_entropy}[self.loss],
            inner_lr=self.inner_lr, inner_steps=self.inner_steps, adapts=self.adapts, at_once=self.at_once,
        )  # fmt: skip

    def convert(self, dtype: torch.dtype) -> Stored:
        return Stored(tuple(p.to(dtype) if p.is_floating_point() else p for p in self.tasks), self.batch)


def check(setting: Setting, name: str) -> None:
    """Check that the two trainings compute the same before they are timed.

    Raises:
        SystemExit: their meta-gradients, or their weights after some steps, differ.
    """
    with jax.enable_x64(True):
        stored = setting.convert(torch.float64)
        learner = setting.create_learner(torch.float64)
        batch = stored.episodes(range(setting.batch))
        learner.initialize(batch.support_x[0])
        training = setting.create_training(learner)
        expected = training.gradient(tuple(to_jax(part) for part in batch.parts))
        # The program of many steps is the one to check: compiling another for this gradient would take as long again.
        gradient = setting.create_learner(torch.float64, "vectorized").meta_gradient(batch)[1]
        check_same_gradient(f"{name}, gradient", gradient, expected, _TOLERANCE)
        steps = min(_CHECKED_STEPS, stored.steps)
        training.train(tuple(part[:steps] for part in stored.for_jax()))
        learner.fit(stored, steps, meta_batch=setting.batch)
        weights = {key: to_torch(value) for key, value in training.meta.items()}
        check_same_gradient(f"{name}, weights after {steps} steps", learner.meta_parameters, weights, _TOLERANCE)


def compare(setting: Setting, name: str, seconds: float, target: float | None) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of a setting: CPU time and wall-clock time, with and without drawing the tasks."""
    check(setting, name)
    stored = setting.convert(torch.float32)
    batches, steps = stored.for_jax(), stored.steps
    learner = setting.create_learner(torch.float32)
    learner.initialize(stored.episodes(range(setting.batch)).support_x[0])
    works: dict[str, tuple[Callable[[int], object], Callable[[int], object]]] = {}
    given = setting.create_training(learner)
    works["tasks given"] = (
        lambda steps: learner.fit(stored, steps, meta_batch=setting.batch),
        lambda _: given.train(batches),
    )
    if setting.draws:
        drawing = setting.create_training(learner)
        draw = partial(draw_sinusoids, tasks=setting.batch, shots=10, dtype="float32")
        source = TaskSource.of("sinusoid")
        works["drawing included"] = (
            lambda steps: learner.fit(source, steps, meta_batch=setting.batch),
            lambda steps: drawing.draw_and_train(steps, draw),
        )
    rows, raw = [], {}
    for what, pair in reversed(works.items()):
        sides = dict(zip(("metareg", "JAX"), pair, strict=True))
        for work in sides.values():
            work(steps)
        times = interleaved_clocks(sides, dict.fromkeys(sides, steps), rounds=100, seconds=seconds)
        for clock in ("CPU time", "wall clock"):
            ours, theirs = ([1e3 * getattr(each, clock.split()[0].lower()) for each in times[side]] for side in sides)
            medians = statistics.median(ours), statistics.median(theirs)
            judged = target if (clock, what) == ("CPU time", "drawing included") else None
            rows.append(Row(f"{name}, {what}", f"JAX, {clock}", *medians, "ms", "ratio", judged, paired(ours, theirs)))
            raw[f"{what}, {clock}"] = {"metareg": ours, "JAX": theirs}
    return rows, raw


def sinusoids(**options: Any) -> Setting:
    """Time steps on 25 sinusoids with 10 support and 10 query points each."""
    (drawn,) = TaskSource.of("sinusoid").episodes("train", range(25 * _STEPS), seed=0)
    parts = tuple(part.contiguous() for part in drawn.parts)
    return Setting(mlp, jax_mlp, "mse", parts, 25, 0.01, draws=True, **options)


def images(at_once: bool) -> Setting:
    """Time steps on 4 tasks of 28×28 noise, 5-way 1-shot, 15 queries per class, with metareg's default strategy."""
    create = partial(Conv4, 32, 28)
    return Setting(create, conv4, "cross_entropy", image_tasks(8, 28, 1, 1), 4, 0.1, at_once=at_once, strategy="auto")


SETTINGS: dict[str, tuple[str, Callable[[], Setting]]] = {
    "maml": ("sinusoid, MAML, 1 inner step", sinusoids),
    "maml-5": ("sinusoid, MAML, 5 inner steps", partial(sinusoids, inner_steps=5)),
    "anil": ("sinusoid, ANIL, 1 inner step", partial(sinusoids, algorithm="anil", adapts=("4.",))),
    "metasgd": ("sinusoid, Meta-SGD, 1 inner step", partial(sinusoids, algorithm="metasgd")),
    "conv4": ("Conv4-32, 28×28, JAX's vmap", partial(images, True)),
    "conv4-map": ("Conv4-32, 28×28, JAX's lax.map", partial(images, False)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="measure these alone")
    parser.add_argument("--seconds", type=float, default=10, help="of the wall clock for each comparison; default 10")
    parser.add_argument("--out", type=Path, default=RESULTS / "jax.json", help="where the results are written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = machine(threads=1)
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    for key in options.only:
        name, create = SETTINGS[key]
        print(f"{name} …", file=sys.stderr, flush=True)
        new_rows, raw[key] = compare(create(), name, options.seconds, 0.75 if key == "maml" else None)
        rows += new_rows
        save(rows, about, {"milliseconds_per_step": raw}, options.out)
    report(rows, about, {"milliseconds_per_step": raw}, options.out)


if __name__ == "__main__":
    main()
