"""The mathematics of one task: adaptation, and the outer objective as a pure function of the meta-parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.func import grad

from metareg.contract.losses import Loss, Metric
from metareg.engine.split_model import SplitModel
from metareg.engine.stages import Stages
from metareg.errors import UsageError
from metareg.util.torch_internals import tree_map

__all__ = ["Task", "TaskContext", "TaskFunctions", "TaskOptions", "Tensors"]

Tensors = dict[str, Tensor]
Task = tuple[Any, Tensor, Any, Tensor]
"""Support inputs and targets, query inputs and targets."""


class TaskOptions(Protocol):
    """The options of a learner that decide what happens in one task; `first_order` as in Finn et al. (2017), §5.2."""

    @property
    def inner_steps(self) -> int: ...

    @property
    def first_order(self) -> bool: ...

    @property
    def memory(self) -> Literal["store", "recompute"]: ...

    @property
    def bn_statistics(self) -> Literal["transductive", "support"]: ...

    @property
    def precision(self) -> Literal["full", "bf16"]: ...


@dataclass(frozen=True)
class TaskContext:
    """One task at some values of the meta-parameters: all that the inner steps and the outer loss need."""

    meta: Tensors
    """Every meta-parameter by name."""
    support_x: Any
    """Inputs ``[examples, …]`` in the precision that the model runs in."""
    support_y: Tensor
    query_x: Any
    query_y: Tensor
    noise: Mapping[str, Any]
    """What each augmenter drew for the task."""
    weights: Tensor | None
    """Of the query loss after each inner step ``[inner_steps]``; None for that after the last step alone."""
    features: tuple[Tensor, ...] = ()
    """Of the support set, and of the query set where they are known, if only the head adapts; they depend on `meta`."""

    def detach(self) -> TaskContext:
        """The same values as constants."""
        meta, features = tree_map(Tensor.detach, (self.meta, self.features))
        return replace(self, meta=meta, features=features)


class TaskFunctions:
    """What happens in one task, as pure functions; there is no task dimension here."""

    def __init__(self, model: SplitModel, stages: Stages, loss: Loss, metric: Metric, options: TaskOptions) -> None:
        self.model = model
        self.stages = stages
        self.loss = loss
        self.metric = metric
        self.options = options
        self.adapted_names = stages.adapted_parameters(model.names, model.body_names, model.head_names)
        """The parameters that the inner loop changes, in the model's order."""
        self.head_only = set(self.adapted_names) <= set(model.head_names)
        """Whether only the head adapts, so that the body's features are computed once per support set."""
        self.support_statistics = options.bn_statistics == "support" and bool(model.batch_norms)
        """Whether query predictions use the support set's statistics."""

    def prepare(
        self, meta: Tensors, task: Task, noise: Mapping[str, Any] | None = None, weights: Tensor | None = None
    ) -> TaskContext:
        """What does not change from one inner step to the next; `TaskContext` says what the arguments are."""
        support_x, query_x = self._lower(task[0]), self._lower(task[2])
        features: tuple[Tensor, ...] = ()
        if self.head_only and self.support_statistics:
            features = self.model.body_of_query(self._lower(meta), support_x, query_x)
        elif self.head_only:
            features = (self.model.body(self._lower(meta), support_x),)
        return TaskContext(meta, support_x, task[1], query_x, task[3], noise or {}, weights, features)

    def start(self, meta: Tensors) -> Tensors:
        """The adapted parameters before the first step."""
        return self.stages.start_task({name: meta[name] for name in self.adapted_names}, meta)

    def support_loss(self, adapted: Tensors, context: TaskContext) -> Tensor:
        """The loss on the support set."""
        params = self._lower({**context.meta, **adapted})
        if context.features:
            outputs = self.model.head(params, context.features[0])
        else:
            _, outputs = self.model.forward(params, context.support_x)
        return self.loss(self._restore(outputs, context), context.support_y)

    def inner_step(self, adapted: Tensors, context: TaskContext, step: int) -> Tensors:
        """The parameters after one more adaptation step."""
        if self.options.first_order:
            gradient = grad(self.support_loss)(_detach(adapted), context.detach())
            gradient = _detach(gradient)
        else:
            gradient = grad(self.support_loss)(adapted, context)
        gradient = self.stages.augment_inner_gradient(gradient, adapted, context.meta, context.noise, step)
        return self.stages.inner_update(adapted, gradient, context.meta, step)

    def adapt(self, context: TaskContext, steps: int) -> Tensors:
        """The parameters after `steps` adaptation steps."""
        adapted = self.start(context.meta)
        for step in range(steps):
            adapted = self.inner_step(adapted, context, step)
        return adapted

    def predict(self, adapted: Tensors, context: TaskContext) -> tuple[Tensor, Tensor]:
        """Features and outputs of the query set ``[query, …]`` under adapted parameters."""
        params = self._lower({**context.meta, **adapted})
        if self.support_statistics:
            features = context.features or self.model.body_of_query(params, context.support_x, context.query_x)
            query_features, outputs = features[1], self.model.head_of_query(params, *features)
        elif len(context.features) == 2:
            query_features, outputs = context.features[1], self.model.head(params, context.features[1])
        else:
            query_features, outputs = self.model.forward(params, context.query_x)
        return query_features, self._restore(outputs, context)

    def outer_loss(self, adapted: Tensors, context: TaskContext) -> tuple[Tensor, Tensors]:
        """The part of the outer objective that adapted parameters decide, and what is logged of it."""
        features, outputs = self.predict(adapted, context)
        targets, weights = context.query_y, context.weights
        query_loss = self.loss(outputs, targets)
        if query_loss.dim() != 0:
            raise UsageError(
                f"The loss must return a scalar, the mean over a task's examples; it returned the shape "
                f"{tuple(query_loss.shape)}."
            )
        terms, extra_logs = self.stages.augment_outer_loss(
            self._lower(context.meta),
            context.noise,
            features=features,
            outputs=outputs,
            targets=targets,
            loss=lambda outputs, targets: self.loss(self._restore(outputs, context), targets),
            metric=lambda outputs, targets: self.metric(self._restore(outputs, context), targets),
        )
        # Where a plugin gives the outer gradient, the query loss is reported and only the terms are differentiated.
        weighted = query_loss if weights is None else weights[-1] * query_loss
        total = terms if self.stages.implements("outer_gradient") else weighted + terms
        reported = query_loss.detach()
        same = self.metric.function is self.loss
        logs = {"query_loss": reported, self.metric.name: reported if same else self.metric(outputs.detach(), targets)}
        return torch.as_tensor(total, dtype=query_loss.dtype), logs | extra_logs

    def earlier_losses(self, adapted: Tensors, context: TaskContext, step: int) -> tuple[Tensor, ...]:
        """The weighted query loss of the parameters that an inner step starts from, where there are weights."""
        if context.weights is None or step == 0:
            return ()
        _, outputs = self.predict(adapted, context)
        return (context.weights[step - 1] * self.loss(outputs, context.query_y),)

    def objective(
        self, meta: Tensors, task: Task, noise: Mapping[str, Any], weights: Tensor | None = None
    ) -> tuple[Tensor, Tensors]:
        """The outer objective of one task, and what is logged of it; arguments as in `prepare`."""
        context = self.prepare(meta, task, noise, weights)
        adapted = self.start(meta)
        earlier: tuple[Tensor, ...] = ()
        for step in range(self.options.inner_steps):
            earlier += self.earlier_losses(adapted, context, step)
            adapted = self.inner_step(adapted, context, step)
        last, logs = self.outer_loss(adapted, context)
        return sum(earlier, last), logs

    def scores(self, meta: Tensors, task: Task, inner_steps: Sequence[int]) -> Tensor:
        """The metric on the query set after each number of inner steps in `inner_steps` (ascending): ``[len]``."""
        context = self.prepare(meta, task)
        if len(context.features) == 1:  # those of the query set too: once, not after each number of steps
            query_features = self.model.body(self._lower(meta), context.query_x)
            context = replace(context, features=(*context.features, query_features))
        adapted = self.start(meta)
        scores = []
        for step in range(inner_steps[-1] + 1):
            if step in inner_steps:
                _, outputs = self.predict(adapted, context)
                scores.append(self.metric(outputs, context.query_y))
            if step < inner_steps[-1]:
                adapted = self.inner_step(adapted, context, step)
        return torch.stack(scores)

    def _lower(self, tree: Any) -> Any:
        """Parameters or inputs in the precision that the model runs in."""
        if self.options.precision == "full":
            return tree
        return tree_map(lambda leaf: leaf.to(torch.bfloat16) if leaf.is_floating_point() else leaf, tree)

    def _restore(self, outputs: Tensor, context: TaskContext) -> Tensor:
        """Outputs in the precision of the meta-parameters, in which losses and metrics are computed."""
        return outputs if self.options.precision == "full" else outputs.to(next(iter(context.meta.values())).dtype)


def _detach(tensors: Tensors) -> Tensors:
    return {name: value.detach() for name, value in tensors.items()}
