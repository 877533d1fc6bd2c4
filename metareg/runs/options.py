"""From what a user says (names, flags, ``KEY=VALUE``, a file) to the complete configuration of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from metareg.contract.config import PluginConfig, PluginSpec, unknown_option_error, update_names, validate
from metareg.errors import MetaregError, PluginError, UnknownNameError, UsageError, nearest
from metareg.registry.plugins import Plugin, find_entry, get_config_class, list_names, resolve
from metareg.runs.config import RunConfig
from metareg.util.yaml_files import parse_yaml

__all__ = ["Selection", "assemble", "parse_assignments", "update_option_names"]

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
    def label(self) -> str:
        """How messages name it: ``augmenter 'cml'``."""
        return f"{_KIND_OF[self.field].removesuffix('s')} '{self.name}'"

    @property
    def configurable(self) -> bool:
        """Whether it is still to be built: an object has its options already."""
        return isinstance(self.plugin, str | type)

    @property
    def options(self) -> Mapping[str, Any]:
        """The fields of its `Config`."""
        return get_config_class(self.loaded).model_fields

    @property
    def former_names(self) -> Mapping[str, str]:
        """Names that its options once had, and those they have today."""
        return get_config_class(self.loaded).former_names

    @cached_property  # an installed plugin is looked for in the metadata of every distribution
    def loaded(self) -> type | object:
        """Its class, or the object that was given."""
        return find_entry(_KIND_OF[self.field], self.plugin).load() if isinstance(self.plugin, str) else self.plugin

    @classmethod
    def of(cls, field_name: str, value: Any) -> _Selected:
        """From a name, a class, an object, a pair ``(name or class, config)`` or a mapping with name and config."""
        if isinstance(value, tuple | list):
            if len(value) != 2 or not isinstance(value[1], Mapping):
                raise UsageError(f"'{field_name}' takes a name, a class or a pair (name, config); got {value!r}.")
            return cls(field_name, value[0], dict(value[1]))
        if isinstance(value, Mapping | PluginSpec):
            choice = value if isinstance(value, PluginSpec) else validate(PluginSpec, value, f"'{field_name}'")
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

    What the user says in `options` stands before `base`. Then comes what the plugins recommend: the task for this
    algorithm, the algorithm, the task in general, the model. The defaults come last.

    Args:
        base: values by the field names of `RunConfig`, as in a configuration file; plugins may be given as names,
            classes, objects, or with their configuration.
        options: further options by name: fields of `RunConfig`, options of one of the plugins, or ``NAME.OPTION`` with a
            plugin's name or ``algo``, ``augment``, ``task``, ``model`` or ``observers``.

    Raises:
        UsageError: an unknown name or option, one that several plugins have, or an impossible value.
        PluginError: a plugin recommends an option that there is not, or that several plugins have.
    """
    unknown = [key for key in base if key not in RunConfig.model_fields]
    if unknown:
        present = _present_names(unknown[0], [])
        raise unknown_option_error("run option", unknown[0], RunConfig.model_fields, present)
    base = {**base, **{key: value for key, value in options.items() if key in _CHOICES}}
    given = {key: value for key, value in options.items() if key not in _CHOICES}
    values = {key: value for key, value in base.items() if key not in _CHOICES}
    chosen = {
        "algo": [_Selected.of("algo", base.get("algo", "maml"))],
        "augment": [_Selected.of("augment", each) for each in _listed(base.get("augment"))],
        "task": [_Selected.of("task", base.get("task", "sinusoid"))],
        "model": [_Selected.of("model", base["model"])] if base.get("model") else [],
        "observers": [_Selected.of("observers", each) for each in _listed(base.get("observers"))],
    }
    everything = [each for field_name in _CHOICES for each in chosen[field_name]]
    (own_algorithm,), (own_task,) = chosen["algo"], chosen["task"]
    # A task names its model, and its own options can decide which: they are set before it is known whose the others are.
    for key, value in given.items():
        if key not in RunConfig.model_fields and _meant(key, everything) == [own_task]:
            own_task.config[_option(key)] = value
    task = resolve("tasks", own_task.plugin, own_task.config)
    if not chosen["model"]:
        # An algorithm that needs models of its own kind names one, and that stands before the task's.
        default = getattr(own_algorithm.loaded, "default_model", None) or getattr(task.instance, "default_model", None)
        if default is None:
            raise UsageError(f"The {task.label} names no model of its own; choose one with --model.")
        chosen["model"] = [_Selected("model", default)]
        everything += chosen["model"]
    (own_model,) = chosen["model"]
    for key, value in given.items():
        owner = _owner(key, everything)
        (values if owner is None else owner.config)[_option(key)] = value

    settled = dict(own_task.config)
    for_algorithm, in_general = _parted(own_task, _wishes(own_task, task.instance), own_algorithm, everything)
    _recommend(own_task, for_algorithm, values, everything)
    _recommend(own_algorithm, _wishes(own_algorithm, own_algorithm.loaded), values, everything)
    _recommend(own_task, in_general, values, everything)
    model = resolve("models", own_model.plugin, own_model.config)
    _recommend(own_model, _wishes(own_model, model.instance), values, everything)
    if own_task.config != settled:
        task = resolve("tasks", own_task.plugin, own_task.config)

    algorithm = resolve("algorithms", own_algorithm.plugin, own_algorithm.config)
    augmenters = [resolve("augmenters", each.plugin, each.config) for each in chosen["augment"]]
    observers = [resolve("observers", each.plugin, each.config) for each in chosen["observers"]]
    values |= {
        "algo": _choice(own_algorithm, algorithm),
        "augment": [_choice(*pair) for pair in zip(chosen["augment"], augmenters, strict=True)],
        "task": _choice(own_task, task),
        "model": _choice(own_model, model),
        "observers": [_choice(*pair) for pair in zip(chosen["observers"], observers, strict=True)],
    }
    config = validate(RunConfig, values, "the run's options")
    return Selection(config, algorithm, augmenters, task, model, observers)


