"""Execution of the functions of one task over the tasks of a batch, with each strategy.

A strategy only decides how the tasks of a batch are mapped (a Python loop or `torch.func.vmap`) and how the mapped
function is executed (directly, as a traced graph, or compiled). All strategies therefore agree up to rounding for every
combination of plugins.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from metareg.contract.episodes import Episodes, stack_trees
from metareg.contract.losses import Loss, Metric
from metareg.engine.agreement import compare
from metareg.engine.context import Task, TaskOptions, Tensors
from metareg.engine.derivative import compute_meta_gradient, differentiate_by_steps, recomputes
from metareg.engine.objective import TaskFunctions
from metareg.engine.shared_graphs import identify
from metareg.engine.split_model import SplitModel
from metareg.engine.stages import Stages
from metareg.engine.step_loop import Batches, OuterUpdate, StepLoop, Steps, join
from metareg.engine.strategies import ONE_BY_ONE, Strategy
from metareg.engine.tracing import (
    Description,
    Function,
    Graphs,
    OutOfMemoryError,
    Program,
    advise_on_memory,
    summarise_error,
)
from metareg.errors import MetaregError
from metareg.printable import format_count
from metareg.util.layout import make_channels_last, make_contiguous, match_strides
from metareg.util.torch_internals import tree_flatten, tree_map, tree_unflatten

__all__ = ["Engine", "Gradient"]

log = logging.getLogger("metareg")

_STACKS_BEFORE_TRACING = 32
"""Number of stacks that an evaluation maps untraced: a test has six, and a graph saves only milliseconds per stack."""

_TASKS_BEFORE_TRACING = 2
"""Tasks that an evaluation of one after the other runs untraced: a run's first check has two, and needs no graph."""


@dataclass(frozen=True)
class Gradient:
    """A meta-gradient, averaged over the tasks of a batch.

    If a plugin combines the tasks, `grads` and `loss` have a task dimension until then, and there is no ``grad_norm``;
    logged values are always means. For several steps at once, `loss` and `logs` are ``[steps]``, and `grads` are those of
    the last one.
    """

    grads: Tensors
    loss: Tensor
    """The differentiated objective: query loss and the augmenters' terms."""
    logs: Tensors
    """``query_loss``, the metric under its name, ``PLUGIN.KEY`` of the augmenters, and ``grad_norm``, the Euclidean norm."""

    def with_grads(self, grads: Tensors) -> Gradient:
        """Return the same results with other gradients, without a task dimension, and their norm."""
        return Gradient(grads, self.loss.mean(), self.logs | {"grad_norm": _norm(grads)})

    def select(self, steps: int | slice) -> Gradient:
        """Return the same gradient with the objective and the logs of some of several steps."""
        return Gradient(self.grads, self.loss[steps], {name: value[steps] for name, value in self.logs.items()})


