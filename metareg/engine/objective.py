"""The mathematics: the meta-gradient of one task as a pure function of meta-parameters, task and noise (`torch.func`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vjp

from metareg.contract.losses import Loss, Metric
from metareg.engine.split_model import SplitModel
from metareg.engine.stages import Stages
from metareg.errors import UsageError
from metareg.util.torch_internals import tree_map

__all__ = ["Task", "TaskFunctions", "Tensors"]

Tensors = dict[str, Tensor]
Task = tuple[Any, Tensor, Any, Tensor]
"""Support inputs and targets, query inputs and targets."""


@dataclass(frozen=True)
class TaskFunctions:
    """What happens in one task, as pure functions; there is no task dimension here.

    Args:
        model: the model as functions of its parameters.
        stages: the algorithm's and the augmenters' hooks.
        loss: ``loss(outputs, targets) -> scalar``.
        metric: the task's metric.
        inner_steps: adaptation steps in training.
        first_order: treat the inner gradient as a constant (Finn et al., 2017, §5.2).
        memory: ``"store"`` or ``"recompute"``.
        bn_statistics: ``"transductive"`` or ``"support"``.
        precision: ``"full"`` or ``"bf16"``.
        adapted_names: the parameters that the inner loop changes.
    """

    model: SplitModel
    stages: Stages
    loss: Loss
    metric: Metric
    inner_steps: int
    first_order: bool
    memory: str
    bn_statistics: str
    precision: str
    adapted_names: tuple[str, ...]

    @property
    def head_only(self) -> bool:
        """Whether only the head adapts, so that the body's features are computed once per support set."""
        return set(self.adapted_names) <= set(self.model.head_names)

    @property
    def support_statistics(self) -> bool:
        """Whether query predictions use the support set's statistics."""
        return self.bn_statistics == "support" and bool(self.model.batch_norms)

    # ------------------------------------------------------------------------------------------------------ inner loop

    def prepare(self, meta: Tensors, task: Task) -> tuple[Any, Tensor | None]:
        """What the inner steps run on: the support inputs, or their features where only the head adapts.

        The second part holds the query features where they come out of the same pass.
        """
        support_x, query_x = self._low(task[0]), task[2]
        if not self.head_only:
            return support_x, None
        if self.support_statistics:
            return self.model.body_of_query(self._low(meta), support_x, self._low(query_x))
        return self.model.body(self._low(meta), support_x), None

    def support_loss(self, adapted: Tensors, meta: Tensors, support: Any, targets: Tensor) -> Tensor:
        """The loss on the support set; `support` is what `prepare` returned."""
        params = self._low({**meta, **adapted})
        features = support if self.head_only else self.model.body(params, support)
        return self.loss(self._full(self.model.head(params, features), meta), targets)

    def inner_step(
        self, adapted: Tensors, meta: Tensors, support: Any, targets: Tensor, noise: Mapping[str, Any], step: int
    ) -> Tensors:
        """Parameters after one more adaptation step."""
        if self.first_order:
            constants = tree_map(_constant, (adapted, meta, support, targets))
            gradient = {name: value.detach() for name, value in grad(self.support_loss)(*constants).items()}
        else:
            gradient = grad(self.support_loss)(adapted, meta, support, targets)
        gradient = self.stages.augment_inner_gradient(gradient, adapted, meta, noise, step)
        return self.stages.inner_update(adapted, gradient, meta, step)

    def initial(self, meta: Tensors) -> Tensors:
        """The adapted parameters before the first step."""
        return self.stages.start_task({name: meta[name] for name in self.adapted_names}, meta)

    def adapt(self, meta: Tensors, support: Any, targets: Tensor, noise: Mapping[str, Any], steps: int) -> Tensors:
        """Parameters after `steps` adaptation steps."""
        adapted = self.initial(meta)
        for step in range(steps):
            adapted = self.inner_step(adapted, meta, support, targets, noise, step)
        return adapted

    # ------------------------------------------------------------------------------------------------------ outer loop

    def query(
        self, meta: Tensors, adapted: Tensors, support: Any, query_features: Tensor | None, task: Task
    ) -> tuple[Tensor, Tensor]:
        """Features and outputs of the query set ``[query, …]`` under adapted parameters."""
        support_x, query_x = self._low(task[0]), self._low(task[2])
        params = self._low({**meta, **adapted})
        if self.support_statistics:
            if query_features is None:
                support, query_features = self.model.body_of_query(params, support_x, query_x)
            return query_features, self._full(self.model.head_of_query(params, support, query_features), meta)
        if query_features is None:
            query_features = self.model.body(params, query_x)
        return query_features, self._full(self.model.head(params, query_features), meta)

    def _low(self, tree: Any) -> Any:
        """Parameters or inputs in the precision that the model runs in."""
        if self.precision == "full":
            return tree
        return tree_map(lambda leaf: leaf.to(torch.bfloat16) if leaf.is_floating_point() else leaf, tree)

    def _full(self, outputs: Tensor, meta: Tensors) -> Tensor:
        """Outputs in the precision of the meta-parameters, in which losses and metrics are computed."""
        return outputs if self.precision == "full" else outputs.to(next(iter(meta.values())).dtype)

    def outer_loss(
        self,
        meta: Tensors,
        adapted: Tensors,
        support: Any,
        query_features: Tensor | None,
        task: Task,
        noise: Mapping[str, Any],
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensors]:
        """The outer objective of adapted parameters, and what is logged of it."""
        features, outputs = self.query(meta, adapted, support, query_features, task)
        targets = task[3]
        query_loss = self.loss(outputs, targets)
        if query_loss.dim() != 0:
            raise UsageError(
                f"The loss must return a scalar, the mean over a task's examples; it returned the shape "
                f"{tuple(query_loss.shape)}."
            )
        extra, extra_logs = self.stages.augment_outer_loss(
            self._low(meta),
            noise,
            features=features,
            outputs=outputs,
            targets=targets,
            loss=lambda outputs, targets: self.loss(self._full(outputs, meta), targets),
            metric=lambda outputs, targets: self.metric(self._full(outputs, meta), targets),
        )
        # Where a plugin gives the outer gradient, the query loss is reported and only the terms are differentiated.
        weighted = query_loss if weights is None else weights[-1] * query_loss
        total = extra if self.stages.has_outer_gradient else weighted + extra
        reported = query_loss.detach()
        same = self.metric.function is self.loss
        logs = {"query_loss": reported, self.metric.name: reported if same else self.metric(outputs.detach(), targets)}
        return torch.as_tensor(total, dtype=query_loss.dtype), logs | extra_logs

    def earlier_losses(
        self,
        meta: Tensors,
        adapted: Tensors,
        support: Any,
        query_features: Tensor | None,
        task: Task,
        weights: Tensor | None,
        step: int,
    ) -> tuple[Tensor, ...]:
        """The weighted query loss of the parameters that an inner step starts from, where there are weights."""
        if weights is None or step == 0:
            return ()
        _, outputs = self.query(meta, adapted, support, query_features, task)
        return (weights[step - 1] * self.loss(outputs, task[3]),)

    def objective(
        self, meta: Tensors, task: Task, noise: Mapping[str, Any], weights: Tensor | None = None
    ) -> tuple[Tensor, Tensors]:
        """The outer objective of one task as a function of the meta-parameters."""
        prepared = self.prepare(meta, task)
        adapted = self.initial(meta)
        earlier: tuple[Tensor, ...] = ()
        for step in range(self.inner_steps):
            earlier += self.earlier_losses(meta, adapted, *prepared, task, weights, step)
            adapted = self.inner_step(adapted, meta, prepared[0], task[1], noise, step)
        last, logs = self.outer_loss(meta, adapted, *prepared, task, noise, weights)
        return sum(earlier, last), logs

    def gradient(
        self, meta: Tensors, task: Task, noise: Mapping[str, Any], weights: Tensor | None = None
    ) -> tuple[Tensors, Tensor, Tensors]:
        """The meta-gradient of one task, its objective, and what is logged.

        Args:
            meta: every meta-parameter by name.
            task: support and query set.
            noise: what the augmenters drew for it.
            weights: of the query loss after each inner step ``[inner_steps]``; None for that after the last step alone.
        """
        if not self.stages.has_outer_gradient:
            return self._derivative(meta, task, noise, weights)
        support, query_features = self.prepare(meta, task)
        adapted = self.adapt(meta, support, task[1], noise, self.inner_steps)
        gradient = self.stages.outer_gradient(meta, adapted, self.inner_steps)
        if self.stages.has_outer_loss:
            terms, extra, logs = self._derivative(meta, task, noise, None)
            gradient = {name: gradient[name] + terms[name] for name in meta}
        else:
            extra, logs = self.outer_loss(meta, adapted, support, query_features, task, noise, None)
        return gradient, logs["query_loss"] + extra, logs

    def _derivative(
        self, meta: Tensors, task: Task, noise: Mapping[str, Any], weights: Tensor | None
    ) -> tuple[Tensors, Tensor, Tensors]:
        if self.memory == "recompute":
            return self._derivative_recomputed(meta, task, noise, weights)
        gradient, (loss, logs) = grad_and_value(self.objective, has_aux=True)(meta, task, noise, weights)
        return gradient, loss, logs

    def _derivative_recomputed(
        self, meta: Tensors, task: Task, noise: Mapping[str, Any], weights: Tensor | None
    ) -> tuple[Tensors, Tensor, Tensors]:
        """The same gradient from the parameters of each inner step alone.

        The chain rule through the inner loop, one step at a time from the last to the first: each step's graph is built
        from its kept parameters, used once and freed, so that memory does not grow with the number of steps.
        """
        targets = task[1]

        def contextualised(context: tuple[Tensor, ...]) -> tuple[Any, Tensor | None]:
            """`prepare`'s result from its tensors that depend on the meta-parameters."""
            if not self.head_only:
                return task[0], None
            return context[0], context[1] if len(context) > 1 else None

        def prepare(meta: Tensors) -> tuple[Tensor, ...]:
            if not self.head_only:
                return ()
            return tuple(part for part in self.prepare(meta, task) if part is not None)

        def one_step(
            meta: Tensors, adapted: Tensors, context: tuple[Tensor, ...], step: int
        ) -> tuple[Tensors, tuple[Tensor, ...]]:
            prepared = contextualised(context)
            earlier = self.earlier_losses(meta, adapted, *prepared, task, weights, step)
            return self.inner_step(adapted, meta, prepared[0], targets, noise, step), earlier

        def outer(meta: Tensors, adapted: Tensors, context: tuple[Tensor, ...]) -> tuple[Tensor, Tensors]:
            return self.outer_loss(meta, adapted, *contextualised(context), task, noise, weights)

        context = prepare(meta)
        trajectory = [self.initial(meta)]
        for step in range(self.inner_steps):
            trajectory.append(self.inner_step(trajectory[-1], meta, contextualised(context)[0], targets, noise, step))

        pulled: Any = vjp(outer, meta, trajectory.pop(), context, has_aux=True)
        loss, pull, logs = pulled
        total, adjoint, context_adjoint = pull(torch.ones_like(loss))
        del pulled, pull  # the graph of the query set, freed before the next is built
        for step in reversed(range(self.inner_steps)):
            (_, earlier), pull, *_ = vjp(partial(one_step, step=step), meta, trajectory.pop(), context)
            meta_part, adjoint, context_part = pull((adjoint, tuple(torch.ones_like(each) for each in earlier)))
            loss = sum(earlier, loss)
            del pull
            total = _sum(total, meta_part)
            context_adjoint = _sum(context_adjoint, context_part)
        _, pull, *_ = vjp(self.initial, meta)
        total = _sum(total, pull(adjoint)[0])
        if context:
            _, pull, *_ = vjp(prepare, meta)
            total = _sum(total, pull(context_adjoint)[0])
        return total, loss, logs

    # ------------------------------------------------------------------------------------------------------ evaluation

    def scores(self, meta: Tensors, task: Task, inner_steps: Sequence[int]) -> Tensor:
        """The metric on the query set after each number of inner steps in `inner_steps` (ascending): ``[len]``."""
        support, query_features = self.prepare(meta, task)
        if self.head_only and query_features is None:
            # Once, not after each number of steps.
            query_features = self.model.body(self._low(meta), self._low(task[2]))
        adapted = self.initial(meta)
        scores = []
        for step in range(inner_steps[-1] + 1):
            if step in inner_steps:
                _, outputs = self.query(meta, adapted, support, query_features, task)
                scores.append(self.metric(outputs, task[3]))
            if step < inner_steps[-1]:
                adapted = self.inner_step(adapted, meta, support, task[1], {}, step)
        return torch.stack(scores)


def _constant(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _sum(a: Any, b: Any) -> Any:
    return tree_map(torch.add, a, b)
