"""The training loop: steps, logging, validation and calls of observers."""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, reduce
from types import SimpleNamespace
from typing import Any, NoReturn, Protocol

import torch

from metareg.contract.episodes import Episodes
from metareg.contract.evaluation import Evaluation
from metareg.contract.splits import TRAIN, VALIDATION
from metareg.engine.engine import Engine, Gradient
from metareg.engine.step_loop import Batches
from metareg.errors import DivergenceError, MetaregError, UsageError
from metareg.learner.batch_split import Share
from metareg.learner.config import LearnerConfig, Schedule
from metareg.learner.learning_rate import check_schedule, compute_learning_rate, is_constant
from metareg.learner.processes import Processes
from metareg.registry.dispatch import Implementation, create_plugin_manager, find_implementations
from metareg.registry.plugins import resolve
from metareg.registry.task_source import TaskSource
from metareg.util.torch_internals import tree_leaves, tree_map

__all__ = ["Progress", "connect_observers", "fit"]

log = logging.getLogger("metareg")

Observer = Any
_PREFETCHED_BYTES = 4 << 20
_PREFETCHED_STEPS = 100


class Trainee(Protocol):
    """The interface of a `metareg.MetaLearner` for the loop."""

    config: LearnerConfig
    logs: dict[str, float]
    steps_done: int

    @property
    def processes(self) -> Processes: ...

    def split_over(self, processes: Processes) -> AbstractContextManager[None]: ...

    @property
    def engine(self) -> Engine: ...

    def take_step(self, episodes: Sequence[Episodes] | Share) -> Gradient: ...

    def take_steps(self, batches: Batches) -> tuple[Gradient, MetaregError | None] | None: ...

    def abandon_step(self, error: Exception) -> NoReturn: ...

    def evaluate(
        self, task_source: TaskSource, tasks: int, *, split: str, inner_steps: Sequence[int]
    ) -> Evaluation: ...


class Checkpointer(Protocol):
    """The interface of a `metareg.runs.checkpoints.CheckpointManager` for the loop."""

    every_steps: int | None
    """Training steps between necessary calls of `after_step`, in addition to those with `must`."""

    def after_step(self, *, must: bool) -> None: ...

    def restore(self) -> bool: ...


def connect_observers(observers: Sequence[Any], learner: Trainee) -> Any:
    """Combine the hooks of observers (objects or plugins) into one caller: ``hooks.on_step(step=…, logs=…)``.

    If several processes train the learner, only process 0's observers are called. An error in them is raised in all
    processes.
    """
    manager, named = create_plugin_manager([resolve("observers", each) for each in observers])

    def tell(found: list[Implementation], **news: Any) -> None:
        def call_all() -> None:
            with learner.split_over(Processes()):
                for each in found:
                    each(**news)

        learner.processes.first(call_all)

    hooks = ("on_run_start", "on_step", "on_evaluation", "on_run_end")
    return SimpleNamespace(**{hook: partial(tell, find_implementations(manager, named, hook)) for hook in hooks})


