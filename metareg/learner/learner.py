"""`MetaLearner`: a model, an algorithm and augmenters, ready to be trained on the user's own tasks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from metareg._version import __version__
from metareg.contract.config import PluginConfig, PluginSpec, split_names, unknown_option_error, validate
from metareg.contract.episodes import Episodes
from metareg.contract.evaluation import Evaluation
from metareg.contract.losses import Loss, Metric, find_loss, find_metric
from metareg.contract.tasks import TaskSpec
from metareg.engine.engine import Engine, Gradient
from metareg.engine.objective import TaskFunctions
from metareg.engine.split_model import SplitModel
from metareg.engine.stages import Stages
from metareg.engine.strategies import Strategy, choose_strategy
from metareg.engine.tracing import CompileError
from metareg.errors import DivergenceError, MetaregError, PluginError, UsageError
from metareg.learner.config import LearnerConfig, Schedule
from metareg.learner.module_json import build_module, describe_module
from metareg.learner.noise import draw_batch_noise, draw_task_noise
from metareg.learner.optimizer import Adam
from metareg.learner.processes import BatchSplit, Processes, hash_tensors, select_tasks
from metareg.learner.training import Observer, fit
from metareg.registry.dispatch import find_hook
from metareg.registry.plugins import Plugin, find_entry, get_config_class, resolve
from metareg.registry.sources import TaskSource
from metareg.util.devices import find_device
from metareg.util.layout import copy_contiguous
from metareg.util.seeding import use_seed
from metareg.util.tensorfile import TensorFile, limit_allocation, write_tensors
from metareg.util.torch_internals import tree_map

__all__ = ["MetaLearner"]

log = logging.getLogger("metareg")

FILE_FORMAT = 1
_EVALUATION_CHUNK = 100


class MetaLearner:
    """Gradient-based meta-learning of one model.

    Args:
        model: any `nn.Module`; it is copied, never changed. One with the submodules `body` and `head` is split there, an
            `nn.Sequential` before its last layer. Or the name or class of a model plugin, built for `spec`.
        algo: an algorithm: a plugin's name, a plugin class or object.
        augment: gradient augmenters in the order in which they are chained: names, classes, objects, or pairs
            ``(name or class, config)``.
        loss: ``"cross_entropy"``, ``"mse"``, or a callable ``loss(outputs, targets) -> scalar``.
        metric: ``"accuracy"``, ``"mse"`` or a `metareg.contract.losses.Metric`; by default the one that goes with the loss.
        inner_steps: adaptation steps in training.
        first_order: treat inner gradients as constants in the meta-gradient.
        outer_lr: step size of the outer Adam.
        reset_optimizer_every: forget Adam's moments every so many steps.
        strategy: ``"auto"``, ``"serial"``, ``"traced"``, ``"vectorized"`` or ``"compiled"``; all give the same result to
            rounding.
        memory: ``"store"``, or ``"recompute"`` for a peak memory that does not grow with the inner steps.
        bn_statistics: whose statistics BatchNorm uses for query predictions, ``"transductive"`` or ``"support"``.
        precision: ``"full"``, or ``"bf16"`` to run the model in bfloat16; parameters, losses, gradients and updates keep
            the model's own precision.
        chunk: at most so many tasks at once.
        device: where to run; by default where the model is.
        seed: fixes what is drawn at random: a plugin's initial parameters, noise, the tasks of `fit`.
        head: the dotted name of the model's head, for a model without `body` and `head`.
        spec: the shapes for a model named by its plugin.
        model_options: options of a model named by its plugin.
        algo_config: the algorithm's options; they may also be given by name (``inner_lr=0.4``).

    Raises:
        UsageError: an unknown name, an impossible value, or a model that does not fit.

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
        loss: str | Loss = "cross_entropy",
        metric: str | Metric | None = None,
        inner_steps: int = 1,
        first_order: bool = False,
        outer_lr: float = 1e-3,
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
        _refuse_misspelt(algo, algo_options)
        self.config = validate(
            LearnerConfig,
            {
                "seed": seed, "inner_steps": inner_steps, "first_order": first_order, "outer_lr": outer_lr,
                "reset_optimizer_every": reset_optimizer_every, "strategy": strategy, "memory": memory,
                "bn_statistics": bn_statistics, "precision": precision, "chunk": chunk,
            },
            "MetaLearner",
        )  # fmt: skip
        self._recipe: dict[str, Any] | None = None
        if not isinstance(model, nn.Module):
            model = self._build(model, spec, model_options)
        self.loss = find_loss(loss)
        self.metric = find_metric(metric, loss)
        self._loss_name = loss if isinstance(loss, str) else None
        self._head = head
        self.algorithm = resolve("algorithms", algo, {**(algo_config or {}), **algo_options})
        self.augmenters = [_augmenter(each) for each in split_names(augment)]
        self.stages = Stages(self.algorithm, self.augmenters)

        self.model = SplitModel(model, head)
        self.device = find_device(str(device)) if device is not None else _device_of(model)
        self.model.to(self.device)
        if not self.model.has_head and (plugin := self.stages.wanting("features", "outputs", "head", "body")):
            children = ", ".join(name for name, _ in model.named_children()) or "no submodule"
            raise UsageError(
                f"The {plugin.label} needs to know which part of {type(model).__name__} is its head: name the submodule "
                f"with head=… (it has {children}), or give the model a body and a head."
            )
        self.engine = Engine(self._functions(self.stages), self._functions(self.stages.without_augmenters()))
        """What computes gradients and scores; for checks that compare single steps with a reference of their own."""
        self._initial = {name: value.to(self.device) for name, value in self.model.initial_parameters().items()}
        self._dtype = next(iter(self._initial.values())).dtype
        self._meta: dict[str, Tensor] | None = None
        self._split_checked = False
        self._adam: Adam | None = None
        self._outer_state: dict[str, Any] = {}
        self._split = BatchSplit(Processes())
        self._strategy: Strategy | None = None if strategy == "auto" else strategy  # type: ignore[assignment]
        self.steps_done = 0
        """Training steps taken so far."""
        self.logs: dict[str, float] = {}
        """What the last `step` or `meta_gradient` logged: query loss, metric, and ``PLUGIN.KEY`` of the augmenters."""

    @property
    def bn_statistics(self) -> str:
        """Whose statistics BatchNorm layers use for query predictions; ``"none"`` where the model has no such layer."""
        return self.config.bn_statistics if self.model.batch_norms else "none"

    @property
    def strategy(self) -> Strategy | None:
        """The strategy in use; None while ``"auto"`` has not chosen."""
        return self._strategy

    # ------------------------------------------------------------------------------------------------ meta-parameters

    @property
    def meta_parameters(self) -> dict[str, Tensor]:
        """Every meta-parameter by name: the model's own, and the plugins' with their name as prefix.

        Raises:
            UsageError: a plugin needs an example to build its own and has seen none; `initialize` gives it one.
        """
        if self._meta is None:
            self.initialize(None)
        assert self._meta is not None
        return dict(self._meta)

    @property
    def plain_meta_parameters(self) -> dict[str, Tensor]:
        """`meta_parameters` without the augmenters': those that evaluation, adaptation and the learner's file have."""
        augmenters = set(self.stages.plugins) - {self.algorithm.name}
        return {
            name: value for name, value in self.meta_parameters.items() if self.stages.owner(name) not in augmenters
        }

    def initialize(self, example: Any) -> None:
        """Create the plugins' meta-parameters, which the first batch of tasks would do otherwise.

        Args:
            example: one support set's inputs ``[examples, …]``. None will do where no plugin needs one, or where the
                head is an `nn.Linear`, whose input tells the shape of the features.
        """
        if self._meta is not None:
            return
        arguments: dict[str, Any] = {"example": example, "features": None, "outputs": None}
        if example is not None:
            self._check_split(example)
        if self.stages.init_wants("example", "features", "outputs"):
            with torch.no_grad():
                if example is not None:
                    arguments["features"] = self.model.body(self._initial, example)
                else:
                    arguments["features"] = self._features_by_the_head()
                arguments["outputs"] = self.model.head(self._initial, arguments["features"])
        extra = self.stages.init_meta(
            self.config.seed, model=self.model.module, inner_steps=self.config.inner_steps, **arguments
        )
        taken = [name for name in self._initial if self.stages.owner(name)]
        if taken:
            raise UsageError(
                f"The model's parameter '{taken[0]}' has the name of a plugin in front; rename the submodule."
            )
        self._meta = self._initial | {name: value.to(self.device, self._dtype) for name, value in extra.items()}

    # ------------------------------------------------------------------------------------------------------ processes

    @property
    def processes(self) -> Processes:
        """The processes that its batches and evaluations are split over."""
        return self._split.processes

    @contextmanager
    def split_over(self, processes: Processes) -> Iterator[None]:
        """Split batches and evaluations over processes for a block, in which all of them make the same calls.

        Each is given all tasks and computes its share. All begin with the first one's parameters, and end with the same bits
        in every process.

        Args:
            processes: those of `metareg.join_processes`.

        Example:
            >>> with join_processes() as processes, learner.split_over(processes):  # in a script that torchrun starts
            ...     learner.fit(task_source, steps=1000)
        """
        before, self._split = self._split, BatchSplit(processes)
        try:
            if processes.size > 1:
                whole = processes.first(self._whole)
                processes.each(lambda: None if processes.leads else self._take_over(whole))
            yield
        finally:
            self._split = before

    # ------------------------------------------------------------------------------------------------------- training

    def meta_gradient(self, episodes: Episodes | Sequence[Episodes]) -> tuple[Tensor, dict[str, Tensor]]:
        """The meta-gradient of a batch of tasks; nothing of the learner changes.

        Args:
            episodes: the tasks, or a list of stacks where they are of unequal sizes (`Episodes.group`).

        Returns:
            The objective (mean query loss and the augmenters' terms) and its gradient by name.
        """
        gradient = self._gradient(episodes)
        self.logs = {name: value.item() for name, value in gradient.logs.items()}
        return gradient.loss, gradient.grads

    def step(self, episodes: Episodes | Sequence[Episodes]) -> Tensor:
        """One training step: the meta-gradient and the outer update.

        Returns:
            The objective before the update, a scalar.

        Raises:
            DivergenceError: the objective or its gradient is not finite; the learner is as it was before.
        """
        gradient = self.take_step(episodes)
        self.logs = {name: value.item() for name, value in gradient.logs.items()}
        return gradient.loss

    def take_step(self, episodes: Episodes | Sequence[Episodes]) -> Gradient:
        """`step`, returning all that was computed as tensors; what a training loop calls."""
        gradient = self._gradient(episodes)
        if not (math.isfinite(gradient.loss.item()) and math.isfinite(gradient.logs["grad_norm"].item())):
            raise DivergenceError(self._divergence(gradient))
        self._update(gradient.grads)
        self.steps_done += 1
        return gradient

    def abandon_step(self, error: Exception) -> NoReturn:
        """Raise an error that left this process without tasks; the processes that wait for its share hear of it."""
        self._split.fail(error)

    def fit(
        self,
        task_source: str | type | object,
        steps: int,
        *,
        meta_batch: int = 4,
        log_every: int = 100,
        eval_every: int | None = None,
        eval_tasks: int = 100,
        observers: Sequence[Observer | object] = (),
    ) -> MetaLearner:
        """Train on the tasks of a source: an object with `episodes(split, indices)`, a task plugin's name or class.

        Args:
            task_source: where the tasks come from; training takes its split ``"train"`` in order.
            steps: training steps.
            meta_batch: tasks per step.
            log_every: steps between two calls of the observers' `on_step`.
            eval_every: steps between evaluations on the split ``"validation"``; None for none.
            eval_tasks: tasks of each.
            observers: objects with the hooks `on_step` and `on_evaluation`.

        Returns:
            The learner itself.
        """
        schedule = validate(
            Schedule,
            {"steps": self.steps_done + steps, "meta_batch": meta_batch, "log_every": log_every,
             "eval_every": eval_every, "eval_tasks": eval_tasks},
            "fit",
        )  # fmt: skip
        source = TaskSource.of(task_source)
        self.choose_strategy(meta_batch, steps, source.stackable)
        fit(self, source, schedule, observers)
        return self

    def choose_strategy(self, tasks: int, steps: int, stackable: bool = True) -> tuple[Strategy, str]:
        """Fix what ``strategy="auto"`` stands for, given the work ahead; returns it and the reason."""
        if self.config.strategy != "auto":
            self._strategy = self.config.strategy
            return self._strategy, "as asked for"
        # One choice for all processes, so that a checkpoint holds what each of them ran.
        tasks = self.processes.largest_share(tasks)
        at_once = tasks if self.config.chunk is None else min(tasks, self.config.chunk)
        self._strategy, reason = choose_strategy(self.engine.training, self.device, at_once, steps, stackable)
        return self._strategy, reason

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self,
        task_source: str | type | object,
        tasks: int = 600,
        *,
        split: str = "test",
        inner_steps: Sequence[int] = (0, 1, 5, 10),
        seed: int | None = None,
    ) -> Evaluation:
        """The metric over tasks, after each number of inner steps, by the algorithm alone and without graphs.

        Args:
            task_source: as in `fit`.
            tasks: how many tasks of the split, from its first on.
            split: ``"test"``, ``"validation"`` or ``"train"``.
            inner_steps: numbers of adaptation steps.
            seed: fixes the tasks; the learner's own by default.
        """
        source = TaskSource.of(task_source)
        wanted = tuple(sorted(set(inner_steps)))
        if tasks < 2 or not wanted or wanted[0] < 0:
            raise UsageError(
                f"An evaluation needs at least 2 tasks and numbers of inner steps of 0 or more; got {tasks} tasks and "
                f"inner steps {list(inner_steps)}."
            )
        chunk = self.config.chunk or _EVALUATION_CHUNK
        seed = self.config.seed if seed is None else seed

        def scores(indices: range) -> tuple[list[int], list[Tensor]]:
            """Where in `indices` each task stands, and the scores of this process's share of them."""
            rows = []
            drawn, positions = source.placed_episodes(split, indices, seed)
            self._ready(drawn[0])  # also where none of the tasks are this process's
            for batch in self._on_device(select_tasks(drawn, self.processes.share(len(indices)))):
                strategy = self._strategy or self.choose_strategy(len(batch), 1, source.stackable)[0]
                rows.append(self.engine.scores(self.plain_meta_parameters, batch, wanted, strategy, chunk).cpu())
            return positions, rows

        blocks = [range(start, min(start + _EVALUATION_CHUNK, tasks)) for start in range(0, tasks, _EVALUATION_CHUNK)]
        shares = self.processes.gather(lambda: ([scores(indices) for indices in blocks], self._fingerprint()))
        if len({fingerprint for _, fingerprint in shares}) > 1:
            raise MetaregError(
                f"After step {self.steps_done} the processes hold different meta-parameters: their machines or versions "
                "differ, or a plugin draws random numbers of its own."
            )
        ordered = []
        for parts in zip(*[share for share, _ in shares], strict=True):  # a block's, of each process
            positions = torch.tensor(parts[0][0])
            ordered.append(torch.cat([row for _, rows in parts for row in rows])[positions.argsort()])
        return Evaluation(
            self.metric.name, self.metric.higher_is_better, wanted, torch.cat(ordered), self.bn_statistics
        )

    def adapt(self, x: Any, y: Tensor, steps: int | None = None) -> nn.Module:
        """Adapt to one task.

        Args:
            x: support inputs ``[examples, …]``, without a task dimension.
            y: support targets ``[examples]`` or ``[examples, outputs]``.
            steps: adaptation steps; as many as in training by default.

        Returns:
            An ordinary module of the user's class, in evaluation mode, on the learner's device. Its BatchNorm layers use
            the batch at hand, or with ``bn_statistics="support"`` the support set's statistics.
        """
        steps = self.config.inner_steps if steps is None else steps
        if steps < 0:
            raise UsageError(f"The number of inner steps cannot be negative; got {steps}.")
        episodes = Episodes(_batched(x), _batched(y), _batched(x), _batched(y))
        (episodes,) = self._on_device(episodes)
        self._ready(episodes)
        task = tuple(_unbatched(part) for part in episodes.parts)
        meta, functions = self.plain_meta_parameters, self.engine.plain
        with torch.no_grad():
            adapted = functions.adapt(functions.prepare(meta, task), steps)
        statistics_of = task[0] if functions.support_statistics else None
        return self.model.adapted_module({**meta, **adapted}, statistics_of)

    # ---------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Write the learner, without anything of the augmenters, as one safetensors file.

        The file holds the model's parameters, the algorithm's own meta-parameters and, as metadata, the configuration.
        """
        own = self.plain_meta_parameters
        constants = {f"{_CONSTANT}{name}": value for name, value in self.model.constants().items()}
        header = {
            "format": FILE_FORMAT,
            "metareg": __version__,
            "algo": {"name": self.algorithm.name, "config": _dumped(self.algorithm.config)},
            "installed": self.algorithm.distribution is not None,
            "model": self._recipe,
            "architecture": None if self._recipe else describe_module(self.model.module),
            "module": type(self.model.module).__name__,
            "head": self._head,
            "loss": self._loss_name,
            "metric": self.metric.name,
            "steps_done": self.steps_done,
            **self.config.model_dump(exclude={"device"}),
        }
        write_tensors(Path(path), own | constants, header)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module | None = None,
        *,
        algo: type | object | None = None,
        loss: Loss | None = None,
        metric: Metric | None = None,
        device: str | torch.device | None = None,
    ) -> MetaLearner:
        """The learner that `save` wrote; nothing in the file can execute code.

        Args:
            path: the file.
            model: a module of the saved one's shapes. It may be left out where the model came from a model plugin or is
                made of `torch.nn` layers alone (a body and a head of such layers come back as a `BodyHead`); for
                others it is needed, for a file that anybody may have written must not build classes of its choice.
            algo: the algorithm's class or object, where it is not installed.
            loss: the callable, where the loss was one.
            metric: the metric, where it was no named one.
            device: where to put it.

        Raises:
            UsageError: the file is missing, damaged, or does not fit the model.
        """
        file = TensorFile(Path(path), "learner")
        if file.header.get("format") != FILE_FORMAT:
            raise UsageError(
                f"{path} has the file format {file.header.get('format')}, this metareg reads format {FILE_FORMAT}; "
                "use the metareg version that wrote it."
            )
        header = validate(_Header, file.header, str(path))
        if algo is None and not header.installed:
            raise UsageError(f"{path} was trained by '{header.algo.name}', which no package installs; pass algo=…")
        given_loss: str | Loss | None = header.loss if loss is None else loss
        if given_loss is None:
            raise UsageError(f"{path} was trained with a loss of its own; pass it as loss=…")
        options = header.model_dump(include=set(LearnerConfig.model_fields) - {"device"})
        bounds = ExitStack()
        given: nn.Module | str
        if model is not None:
            given = model
        elif header.model is not None:
            given, shapes = header.model.name, TaskSpec(header.model.input_shape, header.model.output_shape)
            options |= {"spec": shapes, "model_options": header.model.config}
            bounds.enter_context(limit_allocation(file.bytes, str(path)))
        elif header.architecture is not None:
            values = {name.removeprefix(_CONSTANT): value for name, value in file.read().items()}
            given = build_module(header.architecture, values)
        else:
            raise UsageError(f"{path} holds the weights of a {header.module}; pass such a module as model=…")
        built = algo is not None and not isinstance(algo, type | str)
        with bounds:
            learner = cls(
                given,
                algo=header.algo.name if algo is None else algo,
                algo_config=None if built else header.algo.config,
                loss=given_loss,
                metric=header.metric if metric is None and header.loss is not None else metric,
                head=header.head,
                device=device,
                **options,
            )
        learner._load_tensors(file)
        learner.steps_done = header.steps_done
        return learner

    def state(self) -> dict[str, Any]:
        """All that training changes, augmenters and outer optimiser included: tensors, and what JSON can hold.

        The tensors are the learner's own and change with its next step.
        """
        meta = self.meta_parameters
        return {
            "steps_done": self.steps_done,
            "strategy": self._strategy,
            "meta": meta,
            "adam": self._adam.state() if self._adam else {},
            "outer_state": self._outer_state,
        }

    def load_state(self, state: Mapping[str, Any], where: str = "The state") -> None:
        """Become the learner that `state` described: the next step is bit for bit the one that it would have taken.

        Raises:
            UsageError: it is the state of another learner; what does not fit is named.
        """
        expected = self.meta_parameters
        _refuse_misfit(expected, {name: tuple(value.shape) for name, value in state["meta"].items()}, where)
        self._meta = copy_contiguous(
            {name: state["meta"][name].to(self.device, value.dtype) for name, value in expected.items()}
        )
        self._adam = None
        if state["adam"]:
            self._adam = Adam(self._meta, self.config.outer_lr)
            self._adam.load_state(state["adam"])
        self._outer_state = tree_map(self._moved, state["outer_state"])
        if self.config.strategy == "auto":
            if state["strategy"] not in (None, *get_args(Strategy)):
                raise TypeError(f"{state['strategy']!r} is no strategy")
            self._strategy = state["strategy"]
        self.steps_done = state["steps_done"]

    # -------------------------------------------------------------------------------------------------------- private

    def _build(self, which: str | type | Plugin, spec: TaskSpec | None, options: Mapping[str, Any] | None) -> nn.Module:
        plugin = resolve("models", which, options)
        if spec is None:
            raise UsageError(f"The {plugin.label} needs spec=TaskSpec(input_shape, output_shape) to be built.")
        build = find_hook(plugin, "build")
        if build is None:
            raise PluginError(f"The {plugin.label} implements no hook 'build'.")
        with use_seed(self.config.seed, "model") as generator:
            model = build(spec=spec, generator=generator)
        if not isinstance(model, nn.Module):
            build.reject(f"it must return an nn.Module, not a {type(model).__name__}")
        if plugin.distribution is not None:
            self._recipe = {
                "name": plugin.name,
                "config": _dumped(plugin.config),
                "input_shape": list(spec.input_shape),
                "output_shape": list(spec.output_shape),
            }
        return model

    def _functions(self, stages: Stages) -> TaskFunctions:
        return TaskFunctions(self.model, stages, self.loss, self.metric, self.config)

    def _features_by_the_head(self) -> Tensor:
        head = self.model.module.get_submodule((self.model.head_prefix or "").rstrip("."))
        if not isinstance(head, nn.Linear):
            raise UsageError(
                "The meta-parameters of this learner depend on the shape of its features; call "
                "learner.initialize(example_inputs) first, or run a first batch of tasks."
            )
        return torch.zeros(2, head.in_features, dtype=self._dtype, device=self.device)

    def _ready(self, episodes: Episodes) -> None:
        if torch.is_autocast_enabled(self.device.type):
            raise UsageError(
                "torch.autocast would change the types of gradients and scores, in a traced graph for good; leave its "
                "context and take MetaLearner(precision='bf16')."
            )
        if self._meta is None or not self._split_checked:
            (episodes,) = self._on_device(episodes[:1])
            example = _unbatched(episodes.support_x)
            self._check_split(example)
            self.initialize(example)

    def _check_split(self, example: Any) -> None:
        if self.model.has_head and not self._split_checked:
            self.model.check_split(self._initial, example)
        self._split_checked = True

    def _on_device(self, episodes: Episodes | Sequence[Episodes]) -> list[Episodes]:
        batches = [episodes] if isinstance(episodes, Episodes) else episodes
        return [batch.to(self.device, self._dtype) for batch in batches]

    def _gradient(self, episodes: Episodes | Sequence[Episodes]) -> Gradient:
        """The meta-gradient of a batch, the same in all processes that its tasks are split over."""
        batches = [episodes] if isinstance(episodes, Episodes) else list(episodes)
        if not batches:
            raise UsageError("There is no task in the batch.")
        self._ready(batches[0])
        assert self._meta is not None
        strategy = self._strategy or self.choose_strategy(sum(len(batch) for batch in batches), 1)[0]
        if self.processes.size == 1:
            gradient = self._mean_gradient(batches, 0, strategy)
        else:
            gradient = self._split.gradient(self._meta, batches, partial(self._mean_gradient, strategy=strategy))
        if self.stages.has_outer_batch_gradient:
            noise = draw_batch_noise(self.stages, self.config, self._meta, self.steps_done)
            augmented = self.stages.augment_outer_gradient(gradient.grads, self._meta, noise)
            norm = torch.nn.utils.get_total_norm(list(augmented.values()))
            gradient = Gradient(augmented, gradient.loss, gradient.logs | {"grad_norm": norm})
        return gradient

    def _mean_gradient(self, batches: Sequence[Episodes], first: int, strategy: Strategy) -> Gradient:
        """The meta-gradient of some tasks, the first of which has the number `first` in the batch."""
        assert self._meta is not None
        batches = self._on_device(batches)
        adapted = {name: self._meta[name] for name in self.engine.training.adapted_names}
        tasks = range(first, first + sum(len(batch) for batch in batches))
        noise = draw_task_noise(self.stages, self.config, adapted, self.steps_done, tasks)
        weights = self._outer_loss_weights()
        try:
            return self.engine.gradient(self._meta, batches, noise, strategy, self.config.chunk, weights)
        except CompileError as error:
            if self.config.strategy != "auto":
                raise
            log.warning("%s Going on with strategy vectorized.", error)
            self._strategy = "vectorized"
            return self.engine.gradient(self._meta, batches, noise, "vectorized", self.config.chunk, weights)

    def _whole(self) -> dict[str, Any]:
        """All that a learner of the same arguments needs to be this one, on the CPU."""
        whole = {
            "initial": self._initial,
            "constants": self.model.constants(),
            "state": None if self._meta is None else self.state(),
        }
        return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, whole)

    def _take_over(self, whole: Mapping[str, Any]) -> None:
        """Become the learner that `_whole` described."""
        self._initial = {name: value.to(self.device) for name, value in whole["initial"].items()}
        self.model.module.load_state_dict(whole["constants"], strict=False)
        if whole["state"] is not None:
            self.load_state(whole["state"])

    def _fingerprint(self) -> str | None:
        """A hash of the meta-parameters, where there is another process whose are to be the same."""
        return None if self.processes.size == 1 else hash_tensors(self.meta_parameters)

    def _outer_loss_weights(self) -> Tensor | None:
        if self.stages.has_outer_gradient:
            return None
        weights = self.stages.outer_loss_weights(self.config.inner_steps, self.steps_done)
        return None if weights is None else torch.tensor(weights, dtype=self._dtype, device=self.device)

    def _moved(self, leaf: Any) -> Any:
        return leaf.to(self.device) if isinstance(leaf, Tensor) else leaf

    def _update(self, grads: dict[str, Tensor]) -> None:
        assert self._meta is not None
        every = self.config.reset_optimizer_every
        if every is not None and self.steps_done % every == 0:
            self._adam, self._outer_state = None, {}
        with torch.no_grad():
            if self.stages.has_outer_update:
                updated, self._outer_state = self.stages.outer_update(self._meta, grads, self._outer_state)
                self._meta = {name: value.contiguous() for name, value in updated.items()}
                return
            if self._adam is None:
                self._adam = Adam(self._meta, self.config.outer_lr)
            self._adam.step(grads)

    def _divergence(self, gradient: Gradient) -> str:
        bad = [name for name, value in gradient.grads.items() if not bool(torch.isfinite(value).all())]
        what = "the objective" if not bool(torch.isfinite(gradient.loss)) else "the meta-gradient"
        first = f", first in '{bad[0]}'" if bad else ""
        return (
            f"Training diverged at step {self.steps_done + 1}: {what} is not finite{first}. The meta-parameters are those "
            f"after step {self.steps_done}; a smaller inner_lr or outer_lr usually helps."
        )

    def _load_tensors(self, file: TensorFile) -> None:
        expected = self.plain_meta_parameters
        shapes = {name: shape for name, shape in file.shapes.items() if not name.startswith(_CONSTANT)}
        _refuse_misfit(expected, shapes, str(file.path))
        tensors = file.read()
        self._meta = {name: tensors[name].to(self.device, value.dtype) for name, value in expected.items()}
        constants = {
            name.removeprefix(_CONSTANT): value for name, value in tensors.items() if name.startswith(_CONSTANT)
        }
        _refuse_misfit(
            self.model.constants(),
            {name: tuple(value.shape) for name, value in constants.items()},
            str(file.path),
        )
        self.model.module.load_state_dict(constants, strict=False)


_CONSTANT = "constant:"


class _Recipe(PluginConfig):
    """How a model plugin built the model."""

    name: str
    config: dict[str, Any]
    input_shape: tuple[PositiveInt, ...]
    output_shape: tuple[PositiveInt, ...]


class _Header(LearnerConfig):
    """What a learner's file says of it, beside its tensors."""

    format: int
    metareg: str
    algo: PluginSpec
    installed: bool
    model: _Recipe | None
    architecture: dict[str, Any] | None
    module: str
    head: str | None
    loss: str | None
    metric: str
    steps_done: int = Field(ge=0)


