"""`MetaLearner`: a model with an algorithm and augmenters, which you can train on your own tasks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor, nn

from metareg.contract.config import PluginSpec, split_names, validate
from metareg.contract.episodes import Batch
from metareg.contract.evaluation import Evaluation
from metareg.contract.losses import Loss, Metric, find_loss, find_loss_name, find_metric
from metareg.contract.splits import TEST
from metareg.contract.tasks import TaskSpec
from metareg.engine.engine import Engine, Gradient
from metareg.engine.split_model import SplitModel
from metareg.engine.stages import Stages
from metareg.engine.step_loop import Batches
from metareg.engine.strategies import Strategy
from metareg.errors import DivergenceError, MetaregError, UnknownNameError, UsageError
from metareg.learner.batch_runner import BatchRunner, check_finite, sort_inner_steps
from metareg.learner.batch_split import BatchSplit, Share, check_same_bits
from metareg.learner.config import BatchNormStatistics, Schedule, create_config, describe_options
from metareg.learner.description import describe_learner
from metareg.learner.display import display_training
from metareg.learner.file import LearnerFile, write_learner
from metareg.learner.idle import report_idle
from metareg.learner.meta_parameters import MetaParameters
from metareg.learner.model_plugin import resolve_model
from metareg.learner.optimizer import OuterOptimizer
from metareg.learner.processes import Processes
from metareg.learner.training import Observer, fit
from metareg.registry.plugins import Plugin, resolve
from metareg.registry.task_source import TaskSource
from metareg.util.devices import find_device

__all__ = ["MetaLearner"]


class MetaLearner:
    """Gradient-based meta-learning of one model.

    Args:
        model: any `nn.Module`; it is copied, never changed. A module with the submodules `body` and `head` is split
            there, an `nn.Sequential` before its last layer. Or the name or class of a model plugin, built for `spec`.
        algo: the algorithm: a plugin's name, a plugin class or object.
        augment: gradient augmenters, chained in this order: names, classes, objects, or pairs ``(name or class,
            config)``.
        loss: ``"cross_entropy"``, ``"mse"``, ``"mae"``, ``"huber"``, a callable ``loss(outputs, targets) -> scalar``, or a
            class of torch's losses.
        metric: ``"accuracy"``, ``"balanced_accuracy"``, ``"auroc"``, ``"cross_entropy"``, ``"mse"``, ``"mae"``, ``"huber"``,
            ``"r2"``, a `metareg.Metric` or a function ``metric(outputs, targets) -> scalar``, of which higher values
            are better; by default, the metric for the loss.
        device: where to run; by default, the model's device.
        head: the dotted name of the model's head, for a model without `body` and `head`.
        spec: the shapes for a model named by its plugin.
        model_options: options of a model named by its plugin.
        algo_config: the algorithm's options; you can also pass them by name (``inner_lr=0.4``).
        inner_steps … seed: the options of `LearnerConfig`, which `help(MetaLearner)` lists.

    Raises:
        UsageError: an unknown name, an invalid value, or a model that does not fit.

    Example:
        >>> learner = MetaLearner(model, algo="maml", augment=["cml"], loss="mse", inner_lr=0.01)
        >>> loss = learner.step(Episodes(support_x, support_y, query_x, query_y))
        >>> adapted = learner.adapt(x, y, steps=5)
    """

    def __init__(
        self,
        model: nn.Module | str | type | Plugin,
        algo: str | type | object = "maml",
        augment: Sequence[Any] | str = (),
        *,
        loss: str | type | Loss = "cross_entropy",
        metric: str | Metric | Loss | None = None,
        inner_steps: int = 1,
        first_order: bool = False,
        outer_lr: float = 1e-3,
        outer_optimizer: str = "adam",
        outer_weight_decay: float | None = None,
        outer_momentum: float | None = None,
        outer_nesterov: bool = False,
        outer_betas: Sequence[float] | None = None,
        lr_schedule: str = "constant",
        lr_warmup_steps: int = 0,
        lr_schedule_steps: int | None = None,
        lr_step_size: int | None = None,
        lr_milestones: Sequence[int] | None = None,
        lr_gamma: float | None = None,
        reset_optimizer_every: int | None = None,
        strategy: str = "auto",
        memory: str = "store",
        bn_statistics: str = "transductive",
        precision: str = "full",
        chunk: int | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
        head: str | None = None,
        spec: TaskSpec | None = None,
        model_options: Mapping[str, Any] | None = None,
        algo_config: Mapping[str, Any] | None = None,
        **algo_options: Any,
    ) -> None:
        self.config = create_config(locals())
        model, self._recipe = resolve_model(model, model_options, spec, self.config.seed)
        self.loss, self.metric = find_loss(loss), find_metric(metric, loss)
        name = find_loss_name(loss) if isinstance(loss, str | type) else None
        self._file_facts = {"head": head, "loss": name, "metric": self.metric.name}
        self.algorithm = resolve("algorithms", algo, {**(algo_config or {}), **algo_options})
        self.augmenters = [_resolve_augmenter(each) for each in split_names(augment)]
        self.stages = Stages(self.algorithm, self.augmenters)
        self.model = SplitModel(model, head)
        _check_head(self.stages, self.model, model)
        self.device = next(model.parameters()).device if device is None else find_device(str(device))
        self.model.to(self.device)
        self.engine = Engine(self.model, self.stages, self.loss, self.metric, self.config)
        """Computes gradients and scores; public for checks that compare single steps with a reference."""
        self._meta = MetaParameters(self.model, self.stages, self.config, self.device)
        self._optimizer = OuterOptimizer(self.stages, self.config)
        report_idle(self.stages, self.config, self.model)
        self._runner = BatchRunner(self.engine, self.config, self.device)
        self.steps_done = 0
        """Training steps taken so far."""
        self.task: PluginSpec | None = None
        """The task plugin that a run trained it on, with the options for reading a user's own examples."""
        self.logs: dict[str, float] = {}
        """The logs of the last `step` or `meta_gradient`: query loss, metric, and ``PLUGIN.KEY`` of the augmenters."""

    __repr__ = describe_learner

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copy the tensors, because `torch.multiprocessing` sends them in shared memory."""
        shared = any(value.is_shared() for value in state["_meta"].tensors.values())
        self.__dict__.update(copy.deepcopy(state) if shared else state)

    @property
    def bn_statistics(self) -> str:
        """The statistics that BatchNorm layers use for query predictions; ``"none"`` if the model has no such layer."""
        return _check_statistics(self.config.bn_statistics, self.model)

    @property
    def predictor(self) -> str:
        """The predictor in evaluation and in adapted modules: ``"head"``, or a plugin's name."""
        return self.engine.plain.stages.predictor or "head"

    @property
    def strategy(self) -> Strategy | None:
        """The strategy in use; None until ``"auto"`` has chosen."""
        return self._runner.strategy

    def choose_strategy(self, tasks: int, steps: int, stackable: bool = True) -> tuple[Strategy, str]:
        """Choose the strategy for ``strategy="auto"``, given the work ahead; return it and the reason."""
        return self._runner.choose_strategy(tasks, steps, stackable)

    @property
    def meta_parameters(self) -> dict[str, Tensor]:
        """Every meta-parameter by name: the model's own, and the plugins' with their name as prefix.

        Raises:
            UsageError: a plugin needs an example to create its own, but has not seen one; call `initialize`.
        """
        self.initialize(None)
        return dict(self._meta.tensors)

    @property
    def plain_meta_parameters(self) -> dict[str, Tensor]:
        """The meta-parameters of evaluation, adaptation and the learner's file: without those of training only."""
        return self._meta.select_plain()

    def initialize(self, example: Any) -> None:
        """Create the plugins' meta-parameters; otherwise, the first batch of tasks does so.

        Args:
            example: one support set's inputs ``[examples, …]``. Can be None if no plugin needs an example, or if the
                head is an `nn.Linear`, whose input gives the shape of the features.
        """
        self._meta.initialize(example)

    def meta_gradient(self, episodes: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the meta-gradient of a batch of tasks; the learner does not change.

        Args:
            episodes: the tasks, or a list of stacks if their sizes differ (`Episodes.group`); or the four parts of
                Episodes, as a DataLoader returns them.

        Returns:
            The objective (mean query loss and the augmenters' terms) and its gradient by name.

        Raises:
            UsageError: the tasks do not fit the learner, or contain NaN or infinite values.
        """
        gradient = self._runner.compute_gradient(self._meta, episodes, self.steps_done)
        self.logs = {name: value.item() for name, value in gradient.logs.items()}
        if not bool(gradient.loss.isfinite()):
            self._runner.refuse_nonfinite(self._meta, episodes)
        return gradient.loss, gradient.grads

    def step(self, episodes: Batch) -> Tensor:
        """Take one training step, meta-gradient and outer update; returns the objective before the step, a scalar.

        Args:
            episodes: as in `meta_gradient`.

        Raises:
            UsageError: as `meta_gradient`.
            DivergenceError: the objective or its gradient is not finite; the learner is unchanged.
        """
        gradient = self.take_step(episodes)
        self.logs = {name: value.item() for name, value in gradient.logs.items()}
        return gradient.loss

    def take_step(self, episodes: Batch | Share) -> Gradient:
        """Like `step`, but returns everything computed, as tensors; for training loops."""
        gradient = self._runner.compute_gradient(self._meta, episodes, self.steps_done)
        self._check_finite(gradient, episodes)
        self._meta.tensors = self._optimizer.update(self._meta.tensors, gradient.grads, self.steps_done)
        self.steps_done += 1
        return gradient

    def take_steps(self, batches: Batches) -> tuple[Gradient, MetaregError | None] | None:
        """Call `take_step` with the first batches, as many as one program takes; return None if it takes none.

        Returns:
            The objectives and logs of the steps taken ``[steps]`` and the gradient of the last one; and the error that
            prevented the next step.
        """
        taken = self._runner.take_steps(self._meta, self._optimizer, batches, self.steps_done)
        if taken is None:
            return None
        last = len(taken.loss) - 1
        self.steps_done += last
        try:
            self._check_finite(taken.select(last), batches[last:].first())
        except MetaregError as error:
            return taken.select(slice(last)), error
        self.steps_done += 1
        return taken, None

    def _check_finite(self, gradient: Gradient, episodes: Batch | Share) -> None:
        """Refuse the next step if its gradient is not finite, as described in `step`."""
        try:
            check_finite(gradient, self.steps_done)
        except DivergenceError:
            where = f"Step {self.steps_done + 1} was not taken because its objective is not finite: "
            self.processes.each(lambda: self._runner.refuse_nonfinite(self._meta, episodes, where))
            raise

    def fit(
        self,
        task_source: str | type | object,
        steps: int,
        *,
        meta_batch: int = 4,
        log_every: int = 100,
        eval_every: int | None = None,
        eval_tasks: int = 100,
        patience: int | None = None,
        observers: Sequence[Observer | object] = (),
        progress: bool = False,
    ) -> MetaLearner:
        """Train on your own tasks or on those of a task plugin; returns the learner.

        Args:
            task_source: an object with a method ``episodes(split, indices, seed)`` that returns Episodes, or a function
                with some or all of these arguments; an iterable of batches, such as a DataLoader, or a mapping from
                ``"train"``, ``"validation"`` and ``"test"`` to such iterables; a function ``f(split, seed)`` that
                returns one; or a plugin's name or class. Training takes the split ``"train"`` in order.
            steps: training steps.
            meta_batch: tasks per step.
            log_every: steps between calls of the observers' `on_step`.
            eval_every: steps between evaluations on the split ``"validation"``; None for none.
            eval_tasks: tasks per evaluation.
            patience: stop after this many evaluations in a row without a new best; None for never.
            observers: objects with the hooks `on_step` and `on_evaluation`.
            progress: whether to show a bar and the losses, in a terminal or a notebook.
        """
        values = {"steps": self.steps_done + steps, "meta_batch": meta_batch, "log_every": log_every,
                  "eval_every": eval_every, "eval_tasks": eval_tasks, "patience": patience}  # fmt: skip
        schedule, source = validate(Schedule, values, "fit"), TaskSource.of(task_source)
        self.choose_strategy(meta_batch, steps, source.stackable)
        with display_training(self, source, schedule, progress) as displays:
            fit(self, source, schedule, [*observers, *displays])
        return self

    def evaluate(
        self,
        task_source: str | type | object,
        tasks: int = 600,
        *,
        split: str = TEST,
        inner_steps: Sequence[int] = (0, 1, 5, 10),
        seed: int | None = None,
        bn_statistics: str | None = None,
    ) -> Evaluation:
        """Evaluate the metric over tasks after each number of inner steps, without training-only augmenters and graphs.

        Args:
            task_source: as in `fit`.
            tasks: the number of tasks, from the first one of the split.
            split: ``"test"``, ``"validation"`` or ``"train"``.
            inner_steps: numbers of inner steps.
            seed: fixes the tasks; by default, the learner's own.
            bn_statistics: as for the learner; by default, the learner's own.
        """
        (evaluation,) = self.evaluate_policies(
            [bn_statistics or self.config.bn_statistics], task_source, tasks, split, inner_steps, seed
        )
        return evaluation

    def evaluate_policies(
        self,
        bn_statistics: Sequence[str],
        task_source: str | type | object,
        tasks: int,
        split: str,
        inner_steps: Sequence[int],
        seed: int | None = None,
    ) -> list[Evaluation]:
        """Evaluate with several choices of BatchNorm statistics, drawing and adapting to each task only once.

        Returns:
            An evaluation for each different choice; a single one if the model has no BatchNorm.
        """
        wanted = sort_inner_steps(inner_steps, tasks)
        seed = self.config.seed if seed is None else seed
        policies = tuple(dict.fromkeys(_check_statistics(each, self.model) for each in bn_statistics))
        scores = self._runner.score_tasks(self._meta, TaskSource.of(task_source), split, tasks, seed, wanted, policies)
        check_same_bits(self.processes, self._meta.tensors, self.steps_done)
        facts = self.metric.name, self.metric.higher_is_better, wanted
        return [
            Evaluation(*facts, scores[:, number].contiguous(), policy, self.predictor)
            for number, policy in enumerate(policies)
        ]

    def adapt(
        self, x: Any, y: Tensor, steps: int | None = None, query_x: Any = None, *, bn_statistics: str = "support"
    ) -> nn.Module:
        """Adapt to one task.

        Args:
            x: support inputs ``[examples, …]``, without a task dimension.
            y: support targets ``[examples]`` or ``[examples, outputs]``.
            steps: inner steps; by default, as many as in training.
            query_x: query inputs ``[query, …]``, for algorithms that read them (`metareg.TaskView.query_x`).
            bn_statistics: ``"support"``, with which predictions are independent of each other; or ``"transductive"``,
                the statistics of each batch, as in results that say so.

        Returns:
            An ordinary module of your model's class, in evaluation mode, on the learner's device.
        """
        steps = self.config.inner_steps if steps is None else steps
        statistics = _check_statistics(bn_statistics, self.model)
        return self._runner.adapt(self._meta, x, y, steps, statistics, query_x)

    def save(self, path: str | Path) -> None:
        """Save the learner, without anything that only training needs, as one safetensors file.

        The file contains the parameters of the model, the algorithm and the augmenters that stay; its metadata contains
        the configuration.
        """
        write_learner(
            Path(path), self.config, self.engine.plain.stages, self.model, self._recipe, self.plain_meta_parameters,
            **self._file_facts, steps_done=self.steps_done, example=self._meta.example,
            task=self.task and self.task.model_dump(mode="json"),
        )  # fmt: skip

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module | None = None,
        *,
        algo: type | object | None = None,
        augment: Sequence[type | object] = (),
        loss: Loss | None = None,
        metric: Metric | None = None,
        device: str | torch.device | None = None,
    ) -> MetaLearner:
        """Load a learner that `save` wrote; nothing in the file can execute code.

        Args:
            path: the file.
            model: a module with the saved one's shapes. You can omit it if the model came from a model plugin or
                consists only of `torch.nn` layers (a body and a head of such layers are returned as a `BodyHead`).
                Otherwise it is needed, because an untrusted file must not instantiate arbitrary classes.
            algo: the algorithm's class or object, if it is not installed.
            augment: those of the augmenters that stay, if they are not installed.
            loss: the callable, if the loss was one.
            metric: the metric, if it was not given by name.
            device: where to load it.

        Raises:
            UsageError: the file is missing, damaged, or does not fit the model.
        """
        file = LearnerFile(Path(path))
        with file.limit_cost():
            learner = cls(**file.create_arguments(model, algo, augment, loss, metric), device=device)
        with file.limit_cost(examples=True):
            learner._meta.initialize_like(file.header.example)
            plain = learner.plain_meta_parameters
        learner._meta.tensors, constants = file.read(plain, learner.model.constants())
        learner.model.module.load_state_dict(constants, strict=False)
        learner.steps_done, learner.task = file.header.steps_done, file.header.task
        return learner

    def state(self) -> dict[str, Any]:
        """Everything that training changes, including augmenters and outer optimiser: tensors and JSON values.

        The tensors are the learner's own and change with its next step.
        """
        parts = {"steps_done": self.steps_done, "strategy": self.strategy, "proven": self._runner.proven,
                 "meta": self.meta_parameters, "example": self._meta.example}  # fmt: skip
        return parts | self._optimizer.state()

    def load_state(self, state: Mapping[str, Any], where: str = "The state") -> None:
        """Restore the learner that `state` described: its next step is the same, bit for bit.

        Raises:
            UsageError: it is the state of another learner; the message names what does not fit.
        """
        self._meta.load(state["meta"], state.get("example"), where)
        self._optimizer.load_state(state, self._meta.tensors)
        self._runner.restore_strategy(state["strategy"], state.get("proven", True))
        self.steps_done = state["steps_done"]

    @property
    def processes(self) -> Processes:
        """The processes that share batches and evaluations."""
        return self._runner.split.processes

    @contextmanager
    def split_over(self, processes: Processes) -> Iterator[None]:
        """Split batches and evaluations over processes in a block, in which all of them must make the same calls.

        Each process receives all tasks and computes its share. All start from the first one's parameters, and end with
        the same bits.

        Args:
            processes: those of `metareg.join_processes`.
        """
        before, self._runner.split = self._runner.split, BatchSplit(processes)
        try:
            processes.replicate(self._meta.take_snapshot, self._meta.restore_snapshot)
            if self._meta.initialized:
                processes.replicate(self.state, self.load_state)
            yield
        finally:
            self._runner.split = before

    def abandon_step(self, error: Exception) -> NoReturn:
        """Raise an error that left this process without tasks, and notify the processes that wait for its share."""
        self._runner.split.fail(error)


def _resolve_augmenter(given: Any) -> Plugin:
    """Return the augmenter for a name, a class, an object or a pair ``(name or class, config)``."""
    if isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[1], Mapping):
        return resolve("augmenters", given[0], given[1])
    if isinstance(given, tuple | list | Mapping):
        raise UsageError(f"An augmenter is a name, a class or a pair (name, config); got {given!r}.")
    return resolve("augmenters", given)


def _check_statistics(name: str, model: SplitModel) -> str:
    """Return the BatchNorm statistics for query predictions; ``"none"`` if the model has no such layer."""
    if name not in get_args(BatchNormStatistics):
        raise UnknownNameError("policy of BatchNorm (bn_statistics)", name, get_args(BatchNormStatistics))
    return name if model.batch_norms else "none"


def _check_head(stages: Stages, split: SplitModel, model: nn.Module) -> None:
    """Refuse a model with an unknown head if a plugin needs to know it."""
    if split.has_head or not (plugin := stages.find_asking("features", "outputs", "head", "body")):
        return
    children = ", ".join(name for name, _ in model.named_children()) or "no submodule"
    raise UsageError(
        f"The {plugin.label} needs to know which part of {type(model).__name__} is its head: name the submodule with "
        f"head=… (it has {children}), or give the model a body and a head."
    )


MetaLearner.__doc__ = f"{MetaLearner.__doc__}\n{describe_options()}"
