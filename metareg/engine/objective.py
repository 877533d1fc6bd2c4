"""The mathematics of one task: adaptation, and the outer objective as a pure function of the meta-parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad

from metareg.contract.losses import Loss, Metric, widen
from metareg.engine.context import Adaptation, Task, TaskContext, TaskOptions, Tensors
from metareg.engine.plugin_head import PluginHead
from metareg.engine.split_model import SplitModel
from metareg.engine.stages import Stages
from metareg.errors import PluginError, UsageError
from metareg.util.torch_internals import tree_map

__all__ = ["TaskFunctions"]


@dataclass(frozen=True)
class _TaskView:
    """A task at one inner step, or in the outer stages; `metareg.TaskView` describes its members."""

    functions: TaskFunctions
    context: TaskContext
    step: int
    start: Tensors | None = None
    """The parameters before the first step; None in the inner stages."""

    @property
    def support_x(self) -> Any:
        return self.context.support_x

    @property
    def support_y(self) -> Tensor:
        return self.context.support_y

    @property
    def query_x(self) -> Any:
        if self.start is None and not self.functions.stages.transductive:
            raise PluginError(
                "Inner stages see the query inputs only if the plugin's class declares transductive = True."
            )
        return self.context.query_x

    @property
    def query_y(self) -> Tensor:
        self._refuse_inner("query_y")
        return self.context.query_y

    @property
    def body_names(self) -> tuple[str, ...]:
        return self.functions.model.body_names

    @property
    def head_names(self) -> tuple[str, ...]:
        return self.functions.model.head_names

    @property
    def output_layer(self) -> tuple[str, str | None]:
        return self.functions.model.output_layer

    def body(self, params: Tensors, x: Any) -> Tensor:
        lower = self.functions.lower
        return self.functions.model.body(self._complete(params), lower(x))

    def head(self, params: Tensors, features: Tensor) -> Tensor:
        return self.functions.restore(self.functions.model.head(self._complete(params), features), self.context)

    def embed(self, params: Tensors, features: Tensor) -> Tensor:
        return self.functions.restore(self.functions.model.embed(self._complete(params), features), self.context)

    def outputs(self, params: Tensors, x: Any) -> Tensor:
        return self.head(params, self.body(params, x))

    def support_features(self, params: Tensors) -> Tensor:
        return self.context.features[0] if self.context.features else self.body(params, self.context.support_x)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.functions.loss(outputs, targets)

    def support_loss(self, params: Tensors) -> Tensor:
        return self.loss(self.head(params, self.support_features(params)), self.context.support_y)

    def gradient(self, params: Tensors) -> Tensors:
        return self.functions.inner_gradient(params, self.context, self.step)

    def hessian_product(self, params: Tensors, vector: Tensors) -> Tensors:
        def multiply(params: Tensors) -> Tensor:
            grads = grad(self.functions.inner_loss)(params, self.context, self.step)
            return torch.stack([(grads[name] * vector[name]).sum() for name in params]).sum()

        return grad(multiply)(params)

    def query_outputs(self, params: Tensors) -> Tensor:
        self._refuse_inner("query_outputs")
        _, outputs = self.functions.predict(params, self.context)
        return outputs

    def query_loss(self, params: Tensors) -> Tensor:
        self._refuse_inner("query_loss")
        return self.loss(self.query_outputs(params), self.context.query_y)

    def query_gradient(self, params: Tensors) -> Tensors:
        self._refuse_inner("query_gradient")
        return grad(self.query_loss)(params)

    def adapt(self, params: Tensors, state: Any, first: int, steps: int) -> tuple[Tensors, Any]:
        self._refuse_inner("adapt")
        adaptation = Adaptation(params, state, self.start or {})
        for step in range(first, first + steps):
            adaptation = self.functions.plain.inner_step(adaptation, self.context, step)
        return adaptation.params, adaptation.state

    def _complete(self, params: Tensors) -> Tensors:
        """Return every parameter in the precision of the model's forward pass."""
        return self.functions.lower({**self.context.meta, **params})

    def _refuse_inner(self, name: str) -> None:
        if self.start is None:
            raise PluginError(f"task.{name} exists only in the outer stages: no inner step may see the query targets.")


