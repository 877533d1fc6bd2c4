"""The meta-gradient: one pure function of meta-parameters, tasks and noise, and the strategies that run it.

All mathematics of this module is in `TaskFunctions`, written for one task with `torch.func`. A strategy only decides how
the tasks of a batch are mapped (a Python loop or `torch.func.vmap`) and how the mapped function is executed (as it
stands, as a traced graph, or compiled), so that all strategies agree to rounding in every combination of plugins.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functionalize, grad, grad_and_value, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from metareg.contract.episodes import Episodes, stack_trees
from metareg.contract.losses import Loss, Metric
from metareg.errors import MetaregError, UsageError
from metareg.modules import SplitModel
from metareg.stages import Stages
from metareg.util.layout import channels_last_or_contiguous, contiguous, like_parameters

__all__ = ["Engine", "Gradient", "TaskFunctions", "choose_strategy", "find_compiler"]

log = logging.getLogger("metareg")

Tensors = dict[str, Tensor]
Task = tuple[Any, Tensor, Any, Tensor]
Strategy = Literal["serial", "traced", "vectorized", "compiled"]
_ONE_BY_ONE = ("serial", "traced")


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
            constants = pytree.tree_map(_constant, (adapted, meta, support, targets))
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
        return pytree.tree_map(lambda leaf: leaf.to(torch.bfloat16) if leaf.is_floating_point() else leaf, tree)

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


@dataclass(frozen=True)
class Gradient:
    """A meta-gradient, averaged over the tasks of a batch."""

    grads: Tensors
    loss: Tensor
    """The objective that was differentiated: query loss and the augmenters' terms."""
    logs: Tensors
    """``query_loss``, the metric under its name, ``PLUGIN.KEY`` of the augmenters, and ``grad_norm``, the Euclidean norm."""


