"""Runs on a user's own objects: tasks and modules that are not installed plugins."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metareg.contract.config import PluginConfig, PluginSpec
from metareg.contract.episodes import Episodes
from metareg.contract.hookspecs import hookimpl
from metareg.contract.losses import METRICS, Loss, Metric, find_metric
from metareg.contract.splits import TRAIN
from metareg.contract.tasks import Task, TaskSpec
from metareg.errors import UsageError
from metareg.registry.own_tasks import wrap_tasks
from metareg.registry.plugins import Plugin, get_name
from metareg.registry.task_source import TaskSource
from metareg.runs.config import PLUGIN_FIELDS, RunConfig
from metareg.runs.options import Selection, assemble
from metareg.util.torch_internals import tree_map

__all__ = ["OwnFacts", "OwnModel", "OwnTask", "adopt_objects", "list_own", "select"]

log = logging.getLogger("metareg")

_TASKS_LOOKED_AT = 8
"""Number of training tasks from which shapes and loss are inferred."""


@dataclass(frozen=True)
class OwnFacts:
    """A user's description of their own tasks and module; None for facts to be inferred."""

    loss: str | Loss | None = None
    metric: str | Metric | None = None
    spec: TaskSpec | None = None
    head: str | None = None


class OwnModel:
    """A model plugin for the user's own module.

    Args:
        module: the module.
        head: the dotted name of its head; None if the module has the attributes `body` and `head`.
    """

    class Config(PluginConfig):
        """The entry in a run's configuration."""

        head: str | None = None

    def __init__(self, module: nn.Module, head: str | None) -> None:
        self.name = type(module).__name__.lower()
        self.module = module
        self.head = head
        self.stored_config = self.Config(head=head)

    @hookimpl
    def build(self) -> nn.Module:
        """Return the module itself, with its current weights."""
        return self.module


class OwnTask(Task):
    """A task plugin for the user's own tasks.

    Args:
        given: the result of `metareg.registry.own_tasks.wrap_tasks`.
        spec: the shapes of inputs and outputs.
        loss: a name or a callable.
        metric: a name or a `metareg.Metric`; None for the loss's own metric.
    """

    class Config(PluginConfig):
        """The entry in a run's configuration; a callable is represented by its name in brackets."""

        loss: str
        metric: str
        input_shape: tuple[Any, ...]
        output_shape: tuple[int, ...]

    def __init__(self, given: Any, spec: TaskSpec, loss: str | Loss, metric: str | Metric | None) -> None:
        self.name = get_name(given)
        self.stackable = getattr(given, "stackable", True)
        self.default_model = getattr(given, "default_model", None)
        self.recommended = getattr(given, "recommended", {})  # type: ignore[misc]
        self.loss, self.metric = loss, metric  # type: ignore[assignment]
        self._source, self._spec = TaskSource.of(given), spec
        self.stored_config = self.Config(
            loss=_name_loss(loss),
            metric=_name_metric(find_metric(metric, loss)),
            input_shape=spec.input_shape,
            output_shape=spec.output_shape,
        )

    @property
    def spec(self) -> TaskSpec:
        return self._spec

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> list[Episodes]:
        return self._source.episodes(split, indices, seed)


def list_own(config: RunConfig) -> dict[str, list[PluginSpec]]:
    """List the user's own objects in a run, by the fields of its configuration."""
    own = {}
    for field in PLUGIN_FIELDS:
        chosen = getattr(config, field)
        listed = chosen if isinstance(chosen, list) else [chosen] if chosen else []
        own[field] = [each for each in listed if each.program]
    return {field: chosen for field, chosen in own.items() if chosen}


