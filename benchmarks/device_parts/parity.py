"""Whole training steps on the device, in every strategy, beside the same steps on the CPU in float64."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from device_parts.jobs import Job, Row, describe_problem
from metareg import MetaLearner
from metareg.contract.config import NO_PLUGIN
from metareg.learner.config import LearnerConfig
from metareg.registry.task_source import TaskSource
from metareg.runs.options import Selection, assemble
from metareg.testing import combinations
from metareg.testing.steps import Precision
from metareg.util.seeding import use_seed

__all__ = ["STRATEGIES", "list_jobs"]

STEPS, TASKS, SEED = 3, 3, 6
"""The first step of a strategy runs Python, the second traces and runs the graph, and the third runs it again."""
TOLERANCE = 1e-6
"""Of parameters in float64."""
STRATEGIES = ("serial", "traced", "vectorized", "compiled")
AUGMENTERS = (NO_PLUGIN, "cml")

_SMALL = {"ways": 3, "query": 2, "size": 28, "channels": 1}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "sinusoid": {"task": ("sinusoid", {"shots": 5, "query": 5})},
    "conv4": {"task": ("glyphs", _SMALL), "model": ("conv4", {"width": 8})},
    "graph": {"task": ("csbm", {"query": 5})},
}
"""Tasks, and models where it is not the task's own. Everything else is as the plugins recommend it."""
_NEVER_COMPILED = ("conv4",)
"""Settings whose compilation takes minutes on a GPU."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """The steps on the CPU in float64."""

    start: Tensors
    end: Tensors
    sizes: list[Tensors]
    """Of each entry's gradient, step by step, in units of the largest of that step."""

    def select_certain(self, rounding: float) -> Tensors:
        """Where an entry of a parameter moved by more than rounding in each step: Adam makes whole steps of rounding too."""
        return {name: torch.stack([sizes[name] > rounding for sizes in self.sizes]).all(0) for name in self.end}


def list_jobs(
    algorithms: Collection[str] | None,
    settings: Collection[str],
    strategies: Sequence[str],
    precisions: Sequence[Precision],
    device: str,
    seconds: float,
) -> list[Job]:
    """The jobs of all combinations of the registry's algorithms with no augmenter and with CML.

    Args:
        algorithms: these alone; None for all that are installed.
        settings: of `SETTINGS`.
        strategies: one job runs those that compile nothing, another one the compiled steps; these come after all others.
        precisions: in which the device computes.
        device: its name.
        seconds: at most for each job.
    """
    plain, compiled = [], []
    for setting in settings:
        for pair in combinations():
            if pair.augmenter not in AUGMENTERS or (algorithms is not None and pair.algorithm not in algorithms):
                continue
            key = {"algorithm": pair.algorithm, "augmenter": pair.augmenter, "setting": setting}
            for jobs, those in ((plain, set(strategies) - {"compiled"}), (compiled, set(strategies) & {"compiled"})):
                arguments = {
                    **key, "strategies": [name for name in STRATEGIES if name in those],
                    # Compiling takes longest; float64 is the precision in which the answer is certain.
                    "precisions": precisions[:1] if those == {"compiled"} else precisions, "device": device,
                }  # fmt: skip
                if those and not (those == {"compiled"} and setting in _NEVER_COMPILED):
                    strategy = "compiled" if those == {"compiled"} else "any"
                    jobs.append(Job(key | {"strategy": strategy}, compare_steps, arguments, seconds))
    return plain + compiled


def compare_steps(
    algorithm: str,
    augmenter: str,
    setting: str,
    strategies: Sequence[str],
    precisions: Sequence[Precision],
    device: str,
) -> Iterator[Row]:
    """A row for each precision and strategy: how far the steps on the device end from those on the CPU."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True

    def select() -> Selection:
        augment = [] if augmenter == NO_PLUGIN else [augmenter]
        base = {"algo": algorithm, "augment": augment, **SETTINGS[setting]}
        return assemble(base, {"inner_steps": 2, "seed": SEED})

    reference = _train_on_cpu(select)
    for precision in precisions:
        for strategy in strategies:
            row: Row = {"strategy": strategy, "precision": str(precision)}
            began = time.perf_counter()
            try:
                with _listen() as remarks:
                    learner = _create_learner(select(), precision.dtype, device, strategy)
                    learner.fit(select().task.instance, STEPS, meta_batch=TASKS)
                row |= _compare(reference, learner.meta_parameters, precision) | {"remark": " ".join(remarks)[:300]}
            except Exception as error:
                row |= describe_problem(error)
            yield row | {"seconds": round(time.perf_counter() - began, 1)}


@contextmanager
def _listen() -> Iterator[list[str]]:
    """Collect what metareg logs in a block, such as why a step runs untraced or without a CUDA graph."""
    messages: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("metareg")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _train_on_cpu(select: Any) -> Reference:
    learner = _create_learner(select(), torch.float64, "cpu", "serial")
    source = TaskSource(select().task)
    batches = [source.episodes("train", range(TASKS * step, TASKS * (step + 1)), SEED) for step in range(STEPS)]
    learner.initialize(batches[0][0].to("cpu", torch.float64).unstack(0)[0])
    start, sizes = _copy(learner.meta_parameters), []
    for batch in batches:
        _, grads = learner.meta_gradient(batch)
        largest = max(value.abs().max() for value in grads.values())
        sizes.append({name: value.abs() / largest for name, value in grads.items()})
        learner.step(batch)
    return Reference(start, _copy(learner.meta_parameters), sizes)


def _create_learner(selection: Selection, dtype: torch.dtype, device: str, strategy: str) -> MetaLearner:
    """The learner of a run, its model in a type of choice; the initial weights are the same in all types."""
    task, config = selection.task.instance, selection.config
    with use_seed(SEED, "model"):
        model = selection.model.instance.build(spec=task.spec).to(dtype)
    options = config.model_dump(include=set(LearnerConfig.model_fields) - {"device", "strategy"})
    return MetaLearner(
        model, selection.algorithm, selection.augmenters, loss=task.loss, metric=getattr(task, "metric", None),
        device=device, strategy=strategy, **options,
    )  # fmt: skip


def _copy(tensors: Tensors) -> Tensors:
    return {name: value.detach().to("cpu", torch.float64, copy=True) for name, value in tensors.items()}


def _compare(reference: Reference, found: Tensors, precision: Precision) -> Row:
    """How far parameters are from where they belong.

    ``difference`` is the largest relative difference of one tensor, in the Euclidean norm, or relative to a thousandth of
    all tensors' norm where that is more; ``of_way`` that of all tensors together, in units of the way that they went.
    """
    found, certain = _copy(found), reference.select_certain(precision.rounding)
    errors = {name: (found[name] - end)[certain[name]] for name, end in reference.end.items()}
    ways = {name: (end - reference.start[name])[certain[name]] for name, end in reference.end.items()}
    least = 1e-3 * _norm(reference.end)
    difference = max(
        float(error.norm()) / max(float(reference.end[name].norm()), least) for name, error in errors.items()
    )
    of_way = _norm(errors) / max(_norm(ways), 1e-30)
    same = of_way <= precision.tolerance and (precision.dtype != torch.float64 or difference <= TOLERANCE)
    compared = sum(int(where.sum()) for where in certain.values()) / sum(value.numel() for value in found.values())
    return {
        "status": "same" if same else "differs", "difference": difference, "of_way": of_way,
        "compared": round(compared, 3),
    }  # fmt: skip


def _norm(tensors: Tensors) -> float:
    return float(torch.stack([value.norm() for value in tensors.values()]).norm())
