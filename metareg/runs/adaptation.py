"""Where a learner adapts: how much the inner loop changes each layer, and how much that improves the metric.

Measures what Raghu et al., "Rapid Learning or Feature Reuse?" (ICLR 2020), measured, and §4.4 of Shin, Han and Kim,
"Cooperative Meta-Learning with Gradient Augmentation" (UAI 2024).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metareg.contract.splits import TEST, TRAIN
from metareg.engine.objective import TaskFunctions
from metareg.errors import UsageError
from metareg.learner.learner import MetaLearner
from metareg.runs.checkpoints import Checkpoints
from metareg.runs.folder import CHECKPOINTS
from metareg.runs.options import assemble
from metareg.runs.run import Run
from metareg.runs.training import prepare_run
from metareg.util.devices import move_tensors
from metareg.util.intervals import compute_half_width

__all__ = ["Analysis", "Angle", "LayerUpdate", "Mean", "measure_adaptation"]

log = logging.getLogger("metareg")

_BATCHES = 20
"""Number of batches of training tasks over which angles are averaged."""


@dataclass(frozen=True)
class Mean:
    """A mean and half its 95 % interval, over tasks or batches."""

    mean: float
    ci95: float

    @classmethod
    def over(cls, values: Sequence[float] | Tensor) -> Mean:
        array = np.asarray(values, dtype=np.float64)
        return cls(float(array.mean()), compute_half_width(array))


@dataclass(frozen=True)
class LayerUpdate:
    """How far the inner loop moves a layer's parameters."""

    layer: str
    part: str
    """``"body"`` or ``"head"``; ``"plugin"`` for the algorithm's own parameters."""
    relative: list[Mean]
    """‖θₖ − θ₀‖ / ‖θ₀‖ over all parameters of the layer, after each inner step k ≥ 1."""


@dataclass(frozen=True)
class Angle:
    """The angle between the algorithm's outer gradient and what the augmenters add, for one part of the model."""

    part: str
    degrees: Mean
    """From 0 (same direction) to 180."""
    ratio: Mean
    """The norm of the added gradient divided by that of the algorithm's gradient."""


@dataclass(frozen=True)
class Analysis:
    """The analysis of a run."""

    metric: str
    higher_is_better: bool
    inner_steps: int
    tasks: int
    layers: list[LayerUpdate]
    adapting: dict[str, list[Mean]]
    """The test metric after 0, 1, … inner steps that may change all adapted parameters, only the body, or only the
    head. The last two are present if the algorithm adapts both."""
    train: list[Mean]
    """The same as ``adapting["all"]``, on the first training tasks."""
    augmenters: str
    """The run's augmenters, joined by ``+``; empty if there are none."""
    angles: list[Angle]
    """Empty without augmenters or without checkpoints."""


def measure_adaptation(run: Run, tasks: int, inner_steps: int) -> Analysis:
    """Measure where a finished run's learner adapts; arguments as in `metareg.runs.analysis.analyse`."""
    learner, steps = run.learner, inner_steps
    if tasks < 2 or steps < 1:
        raise UsageError(f"An analysis needs at least 2 tasks and 1 inner step; got {tasks} and {steps}.")
    adapted = set(learner.engine.plain.adapted_names)
    if not adapted:
        raise UsageError(f"{run.config.algo.name} adapts no parameters in an inner loop: there is nothing to analyse.")
    body, head = set(learner.model.body_names), set(learner.model.head_names)
    layers, everything = _measure_updates(run, tasks, steps)
    scores = {"all": everything}
    if adapted & body and adapted & head:
        scores |= {"body": _score(run, TEST, tasks, steps, head), "head": _score(run, TEST, tasks, steps, body)}
    return Analysis(
        metric=learner.metric.name,
        higher_is_better=learner.metric.higher_is_better,
        inner_steps=steps,
        tasks=tasks,
        layers=layers,
        adapting={name: [Mean.over(column) for column in of_part.T] for name, of_part in scores.items()},
        train=[Mean.over(column) for column in _score(run, TRAIN, tasks, steps, set()).T],
        augmenters="+".join(choice.name for choice in run.config.augment),
        angles=_measure_angles(run) if run.config.augment else [],
    )


# ------------------------------------------------------------------------------------------------------- the inner loop


def _iterate_adaptations(
    run: Run, split: str, tasks: int, steps: int, frozen: set[str]
) -> Iterator[tuple[list[dict[str, Tensor]], list[Tensor]]]:
    """Yield each task's adapted parameters and its metric after 0, 1, … inner steps.

    The `frozen` parameters are reset after each step.
    """
    engine, meta = run.learner.engine, run.learner.plain_meta_parameters
    like = next(iter(meta.values()))
    stacks, positions = run.source.placed_episodes(split, range(tasks), run.config.seed)
    placed = [stack.unstack(number) for stack in stacks for number in range(len(stack))]
    for index, position in sorted((position, place) for place, position in enumerate(positions)):
        task = move_tensors(placed[position], like.device, like.dtype)
        drawn = engine.draw_for_adaptation(meta, steps, run.config.seed, [(split, index)])
        with torch.no_grad():
            yield _adapt(engine.plain, meta, task, drawn[0] if drawn else {}, steps, frozen)