class Engine:
    """Runs the functions of one task over batches of tasks; arguments as for `TaskFunctions`."""

    def __init__(self, model: SplitModel, stages: Stages, loss: Loss, metric: Metric, options: TaskOptions) -> None:
        self.plain = TaskFunctions(model, stages.for_adaptation(), loss, metric, options)
        """Functions with the stages of the algorithm and the augmenters that stay, for evaluation and adaptation."""
        self.training = TaskFunctions(model, stages, loss, metric, options, self.plain)
        """Functions with all stages."""
        self._keeps_tasks = stages.implements("combine_tasks")
        self._programs: dict[Any, Program] = {}
        self._graphs: Graphs | None = None
        self._loop: StepLoop | None = None
        self._most_scored = sys.maxsize
        """The most tasks that an evaluation runs at once; it has a hundred, where a training step often has only four."""

    def __getstate__(self) -> dict[str, Any]:
        """Omit programs from copies and pickles, because graphs are bound to the model that they were traced from."""
        return {**self.__dict__, "_programs": {}, "_graphs": None, "_loop": None}

    def gradient(
        self,
        meta: Tensors,
        batches: Sequence[Episodes],
        noise: Sequence[Mapping[str, Any]],
        strategy: Strategy,
        chunk: int | None,
        weights: Tensor | None = None,
    ) -> Gradient:
        """Compute the mean meta-gradient of the tasks in `batches`, each tensor with the strides of its parameter.

        If a plugin combines tasks, return the gradient of every task, in order.

        Args:
            meta: every meta-parameter by name.
            batches: stacks of tasks; tasks of different sizes are in different stacks.
            noise: the noise of each task, in order.
            strategy: how to run them.
            chunk: the maximum number of tasks at once.
            weights: weights of the query loss after each inner step ``[inner_steps]``; None if only the last step
                counts.
        """
        parts = self._run_parts(meta, batches, noise, strategy, chunk, weights)
        if self._keeps_tasks:
            return _concatenate([part for part, _ in parts])
        result: Gradient | None = None
        for part, share in parts:
            result = part if share == 1 else _accumulate(result, part, share)
        assert result is not None
        if share < 1:
            result.logs["grad_norm"] = _norm(result.grads)
        return Gradient(match_strides(result.grads, meta), result.loss, result.logs)

    def _run_parts(
        self,
        meta: Tensors,
        batches: Sequence[Episodes],
        noise: Sequence[Mapping[str, Any]],
        strategy: Strategy,
        chunk: int | None,
        weights: Tensor | None,
    ) -> Iterator[tuple[Gradient, float]]:
        """Yield meta-gradients of tasks that run at once, with their weights; arguments as in `gradient`."""
        total = sum(len(batch) for batch in batches)
        done = 0
        for batch in batches:
            for part in batch.chunks(1 if strategy in ONE_BY_ONE else chunk):
                part_noise = noise[done : done + len(part)]
                done += len(part)
                yield self._run_stack(meta, part, part_noise, strategy, weights), len(part) / total

    def take_steps(self, meta: Tensors, batches: Batches, update: OuterUpdate) -> tuple[Steps, Gradient] | None:
        """Take training steps in one compiled program, on a CPU; return None if that is impossible.

        Args:
            meta: every meta-parameter by name.
            batches: contiguous batches, each vectorized as one stack, without noise and weights.
            update: the outer update.

        Returns:
            The state after the steps; and their objectives and logs ``[steps]`` with the gradient of the last step. If the
            loop ended early, the last step is the one that is not finite.
        """
        if self._loop is None:
            self._loop = StepLoop(
                lambda meta, tasks: self._map_gradient(meta, tasks, {}),
                _find_checked,
                self._reads,
                self._identify(),
            )
        if not self._loop.fits(batches):
            return None
        with advise_on_memory(batches.tasks):
            steps, log_names = self._loop(meta, batches, update)
        losses, *logs = steps.scalars
        return steps, Gradient(steps.grads, losses, dict(zip(log_names, logs, strict=True)))

    @property
    def _reads(self) -> tuple[Any, ...]:
        """The user's objects that the functions of a task read."""
        return self.training.loss, self.training.metric.function, *self.training.model.forwards

    def scores(
        self,
        meta: Tensors,
        episodes: Episodes,
        noise: Sequence[Mapping[str, Any]],
        inner_steps: tuple[int, ...],
        strategy: Strategy,
        chunk: int | None,
        bn_statistics: tuple[str, ...],
    ) -> Tensor:
        """Compute the metric of every task ``[tasks, len(bn_statistics), len(inner_steps)]``."""
        policies = [_use_statistics(self.plain, each) for each in bn_statistics]
        # The statistics of predictions do not affect adaptation, unless it starts from features that were computed
        # together with the query set's.
        adapting_alike = [[each] for each in policies] if self.plain.head_only else [policies]
        one_by_one = strategy in ONE_BY_ONE

        def score_stack(meta: Tensors, tasks: Task, extra: Mapping[str, Any]) -> tuple[list[Tensor], Description]:
            def score(task: Task, noise: Mapping[str, Any]) -> Tensor:
                return torch.cat([alike[0].scores(meta, task, noise, inner_steps, alike) for alike in adapting_alike])

            noise = extra.get("noise", {})
            scores = score(_unbatch(tasks), _unbatch(noise))[None] if one_by_one else vmap(score)(tasks, noise)
            return [scores], Description(1, None)

        def run(size: int, compute: Callable[[Episodes, Mapping[str, Any]], list[Tensor]]) -> Tensor:
            scores, done = [], 0
            for part in episodes.chunks(size):
                scores += compute(part, _stack_noise(noise[done : done + len(part)]))
                done += len(part)
            return torch.cat(scores)

        if strategy == "serial":
            with torch.no_grad(), advise_on_memory(1):
                return run(1, lambda part, extra: score_stack(meta, part.parts, extra)[0])
        self._expect_changes()
        # Compiling pays off only for many equal steps; an evaluation has few long ones, and tracing takes seconds.
        strategy = "vectorized" if strategy == "compiled" else strategy
        calls = _TASKS_BEFORE_TRACING if one_by_one else _STACKS_BEFORE_TRACING
        program = self._find_program(("scores", inner_steps, bn_statistics), score_stack, strategy, calls)
        while True:
            size = 1 if one_by_one else min(len(episodes), chunk or len(episodes), self._most_scored)
            try:
                return run(size, lambda part, extra: program(meta, part, extra)[0])
            except OutOfMemoryError:
                if size == 1:
                    raise
            self._most_scored = size // 2
            log.warning(
                "Evaluating at most %s at once from now on: %d do not fit the memory.",
                format_count(self._most_scored, "task"), size,
            )  # fmt: skip

    def find_disagreement(
        self, meta: Tensors, episodes: Episodes, noise: Sequence[Mapping[str, Any]], weights: Tensor | None = None
    ) -> str | None:
        """Explain why the meta-gradients of tasks at once differ from those of one after the other; None if they agree.

        Args:
            meta, noise, weights: as in `gradient`.
            episodes: at least two tasks.
        """
        expected = self.gradient(meta, [episodes], noise, "serial", None, weights)
        extra = _stack_noise(noise) | ({} if weights is None else {"weights": weights})

        def compute_at_once() -> list[Tensor]:
            found, (checked, _) = self._map_gradient(meta, tree_map(make_contiguous, episodes.parts), extra)
            return found[:checked]

        return self._compare(compute_at_once, list(expected.grads.values()))

    def find_disagreement_of_scores(
        self,
        meta: Tensors,
        episodes: Episodes,
        noise: Sequence[Mapping[str, Any]],
        inner_steps: tuple[int, ...],
        bn_statistics: str,
    ) -> str | None:
        """Do the same as `find_disagreement` for an evaluation: the outputs for the query sets, and their metric."""
        drawn = list(noise) or [{}] * len(episodes)
        steps = inner_steps[-1]

        def score(task: Task, drawn: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
            outputs = self.predict(meta, task, drawn, steps, bn_statistics)
            return outputs, self.plain.metric(outputs, task[3])

        with torch.no_grad():
            expected = [score(episodes.unstack(number), each)[0] for number, each in enumerate(drawn)]
            tasks = tree_map(make_contiguous, episodes.parts), stack_trees(drawn)
            return self._compare(lambda: list(vmap(score)(*tasks)[0]), expected)

    def _compare(self, compute_at_once: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]) -> str | None:
        """Explain why tasks cannot run at once: an error, or values that differ from one after the other."""
        try:
            with torch.no_grad():
                found = compute_at_once()
        except MetaregError:
            raise
        except Exception as error:  # running code of users and plugins can raise many kinds of errors
            return summarise_error(error)
        precision = torch.bfloat16 if self.training.options.precision == "bf16" else None
        return compare(found, expected, precision)

    def draw_for_adaptation(
        self, meta: Tensors, inner_steps: int, seed: int, draws: Sequence[tuple[str | int, ...]]
    ) -> list[dict[str, Any]]:
        """Draw the noise of the plugins that adapt, for the tasks identified by `draws` and the seed."""
        adapted = {name: meta[name] for name in self.plain.adapted_names}
        return self.plain.stages.draw_noise("adapt", adapted, next(iter(meta.values())), inner_steps, seed, draws)

    def predict(
        self, meta: Tensors, task: Task, noise: Mapping[str, Any], inner_steps: int, bn_statistics: str
    ) -> Tensor:
        """Compute the outputs ``[query, …]`` for one task after some inner steps, as evaluation does."""
        functions = _use_statistics(self.plain, bn_statistics)
        context = functions.prepare(meta, task, noise)
        return functions.evaluate_query(functions.adapt(context, inner_steps).params, context)

    def _run_stack(
        self,
        meta: Tensors,
        episodes: Episodes,
        noise: Sequence[Mapping[str, Any]],
        strategy: Strategy,
        weights: Tensor | None,
    ) -> Gradient:
        if strategy == "serial":
            with torch.no_grad(), advise_on_memory(1):
                task_noise = noise[0] if noise else {}
                task = _unbatch(episodes.parts)
                return self._describe_task(*compute_meta_gradient(self.training, meta, task, task_noise, weights))
        self._expect_changes()
        # The weights change from step to step, so they are an input; otherwise, tracing would freeze them.
        extra = _stack_noise(noise) | ({} if weights is None else {"weights": weights})
        has_own = self.training.stages.implements("outer_gradient")
        if recomputes(self.training) and not has_own and strategy != "compiled":
            return self._differentiate_by_steps(meta, episodes, extra, strategy)
        program = self._find_program("gradient", self._map_gradient, strategy)
        flat, log_names = program(meta, episodes, extra)
        loss, *logs = flat[len(meta) :]
        return Gradient(dict(zip(meta, flat, strict=False)), loss, dict(zip(log_names, logs, strict=True)))

    def _differentiate_by_steps(
        self, meta: Tensors, episodes: Episodes, extra: Mapping[str, Any], strategy: Strategy
    ) -> Gradient:
        """Compute the gradient in parts that are traced one by one, so that the steps of the inner loop share graphs."""

        def call(name: str, part: Callable[..., Any], *trees: Any, has_logs: bool = False) -> Any:
            def run_tasks(meta: Tensors, tasks: Task, extra: Mapping[str, Any]) -> tuple[list[Tensor], Description]:
                def run_task(task: Task, noise: Mapping[str, Any], trees: Any) -> Any:
                    return part(meta, (task, noise, extra.get("weights")), *trees)

                given = tasks, extra.get("noise", {}), extra["trees"]
                if len(tasks[1]) == 1:
                    values = tree_map(lambda leaf: leaf[None], run_task(*_unbatch(given)))
                else:
                    values = vmap(run_task)(*given)
                leaves, structure = tree_flatten(values)
                return leaves, Description(len(leaves) - (len(values[-1]) if has_logs else 0), structure)

            program = self._find_program(name, run_tasks, strategy, captures=False)
            return tree_unflatten(*program(meta, episodes, {**extra, "trees": trees}))

        return self._describe_tasks(*differentiate_by_steps(self.training, call))

    def _map_gradient(self, meta: Tensors, tasks: Task, extra: Mapping[str, Any]) -> tuple[list[Tensor], Description]:
        """Return the gradients in the order of `meta`, the objective and the logs, and the logs' names."""
        # Differentiate each task inside the map instead of the mapped mean. It costs little more, and outside the map,
        # the batched backward of BatchNorm, InstanceNorm and LayerNorm treats their statistics as constants
        # (pytorch/functorch#534).
        noise, weights = extra.get("noise", {}), extra.get("weights")
        if len(tasks[1]) == 1:  # a map over one task would only turn convolutions into grouped ones
            derivative = compute_meta_gradient(self.training, meta, _unbatch(tasks), _unbatch(noise), weights)
            gradient = self._describe_task(*derivative)
        else:
            compute = vmap(lambda task, drawn: compute_meta_gradient(self.training, meta, task, drawn, weights))
            gradient = self._describe_tasks(*compute(tasks, noise))
        values = [*gradient.grads.values(), gradient.loss, *gradient.logs.values()]
        # Rounding can change a prediction, and so a metric by a whole example: only the gradients are checked.
        return values, Description(len(gradient.grads), tuple(gradient.logs))

    def _describe_task(self, grads: Tensors, loss: Tensor, logs: Tensors) -> Gradient:
        """Create the `Gradient` of a single task."""
        if self._keeps_tasks:
            return Gradient({name: value[None] for name, value in grads.items()}, loss[None], logs)
        return Gradient(grads, loss, logs | {"grad_norm": _norm(grads)})

    def _describe_tasks(self, grads: Tensors, losses: Tensor, logs: Tensors) -> Gradient:
        """Create the `Gradient` of some tasks ``[tasks, …]``."""
        if self._keeps_tasks:
            return Gradient(grads, losses, tree_map(lambda leaf: leaf.mean(0), logs))
        grads, loss, logs = tree_map(lambda leaf: leaf.mean(0), (grads, losses, logs))
        return Gradient(grads, loss, logs | {"grad_norm": _norm(grads)})

    def _identify(self) -> Hashable | None:
        """Describe what the functions of a task are traced from; None if that is impossible."""
        functions = self.training
        return identify(functions.model, functions.stages, functions.loss, functions.metric, functions.options)

    def _expect_changes(self) -> None:
        """Have the next program look at the variables, which the user may have changed between two calls."""
        if self._graphs is not None:
            self._graphs.is_current = False

    def _lay_inputs(self, x: Any) -> Any:
        """Return the inputs ``[1, examples, …]`` of a task in the memory order that suits the model."""
        layout = self.training.model.layout
        if layout == "channels first":
            return tree_map(make_contiguous, x)
        is_images = type(x) is Tensor and x.dim() == 5 and x.is_floating_point() and x.device.type == "cpu"
        return make_channels_last(x) if layout == "channels last" and is_images else x

    def _find_program(
        self,
        key: Any,
        function: Function,
        strategy: Strategy,
        calls_before_tracing: int = 1,
        *,
        captures: bool = True,
    ) -> Program:
        program = self._programs.get((key, strategy))
        if program is None:
            identity = self._identify()
            self._graphs = self._graphs or Graphs(self._reads)
            program = Program(
                function,
                self._graphs,
                compiled=strategy == "compiled",
                calls_before_tracing=calls_before_tracing,
                captures=captures,
                identity=None if identity is None else (identity, key, strategy),
                lay_inputs=self._lay_inputs,
            )
            self._programs[key, strategy] = program
        return program


