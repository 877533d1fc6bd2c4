"""Whole training steps: the result of fit in every strategy, compared with a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metareg.errors import MetaregError
from metareg.learner.learner import MetaLearner
from metareg.registry.task_source import TaskSource
from metareg.testing.benches import Bench, Pair, RepeatedTasks
from metareg.testing.check import Subject, fail, find_worst
from metareg.testing.loop import Training, train_in_a_loop

__all__ = ["PRECISIONS", "STRATEGIES", "check_compiled", "check_steps", "compare_pair_steps", "compare_steps"]

STEPS, META_BATCH = 3, 2
"""Three steps: a strategy's first call runs Python, the second traces and runs the graph, the third reuses it."""

Options = Mapping[str, Any]

STRATEGIES: Sequence[Options] = ({"strategy": "serial"}, {"strategy": "traced"}, {"strategy": "vectorized"})
_EVERY_WAY: Sequence[Options] = (
    *STRATEGIES,
    {"strategy": "vectorized", "chunk": 1},
    {"strategy": "serial", "memory": "recompute"},
    {"strategy": "vectorized", "memory": "recompute"},
)
_FIRST_ORDER: Sequence[Options] = ({"strategy": "vectorized", "memory": "recompute", "first_order": True},)
_COMPILED: Sequence[Options] = ({"strategy": "compiled"},)


@dataclass(frozen=True)
class Precision:
    """Tolerances for parameters after steps with different orders of summation.

    Adam takes a full step even for a gradient that is only rounding error, such as that of a bias before BatchNorm, so
    such entries are not compared.
    """

    dtype: torch.dtype
    rounding: float
    """Entries of a gradient below this fraction of the largest can be rounding error."""
    tolerance: float
    """The allowed error of a parameter, relative to its total change."""

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


DOUBLE = Precision(torch.float64, rounding=1e-8, tolerance=1e-5)
# In float32, a ReLU that rounding switches on or off changes gradients by some percent. A wrong kernel, for example one
# that reads a tensor in another layout, causes an error as large as the change itself.
SINGLE = Precision(torch.float32, rounding=1e-3, tolerance=0.5)
PRECISIONS = (DOUBLE, SINGLE)


def check_steps(subject: Subject) -> None:
    """In every strategy, a few steps of fit equal the plain loop over hooks with `torch.optim.Adam`."""
    compare_pair_steps(lambda: Pair.of(subject))


def check_compiled(subject: Subject) -> None:
    """With `torch.compile`, too, a few steps of fit equal the plain loop."""
    _compare_pair(lambda: Pair.of(subject), Pair.of(subject).benches[0], DOUBLE, _COMPILED)


def compare_pair_steps(new_pair: Callable[[], Pair]) -> None:
    """Compare a pair's training in every strategy, each with new plugins, with the plain loop."""
    for bench in new_pair().benches:
        if bench.name == "images":
            _compare_pair(new_pair, bench, SINGLE, STRATEGIES)
        else:
            _compare_pair(new_pair, bench, DOUBLE, _EVERY_WAY)
            _compare_pair(new_pair, bench, DOUBLE, _FIRST_ORDER)


def _compare_pair(new_pair: Callable[[], Pair], bench: Bench, precision: Precision, ways: Sequence[Options]) -> None:
    def new_learner(**options: Any) -> MetaLearner:
        return new_pair().learner(bench, dtype=precision.dtype, **options)

    compare_steps(
        new_learner,
        TaskSource.of(RepeatedTasks(bench.episodes)),
        precision,
        ways,
        f"{new_pair().label} on the kit's {bench.name}",
        "let every hook compute its result only from its arguments, with operations that torch.func.vmap supports. The "
        "plain loop uses a new plugin for each step, and a traced graph keeps the values that it was traced with. Keep "
        "the state of an outer optimiser in the state that outer_update returns.",
    )


def compare_steps(
    new_learner: Callable[..., MetaLearner],
    source: TaskSource,
    precision: Precision,
    ways: Sequence[Options],
    label: str,
    remedy: str,
    steps: int = STEPS,
) -> None:
    """Train on the first tasks of a source in each way, and compare with the plain loop.

    Args:
        new_learner: creates a learner with new plugins, from options of `MetaLearner`.
        source: the tasks.
        precision: the learners' precision.
        ways: options of learners that must all give the same result.
        label: a description of what is trained, for messages.
        remedy: how to fix a difference.
        steps: number of training steps.

    Raises:
        CheckFailed: a training differs from the plain loop.
    """
    numbers = [range(step * META_BATCH, (step + 1) * META_BATCH) for step in range(steps)]
    batches = [[stack.to("cpu", precision.dtype) for stack in source.episodes("train", each, 0)] for each in numbers]
    example = batches[0][0].unstack(0)[0]

    def prepare(way: Options) -> MetaLearner:
        learner = new_learner(**way)
        learner.initialize(example)
        return learner

    plain = train_in_a_loop(lambda: prepare(ways[0]), batches)
    for way in ways:
        described = ", ".join([str(precision), *(f"{key}={value}" for key, value in way.items())])
        try:
            learner = prepare(way).fit(source, steps, meta_batch=META_BATCH)
        except (MetaregError, RuntimeError) as error:
            fail(f"Training {label} fails ({described}): {error}.", remedy)
        off, name = _deviation(learner.meta_parameters, plain, precision)
        if not off <= precision.tolerance:
            fail(
                f"{steps} steps of fit with {label} ({described}) differ from the same steps in a plain loop: the "
                f"error of '{name}' is {off:.1e} of its total change.",
                remedy,
            )


def _deviation(found: Mapping[str, Tensor], plain: Training, precision: Precision) -> tuple[float, str]:
    """Return the largest error of a parameter, relative to its total change, and its name."""
    off = dict.fromkeys(plain.end, 0.0)
    certain = {name: torch.ones_like(end, dtype=torch.bool) for name, end in plain.end.items()}
    for grads in plain.gradients:
        least = precision.rounding * max(value.abs().max().item() for value in grads.values())
        certain = {name: certain[name] & (value.abs() > least) for name, value in grads.items()}
    for name, where in certain.items():
        if where.any():
            error, way = (found[name] - plain.end[name])[where], (plain.end[name] - plain.start[name])[where]
            off[name] = (error.norm() / way.norm()).item()
    return find_worst(off)
