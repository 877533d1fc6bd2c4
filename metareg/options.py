"""From what a user says (names, flags, ``KEY=VALUE``, a file) to the complete configuration of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from metareg.config import Choice, PluginConfig, RunConfig, parse_yaml, validated
from metareg.errors import UnknownNameError, UsageError
from metareg.registry import Plugin, config_of, find, resolve

__all__ = ["Selection", "assemble", "parse_assignments"]

_CHOICES = ("algo", "augment", "task", "model", "observers")
_KIND_OF = {
    "algo": "algorithms", "augment": "augmenters", "task": "tasks", "model": "models", "observers": "observers",
}  # fmt: skip


@dataclass
class _Selected:
    """One plugin of the run, before its configuration is complete."""

    field: str
    plugin: str | type | object
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        if isinstance(self.plugin, str):
            return self.plugin.rpartition(":")[2]
        cls = self.plugin if isinstance(self.plugin, type) else type(self.plugin)
        return str(getattr(self.plugin, "name", cls.__name__.lower()))

    @property
    def options(self) -> Mapping[str, Any]:
        """The fields of its `Config`."""
        return config_of(self.loaded).model_fields

    @cached_property  # an installed plugin is looked for in the metadata of every distribution
    def loaded(self) -> type | object:
        """Its class, or the object that was given."""
        return find(_KIND_OF[self.field], self.plugin).load() if isinstance(self.plugin, str) else self.plugin

    @classmethod
    def of(cls, field_name: str, value: Any) -> _Selected:
        """From a name, a class, an object, a pair ``(name or class, config)`` or a mapping with name and config."""
        if isinstance(value, tuple | list):
            if len(value) != 2 or not isinstance(value[1], Mapping):
                raise UsageError(f"'{field_name}' takes a name, a class or a pair (name, config); got {value!r}.")
            return cls(field_name, value[0], dict(value[1]))
        if isinstance(value, Mapping | Choice):
            choice = value if isinstance(value, Choice) else validated(Choice, value, f"'{field_name}'")
            return cls(field_name, choice.name, dict(choice.config))
        if value is None or isinstance(value, bool | int | float):
            raise UsageError(f"'{field_name}' takes the name of a plugin; got {value!r}.")
        return cls(field_name, value)


@dataclass(frozen=True)
class Selection:
    """A complete configuration and the plugins that it names, loaded."""

    config: RunConfig
    algorithm: Plugin
    augmenters: list[Plugin]
    task: Plugin
    model: Plugin
    observers: list[Plugin]


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``["inner_lr=0.1", "cml.gamma=0.5"]`` as a dict; values are read as YAML.

    Raises:
        UsageError: one has no ``=``, or its value is no YAML.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set takes KEY=VALUE; got '{assignment}'.")
        try:
            values[key.strip()] = _number(parse_yaml(text))
        except ValueError as error:
            raise UsageError(f"--set {assignment}: the value is no valid YAML{error}.") from error
    return values


def assemble(base: Mapping[str, Any], options: Mapping[str, Any]) -> Selection:
    """Complete a run's configuration and load its plugins.

    What the user says in `options` stands before `base`, that before what the task recommends, that before the defaults.

    Args:
        base: values by the field names of `RunConfig`, as in a configuration file; plugins may be given as names,
            classes, objects, or with their configuration.
        options: further options by name: fields of `RunConfig`, options of one of the plugins, or ``NAME.OPTION`` with a
            plugin's name or ``algo``, ``task`` or ``model``.

    Raises:
        UsageError: an unknown name or option, or an impossible value.
    """
    unknown = [key for key in base if key not in RunConfig.model_fields]
    if unknown:
        raise UnknownNameError("run option", unknown[0], RunConfig.model_fields)
    base = {**base, **{key: value for key, value in options.items() if key in _CHOICES}}
    values = {key: value for key, value in base.items() if key not in _CHOICES}
    chosen = {
        "algo": [_Selected.of("algo", base.get("algo", "maml"))],
        "augment": [_Selected.of("augment", each) for each in _listed(base.get("augment"))],
        "task": [_Selected.of("task", base.get("task", "sinusoid"))],
        "model": [_Selected.of("model", base["model"])] if base.get("model") else [],
        "observers": [_Selected.of("observers", each) for each in _listed(base.get("observers"))],
    }
    everything = [each for field_name in _CHOICES for each in chosen[field_name]]
    # A task names its model, and its own options can decide which: they are set before the others are looked at.
    waiting = {key: value for key, value in options.items() if key not in _CHOICES}
    for key in list(waiting):
        owner, _, option = key.partition(".")
        if owner in ("task", chosen["task"][0].name) and option:
            chosen["task"][0].config[option] = waiting.pop(key)
        elif key not in RunConfig.model_fields and _owners(key, everything) == chosen["task"]:
            chosen["task"][0].config[key] = waiting.pop(key)
    task = resolve("tasks", chosen["task"][0].plugin, chosen["task"][0].config)
    if not chosen["model"]:
        # An algorithm that needs models of its own kind names one, and that stands before the task's.
        default = getattr(chosen["algo"][0].loaded, "default_model", None) or getattr(
            task.instance, "default_model", None
        )
        if default is None:
            raise UsageError(f"The {task.label} names no model of its own; choose one with --model.")
        chosen["model"] = [_Selected("model", default)]
        everything += chosen["model"]
    for key, value in waiting.items():
        _route(key, value, values, everything)
    for key, value in getattr(task.instance, "recommended", {}).items():
        if key in RunConfig.model_fields:
            values.setdefault(key, value)
        for each in _owners(key, everything):
            if each.field != "task":
                each.config.setdefault(key, value)

    algorithm = resolve("algorithms", chosen["algo"][0].plugin, chosen["algo"][0].config)
    augmenters = [resolve("augmenters", each.plugin, each.config) for each in chosen["augment"]]
    model = resolve("models", chosen["model"][0].plugin, chosen["model"][0].config)
    # A model says in turn what the task is to prepare for it.
    selected_task, wishes = chosen["task"][0], getattr(model.instance, "recommended", {})
    unset = {key: wishes[key] for key in wishes if key in selected_task.options and key not in selected_task.config}
    if unset:
        selected_task.config |= unset
        task = resolve("tasks", selected_task.plugin, selected_task.config)
    observers = [resolve("observers", each.plugin, each.config) for each in chosen["observers"]]
    values |= {
        "algo": _choice(chosen["algo"][0], algorithm),
        "augment": [_choice(*pair) for pair in zip(chosen["augment"], augmenters, strict=True)],
        "task": _choice(chosen["task"][0], task),
        "model": _choice(chosen["model"][0], model),
        "observers": [_choice(*pair) for pair in zip(chosen["observers"], observers, strict=True)],
    }
    config = validated(RunConfig, values, "the run's options")
    return Selection(config, algorithm, augmenters, task, model, observers)


def _route(key: str, value: Any, values: dict[str, Any], everything: Sequence[_Selected]) -> None:
    """Put one option where it belongs."""
    owner, dot, option = key.partition(".")
    if dot:
        named = [each for each in everything if owner in (each.name, each.field)]
        if not named:
            raise UnknownNameError("plugin of this run", owner, {each.name for each in everything})
        for each in named:
            each.config[option] = value
        return
    if key in RunConfig.model_fields:
        values[key] = value
        return
    owners = _owners(key, everything)
    if len(owners) > 1:
        choices = " or ".join(f"'{each.name}.{key}'" for each in owners)
        raise UsageError(f"'{key}' is an option of several plugins of this run; write {choices}.")
    if not owners:
        known = {*RunConfig.model_fields, *(option for each in everything for option in each.options)} - {*_CHOICES}
        raise UnknownNameError("option of this run", key, known)
    owners[0].config[key] = value


def _owners(key: str, everything: Sequence[_Selected]) -> list[_Selected]:
    return [each for each in everything if key in each.options]


def _choice(selected: _Selected, plugin: Plugin) -> Choice:
    name = selected.plugin if isinstance(selected.plugin, str) else plugin.name
    config = plugin.config.model_dump(mode="json") if isinstance(plugin.config, PluginConfig) else {}
    return Choice(name=name, config=config)


def _listed(value: Any) -> list[Any]:
    """A list of plugins from a list, a text with commas, or nothing; ``none`` means none."""
    if value is None:
        return []
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple):
        raise UsageError(f"A list of plugins was expected, not {value!r}.")
    parts: list[Any] = []
    for each in value:
        parts += [part.strip() for part in each.split(",")] if isinstance(each, str) else [each]
    return [part for part in parts if not (isinstance(part, str) and part in ("", "none"))]


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as a text; a user means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