class Engine:
    """Runs `TaskFunctions` over batches of tasks with one strategy.

    Args:
        training: the functions with every stage.
        plain: the functions without augmenters, for evaluation.
    """

    def __init__(self, training: TaskFunctions, plain: TaskFunctions) -> None:
        self.training = training
        self.plain = plain
        self._programs: dict[Any, _Program] = {}
        self._log_names: tuple[str, ...] = ()

    def gradient(
        self,
        meta: Tensors,
        batches: Sequence[Episodes],
        noise: Sequence[Mapping[str, Any]],
        strategy: Strategy,
        chunk: int | None,
        weights: Tensor | None = None,
    ) -> Gradient:
        """The mean meta-gradient over all tasks of `batches`, each tensor with the strides of its parameter.

        Args:
            meta: every meta-parameter by name.
            batches: stacks of tasks; tasks of different sizes are in different stacks.
            noise: what was drawn for each task, in the order of the tasks.
            strategy: how to run them.
            chunk: at most so many tasks at once.
            weights: of the query loss after each inner step ``[inner_steps]``; None for that after the last step alone.
        """
        total = sum(len(batch) for batch in batches)
        result: Gradient | None = None
        done = 0
        for batch in batches:
            for part in batch.chunks(1 if strategy in _ONE_BY_ONE else chunk):
                part_noise = noise[done : done + len(part)]
                one = self._gradient_of_stack(meta, part, part_noise, strategy, weights)
                done += len(part)
                result = one if len(part) == total else _accumulated(result, one, len(part) / total)
        assert result is not None
        if len(part) < total:
            result.logs["grad_norm"] = _norm(result.grads)
        return replace(result, grads=like_parameters(result.grads, meta))

    def scores(
        self,
        meta: Tensors,
        episodes: Episodes,
        inner_steps: tuple[int, ...],
        strategy: Strategy,
        chunk: int | None,
    ) -> Tensor:
        """The metric of every task after each number of inner steps: ``[tasks, len(inner_steps)]``."""
        one_by_one = strategy in _ONE_BY_ONE
        parts = episodes.chunks(1 if one_by_one else chunk)

        def mapped(meta: Tensors, tasks: Task, _: Mapping[str, Any]) -> list[Tensor]:
            if one_by_one:
                return [self.plain.scores(meta, _only(tasks), inner_steps)[None]]
            return [vmap(lambda task: self.plain.scores(meta, task, inner_steps))(tasks)]

        if strategy == "serial":
            with torch.no_grad(), _memory_advice(1):
                return torch.cat([mapped(meta, part.parts, {})[0] for part in parts])
        # Compiling pays for many equal steps; an evaluation has few, each as long as many.
        program = self._program(("scores", inner_steps), mapped, "vectorized" if strategy == "compiled" else strategy)
        return torch.cat([program(meta, part, {})[0] for part in parts])

    def _gradient_of_stack(
        self,
        meta: Tensors,
        episodes: Episodes,
        noise: Sequence[Mapping[str, Any]],
        strategy: Strategy,
        weights: Tensor | None,
    ) -> Gradient:
        if strategy == "serial":
            with torch.no_grad(), _memory_advice(1):
                task_noise = noise[0] if noise else {}
                grads, loss, logs = self.training.gradient(meta, _only(episodes.parts), task_noise, weights)
                return Gradient(grads, loss, logs | {"grad_norm": _norm(grads)})
        program = self._program("gradient", self._mapped_gradient, strategy)
        # The weights change from step to step: an input of the traced program, or they would be frozen into it.
        extra = ({"noise": stack_trees(noise)} if noise else {}) | ({} if weights is None else {"weights": weights})
        flat = program(meta, episodes, extra)
        count = len(meta)
        return Gradient(
            dict(zip(meta, flat, strict=False)), flat[count], dict(zip(self._log_names, flat[count + 1 :], strict=True))
        )

    def _mapped_gradient(self, meta: Tensors, tasks: Task, extra: Mapping[str, Any]) -> list[Tensor]:
        """The gradients in the order of `meta`, the objective, and the logs in the order of `_log_names`."""
        # Each task is differentiated inside the map, not the mapped mean: that costs little more, and outside it the batched
        # backward of BatchNorm, InstanceNorm and LayerNorm takes their statistics for constants (pytorch/functorch#534).
        noise, weights = extra.get("noise", {}), extra.get("weights")
        if len(tasks[1]) == 1:  # a map over one task would only make its convolutions grouped ones
            grads, loss, logs = self.training.gradient(meta, _only(tasks), _only(noise), weights)
        else:
            gradient = vmap(lambda task, drawn: self.training.gradient(meta, task, drawn, weights))
            grads, losses, logs = gradient(tasks, noise)
            grads, loss, logs = _means(grads), losses.mean(), _means(logs)
        logs["grad_norm"] = _norm(grads)
        self._log_names = tuple(logs)
        return [*grads.values(), loss, *logs.values()]

    def _program(self, key: Any, function: _Function, strategy: Strategy) -> _Program:
        program = self._programs.get((key, strategy))
        if program is None:
            program = self._programs[key, strategy] = _Program(function, compiled=strategy == "compiled")
        return program


_Function = Callable[[Tensors, Task, Mapping[str, Any]], list[Tensor]]


_CALLS_OF_ANOTHER_SHAPE = 32