def adopt_objects(
    base: Mapping[str, Any], given: Mapping[str, Any], facts: OwnFacts, seed: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Wrap a user's own objects as plugins.

    Args:
        base: a configuration by the field names of `RunConfig`; may be from an earlier run with the same objects.
        given: plugins and objects by field.
        facts: the user's description of the objects.
        seed: the run's seed.

    Returns:
        The plugins, and the facts that are options of the plugins because they describe no object.

    Raises:
        UsageError: `task` is not a source of tasks, or a fact describes no object.
    """
    plugins = {field: _add_stored_options(value, base.get(field)) for field, value in given.items()}
    stored = {field: _get_stored(base.get(field)) for field in ("task", "model")}
    model, task = plugins.get("model"), plugins.get("task")
    if isinstance(model, nn.Module):
        model = plugins["model"] = OwnModel(model, facts.head or stored["model"].get("head"))
    elif facts.head is not None:
        raise UsageError("head=… is only for a module passed as model=…; a model plugin knows its own head.")
    told = {"loss": facts.loss, "metric": facts.metric}
    if task is None or _names_plugin(task):
        if facts.spec is not None:
            raise UsageError("spec=… is only for your own tasks, passed as task=…; a task plugin knows its shapes.")
        return plugins, {name: value for name, value in told.items() if value is not None}
    source = wrap_tasks(task)
    if not (hasattr(source, "spec") and hasattr(source, "loss")) or any((*told.values(), facts.spec)):
        module = model.module if isinstance(model, OwnModel) else None
        plugins["task"] = _create_task(source, facts, stored["task"], module, seed if isinstance(seed, int) else 0)
    return plugins, {}


def select(base: Mapping[str, Any], given: Mapping[str, Any], facts: OwnFacts, options: Mapping[str, Any]) -> Selection:
    """Call `metareg.runs.options.assemble` with plugins that may include a user's own objects.

    Args:
        base: values by the field names of `RunConfig`; may include objects.
        given: the plugins that override them.
        facts: the user's description of the objects.
        options: further options by name.
    """
    own = {field: base[field] for field in PLUGIN_FIELDS if base.get(field) is not None}
    chosen, of_plugins = adopt_objects(base, own | dict(given), facts, options.get("seed", base.get("seed")))
    return assemble({**base, **chosen}, {**options, **of_plugins})


def _names_plugin(task: Any) -> bool:
    """Return whether `task` refers to a task plugin by its name or class."""
    if isinstance(task, list | tuple):
        return len(task) == 2 and isinstance(task[0], str | type) and isinstance(task[1], Mapping)
    return isinstance(task, str | type | Plugin | PluginSpec) or (isinstance(task, Mapping) and "name" in task)


def _get_stored(spec: Any) -> Mapping[str, Any]:
    """Return the stored options of a user's own object; empty for a plugin."""
    own = isinstance(spec, Mapping) and spec.get("program")
    return (spec.get("config") or {}) if own else {}


def _add_stored_options(given: Any, stored: Any) -> Any:
    """Pair a class with the options of its stored configuration; return other objects unchanged."""
    if isinstance(given, list | tuple) and isinstance(stored, list) and len(given) == len(stored):
        return [_add_stored_options(*each) for each in zip(given, stored, strict=True)]
    options = _get_stored(stored)
    if isinstance(given, type) and options and stored["name"] == get_name(given):
        return given, options
    return given


def _create_task(
    source: Any, facts: OwnFacts, stored: Mapping[str, Any], module: nn.Module | None, seed: int
) -> OwnTask:
    def choose(name: str) -> Any:
        """Return a fact about the tasks, or the one stored when the run began."""
        own = getattr(source, name, None)
        told, before = getattr(facts, name), stored.get(name)
        return told or own or (before if isinstance(before, str) and not before.startswith("(") else None)

    tasks = TaskSource.of(source)
    tasks.check_splits()
    tasks.check_repeatable(TRAIN, seed)
    stacks = tasks.episodes(TRAIN, range(_TASKS_LOOKED_AT), seed)
    loss = choose("loss") or ("mse" if stacks[0].support_y.is_floating_point() else "cross_entropy")
    spec = choose("spec")
    if spec is None and stored:
        spec = TaskSpec(tuple(stored["input_shape"]), tuple(stored["output_shape"]))
    if spec is None:
        spec = _infer_spec(stacks, module)
        log.info(
            "Inferred from the first %d tasks of '%s': inputs of shape %s, %s of shape %s, loss %s.",
            _TASKS_LOOKED_AT, get_name(source), spec.input_shape,
            "numbers" if stacks[0].support_y.is_floating_point() else "scores of classes", spec.output_shape,
            _name_loss(loss),
        )  # fmt: skip
    return OwnTask(source, spec, loss, choose("metric"))


def _name_loss(loss: str | Loss) -> str:
    return loss if isinstance(loss, str) else f"({getattr(loss, '__name__', type(loss).__name__)})"


def _name_metric(metric: Metric) -> str:
    return metric.name if METRICS.get(metric.name) is metric else f"({metric.name})"


def _infer_spec(stacks: Sequence[Episodes], module: nn.Module | None) -> TaskSpec:
    """Infer the shapes from some tasks, and from the outputs of the module if there is one."""
    first = stacks[0]
    x, y = first.support_x, first.support_y
    input_shape: tuple[Any, ...] = tuple(x.shape[2:]) if isinstance(x, Tensor) else ("a tree of tensors",)
    outputs = None if module is None else _run(module, x)
    if outputs is not None and outputs.dim() > 1:
        return TaskSpec(input_shape, tuple(outputs.shape[1:]))
    if y.is_floating_point():
        return TaskSpec(input_shape, tuple(y.shape[2:]) or (1,))
    return TaskSpec(
        input_shape, (1 + max(int(part.max()) for each in stacks for part in (each.support_y, each.query_y)),)
    )


def _run(module: nn.Module, x: Any) -> Tensor | None:
    """Return a module's outputs for a stack's first task; None if it fails, which training reports later."""
    like = next(module.parameters(), torch.zeros(0))

    def take(leaf: Tensor) -> Tensor:
        return leaf[0].to(like.device, like.dtype if leaf.is_floating_point() else None)

    with suppress(Exception), torch.no_grad():
        outputs = copy.deepcopy(module).eval()(tree_map(take, x))
        return outputs if isinstance(outputs, Tensor) else None
    return None