def _stack_noise(noise: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack the noise of some tasks as an extra input of a program; empty without noise."""
    return {"noise": stack_trees(noise)} if noise else {}


def _find_checked(log_names: Sequence[str]) -> list[int]:
    """Return the positions of objective and gradient norm in `Engine._map_gradient`'s results after the gradients."""
    return [0, 1 + log_names.index("grad_norm")]


def _use_statistics(functions: TaskFunctions, bn_statistics: str) -> TaskFunctions:
    """Return the functions of a task with the given BatchNorm statistics for query predictions."""
    other = copy.copy(functions)
    other.support_statistics = bn_statistics == "support" and bool(functions.model.batch_norms)
    return other


def _unbatch(tasks: Any) -> Any:
    """Remove the task dimension of a stack of one task."""
    return tree_map(lambda leaf: leaf[0], tasks)


def _norm(grads: Tensors) -> Tensor:
    """Return the Euclidean norm of a whole gradient."""
    return join(grads.values()).norm()


def _accumulate(total: Gradient | None, part: Gradient, weight: float) -> Gradient:
    """Add a part to a mean, weighted by its fraction of the tasks."""
    grads, loss, logs = _scale(part.grads, weight), part.loss * weight, _scale(part.logs, weight)
    if total is None:
        return Gradient(grads, loss, logs)
    return Gradient(_add(total.grads, grads), total.loss + loss, _add(total.logs, logs))


def _concatenate(parts: Sequence[Gradient]) -> Gradient:
    """Concatenate the gradients of several parts' tasks, and average their logged values."""
    if len(parts) == 1:
        return parts[0]
    losses = [part.loss for part in parts]
    total = sum(len(loss) for loss in losses)
    logs = [_scale(part.logs, len(loss) / total) for part, loss in zip(parts, losses, strict=True)]
    grads = {name: torch.cat([part.grads[name] for part in parts]) for name in parts[0].grads}
    return Gradient(grads, torch.cat(losses), reduce(_add, logs))


def _scale(values: Tensors, factor: float) -> Tensors:
    return {name: value * factor for name, value in values.items()}


def _add(values: Tensors, others: Tensors) -> Tensors:
    return {name: value + others[name] for name, value in values.items()}