def _adapt(
    functions: TaskFunctions, meta: dict[str, Tensor], task: Any, noise: Any, steps: int, frozen: set[str]
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    context = functions.prepare(meta, task, noise)
    adaptation = functions.start(context)
    kept = {name: value for name, value in adaptation.params.items() if name in frozen}
    params, scores = [], []
    for step in range(steps + 1):
        params.append(dict(adaptation.params))
        scores.append(functions.metric(functions.evaluate_query(adaptation.params, context), context.query_y))
        if step < steps:
            after = functions.evaluation_step(adaptation, context, step)
            adaptation = after._replace(params={**after.params, **kept})
    return params, scores


def _score(run: Run, split: str, tasks: int, steps: int, frozen: set[str]) -> Tensor:
    """Return the metric ``[tasks, steps + 1]``."""
    return torch.stack(
        [torch.stack(scores) for _, scores in _iterate_adaptations(run, split, tasks, steps, frozen)]
    ).cpu()


def _measure_updates(run: Run, tasks: int, steps: int) -> tuple[list[LayerUpdate], Tensor]:
    """Return the inner loop's updates on the test tasks, and the metric as `_score` does."""
    model, layers = run.learner.model, _group_by_layer(run.learner.engine.plain.adapted_names)
    relative: dict[str, list[list[float]]] = {layer: [] for layer in layers}
    of_tasks = []
    for params, scores in _iterate_adaptations(run, TEST, tasks, steps, set()):
        of_tasks.append(torch.stack(scores))
        for layer, names in layers.items():
            start = _flatten(params[0], names)
            relative[layer].append([_divide(_flatten(each, names) - start, start) for each in params[1:]])
    parts = dict.fromkeys(model.body_names, "body") | dict.fromkeys(model.head_names, "head")
    updates = [
        LayerUpdate(
            layer, parts.get(names[0], "plugin"), [Mean.over(column) for column in zip(*relative[layer], strict=True)]
        )
        for layer, names in layers.items()
    ]
    return updates, torch.stack(of_tasks).cpu()


def _group_by_layer(names: Sequence[str]) -> dict[str, list[str]]:
    """Group parameters by module: ``body.0`` for ``body.0.weight`` and ``body.0.bias``."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return layers


def _flatten(tensors: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names]).double()


def _divide(one: Tensor, other: Tensor) -> float:
    """Return the ratio of two vectors' norms; infinite if only the second is zero, NaN if both are."""
    length = other.norm().item()
    return one.norm().item() / length if length else math.inf if one.any() else math.nan


# ------------------------------------------------------------------------------------------------------- outer gradients


def _measure_angles(run: Run) -> list[Angle]:
    """Measure the angle between the algorithm's outer gradient and what the augmenters add, at the end of training."""
    state = Checkpoints(run.path / CHECKPOINTS, run.config.keep_checkpoints).load_newest()
    if state is None:
        log.warning(
            "The run at %s has no checkpoint with its augmenters, so the angles of their gradients cannot be computed.",
            run.path,
        )
        return []
    augmented = _restore(run, state["learner"], augment=True)
    plain = _restore(run, state["learner"], augment=False)
    parts = {"body": run.learner.model.body_names, "head": run.learner.model.head_names}
    found: dict[str, list[tuple[float, float]]] = {part: [] for part, names in parts.items() if names}
    size = run.config.meta_batch
    for batch in range(_BATCHES):
        episodes = run.source.episodes(TRAIN, range(size * batch, size * (batch + 1)), run.config.seed)
        (_, with_it), (_, without) = augmented.meta_gradient(episodes), plain.meta_gradient(episodes)
        for part, of_part in found.items():
            own, both = (_flatten(grads, parts[part]) for grads in (without, with_it))
            of_part.append((_compute_angle(own, both - own), _divide(both - own, own)))
    return [Angle(part, *(Mean.over(column) for column in zip(*values, strict=True))) for part, values in found.items()]


def _restore(run: Run, state: dict[str, Any], *, augment: bool) -> MetaLearner:
    """Restore a learner from a checkpoint, with or without its augmenters."""
    content = run.config.model_dump(mode="json")
    learner, source = prepare_run(
        assemble({**content, "strategy": "serial"} | ({} if augment else {"augment": []}), {})
    )
    learner.initialize(source.episodes(TRAIN, [0], run.config.seed)[0].unstack(0)[0])
    own = learner.state()
    meta = {name: state["meta"][name] for name in own["meta"]}
    learner.load_state({**own, "meta": meta, "steps_done": state["steps_done"]})
    return learner


def _compute_angle(one: Tensor, other: Tensor) -> float:
    """Return the angle between two vectors in degrees; NaN if one is zero."""
    lengths = (one.norm() * other.norm()).item()
    if lengths == 0:
        return math.nan
    return math.degrees(math.acos(max(-1.0, min(1.0, (one @ other).item() / lengths))))