class _Program:
    """A function of meta-parameters, tasks and extra inputs that is traced to a graph of operations for each set of shapes.

    Tracing (`make_fx`) runs the function's Python, plugins and `torch.func` transforms included, and keeps only the
    operations; replaying them costs a fraction of the original and gives the same bits. `torch.compile` gets the traced
    graph, in which no Python of a plugin is left to break it.

    Args:
        function: pure; its control flow depends on nothing but shapes.
        compiled: hand the graph to `torch.compile`.
    """

    def __init__(self, function: _Function, *, compiled: bool) -> None:
        self._function = function
        self._compiled = compiled
        self._graphs: dict[Any, Callable[..., list[Tensor]]] = {}
        self._calls: Counter[Any] = Counter()

    def __call__(self, meta: Tensors, episodes: Episodes, extra: Mapping[str, Any]) -> list[Tensor]:
        inputs, structure = _flattened(episodes.parts, extra)
        # A graph is for one layout in memory, and bits can depend on it: every way of running gets a settled one. A map over
        # tasks takes nothing channels last: the second derivative of max-pooling has no batching rule there.
        settled = channels_last_or_contiguous if len(episodes) == 1 else contiguous
        inputs = [settled(leaf) for leaf in inputs]
        key = (structure, *[(leaf.shape, leaf.stride(), leaf.dtype) for leaf in inputs])
        with torch.no_grad(), _memory_advice(len(episodes)):
            graph = self._graphs.get(key)
            if graph is None:
                self._calls[key] += 1
                # Tracing costs as much as a dozen calls or more: not worth it for a function that is called once, nor for
                # each of the many shapes that tasks of unequal sizes come in.
                worth = 1 if not self._graphs else _CALLS_OF_ANOTHER_SHAPE
                if self._calls[key] <= worth and not self._compiled:
                    return self._function(meta, *_unflattened(inputs, structure))
                graph = self._graphs[key] = self._traced(meta, inputs, structure)
            return graph(*meta.values(), *inputs)

    def _traced(self, meta: Tensors, inputs: Sequence[Tensor], structure: Any) -> Callable[..., list[Tensor]]:
        names, leaves = tuple(meta), (*meta.values(), *inputs)

        def flat(*leaves: Tensor) -> list[Tensor]:
            parts, extra = _unflattened(leaves[len(names) :], structure)
            return self._function(dict(zip(names, leaves, strict=False)), parts, extra)

        # With fake tensors, tracing takes neither memory nor arithmetic; the model's constants (frozen parameters, buffers)
        # are real.
        trace = partial(make_fx, tracing_mode="fake", _allow_non_fake_inputs=True)
        graph = trace(flat)(*leaves)
        if _writes(graph):
            graph = trace(functionalize(graph))(*leaves)
        graph = without_idle_operations(graph)
        if not self._compiled:
            traced: Callable[..., list[Tensor]] = graph.forward
            return traced
        try:
            # torch.compile would look for a graph in Python code, and at every call for what the code may have changed;
            # here the graph is there already, and its shapes and types are its key: its compiler is called directly.
            compiled: Callable[..., list[Tensor]] = torch._inductor.compile(graph, list(leaves))
            compiled(*leaves)
        except Exception as error:
            raise CompileError(
                f"torch.compile failed ({type(error).__name__}: {str(error).strip().splitlines()[0]}); "
                "strategy='vectorized' needs no compiler."
            ) from error
        return compiled


_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.expand.default)
_TRANSPOSITIONS = (_ATEN.t.default, _ATEN.transpose.int)


