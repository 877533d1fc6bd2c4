"""The meta-gradient of one task: the derivative of its outer objective, or the algorithm's own outer gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from metareg.engine.context import Adaptation, Task, TaskContext, Tensors
from metareg.engine.objective import TaskFunctions
from metareg.util.torch_internals import tree_map

__all__ = ["compute_meta_gradient"]

Derivative = tuple[Tensors, Tensor, Tensors]
"""A gradient by name, the differentiated value, and its logs."""


def compute_meta_gradient(
    functions: TaskFunctions, meta: Tensors, task: Task, noise: Mapping[str, Any], weights: Tensor | None = None
) -> Derivative:
    """Compute the meta-gradient of one task, its objective and its logs; arguments as in `TaskFunctions.prepare`."""
    stages, steps = functions.stages, functions.options.inner_steps
    if not stages.implements("outer_gradient"):
        return _differentiate(functions, meta, task, noise, weights)
    context = functions.prepare(meta, task, noise)
    adaptation = functions.start(context)
    for step in range(steps):
        adaptation = functions.inner_step(adaptation, context, step)
    adapted, state, start = adaptation
    view = functions.view_outer(adaptation, context)
    gradient = stages.outer_gradient(meta, adapted, start, state, steps, context.noise, view)
    if stages.implements("augment_outer_loss"):
        of_terms, terms, logs = _differentiate(functions, meta, task, noise, None)
        gradient = {name: gradient[name] + of_terms[name] for name in meta}
    else:
        terms, logs = functions.outer_loss(adaptation, context)
    return gradient, logs["query_loss"] + terms, logs


def _differentiate(
    functions: TaskFunctions, meta: Tensors, task: Task, noise: Mapping[str, Any], weights: Tensor | None
) -> Derivative:
    if functions.options.memory == "recompute" and functions.adapted_names:
        return _differentiate_by_steps(functions, meta, task, noise, weights)
    pulled: Any = vjp(lambda meta: functions.objective(meta, task, noise, weights), meta, has_aux=True)
    objective, pull, logs = pulled
    # Nothing differentiates this derivative: its own graph, which `grad_and_value` builds, would take as much memory again.
    (gradient,) = pull(torch.ones_like(objective), retain_graph=False)
    return gradient, objective, logs


def _differentiate_by_steps(
    functions: TaskFunctions, meta: Tensors, task: Task, noise: Mapping[str, Any], weights: Tensor | None
) -> Derivative:
    """Compute the same derivative from only the parameters of each inner step.

    Applies the chain rule through the inner loop one step at a time, from the last to the first. Each step's graph is
    built from its stored parameters, used once and freed, so memory for graphs does not grow with the number of steps.
    """
    context = functions.prepare(meta, task, noise, weights)
    steps = range(functions.options.inner_steps)

    def at(meta: Tensors, features: tuple[Tensor, ...]) -> TaskContext:
        return replace(context, meta=meta, features=features)

    def compute_features(meta: Tensors) -> tuple[Tensor, ...]:
        return functions.prepare(meta, task).features

    def start_from(meta: Tensors, features: tuple[Tensor, ...]) -> Adaptation:
        return functions.start(at(meta, features))

    def step_from(
        meta: Tensors, adaptation: Adaptation, features: tuple[Tensor, ...], step: int
    ) -> tuple[Adaptation, tuple[Tensor, ...]]:
        earlier = functions.earlier_losses(adaptation.params, at(meta, features), step)
        return functions.inner_step(adaptation, at(meta, features), step), earlier

    def outer_loss(meta: Tensors, adaptation: Adaptation, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensors]:
        return functions.outer_loss(adaptation, at(meta, features))

    trajectory = [functions.start(context)]
    for step in steps:
        trajectory.append(functions.inner_step(trajectory[-1], context, step))

    pulled: Any = vjp(outer_loss, meta, trajectory.pop(), context.features, has_aux=True)
    objective, pull, logs = pulled
    gradient, adjoint, of_features = pull(torch.ones_like(objective), retain_graph=False)
    del pulled, pull  # the graph of the query set, freed before the next is built
    for step in reversed(steps):
        (_, earlier), pull, *_ = vjp(partial(step_from, step=step), meta, trajectory.pop(), context.features)
        adjoints = adjoint, tuple(torch.ones_like(each) for each in earlier)
        of_meta, adjoint, of_step_features = pull(adjoints, retain_graph=False)
        del pull
        objective = sum(earlier, objective)
        gradient = tree_map(torch.add, gradient, of_meta)
        of_features = tree_map(torch.add, of_features, of_step_features)
    _, pull, *_ = vjp(start_from, meta, context.features)
    of_meta, of_start_features = pull(adjoint, retain_graph=False)
    gradient = tree_map(torch.add, gradient, of_meta)
    if context.features:
        of_features = tree_map(torch.add, of_features, of_start_features)
        _, pull, *_ = vjp(compute_features, meta)
        gradient = tree_map(torch.add, gradient, pull(of_features, retain_graph=False)[0])
    return gradient, objective, logs
