"""A training step as a plain loop over tasks and inner steps: what fit computes in every strategy.

It calls the plugins' hooks one after the other, differentiates with `torch.autograd.grad` and updates with
`torch.optim`. It uses nothing of the engine, and vectorizes, traces or transforms nothing with `torch.func`. You can
read it as the definition of a step, and step through it with a debugger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from metareg.contract.episodes import Episodes, stack_trees
from metareg.engine.stages import Stages
from metareg.learner.learner import MetaLearner
from metareg.learner.learning_rate import compute_learning_rate
from metareg.testing.benches import draw_noise
from metareg.util.layout import copy_contiguous

__all__ = ["Training", "train_in_a_loop"]

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam, "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}  # fmt: skip

Tensors = dict[str, Tensor]
Task = tuple[Any, Tensor, Any, Tensor]


@dataclass(frozen=True)
class Training:
    """The result of some training steps."""

    start: Tensors
    end: Tensors
    gradients: list[Tensors]
    """The meta-gradient of each step, after `augment_outer_gradient`."""


def train_in_a_loop(new_learner: Callable[[], MetaLearner], batches: Sequence[Sequence[Episodes]]) -> Training:
    """Train with one batch per step.

    Args:
        new_learner: creates the same learner with new plugins each time. Every step uses a new one, so state on a
            plugin object does not carry over.
        batches: the tasks of each step, as stacks of equal size.
    """
    learner = new_learner()
    start, meta = (copy_contiguous(learner.meta_parameters) for _ in range(2))
    optimizer = _new_optimizer(learner, meta)
    state: dict[str, Any] = {}
    gradients: list[Tensors] = []
    for step, stacks in enumerate(batches):
        learner = new_learner()
        changed = learner.stages.augment_episodes(stacks, learner.config.seed, step)
        tasks = [stack.unstack(number) for stack in changed for number in range(len(stack))]
        grads = _meta_gradient(learner, meta, tasks, step)
        gradients.append(grads)
        every = learner.config.reset_optimizer_every
        if every is not None and step % every == 0:
            optimizer, state = _new_optimizer(learner, meta), {}
        if learner.stages.implements("outer_update"):
            with torch.no_grad():
                meta, state = learner.stages.outer_update(meta, grads, state)
        else:
            for group in optimizer.param_groups:
                group["lr"] = compute_learning_rate(learner.config, step)
            for name, value in meta.items():
                value.grad = grads[name]
            optimizer.step()
    return Training(start, meta, gradients)


def _meta_gradient(learner: MetaLearner, meta: Tensors, tasks: Sequence[Task], training_step: int) -> Tensors:
    """Return the meta-gradient of a batch, combined over its tasks and changed by the augmenters."""
    stages, inner_steps = learner.stages, learner.config.inner_steps
    adapted = stages.adapted_parameters(learner.model)
    weights = stages.outer_loss_weights(inner_steps, training_step) or [0.0] * (inner_steps - 1) + [1.0]
    noise = draw_noise(learner, "batch", meta, training_step)

    def combine_at(meta: Tensors) -> Tensors:
        gradients, losses = [], []
        for number, task in enumerate(tasks):
            drawn = draw_noise(learner, "task", adapted, training_step, number)
            gradient, loss = _task_gradient(learner, meta, adapted, task, drawn, weights)
            gradients.append(gradient)
            losses.append(loss)
        with torch.no_grad():
            return stages.combine_tasks(stack_trees(gradients), torch.stack(losses), meta, noise)

    return stages.augment_outer_gradient(combine_at(meta), meta, noise, combine_at)


def _task_gradient(
    learner: MetaLearner,
    meta: Tensors,
    adapted: Sequence[str],
    task: Task,
    noise: Mapping[str, Any],
    weights: Sequence[float],
) -> tuple[Tensors, Tensor]:
    """Return one task's objective, and its meta-gradient.

    The gradient is that of the weighted query losses and the augmenters' terms, or the algorithm's own.
    """
    stages = learner.stages
    meta = {name: value.detach().requires_grad_() for name, value in meta.items()}
    view = _View(learner, meta, noise, task)
    params, state = stages.start_task({name: meta[name] for name in adapted}, meta, noise, view)
    start, objective = params, torch.zeros_like(learner.loss(_run(learner, meta, task[0])[1], task[1]))
    for step, weight in enumerate(weights):
        # A start that depends on no meta-parameter, such as a context of zeros, has a gradient too. If one parameter
        # was computed from another, such as prototypes from the body, clones keep a step's partial derivatives
        # separate.
        params = {
            name: value.clone() if value.requires_grad else value.requires_grad_() for name, value in params.items()
        }
        params, state = view.at(step).take_step(params, state, start, stages)
        features, outputs = _run(learner, meta | params, task[2])
        objective = objective + weight * learner.loss(outputs, task[3])
    view, steps = replace(view, step=len(weights), start=start), len(weights)
    terms, _ = stages.augment_outer_loss(
        meta, noise, dtype=objective.dtype, features=features, outputs=outputs, targets=task[3], adapted=params,
        loss=learner.loss, metric=learner.metric, task=view,
    )  # fmt: skip
    own = stages.outer_objective(meta, params, start, state, steps, noise, view)
    total = (objective if own is None else own) + terms
    if not stages.implements("outer_gradient"):
        return _gradient(total, meta), total.detach()
    of_terms = _gradient(terms, meta)
    gradient = stages.outer_gradient(meta, params, start, state, steps, noise, view)
    return {name: value.detach() + of_terms[name] for name, value in gradient.items()}, total.detach()


@dataclass(frozen=True)
class _View:
    """A `metareg.TaskView` that differentiates with `torch.autograd.grad`."""

    learner: MetaLearner
    meta: Tensors
    noise: Mapping[str, Any]
    task: Task
    step: int = 0
    start: Tensors | None = None
    """The parameters before the first step; None in the inner stages."""

    @property
    def support_x(self) -> Any:
        return self.task[0]

    @property
    def support_y(self) -> Tensor:
        return self.task[1]

    @property
    def query_x(self) -> Any:
        return self.task[2]

    @property
    def query_y(self) -> Tensor:
        return self.task[3]

    @property
    def body_names(self) -> tuple[str, ...]:
        return self.learner.model.body_names

    @property
    def head_names(self) -> tuple[str, ...]:
        return self.learner.model.head_names

    @property
    def output_layer(self) -> tuple[str, str | None]:
        return self.learner.model.output_layer

    def at(self, step: int) -> _View:
        return replace(self, step=step)

    def take_step(self, params: Tensors, state: Any, start: Tensors, stages: Stages) -> tuple[Tensors, Any]:
        """Take one inner step with the hooks."""
        grads = stages.inner_gradient(params, self.meta, self.step, state, self.noise, self)
        grads = self.gradient(params) if grads is None else grads
        grads = stages.augment_inner_gradient(grads, params, self.meta, self.noise, self.step, self)
        return stages.inner_update(grads, start, params, self.meta, self.step, state, self.noise, self)

    def body(self, params: Tensors, x: Any) -> Tensor:
        return _run(self.learner, self.meta | params, x)[0]

    def head(self, params: Tensors, features: Tensor) -> Tensor:
        return self.learner.model.head(self.meta | params, features)

    def embed(self, params: Tensors, features: Tensor) -> Tensor:
        return self.learner.model.embed(self.meta | params, features)

    def outputs(self, params: Tensors, x: Any) -> Tensor:
        return _run(self.learner, self.meta | params, x)[1]

    def support_features(self, params: Tensors) -> Tensor:
        return self.body(params, self.support_x)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.learner.loss(outputs, targets)

    def support_loss(self, params: Tensors) -> Tensor:
        return self.loss(self.outputs(params, self.support_x), self.support_y)

    def inner_loss(self, params: Tensors) -> Tensor:
        """Return the loss that the inner step descends, including learned losses and added terms."""
        outputs = self.outputs(params, self.support_x)
        return self.learner.stages.inner_loss(
            outputs, self.support_y, params, self.meta, self.step, self.learner.loss, self.noise, self
        )

    def gradient(self, params: Tensors) -> Tensors:
        params = _make_differentiable(params)
        return _gradient(self.inner_loss(params), params, create_graph=not self.learner.config.first_order)

    def hessian_product(self, params: Tensors, vector: Tensors) -> Tensors:
        params = _make_differentiable(params)
        grads = _gradient(self.inner_loss(params), params, create_graph=True)
        # The vector is a constant, even if it was computed from the same parameters.
        return _gradient(grads, params, create_graph=True, along=vector)

    def query_outputs(self, params: Tensors) -> Tensor:
        return self.outputs(params, self.query_x)

    def query_loss(self, params: Tensors) -> Tensor:
        return self.loss(self.query_outputs(params), self.query_y)

    def query_gradient(self, params: Tensors) -> Tensors:
        params = _make_differentiable(params)
        return _gradient(self.query_loss(params), params, create_graph=True)

    def adapt(self, params: Tensors, state: Any, first: int, steps: int) -> tuple[Tensors, Any]:
        stages = self.learner.stages.for_adaptation()
        for step in range(first, first + steps):
            params, state = self.at(step).take_step(params, state, self.start or {}, stages)
        return params, state


def _make_differentiable(params: Tensors) -> Tensors:
    """Return the tensors with gradients enabled where they have no graph."""
    return {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in params.items()}


def _run(learner: MetaLearner, params: Tensors, x: Any) -> tuple[Tensor, Tensor]:
    """Return the model's features, which are the head's inputs, and its outputs."""
    module, features = learner.model.module, []
    head = module.get_submodule((learner.model.head_prefix or "").rstrip("."))
    handle = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        outputs = functional_call(module, {name: params[name] for name in learner.model.names}, (x,))
    finally:
        handle.remove()
    return features[-1], outputs


def _gradient(
    value: Tensor | float | Tensors, of: Tensors, *, create_graph: bool = False, along: Tensors | None = None
) -> Tensors:
    """Return the derivative with respect to each tensor, or zero if the value does not depend on it.

    Args:
        value: a scalar, or tensors by name.
        of: the tensors to differentiate with respect to.
        create_graph: whether the derivative can be differentiated again.
        along: for tensors by name, the vector of the vector-Jacobian product.
    """
    values = value if isinstance(value, Mapping) else {"": value}
    values = {name: each for name, each in values.items() if isinstance(each, Tensor) and each.requires_grad}
    if not of or not values:
        return {name: torch.zeros_like(each) for name, each in of.items()}
    grads = torch.autograd.grad(
        list(values.values()),
        list(of.values()),
        None if along is None else [along[name] for name in values],
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(of, grads, strict=True))


def _new_optimizer(learner: MetaLearner, meta: Tensors) -> torch.optim.Optimizer:
    """Create torch's own optimiser without fused or foreach kernels."""
    config = learner.config
    options: dict[str, Any] = {
        "weight_decay": config.outer_weight_decay, "momentum": config.outer_momentum, "betas": config.outer_betas,
        "nesterov": config.outer_nesterov or None,
    }  # fmt: skip
    own = [value for name, value in meta.items() if learner.stages.owner(name) is None]
    learned = [value for name, value in meta.items() if learner.stages.owner(name) is not None]
    groups: list[dict[str, Any]] = [{"params": own}, {"params": learned, "weight_decay": 0.0}]
    create: Callable[..., torch.optim.Optimizer] = _OPTIMIZERS[config.outer_optimizer]
    return create(
        [group for group in groups if group["params"]], lr=config.outer_lr, foreach=False,
        **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