def update_option_names(stored: RunConfig) -> RunConfig:
    """A stored configuration whose plugins' options have the names of today; that of a plugin that is missing as it is."""

    def renamed(field: str, choice: PluginSpec) -> PluginSpec:
        try:
            cls = get_config_class(_Selected.of(field, choice).loaded)
        except MetaregError:
            return choice
        return PluginSpec(name=choice.name, config=update_names(cls, choice.config))

    choices = {field: getattr(stored, field) for field in _CHOICES}
    update = {
        field: [renamed(field, each) for each in given] if isinstance(given, list) else given and renamed(field, given)
        for field, given in choices.items()
    }
    return stored.model_copy(update=update)


# --------------------------------------------------------------------------------------------------- whose option it is


def _option(key: str) -> str:
    """An option's name without its owner's."""
    return key.rpartition(".")[2]


def _meant(key: str, everything: Sequence[_Selected]) -> list[_Selected]:
    """The plugins that have the option; where a key names its owner and that has no such option, the owner."""
    owner, dot, _ = key.rpartition(".")
    named = [each for each in everything if not dot or owner in (each.name, each.field)]
    return [each for each in named if _option(key) in each.options] or (named if dot else [])


def _owner(key: str, everything: Sequence[_Selected]) -> _Selected | None:
    """The one plugin whose option a key is; None where it is one of the run.

    Raises:
        UsageError: nothing has such an option, or several plugins.
    """
    if key in RunConfig.model_fields:
        return None
    owner, dot, option = key.rpartition(".")
    meant = _meant(key, everything)
    if not meant and dot:
        raise UnknownNameError("plugin of this run", owner, {each.name for each in everything})
    if not meant:
        known = {*RunConfig.model_fields, *(name for each in everything for name in each.options)} - {*_CHOICES}
        raise unknown_option_error("option of this run", key, known, _present_names(key, everything))
    if option not in meant[0].options:
        labels = " or ".join(each.label for each in meant)
        known = {name for each in meant for name in each.options}
        raise unknown_option_error(f"option of {labels}", option, known, _present_names(key, meant)[-1:])
    if len(meant) > 1:
        by_name = len({each.name for each in meant}) == len(meant)
        choices = " or ".join(f"'{each.name if by_name else each.field}.{option}'" for each in meant)
        raise UsageError(f"'{key}' is an option of several plugins of this run; write {choices}.")
    return meant[0]