class Progress:
    """The state of a training besides its learner; the two together are enough to resume it exactly."""

    def __init__(self) -> None:
        self.left_out = 0
        """Number of skipped batches of the task stream: step n takes batch n + left_out."""
        self.nonfinite = 0
        """Number of skips and rollbacks."""
        self.best_step: int | None = None
        """The step with the best validation score so far."""
        self.best_score: float | None = None
        self.waited = 0
        """Number of validations since then."""
        self.averager = MetricAverager()

    def state(self) -> dict[str, Any]:
        """Return the complete state, as tensors and plain values."""
        return {
            "left_out": self.left_out,
            "nonfinite": self.nonfinite,
            "best_step": self.best_step,
            "best_score": self.best_score,
            "waited": self.waited,
            "window": self.averager.state(),
        }

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what `state` returned, with sums on a device."""
        self.left_out, self.nonfinite = state["left_out"], state["nonfinite"]
        self.best_step, self.best_score = state["best_step"], state["best_score"]
        self.waited = state.get("waited", 0)
        if self.best_step is not None and type(self.best_step) is not int:
            raise TypeError(f"best_step is a {type(self.best_step).__name__}")
        self.averager.load_state(state["window"], device)

    def describe_wait(self, schedule: Schedule) -> str:
        """Describe why early stopping ends the training."""
        last = "the last validation was" if schedule.patience == 1 else f"the last {schedule.patience} validations were"
        if self.best_step is None:
            return f"{last} not finite"
        return f"{last} not better than that after step {self.best_step}"

    def record(self, evaluation: Evaluation, step: int) -> bool:
        """Record a validation; returns whether it is the best so far."""
        score = evaluation.mean(evaluation.inner_steps[-1])
        sign = 1 if evaluation.higher_is_better else -1
        if not math.isfinite(score) or (self.best_score is not None and sign * score <= sign * self.best_score):
            self.waited += 1
            return False
        self.best_step, self.best_score, self.waited = step, score, 0
        return True


def fit(
    learner: Trainee,
    source: TaskSource,
    schedule: Schedule,
    observers: Sequence[Any] = (),
    *,
    progress: Progress | None = None,
    manager: Checkpointer | None = None,
) -> None:
    """Train a learner on the split ``"train"`` for `schedule.steps` steps, or until early stopping.

    Step n takes the tasks n·meta_batch … (n+1)·meta_batch − 1, so a resumed training sees the same tasks as an
    uninterrupted one.

    Args:
        learner: the learner; training continues after its last step.
        progress: the progress of an earlier training; by default, none.
        manager: called after every step; can restore an earlier step.

    Raises:
        UsageError: the learning rate is 0 before the last step, or there is patience without validations.
        DivergenceError: a loss or gradient is not finite, and the schedule says to stop, or it happened too often; the
            learner has its state before that step.
    """
    check_schedule(learner.config, schedule.steps)
    if schedule.patience is not None and schedule.eval_every is None:
        raise UsageError("patience counts validations, and there are none: give eval_every too.")
    if schedule.eval_every:
        source.check_splits()
    _Loop(learner, source, schedule, connect_observers(observers, learner), progress or Progress(), manager).run()


@dataclass(frozen=True)
class _Loop:
    """The loop of `fit`."""

    learner: Trainee
    source: TaskSource
    schedule: Schedule
    hooks: Any
    progress: Progress
    manager: Checkpointer | None

    def run(self) -> None:
        learner, schedule = self.learner, self.schedule
        self.progress.averager.start_clock()
        while not self.has_ended:
            batches = _draw_batches(learner, self.source, schedule, self.progress.left_out)
            try:
                for drawn in batches:
                    if isinstance(drawn, Batches):
                        self.take_steps(drawn)
                    else:
                        self.take_step(drawn)
                    if self.has_ended:
                        break
            except DivergenceError as error:
                self.roll_back(error)
        # Final actions come after the last checkpoint, so that it can still be resumed with more steps.
        if learner.steps_done % schedule.log_every:
            self.report()
        if schedule.eval_every and learner.steps_done % schedule.eval_every:
            self.validate()
        if learner.steps_done < schedule.steps:
            log.info(
                "Training stops early after step %d: %s.", learner.steps_done, self.progress.describe_wait(schedule)
            )

    @property
    def has_ended(self) -> bool:
        """Return whether the last step is done, or early stopping applies."""
        schedule = self.schedule
        exhausted = schedule.patience is not None and self.progress.waited >= schedule.patience
        return exhausted or self.learner.steps_done >= schedule.steps

    def take_steps(self, batches: Batches) -> None:
        """Take a training step with each batch, as many as possible in one program, and do what is due afterwards."""
        while batches and not self.has_ended:
            taken = self.learner.take_steps(batches[: self.count_steps_to_news()])
            if taken is None:
                self.take_step([batches.first()])
                batches = batches[1:]
                continue
            results, error = taken
            self.progress.averager.add_steps(results.loss, results.logs)
            if error is not None:
                self.refuse_step(error)
            batches = batches[len(results.loss) + (error is not None) :]
            self.conclude_step()

    def count_steps_to_news(self) -> int:
        """Count the training steps until something is due, at least one."""
        schedule, saved = self.schedule, None if self.manager is None else self.manager.every_steps
        every = (schedule.log_every, schedule.eval_every, saved, self.learner.config.reset_optimizer_every)
        return min(each - self.learner.steps_done % each for each in every if each is not None)

    def take_step(self, episodes: list[Episodes] | Share) -> None:
        """Take one training step, and do what is due afterwards."""
        try:
            gradient = self.learner.take_step(episodes)
        except DivergenceError as error:
            self.skip_step(error)
        else:
            self.progress.averager.add(gradient.loss, gradient.logs)
        self.conclude_step()

    def conclude_step(self) -> None:
        """Do what is due after a training step."""
        learner, schedule = self.learner, self.schedule
        step = learner.steps_done
        if step % schedule.log_every == 0:
            self.report()
        improved = schedule.eval_every is not None and step % schedule.eval_every == 0 and self.validate()
        if self.manager is not None:
            self.manager.after_step(must=improved or self.has_ended)

    def report(self) -> None:
        """Report the means since the last report to the observers."""
        if self.progress.averager.count:
            learner = self.learner
            learner.logs = self.progress.averager.means()
            if not is_constant(learner.config):
                learner.logs["lr"] = compute_learning_rate(learner.config, learner.steps_done - 1)
            self.hooks.on_step(step=learner.steps_done, logs=learner.logs)

    def validate(self) -> bool:
        """Evaluate, notify the observers, and return whether the score is the best so far."""
        learner = self.learner
        evaluation = learner.evaluate(
            self.source, self.schedule.eval_tasks, split=VALIDATION, inner_steps=(learner.config.inner_steps,)
        )
        self.hooks.on_evaluation(step=learner.steps_done, split=VALIDATION, evaluation=evaluation)
        return self.progress.record(evaluation, learner.steps_done)

    def refuse_step(self, error: MetaregError) -> None:
        """Call `skip_step` for an error of any kind."""
        if not isinstance(error, DivergenceError):
            raise error
        self.skip_step(error)

    def skip_step(self, error: DivergenceError) -> None:
        """Count a diverged step as done, or raise its error if the schedule does not allow that."""
        progress, at_most = self.progress, self.schedule.max_nonfinite
        if self.schedule.on_nonfinite != "skip" or progress.nonfinite >= at_most:
            raise error
        progress.nonfinite += 1
        log.warning("%s The step is skipped (%d of at most %d).", error, progress.nonfinite, at_most)
        self.learner.steps_done += 1

    def roll_back(self, error: DivergenceError) -> None:
        """Restore the newest checkpoint and skip the tasks between it and the error, or raise the error."""
        learner, progress, at_most = self.learner, self.progress, self.schedule.max_nonfinite
        if self.schedule.on_nonfinite != "rollback" or progress.nonfinite >= at_most or self.manager is None:
            raise error
        next_batch = learner.steps_done + progress.left_out + 1
        times = progress.nonfinite + 1
        self.manager.restore()
        progress.nonfinite, progress.left_out = times, next_batch - learner.steps_done
        log.warning(
            "%s Continuing from step %d with other tasks (%d of at most %d).", error, learner.steps_done, times, at_most
        )


def _draw_batches(
    learner: Trainee, source: TaskSource, schedule: Schedule, left_out: int
) -> Iterator[Batches | list[Episodes] | Share]:
    """Yield the batches of the next steps, drawn in blocks, because many small tasks cost little more than one.

    Blocks begin at multiples of their size, wherever training begins, so that a batch always has the same alignment in
    memory, which can affect the last bit of a result. With several processes, each draws only its share of a batch if
    tasks are functions of their numbers, after a first block for the comparison of strategies.
    """
    seed, size = learner.config.seed, schedule.meta_batch
    whole = range(size)
    mine = learner.processes.share(size) if not source.is_stream and _can_share(learner, size) else whole

    def draw(batches: range, tasks: range) -> list[Episodes]:
        every = range(batches.start * size, batches.stop * size)
        indices = every if tasks == whole else [index for index in every if index % size in tasks]
        try:
            return source.episodes(TRAIN, indices, seed)
        except Exception as error:
            learner.abandon_step(error)

    first, end = learner.steps_done + left_out, schedule.steps + left_out
    one = draw(range(first, first + 1), whole)
    is_stack = len(one) == 1
    block = _count_batches_to_prefetch(one, size) if is_stack else 1
    for start in range(first - first % block, end, block):
        batches = range(start, min(start + block, end))
        tasks = mine if start and is_stack else whole
        # Make the block contiguous once; slices for steps are contiguous too.
        stacks = [stack.contiguous() for stack in draw(batches, tasks)] if block > 1 or tasks != whole else []
        rest = range(max(start, first), batches.stop)
        if len(stacks) == 1 and tasks == whole:
            yield Batches(_pad(stacks[0], block * size), size, range(rest.start - start, rest.stop - start))
            continue
        for batch in rest:
            if len(stacks) == 1:
                yield Share(stacks[0][(batch - start) * len(tasks) : (batch - start + 1) * len(tasks)], size)
            else:  # tasks of unequal sizes are grouped, so each batch must be drawn by itself
                yield one if batch == first else draw(range(batch, batch + 1), whole)


def _pad(stack: Episodes, tasks: int) -> Episodes:
    """Pad a stack with tasks of zeros, because a program needs a fixed number of tasks.

    Keeps the memory order of tensors, because bits depend on it and another training can fill the block.
    """
    missing = tasks - len(stack)
    if not missing:
        return stack

    def extend(leaf: torch.Tensor) -> torch.Tensor:
        order = sorted(range(leaf.dim()), key=lambda dim: (-leaf.stride()[dim], leaf.shape[dim] == 1))
        ordered = leaf.permute(order)
        zeros = leaf.new_zeros(missing, *leaf.shape[1:]).permute(order)
        inverse = sorted(range(leaf.dim()), key=order.__getitem__)
        return torch.cat([ordered.contiguous(), zeros], order.index(0)).permute(inverse)

    return Episodes(*tree_map(extend, stack.parts))


def _can_share(learner: Trainee, tasks: int) -> bool:
    """Return whether a process needs only its share of a batch: no plugin reads or combines all tasks."""
    stages = learner.engine.training.stages
    needed = any(map(stages.implements, ("augment_episodes", "combine_tasks")))
    return not needed and tasks >= learner.processes.size


def _count_batches_to_prefetch(stacks: list[Episodes], size: int) -> int:
    leaves = tree_leaves(stacks[0].parts)
    bytes_per_batch = sum(leaf.numel() * leaf.element_size() for leaf in leaves) * size // len(stacks[0])
    return max(1, min(_PREFETCHED_STEPS, _PREFETCHED_BYTES // max(1, bytes_per_batch)))


class MetricAverager:
    """Computes the means of logged tensors since the last report."""

    def __init__(self) -> None:
        self.count = 0
        """Number of steps since then."""
        self._sums: dict[str, torch.Tensor] = {}
        self.start_clock()

    def start_clock(self) -> None:
        """Start measuring the time of steps."""
        self._timed_from = self.count
        self._since = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Return the sums and their count."""
        return {"count": self.count, "sums": dict(self._sums)}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what `state` returned."""
        self.count = state["count"]
        self._sums = {name: _widen(value, device) for name, value in state["sums"].items()}
        self.start_clock()

    def add(self, loss: torch.Tensor, logs: dict[str, torch.Tensor]) -> None:
        """Add one step's values."""
        if self._sums:
            self._sums["loss"] += loss
            for name, value in logs.items():
                self._sums[name] += value
        else:
            self._sums = {name: _widen(value, value.device) for name, value in {"loss": loss, **logs}.items()}
        self.count += 1

    def add_steps(self, losses: torch.Tensor, logs: dict[str, torch.Tensor]) -> None:
        """Add several steps' values ``[steps]``, all on a CPU; the sums are those of adding them one by one, bit for bit."""
        for name, values in {"loss": losses, **logs}.items():
            start = self._sums[name].item() if name in self._sums else 0.0
            # From Python 3.12 on, `sum` compensates for rounding.
            self._sums[name] = torch.tensor(reduce(operator.add, values.tolist(), start), dtype=torch.float64)
        self.count += len(losses)

    def means(self) -> dict[str, float]:
        """Return the means and ``steps_per_second``, and start the next window."""
        means = {name: value.item() / self.count for name, value in self._sums.items()}
        means["steps_per_second"] = (self.count - self._timed_from) / (time.perf_counter() - self._since)
        self._sums, self.count = {}, 0
        self.start_clock()
        return means


def _widen(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on a device, in double precision if the device has it."""
    return value.to(torch.float32 if device.type == "mps" else torch.float64, copy=True).to(device)
