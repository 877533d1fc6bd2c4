"""Execution of a batch of tasks: strategy, noise and processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from metareg.contract.episodes import Batch, Episodes, convert_arrays
from metareg.engine.engine import Engine, Gradient
from metareg.engine.stages import Stages
from metareg.engine.step_loop import Batches
from metareg.engine.strategies import ONE_BY_ONE, Strategy, choose_strategy, has_convolutions
from metareg.engine.tracing import CompileError, summarise_error
from metareg.errors import DivergenceError, ExamplesError, UsageError
from metareg.learner.batch_split import BatchSplit, Share, read_stacks
from metareg.learner.config import LearnerConfig
from metareg.learner.example_checks import TargetCheck, refuse_nonfinite
from metareg.learner.idle import report_unlearned
from metareg.learner.meta_parameters import MetaParameters
from metareg.learner.optimizer import OuterOptimizer
from metareg.learner.processes import Processes
from metareg.printable import format_count
from metareg.registry.task_source import TaskSource
from metareg.util.devices import move_tensors
from metareg.util.layout import copy_contiguous, match_strides
from metareg.util.torch_internals import tree_map

__all__ = ["BatchRunner", "check_finite", "compute_outer_loss_weights", "sort_inner_steps"]

log = logging.getLogger("metareg")

Tensors = dict[str, Tensor]
_BETWEEN_STEPS = ("augment_episodes", "augment_outer_gradient", "combine_tasks", "outer_loss_weights", "outer_update")
"""Hooks that run Python code in every training step."""
_BLOCK = 100
"""Number of tasks to draw at once, and to vectorize at once unless `chunk` is smaller."""


class BatchRunner:
    """Computes the meta-gradients and scores of batches."""

    def __init__(self, engine: Engine, config: LearnerConfig, device: torch.device) -> None:
        self._engine = engine
        self._config = config
        self._device = device
        self.strategy: Strategy | None = None if config.strategy == "auto" else config.strategy
        """The strategy in use; None until ``"auto"`` has chosen."""
        self._proven: set[str] = set()
        """Results that ``"auto"`` has compared with tasks one after the other: ``"gradient"``, ``"scores"``."""
        self._one_by_one: set[str] = set()
        """Results for which the comparison found a difference or an error."""
        self._targets = TargetCheck(engine.training.loss)
        self._loops = True
        """Whether to try several training steps in one program."""
        self.split = BatchSplit(Processes())
        """The processes over which batches are split."""

    def choose_strategy(self, tasks: int, steps: int, stackable: bool = True) -> tuple[Strategy, str]:
        """Choose the strategy for ``strategy="auto"``; arguments as in `metareg.engine.strategies.choose_strategy`."""
        if self._config.strategy != "auto":
            self.strategy = self._config.strategy
            return self.strategy, "as requested"
        # One choice for all processes, so that a checkpoint contains the strategy of each.
        tasks = self.split.processes.largest_share(tasks)
        at_once = tasks if self._config.chunk is None else min(tasks, self._config.chunk)
        self.strategy, reason = choose_strategy(self._engine.training, self._device, at_once, steps, stackable)
        if "gradient" in self._one_by_one and self.strategy not in ONE_BY_ONE:
            self.strategy, reason = "traced", "running tasks at once gave a different result"
        return self.strategy, reason

    @property
    def proven(self) -> bool:
        """Whether the comparison with tasks one after the other has been made."""
        return self._config.strategy != "auto" or "gradient" in self._proven

    def restore_strategy(self, strategy: Strategy | None, proven: bool) -> None:
        """Restore the strategy of a checkpoint, unless the user set one.

        Args:
            strategy: the value of `strategy`.
            proven: the value of `proven`; the comparison is not repeated, because another batch could give another
                result.

        Raises:
            TypeError: `strategy` is not a strategy.
        """
        if strategy not in (None, *get_args(Strategy)):
            raise TypeError(f"{strategy!r} is no strategy")
        if self._config.strategy == "auto":
            self.strategy = strategy
            self._proven |= {"gradient"} if proven else set()

    def compute_gradient(self, parameters: MetaParameters, episodes: Batch | Share, training_step: int) -> Gradient:
        """Compute the meta-gradient of a batch, with the same bits in all processes that share its tasks.

        Raises:
            UsageError: the batch is empty, or the tasks do not fit the learner.
        """
        batches, of = read_stacks(episodes), episodes.of if isinstance(episodes, Share) else None
        if not batches:
            raise UsageError("The batch contains no task.")
        parameters.prepare(batches[0])
        batches = [self._check_targets(parameters, batch) for batch in batches]
        meta, stages = parameters.tensors, self._engine.training.stages
        steps, seed, draws = self._config.inner_steps, self._config.seed, [(training_step,)]
        batches = stages.augment_episodes(batches, seed, training_step)
        drawn = stages.draw_noise("batch", meta, parameters.like, steps, seed, draws, training_step)
        noise = drawn[0] if drawn else {}

        def compute_at(meta: Tensors) -> Gradient:
            """Compute the batch's meta-gradient at some meta-parameters, before augmenters change it."""
            strategy = self._prove_strategy(meta, parameters, batches, training_step)
            gradient = self.split.gradient(
                meta,
                batches,
                lambda share, first: self._compute_gradient(meta, parameters, share, first, training_step, strategy),
                of,
            )
            if not stages.implements("combine_tasks"):
                return gradient
            grads, losses = _sort_tasks((gradient.grads, gradient.loss), batches)
            combined = stages.combine_tasks(grads, losses, meta, noise)
            return gradient.with_grads(match_strides(combined, meta))

        gradient = compute_at(meta)
        if training_step == 0:
            report_unlearned(stages, gradient.grads)
        if not stages.implements("augment_outer_gradient"):
            return gradient
        augmented = stages.augment_outer_gradient(
            gradient.grads, meta, noise, lambda every: compute_at(copy_contiguous(every)).grads
        )
        return gradient.with_grads(augmented)

    def take_steps(
        self, parameters: MetaParameters, optimizer: OuterOptimizer, batches: Batches, training_step: int
    ) -> Gradient | None:
        """Take training steps in one program, and update parameters and optimiser.

        Args:
            parameters: the meta-parameters, updated in place.
            optimizer: their optimiser, updated in place.
            batches: the batches of the steps.
            training_step: training steps before the first of them.

        Returns:
            The results of the steps, as from `Engine.take_steps`, for at least some of the batches; None if the first
            step must be taken by itself.
        """
        if not self._can_loop(batches):
            return None
        if training_step == 0:
            batches = batches[:1]
        first = batches.first()
        parameters.prepare(first)
        meta = parameters.tensors
        if self._prove_strategy(meta, parameters, [first], training_step) != "compiled":
            return None
        update = optimizer.describe_update(meta, batches, training_step)
        matched = None if update is None else self._match_batches(parameters, batches)
        if update is None or matched is None:
            return None
        try:
            found = self._engine.take_steps(meta, matched, update)
        except Exception as error:  # compiling users' code can raise many kinds of errors
            log.warning("One step at a time, which is slower: a loop of them failed (%s).", summarise_error(error))
            self._loops = False
            return None
        if found is None:
            return None
        steps, results = found
        if training_step == 0:
            report_unlearned(self._engine.training.stages, steps.grads)
        parameters.tensors = steps.meta
        optimizer.adopt(steps.meta, steps.state)
        return results

    def _can_loop(self, batches: Batches) -> bool:
        """Return whether one program should take several training steps: no plugin runs Python code between steps.

        A loop over steps with convolutions takes minutes to compile and saves next to nothing.
        """
        stages, chunk = self._engine.training.stages, self._config.chunk
        return (
            self._loops
            and self.strategy == "compiled"
            and self._device.type == "cpu"
            and not has_convolutions(self._engine.training)
            and self.split.processes.size == 1
            and batches.tasks < len(batches.stack)
            and (chunk is None or batches.tasks <= chunk)
            and not any(map(stages.implements, _BETWEEN_STEPS))
            and not any(map(stages.draws_noise, ("task", "batch")))
        )

    def _match_batches(self, parameters: MetaParameters, batches: Batches) -> Batches | None:
        """Check the batches' targets, and convert batches to the parameters' type; None if a target does not fit."""
        try:
            stack = self._check_targets(parameters, batches.stack)
        except ExamplesError:  # possibly of a later step
            return None
        return replace(batches, stack=parameters.match(stack).contiguous())

    def _compute_gradient(
        self,
        meta: Tensors,
        parameters: MetaParameters,
        batches: Sequence[Episodes],
        first: int,
        training_step: int,
        strategy: Strategy,
    ) -> Gradient:
        """Compute the meta-gradient of some tasks, the first of which is task `first` of the batch."""
        config = self._config
        batches = [parameters.match(batch) for batch in batches]
        tasks = range(first, first + sum(len(batch) for batch in batches))
        noise, weights = self._draw_for_tasks(meta, parameters, tasks, training_step)
        try:
            return self._engine.gradient(meta, batches, noise, strategy, config.chunk, weights)
        except CompileError as error:
            if config.strategy != "auto":
                raise
            log.warning("%s Continuing with strategy vectorized.", error)
            self.strategy = "vectorized"
            return self._engine.gradient(meta, batches, noise, "vectorized", config.chunk, weights)

    def _check_targets(self, parameters: MetaParameters, episodes: Episodes) -> Episodes:
        """Check that the targets fit the model's outputs."""
        if parameters.outputs is None:
            return episodes
        return self._targets.prepare(episodes, parameters.outputs, parameters.like.dtype)

    def refuse_nonfinite(self, parameters: MetaParameters, episodes: Batch | Share, where: str = "") -> None:
        """Refuse tasks with NaN or infinite values, as `metareg.learner.example_checks.refuse_nonfinite` does."""

        def predict(x: Any) -> Tensor:
            x = move_tensors(x, parameters.like.device, parameters.like.dtype)
            with torch.no_grad():
                return self._engine.plain.model.forward(parameters.tensors, x)[1]

        for stack in read_stacks(episodes):
            refuse_nonfinite(stack, predict, where)

    def _draw_for_tasks(
        self, meta: Tensors, parameters: MetaParameters, tasks: range, training_step: int
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Draw the plugins' noise for some tasks, by their numbers in the batch, and get the query losses' weights."""
        config, stages, like = self._config, self._engine.training.stages, parameters.like
        adapted = {name: meta[name] for name in self._engine.training.adapted_names}
        draws = ((training_step, task) for task in tasks)
        noise = stages.draw_noise("task", adapted, like, config.inner_steps, config.seed, draws, training_step)
        return noise, compute_outer_loss_weights(stages, config.inner_steps, training_step, like)

    def _prove_strategy(
        self, meta: Tensors, parameters: MetaParameters, batches: Sequence[Episodes], training_step: int
    ) -> Strategy:
        """Return the strategy for a batch. If ``"auto"`` runs tasks at once, compare two with one after the other,
        once.

        All processes compare the same two tasks, so they continue in the same way.
        """
        strategy = self.strategy or self.choose_strategy(sum(len(batch) for batch in batches), 1)[0]
        pair = None if self.proven or strategy in ONE_BY_ONE else self._find_pair(batches)
        if pair is None:
            return strategy
        episodes, first = pair
        noise, weights = self._draw_for_tasks(meta, parameters, range(first, first + 2), training_step)
        problem = self._engine.find_disagreement(meta, parameters.match(episodes), noise, weights)
        if self._record_proof("gradient", problem):
            self.strategy = strategy = "traced"
        return strategy

    def _prove_scores(
        self,
        meta: MetaParameters,
        plain: Tensors,
        stacks: Sequence[Episodes],
        inner_steps: tuple[int, ...],
        *options: Any,
    ) -> None:
        """Do the same as `_prove_strategy` for the scores of an evaluation."""
        pair = None if self._config.strategy != "auto" or "scores" in self._proven else self._find_pair(stacks)
        if pair is None or self.strategy in ONE_BY_ONE:
            return
        episodes, first = pair
        noise = self._engine.draw_for_adaptation(plain, inner_steps[-1], self._config.seed, [(first,), (first + 1,)])
        problem = self._engine.find_disagreement_of_scores(plain, meta.match(episodes), noise, inner_steps, *options)
        self._record_proof("scores", problem)

    def _find_pair(self, stacks: Sequence[Episodes]) -> tuple[Episodes, int] | None:
        """Find two tasks that run at once, and the number of the first; None if all tasks run alone."""
        first = 0
        for stack in stacks:
            if len(stack) > 1 and self._config.chunk != 1:
                return stack[:2], first
            first += len(stack)
        return None

    def _record_proof(self, what: str, problem: str | None) -> bool:
        """Record and log the result of a comparison; return whether it found a problem."""
        self._proven.add(what)
        if problem is None:
            return False
        self._one_by_one.add(what)
        log.warning(
            "Using strategy traced instead of %s for %s, which runs tasks one after the other: run at once, %s.",
            self.strategy or "vectorized",
            {"gradient": "training", "scores": "evaluation"}[what],
            problem,
        )
        return True

    def score_tasks(
        self,
        meta: MetaParameters,
        source: TaskSource,
        split: str,
        tasks: int,
        seed: int,
        inner_steps: tuple[int, ...],
        bn_statistics: tuple[str, ...],
    ) -> Tensor:
        """Compute the metric of a split's first tasks ``[tasks, len(bn_statistics), len(inner_steps)]``, in order.

        The result is the same in all processes.
        """
        processes = self.split.processes

        def score_share(block: range) -> Tensor:
            """Compute the scores of this process's share of a block, in a tensor for all tasks."""
            share = processes.share(len(block))
            indices = block[share.start : share.stop] or block[:1]
            stacks, positions = source.placed_episodes(split, indices, seed)
            meta.prepare(stacks[0])  # also if this process has none of the tasks
            if not share:
                return torch.empty(0, len(bn_statistics), len(inner_steps))
            stacks = [self._check_targets(meta, stack) for stack in stacks]
            self.refuse_nonfinite(meta, stacks)
            plain = meta.select_plain()
            draws = [(split, indices[position]) for position in positions]
            noise = self._engine.draw_for_adaptation(plain, inner_steps[-1], seed, draws)
            options = inner_steps, source.stackable, bn_statistics
            if source.stackable:
                self._prove_scores(meta, plain, stacks, inner_steps, bn_statistics[0])
            scores, done = [], 0
            for stack in stacks:
                drawn = noise[done : done + len(stack)]
                scores.append(self._compute_scores(plain, meta.match(stack), drawn, *options))
                done += len(stack)
            return torch.cat(scores)[torch.tensor(positions).argsort()]

        blocks = [range(start, min(start + _BLOCK, tasks)) for start in range(0, tasks, _BLOCK)]
        shares = processes.gather(lambda: [score_share(block) for block in blocks])
        return torch.cat([scores for parts in zip(*shares, strict=True) for scores in parts])

    def _compute_scores(
        self,
        meta: Tensors,
        batch: Episodes,
        noise: Sequence[Mapping[str, Any]],
        inner_steps: tuple[int, ...],
        stackable: bool,
        bn_statistics: tuple[str, ...],
    ) -> Tensor:
        """Compute the metric of a stack ``[tasks, len(bn_statistics), len(inner_steps)]``, on the CPU."""
        strategy = self.strategy or self.choose_strategy(len(batch), 1, stackable)[0]
        if "scores" in self._one_by_one and strategy not in ONE_BY_ONE:
            strategy = "traced"
        chunk = self._config.chunk
        return self._engine.scores(meta, batch, noise, inner_steps, strategy, chunk, bn_statistics).cpu()

    def adapt(
        self, meta: MetaParameters, x: Any, y: Tensor, steps: int, bn_statistics: str, query_x: Any = None
    ) -> nn.Module:
        """Implement `MetaLearner.adapt`."""
        if steps < 0:
            raise UsageError(f"The number of inner steps must not be negative; got {steps}.")
        x, y = tree_map(lambda leaf: leaf[None], convert_arrays((x, y), "The support set"))
        query_x = None if query_x is None else convert_arrays(query_x, "The query set")
        episodes = meta.match(Episodes(x, y, x, y))
        meta.prepare(episodes)
        episodes = self._check_targets(meta, episodes)
        self.refuse_nonfinite(meta, episodes)
        support_x, support_y, *_ = episodes.unstack(0)
        task = support_x, support_y, move_tensors(query_x, meta.like.device, meta.like.dtype), None
        plain, functions = meta.select_plain(), self._engine.plain
        drawn = self._engine.draw_for_adaptation(plain, steps, self._config.seed, [()])
        with torch.no_grad():
            adapted = functions.adapt(functions.prepare(plain, task, drawn[0] if drawn else None), steps).params
            params = {**plain, **adapted}
            module = functions.create_module(params, support_x if bn_statistics == "support" else None)
            return module if functions.stages.predictor else functions.model.settle(module, params, support_x)


def _sort_tasks(values: Any, batches: Sequence[Episodes]) -> Any:
    """Sort the tasks' values ``[tasks, …]`` into the order of the request, if the stacks know their positions."""
    positions = [position for batch in batches for position in batch.positions or ()]
    if any(batch.positions is None for batch in batches) or positions == sorted(positions):
        return values
    order = torch.tensor(positions).argsort()
    return tree_map(lambda leaf: leaf[order.to(leaf.device)], values)


def sort_inner_steps(inner_steps: Sequence[int], tasks: int) -> tuple[int, ...]:
    """Sort the numbers of inner steps of an evaluation, without duplicates.

    Raises:
        UsageError: there are no numbers, a number is negative, or there are fewer than two tasks.
    """
    wanted = tuple(sorted(set(inner_steps)))
    if tasks < 2 or not wanted or wanted[0] < 0:
        raise UsageError(
            f"An evaluation needs at least 2 tasks and non-negative numbers of inner steps; got "
            f"{format_count(tasks, 'task')} and inner steps {list(inner_steps)}."
        )
    return wanted


def compute_outer_loss_weights(stages: Stages, inner_steps: int, training_step: int, like: Tensor) -> Tensor | None:
    """Return the weights of the query losses after each inner step ``[inner_steps]``, with the type and device of
    `like`.

    None if only the loss after the last step counts, or a plugin computes the outer gradient or objective itself.
    """
    if stages.implements("outer_gradient") or stages.implements("outer_objective"):
        return None
    weights = stages.outer_loss_weights(inner_steps, training_step)
    return None if weights is None else torch.tensor(weights, dtype=like.dtype, device=like.device)


def check_finite(gradient: Gradient, training_step: int) -> None:
    """Refuse a gradient that is not finite.

    Raises:
        DivergenceError: the objective or the gradient is not finite.
    """
    if math.isfinite(gradient.loss.item()) and math.isfinite(gradient.logs["grad_norm"].item()):
        return
    bad = [name for name, value in gradient.grads.items() if not bool(torch.isfinite(value).all())]
    what = "the meta-gradient" if bool(torch.isfinite(gradient.loss)) else "the objective"
    first = f", first in '{bad[0]}'" if bad else ""
    raise DivergenceError(
        f"Training diverged at step {training_step + 1}: {what} is not finite{first}. The meta-parameters are those after "
        f"step {training_step}; a smaller inner_lr or outer_lr usually helps."
    )
