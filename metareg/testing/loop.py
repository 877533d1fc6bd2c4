"""A training step written out: what fit does in every strategy, as a loop over tasks and inner steps.

It calls the plugins' hooks one after the other, differentiates with `torch.autograd.grad` and updates with
`torch.optim.Adam`. Nothing is vectorized, traced or transformed by `torch.func`, and nothing of the engine is used, so that
it can be read as the definition of a step and be stepped through with a debugger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from metareg.contract.episodes import Episodes
from metareg.learner.learner import MetaLearner
from metareg.testing.benches import draw_noise
from metareg.util.layout import copy_contiguous

__all__ = ["Training", "train_in_a_loop"]

Tensors = dict[str, Tensor]
Task = tuple[Any, Tensor, Any, Tensor]


@dataclass(frozen=True)
class Training:
    """What some steps made of the meta-parameters."""

    start: Tensors
    end: Tensors
    gradients: list[Tensors]
    """The meta-gradient of each step, after `augment_outer_gradient`."""


def train_in_a_loop(new_learner: Callable[[], MetaLearner], batches: Sequence[Sequence[Episodes]]) -> Training:
    """Train on a batch a step.

    Args:
        new_learner: makes the same learner with new plugins each time. Every step has one of its own: what a plugin keeps
            on itself does not reach the next.
        batches: the tasks of each step, as stacks of tasks of one size.
    """
    learner = new_learner()
    start, meta = (copy_contiguous(learner.meta_parameters) for _ in range(2))
    adam = _new_adam(meta, learner.config.outer_lr)
    state: dict[str, Any] = {}
    gradients: list[Tensors] = []
    for step, stacks in enumerate(batches):
        learner = new_learner()
        tasks = [stack.unstack(number) for stack in stacks for number in range(len(stack))]
        grads = _meta_gradient(learner, meta, tasks, step)
        gradients.append(grads)
        every = learner.config.reset_optimizer_every
        if every is not None and step % every == 0:
            adam, state = _new_adam(meta, learner.config.outer_lr), {}
        if learner.stages.implements("outer_update"):
            with torch.no_grad():
                meta, state = learner.stages.outer_update(meta, grads, state)
        else:
            for name, value in meta.items():
                value.grad = grads[name]
            adam.step()
    return Training(start, meta, gradients)


def _meta_gradient(learner: MetaLearner, meta: Tensors, tasks: Sequence[Task], training_step: int) -> Tensors:
    """The mean over the tasks, changed by the augmenters."""
    stages, inner_steps = learner.stages, learner.config.inner_steps
    adapted = stages.adapted_parameters(learner.model.names, learner.model.body_names, learner.model.head_names)
    weights = stages.outer_loss_weights(inner_steps, training_step) or [0.0] * (inner_steps - 1) + [1.0]
    mean = {name: torch.zeros_like(value) for name, value in meta.items()}
    for number, task in enumerate(tasks):
        noise = draw_noise(learner, "task", adapted, training_step, number)
        gradient = _task_gradient(learner, meta, adapted, task, noise, weights)
        mean = {name: value + gradient[name] / len(tasks) for name, value in mean.items()}
    with torch.no_grad():
        return stages.augment_outer_gradient(mean, meta, draw_noise(learner, "batch", meta, training_step))


def _task_gradient(
    learner: MetaLearner,
    meta: Tensors,
    adapted: Sequence[str],
    task: Task,
    noise: Mapping[str, Any],
    weights: Sequence[float],
) -> Tensors:
    """The meta-gradient of one task: of its weighted query losses and the augmenters' terms, or the algorithm's own."""
    stages, first_order = learner.stages, learner.config.first_order
    support_x, support_y, query_x, query_y = task
    meta = {name: value.detach().requires_grad_() for name, value in meta.items()}
    params = stages.start_task({name: meta[name] for name in adapted}, meta)
    objective: Tensor | float = 0.0
    for step, weight in enumerate(weights):
        # A start that no meta-parameter decides, as a context of zeros, has a gradient too.
        params = {name: value if value.requires_grad else value.requires_grad_() for name, value in params.items()}
        _, outputs = _run(learner, meta | params, support_x)
        grads = _gradient(learner.loss(outputs, support_y), params, create_graph=not first_order)
        grads = stages.augment_inner_gradient(grads, params, meta, noise, step)
        params = stages.inner_update(params, grads, meta, step)
        features, outputs = _run(learner, meta | params, query_x)
        objective = objective + weight * learner.loss(outputs, query_y)
    terms, _ = stages.augment_outer_loss(
        meta, noise, features=features, outputs=outputs, targets=query_y, loss=learner.loss, metric=learner.metric
    )
    if not stages.implements("outer_gradient"):
        return _gradient(objective + terms, meta)
    of_terms = _gradient(terms, meta)
    with torch.no_grad():
        gradient = stages.outer_gradient(meta, params, len(weights))
    return {name: value + of_terms[name] for name, value in gradient.items()}


def _run(learner: MetaLearner, params: Tensors, x: Any) -> tuple[Tensor, Tensor]:
    """The model's features, which are what its head is given, and its outputs."""
    module, features = learner.model.module, []
    head = module.get_submodule((learner.model.head_prefix or "").rstrip("."))
    handle = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        outputs = functional_call(module, {name: params[name] for name in learner.model.names}, (x,))
    finally:
        handle.remove()
    return features[-1], outputs


def _gradient(value: Tensor | float, of: Tensors, *, create_graph: bool = False) -> Tensors:
    """The derivative by each tensor, zero for one that the value does not depend on."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return {name: torch.zeros_like(each) for name, each in of.items()}
    grads = torch.autograd.grad(
        value,
        list(of.values()),
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(of, grads, strict=True))


def _new_adam(meta: Tensors, lr: float) -> torch.optim.Adam:
    """Without the kernels that take many tensors at once."""
    return torch.optim.Adam(list(meta.values()), lr, foreach=False, fused=False)
