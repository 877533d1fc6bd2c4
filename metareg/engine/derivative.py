"""The meta-gradient of one task: the derivative of its outer objective, or the algorithm's own outer gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from metareg.engine.context import Adaptation, Task, Tensors
from metareg.engine.objective import TaskFunctions
from metareg.util.torch_internals import tree_map

__all__ = ["compute_meta_gradient", "differentiate_by_steps", "recomputes"]

Derivative = tuple[Tensors, Tensor, Tensors]
"""A gradient by name, the differentiated value, and its logs."""
Features = tuple[Tensor, ...]
_Given = tuple[Task, Mapping[str, Any], Tensor | None]
"""A task, its noise and the weights of query losses."""


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
    if recomputes(functions):

        def call(_: str, part: Callable[..., Any], *trees: Any, **__: Any) -> Any:
            return part(meta, (task, noise, weights), *trees)

        return differentiate_by_steps(functions, call)
    pulled: Any = vjp(lambda meta: functions.objective(meta, task, noise, weights), meta, has_aux=True)
    objective, pull, logs = pulled
    # Nothing differentiates this derivative: its own graph, which `grad_and_value` builds, would take as much memory again.
    (gradient,) = pull(torch.ones_like(objective), retain_graph=False)
    return gradient, objective, logs


def recomputes(functions: TaskFunctions) -> bool:
    """Return whether `differentiate_by_steps` differentiates the outer objective."""
    return functions.options.memory == "recompute" and bool(functions.adapted_names)


def differentiate_by_steps(functions: TaskFunctions, call: Callable[..., Any]) -> Derivative:
    """Differentiate the outer objective of a task from only the parameters of each inner step.

    Applies the chain rule through the inner loop one step at a time, from the last to the first. Each step's graph is
    built from its stored parameters, used once and freed, so memory for graphs does not grow with the number of steps.

    Args:
        functions: the computations of one task.
        call: runs a part of the computation, given its name, the part, trees of tensors, and whether it returns logs
            last; returns ``part(meta, given, *trees)``, where `given` are the other arguments of `TaskFunctions.prepare`.
            It can trace the part, or map it over tasks, and then all trees have a task dimension.
    """
    steps = range(functions.options.inner_steps)

    def compute_features(meta: Tensors, given: _Given) -> Features:
        return functions.prepare(meta, *given).features

    def take_step(
        step: int, given: _Given, meta: Tensors, adaptation: Any, features: Features
    ) -> tuple[Adaptation, tuple[Tensor, ...]]:
        """Return the adaptation after a step, the first of which starts the task, and the weighted query loss before it."""
        context = functions.prepare(meta, *given, features)
        adaptation = adaptation if step else functions.start(context)
        earlier = functions.earlier_losses(adaptation.params, context, step)
        return functions.inner_step(adaptation, context, step), earlier

    def adapt(step: int, meta: Tensors, given: _Given, adaptation: Any, features: Features) -> Adaptation:
        return take_step(step, given, meta, adaptation, features)[0]

    def pull_outer_loss(meta: Tensors, given: _Given, adaptation: Adaptation, features: Features) -> Any:
        """Return the gradients for all three arguments, the outer loss and its logs."""

        def outer_loss(meta: Tensors, adaptation: Adaptation, features: Features) -> tuple[Tensor, Tensors]:
            return functions.outer_loss(adaptation, functions.prepare(meta, *given, features))

        pulled: Any = vjp(outer_loss, meta, adaptation, features, has_aux=True)
        objective, pull, logs = pulled
        return *pull(torch.ones_like(objective), retain_graph=False), objective, logs

    def pull_step(
        step: int, meta: Tensors, given: _Given, adaptation: Any, features: Features, adjoint: Any, *so_far: Any
    ) -> Any:
        """Return the gradient for the adaptation before a step, the other two so far, and the query loss before it."""
        (_, earlier), pull, *_ = vjp(partial(take_step, step, given), meta, adaptation, features)
        adjoints = adjoint, tuple(torch.ones_like(each) for each in earlier)
        of_meta, adjoint, of_features = pull(adjoints, retain_graph=False)
        return adjoint, *tree_map(torch.add, so_far, (of_meta, of_features)), earlier

    def pull_features(meta: Tensors, given: _Given, gradient: Tensors, of_features: Features) -> Tensors:
        _, pull, *_ = vjp(lambda meta: compute_features(meta, given), meta)
        return tree_map(torch.add, gradient, pull(of_features, retain_graph=False)[0])

    features = call("features", compute_features) if functions.head_only else ()
    trajectory: list[Any] = [()]
    for step in steps:
        trajectory.append(call(f"step {step}", partial(adapt, step), trajectory[-1], features))
    found = call("outer loss", pull_outer_loss, trajectory.pop(), features, has_logs=True)
    gradient, adjoint, of_features, objective, logs = found
    for step in reversed(steps):
        name, part = f"step {step}, backward", partial(pull_step, step)
        found = call(name, part, trajectory.pop(), features, adjoint, gradient, of_features)
        adjoint, gradient, of_features, earlier = found
        objective = sum(earlier, objective)
    if features:
        gradient = call("features, backward", pull_features, gradient, of_features)
    return gradient, objective, logs