def without_idle_operations(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph less the operations that give back what they were given.

    `torch.func` leaves many of them: views as the same shape, transpositions of transpositions, products with 1. Small
    tasks spend their time on the number of operations, not on arithmetic. A graph in which something is written in place
    stays as it is.
    """
    if _writes(graph):
        return graph
    for node in graph.graph.nodes:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, torch.fx.Node) or not isinstance(node.meta.get("val"), Tensor):
            continue
        if node.target in _TRANSPOSITIONS and source.target is node.target and source.args[1:] == node.args[1:]:
            node.replace_all_uses_with(source.args[0])
        elif node.target is _ATEN.detach.default or (
            (
                (node.target in _VIEWS and _has_one_layout(source.meta["val"]))
                or (node.target is _ATEN.mul.Scalar and node.args[1] == 1)
            )
            and _layout(node.meta["val"]) == _layout(source.meta["val"])
        ):
            node.replace_all_uses_with(source)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _writes(graph: torch.fx.GraphModule) -> bool:
    """Whether something is written in place."""
    operations = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return any(operation._schema.is_mutable for operation in operations)


def _layout(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.shape, value.stride()


def _has_one_layout(value: Tensor) -> bool:
    """Whether a view of the same shape has the same strides too.

    A view sets that of a dimension of size 1 anew, which fake tensors do not show. No element's place depends on it, but
    products choose their kernel by it, and so the last bit of their result.
    """
    return 1 not in value.shape or value.stride() == torch.empty(value.shape, device="meta").stride()


class CompileError(MetaregError):
    """torch.compile did not produce a program, most often because there is no C++ compiler."""


# The measured cost of compiling on 2 CPU cores, and the gain per training step for each inner step and the outer one.
_COMPILE_SECONDS = 25.0
_GAIN_SECONDS_PER_STAGE = 0.7e-3


def choose_strategy(
    functions: TaskFunctions, device: torch.device, tasks: int, steps: int, stackable: bool
) -> tuple[Strategy, str]:
    """What ``strategy="auto"`` runs, and why; a function of the run's settings, never of a clock.

    Args:
        functions: what is to be run.
        device: where.
        tasks: tasks per batch.
        steps: training steps that there will be.
        stackable: whether the tasks can be stacked.
    """
    if not stackable:
        return "serial", "the task's episodes do not stack"
    if device.type == "cpu" and any(p.dim() >= 4 for p in functions.model.module.parameters()):
        return "traced", "convolutional tasks are slower in one batch than one by one on a CPU"
    if tasks == 1:
        return "vectorized", "there is one task per batch"
    gain = steps * _GAIN_SECONDS_PER_STAGE * (1 + functions.inner_steps)
    cost = _COMPILE_SECONDS * (1 + functions.inner_steps) / 2
    if gain <= cost:
        return "vectorized", f"{steps} steps are too few to pay for about {cost:.0f} s of compiling"
    if device.type == "cpu" and find_compiler() is None:
        return "vectorized", "compiling would pay, but there is no C++ compiler (g++ or clang++)"
    return "compiled", f"{steps} steps pay for about {cost:.0f} s of compiling"


def find_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU; None where there is none."""
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def _constant(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _sum(a: Any, b: Any) -> Any:
    return pytree.tree_map(torch.add, a, b)


def _only(tasks: Any) -> Any:
    """The single task of a stack of one."""
    return pytree.tree_map(lambda leaf: leaf[0], tasks)


def _flattened(parts: Task, extra: Mapping[str, Any]) -> tuple[Sequence[Tensor], Any]:
    """The tensors of tasks and extra inputs, and how they were arranged; None where there is nothing but the four parts."""
    if not extra and type(parts[0]) is Tensor and type(parts[2]) is Tensor:
        return parts, None
    return pytree.tree_flatten((parts, extra))


def _unflattened(leaves: Sequence[Tensor], structure: Any) -> tuple[Task, Mapping[str, Any]]:
    """The inverse of `_flattened`."""
    if structure is None:
        support_x, support_y, query_x, query_y = leaves
        return (support_x, support_y, query_x, query_y), {}
    parts, noise = pytree.tree_unflatten(leaves, structure)
    return parts, noise


def _norm(grads: Tensors) -> Tensor:
    """The Euclidean norm of a whole gradient."""
    return torch.nn.utils.get_total_norm(grads.values())


def _means(trees: Tensors) -> Tensors:
    return {name: value.mean(0) for name, value in trees.items()}


def _accumulated(total: Gradient | None, part: Gradient, weight: float) -> Gradient:
    def add(a: Tensor | None, b: Tensor) -> Tensor:
        return b * weight if a is None else a + b * weight

    previous = total or Gradient({}, None, {})  # type: ignore[arg-type]
    return Gradient(
        {name: add(previous.grads.get(name), value) for name, value in part.grads.items()},
        add(previous.loss, part.loss),
        {name: add(previous.logs.get(name), value) for name, value in part.logs.items()},
    )


@contextmanager
def _memory_advice(tasks: int) -> Any:
    """Turn running out of memory into the advice that helps."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        smaller = f"chunk={max(1, tasks // 2)} takes fewer tasks at once" if tasks > 1 else "take a smaller batch"
        raise MetaregError(
            f"Out of memory with {tasks} task{'s' * (tasks > 1)} at once; {smaller}, and memory='recompute' keeps "
            "only the parameters of each inner step."
        ) from error