def _present_names(key: str, plugins: Sequence[_Selected]) -> list[str]:
    """The names that options of the run and of some plugins have today which once had that of a key."""
    option = _option(key)
    of_run = [RunConfig.former_names[option]] if option in RunConfig.former_names else []
    return of_run + [f"{each.name}.{each.former_names[option]}" for each in plugins if option in each.former_names]


# ------------------------------------------------------------------------------------------------ what plugins recommend


def _wishes(selected: _Selected, plugin: Any) -> Mapping[str, Any]:
    """What a plugin recommends.

    Raises:
        PluginError: it is no mapping.
    """
    wishes = getattr(plugin, "recommended", {})
    if not isinstance(wishes, Mapping):
        raise PluginError(
            f"'recommended' of the {selected.label} is a {type(wishes).__name__}; it must be a mapping of options."
        )
    return wishes


def _parted(
    task: _Selected, wishes: Mapping[str, Any], algorithm: _Selected, everything: Sequence[_Selected]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What a task recommends for this algorithm, and for every one.

    Raises:
        PluginError: it misspells an algorithm's name.
    """
    for_algorithms = {
        key: value
        for key, value in wishes.items()
        if isinstance(value, Mapping) and key not in RunConfig.model_fields and not _meant(key, everything)
    }
    for name in sorted(for_algorithms.keys() - {algorithm.name}):
        known = list_names("algorithms")
        if _is_misspelt(name, known):
            raise _fault(task, UnknownNameError("algorithm", name, known))
    general = {key: value for key, value in wishes.items() if key not in for_algorithms}
    return for_algorithms.get(algorithm.name, {}), general


def _recommend(
    source: _Selected, wishes: Mapping[str, Any], values: dict[str, Any], everything: Sequence[_Selected]
) -> None:
    """Set what a plugin recommends where nothing stands before it.

    Raises:
        PluginError: it is no option, or one of several plugins.
    """
    for key, value in reversed([*wishes.items()]):  # of two names of one option, the last one counts
        if _is_for_others(key, everything):
            continue
        try:
            owner = _owner(key, everything)
        except UsageError as error:
            raise _fault(source, error) from error
        if key in _CHOICES:
            raise _fault(
                source, UsageError(f"'{key}' is no option but a choice of the user; an option of it is '{key}.OPTION'.")
            )
        if owner is None:
            values.setdefault(key, value)
        elif owner.configurable:
            owner.config.setdefault(_option(key), value)


def _is_for_others(key: str, everything: Sequence[_Selected]) -> bool:
    """Whether a recommendation is for runs with other plugins: its owner is not in this one, or has no such option."""
    owner, dot, option = key.rpartition(".")
    if not dot:
        return False
    meant = _meant(key, everything)
    if meant:
        return option not in meant[0].options
    return not _is_misspelt(owner, {*_KIND_OF, *list_names(), *(each.name for each in everything)})


def _is_misspelt(name: str, known: Collection[str]) -> bool:
    """Whether a name is close to known ones and none of them; one far from all is that of a plugin not installed here."""
    return name not in known and bool(nearest(name, known))


def _fault(source: _Selected, error: UsageError) -> PluginError:
    sentence = str(error)
    return PluginError(f"What the {source.label} recommends cannot be used: {sentence[0].lower()}{sentence[1:]}")


def _choice(selected: _Selected, plugin: Plugin) -> PluginSpec:
    name = selected.plugin if isinstance(selected.plugin, str) else plugin.name
    config = plugin.config.model_dump(mode="json") if isinstance(plugin.config, PluginConfig) else {}
    return PluginSpec(name=name, config=config)


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