class TaskFunctions:
    """The computations of one task, as pure functions without a task dimension."""

    def __init__(
        self,
        model: SplitModel,
        stages: Stages,
        loss: Loss,
        metric: Metric,
        options: TaskOptions,
        plain: TaskFunctions | None = None,
    ) -> None:
        self.model = model
        self.stages = stages
        self.plain = plain or self
        """The same functions without training-only augmenters."""
        self.loss = loss
        self.metric = metric
        self.options = options
        self.adapted_names = stages.adapted_parameters(model)
        """The parameters that the inner loop changes, in the model's order."""
        self.head_only = set(self.adapted_names) <= set(model.head_names)
        """Whether only the head adapts, so that the body's features are computed once per support set."""
        self.support_statistics = options.bn_statistics == "support" and bool(model.batch_norms)
        """Whether query predictions use the support set's statistics."""
        self._keeps_start = stages.find_asking("start") is not None

    def prepare(
        self,
        meta: Tensors,
        task: Task,
        noise: Mapping[str, Any] | None = None,
        weights: Tensor | None = None,
        features: tuple[Tensor, ...] = (),
    ) -> TaskContext:
        """Compute everything that stays the same between inner steps; arguments as in `TaskContext`."""
        support_x, query_x = self.lower(task[0]), None if task[2] is None else self.lower(task[2])
        if self.head_only and not features:
            full = self.lower(meta)
            if self.support_statistics:
                features = self.model.body_of_query(full, support_x, query_x)
            else:
                features = (self.model.body(full, support_x),)
        return TaskContext(meta, support_x, task[1], query_x, task[3], noise or {}, weights, features)

    def view(self, context: TaskContext, step: int) -> _TaskView:
        """Create the view of the task for the stages of an inner step."""
        return _TaskView(self, context, step)

    def start(self, context: TaskContext) -> Adaptation:
        """Return the adaptation before the first step."""
        params = {name: context.meta[name] for name in self.adapted_names}
        params, state = self.stages.start_task(params, context.meta, context.noise, self.view(context, 0))
        return Adaptation(params, state, params if self._keeps_start else {})

    def inner_loss(self, params: Tensors, context: TaskContext, step: int) -> Tensor:
        """Return the loss on the support set that an inner step descends."""
        full = self.lower({**context.meta, **params})
        if context.features:
            outputs = self.model.head(full, context.features[0])
        else:
            _, outputs = self.model.forward(full, context.support_x)
        outputs, targets = self.restore(outputs, context), context.support_y
        if not self.stages.changes_inner_loss:
            return self.task_loss(outputs, targets)
        view, meta, noise = self.view(context, step), context.meta, context.noise
        return self.stages.inner_loss(outputs, targets, params, meta, step, self.loss, noise, view)

    def task_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a task's examples, a scalar."""
        value = self.loss(outputs, targets)
        if value.dim() != 0:
            raise UsageError(
                "The loss must return a scalar, the mean over a task's examples; it returned a tensor of shape "
                f"{tuple(value.shape)}."
            )
        return value

    def inner_gradient(self, params: Tensors, context: TaskContext, step: int) -> Tensors:
        """Return the gradient of `inner_loss`; with ``first_order``, a constant for the outer loop."""
        if not params:
            return {}
        if self.options.first_order:
            return _detach(grad(self.inner_loss)(_detach(params), context.detach(), step))
        return grad(self.inner_loss)(params, context, step)

    def inner_step(self, adaptation: Adaptation, context: TaskContext, step: int) -> Adaptation:
        """Take one inner step."""
        params, state, start = adaptation
        given = params, context.meta, step, state, context.noise, self.view(context, step)
        grads = self.stages.inner_gradient(*given) if self.stages.implements("inner_gradient") else None
        if grads is None:
            grads = self.inner_gradient(params, context, step)
        grads = self.stages.augment_inner_gradient(grads, params, context.meta, context.noise, step, given[-1])
        params, state = self.stages.inner_update(grads, start, *given)
        return Adaptation(params, state, start)

    def adapt(self, context: TaskContext, steps: int) -> Adaptation:
        """Take `steps` inner steps of an evaluation."""
        adaptation = self.start(context)
        for step in range(steps):
            adaptation = self.evaluation_step(adaptation, context, step)
        return adaptation

    def evaluation_step(self, adaptation: Adaptation, context: TaskContext, step: int) -> Adaptation:
        """Take one inner step of an evaluation, which does not change the head if a plugin predicts instead of it."""
        after = self.inner_step(adaptation, context, step)
        if self.stages.predictor is None:
            return after
        head = {name: value for name, value in adaptation.params.items() if name in self.model.head_names}
        return after._replace(params={**after.params, **head})

    def predict(self, adapted: Tensors, context: TaskContext) -> tuple[Tensor, Tensor]:
        """Return features and outputs of the query set ``[query, …]`` with the adapted parameters."""
        params = self.lower({**context.meta, **adapted})
        support_features, features = self._extract_query(params, context)
        if support_features is None:
            outputs = self.model.head(params, features)
        else:
            outputs = self.model.head_of_query(params, support_features, features)
        return features, self.restore(outputs, context)

    def evaluate_query(self, adapted: Tensors, context: TaskContext) -> Tensor:
        """Return the outputs for the query set in evaluation: the head's, or those of the plugin that predicts."""
        if self.stages.predictor is None:
            return self.predict(adapted, context)[1]
        params = self.lower({**context.meta, **adapted})
        support_features, features = self._extract_query(params, context)
        return self.restore(self.stages.predict(features, support_features, params), context)

    def create_module(self, params: Tensors, statistics_of: Any = None) -> nn.Module:
        """Create an ordinary module with given meta-parameters that predicts as evaluation does.

        Args:
            params: every meta-parameter, including adapted ones.
            statistics_of: as in `SplitModel.create_adapted_module`.
        """
        head = None
        if self.stages.predictor is not None:
            features = None if statistics_of is None else self.model.body(params, statistics_of)
            head = PluginHead(self.stages, params, features)
        return self.model.create_adapted_module(params, statistics_of, head)

    def _extract_query(self, params: Tensors, context: TaskContext) -> tuple[Tensor | None, Tensor]:
        """Return features of the support set, if it provides the statistics, and of the query set."""
        if self.support_statistics:
            support, query = context.features or self.model.body_of_query(params, context.support_x, context.query_x)
            return support, query
        if len(context.features) == 2:
            return None, context.features[1]
        return None, self.model.body(params, context.query_x)

    def view_outer(self, adaptation: Adaptation, context: TaskContext) -> _TaskView:
        """Create the view of the task for the outer stages."""
        return _TaskView(self, context, self.options.inner_steps, adaptation.start)

    def outer_loss(self, adaptation: Adaptation, context: TaskContext) -> tuple[Tensor, Tensors]:
        """Return the part of the outer objective after the last inner step, and its logs."""
        adapted, state, start = adaptation
        features, outputs = self.predict(adapted, context)
        view = self.view_outer(adaptation, context)
        targets, weights = context.query_y, context.weights
        query_loss = self.task_loss(outputs, targets)
        terms, extra_logs = self.stages.augment_outer_loss(
            self.lower(context.meta),
            context.noise,
            dtype=query_loss.dtype,
            features=features,
            outputs=outputs,
            targets=targets,
            adapted=adapted,
            loss=lambda outputs, targets: self.loss(self.restore(outputs, context), targets),
            metric=lambda outputs, targets: self.metric(self.restore(outputs, context), targets),
            task=view,
        )
        objective = query_loss if weights is None else weights[-1] * query_loss
        if self.stages.implements("outer_objective"):
            steps, noise = self.options.inner_steps, context.noise
            own = self.stages.outer_objective(context.meta, adapted, start, state, steps, noise, view)
            objective = objective if own is None else own
        # If a plugin computes the outer gradient, the query loss is only reported, and only the terms are
        # differentiated.
        if self.stages.implements("outer_gradient"):
            total = terms
        else:
            total = objective + terms if self.stages.implements("augment_outer_loss") else objective
        reported = query_loss.detach()
        same = self.metric.function is self.loss and reported.dtype == widen(reported).dtype
        score = reported if same else self.metric(outputs.detach(), targets)
        logs = {"query_loss": reported, self.metric.name: score}
        return torch.as_tensor(total, dtype=query_loss.dtype), logs | extra_logs

    def earlier_losses(self, adapted: Tensors, context: TaskContext, step: int) -> tuple[Tensor, ...]:
        """Return the weighted query loss at the start of an inner step, if there are weights."""
        if context.weights is None or step == 0:
            return ()
        _, outputs = self.predict(adapted, context)
        return (context.weights[step - 1] * self.loss(outputs, context.query_y),)

    def objective(
        self, meta: Tensors, task: Task, noise: Mapping[str, Any], weights: Tensor | None = None
    ) -> tuple[Tensor, Tensors]:
        """Return the outer objective of one task, and its logs; arguments as in `prepare`."""
        context = self.prepare(meta, task, noise, weights)
        adaptation = self.start(context)
        earlier: tuple[Tensor, ...] = ()
        for step in range(self.options.inner_steps):
            earlier += self.earlier_losses(adaptation.params, context, step)
            adaptation = self.inner_step(adaptation, context, step)
        last, logs = self.outer_loss(adaptation, context)
        return sum(earlier, last), logs

    def scores(
        self,
        meta: Tensors,
        task: Task,
        noise: Mapping[str, Any],
        inner_steps: Sequence[int],
        predictors: Sequence[TaskFunctions],
    ) -> Tensor:
        """Return the metric on the query set after each number of inner steps ``[len(predictors), len(inner_steps)]``.

        Args:
            meta, task, noise: as in `prepare`.
            inner_steps: the numbers of inner steps, ascending.
            predictors: the functions that predict with the adapted parameters. They can differ from these functions
                only in the BatchNorm statistics for the query set; only these functions if only the head adapts.
        """
        context = self.prepare(meta, task, noise)
        if len(context.features) == 1:  # compute the query set's features once, not after each number of steps
            query_features = self.model.body(self.lower(meta), context.query_x)
            context = replace(context, features=(*context.features, query_features))
        adaptation = self.start(context)
        scores = []
        for step in range(inner_steps[-1] + 1):
            if step in inner_steps:
                outputs = [each.evaluate_query(adaptation.params, context) for each in predictors]
                scores.append(torch.stack([self.metric(each, context.query_y) for each in outputs]))
            if step < inner_steps[-1]:
                adaptation = self.evaluation_step(adaptation, context, step)
        return torch.stack(scores, 1)

    def lower(self, tree: Any) -> Any:
        """Convert parameters or inputs to the precision of the model's forward pass."""
        if self.options.precision == "full":
            return tree
        return tree_map(lambda leaf: leaf.to(torch.bfloat16) if leaf.is_floating_point() else leaf, tree)

    def restore(self, outputs: Tensor, context: TaskContext) -> Tensor:
        """Convert outputs to the precision of the meta-parameters, for losses and metrics."""
        return outputs if self.options.precision == "full" else outputs.to(next(iter(context.meta.values())).dtype)


def _detach(tensors: Tensors) -> Tensors:
    return {name: value.detach() for name, value in tensors.items()}