def _refuse_misfit(expected: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare names and shapes with the model's.

    Raises:
        UsageError: they differ; the message says where.
    """
    problems = []
    for name, value in expected.items():
        if name not in shapes:
            problems.append(f"'{name}' is missing")
        elif shapes[name] != value.shape:
            problems.append(f"'{name}' has the shape {shapes[name]} instead of {tuple(value.shape)}")
    problems += [f"'{name}' is not in the model" for name in shapes if name not in expected]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UsageError(f"{where} does not fit the model: {'; '.join(problems[:3])}{more}.")


def _augmenter(given: Any) -> Plugin:
    if isinstance(given, tuple | list):
        if len(given) != 2 or not isinstance(given[1], Mapping):
            raise UsageError(f"An augmenter is a name, a class or a pair (name, config); got {given!r}.")
        return resolve("augmenters", given[0], given[1])
    if isinstance(given, Mapping):
        raise UsageError(f"An augmenter is a name, a class or a pair (name, config); got {given!r}.")
    return resolve("augmenters", given)


def _refuse_misspelt(algo: str | type | object, options: Mapping[str, Any]) -> None:
    """An unknown keyword may be meant for the learner or for the algorithm: look for the nearest in both."""
    if not options or not isinstance(algo, str | type):
        return
    cls = find_entry("algorithms", algo).load() if isinstance(algo, str) else algo
    known = get_config_class(cls).model_fields
    for name in options:
        if name not in known:
            mine = [
                *LearnerConfig.model_fields,
                "loss",
                "metric",
                "head",
                "spec",
                "model_options",
                "algo_config",
                "augment",
            ]
            present = [LearnerConfig.former_names[name]] if name in LearnerConfig.former_names else []
            raise unknown_option_error("option of MetaLearner or its algorithm", name, [*known, *mine], present)


def _dumped(config: Any) -> dict[str, Any]:
    return config.model_dump(mode="json") if isinstance(config, PluginConfig) else {}


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _batched(part: Any) -> Any:
    return tree_map(lambda leaf: leaf[None], part)


def _unbatched(part: Any) -> Any:
    return tree_map(lambda leaf: leaf[0], part)
