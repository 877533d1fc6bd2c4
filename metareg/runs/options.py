"""Assembly of a run's complete configuration from names, flags, ``KEY=VALUE`` and files."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from metareg.contract.config import (
    PluginConfig,
    PluginSpec,
    drop_paths,
    split_names,
    unknown_option_error,
    update_names,
    validate,
)
from metareg.errors import MetaregError, PluginError, UnknownNameError, UsageError, nearest
from metareg.registry.plugins import Plugin, find_entry, get_config_class, get_name, list_names, resolve
from metareg.runs.config import PLUGIN_FIELDS, RunConfig
from metareg.util.yaml_files import parse_yaml

__all__ = ["Selection", "assemble", "describe_task", "parse_assignments", "update_option_names"]


@dataclass(frozen=True)
class Selection:
    """A complete configuration with the loaded plugins that it names."""

    config: RunConfig
    algorithm: Plugin
    augmenters: list[Plugin]
    task: Plugin
    model: Plugin
    observers: list[Plugin]


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse ``["inner_lr=0.1", "cml.gamma=0.5"]`` into a dict; values are YAML."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set takes KEY=VALUE; got '{assignment}'.")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise UsageError(f"--set {assignment}: the value is not valid YAML{error}.") from error
        if isinstance(value, str):  # YAML 1.1 reads ``1e-3`` as a string
            with suppress(ValueError):
                value = float(value)
        key = key.strip()
        if key in values:
            raise UsageError(f"--set sets '{key}' twice; set it once.")
        values[key] = value
    return values


def assemble(base: Mapping[str, Any], options: Mapping[str, Any]) -> Selection:
    """Complete a run's configuration and load its plugins.

    An option's value is taken from the first of these layers that sets it: the user's `options`; `base`; the task's
    recommendation for this algorithm; the algorithm's; the task's general one; the model's; the default.

    Args:
        base: values by the field names of `RunConfig`, as in a configuration file; plugins may be given as names,
            classes, objects, or with their configuration.
        options: further options by name: fields of `RunConfig`, options of one of the plugins, or ``NAME.OPTION`` with a
            plugin's name or ``algo``, ``augment``, ``task``, ``model`` or ``observers``.

    Raises:
        UsageError: an unknown name or option, one that several plugins have, or an impossible value.
        PluginError: a plugin recommends an option that does not exist, or that several plugins have.
    """
    from metareg.util.seeding import seed_global_generators  # imports torch, which reports do not need

    with seed_global_generators({**base, **options}.get("seed", RunConfig.model_fields["seed"].default), "plugins"):
        return _assemble(base, options)


def _assemble(base: Mapping[str, Any], options: Mapping[str, Any]) -> Selection:
    unknown = [key for key in base if key not in RunConfig.model_fields]
    if unknown:
        present = _list_present_names(unknown[0], [])
        raise unknown_option_error("run option", unknown[0], RunConfig.model_fields, present)
    user = {key: value for key, value in options.items() if key not in PLUGIN_FIELDS}
    draft = _Draft({**base, **{key: value for key, value in options.items() if key in PLUGIN_FIELDS}})
    _choose_model(draft, user)
    draft.layers.insert(0, draft.read_layer(user))
    _add_recommendations(draft)
    built = {name: [draft.build(each) for each in chosen] for name, chosen in draft.chosen.items()}
    (algorithm,), (task,), (model,) = built["algo"], built["task"], built["model"]
    specs = {name: [each.to_spec() for each in chosen] for name, chosen in draft.chosen.items()}
    values = draft.get_config(None) | specs | {name: specs[name][0] for name in ("algo", "task", "model")}
    config = validate(RunConfig, values, "the run's options")
    return Selection(config, algorithm, built["augment"], task, model, built["observers"])


def _choose_model(draft: _Draft, user: Mapping[str, Any]) -> None:
    """Add the default model of the algorithm or the task if the user chose none."""
    if draft.chosen["model"]:
        return
    (algorithm,), (own_task,) = draft.chosen["algo"], draft.chosen["task"]
    # The task's options can decide its default model, so the user's options for the task are read first.
    early = {key: value for key, value in user.items() if draft.find_plugins(key) == [own_task]}
    draft.layers.insert(0, draft.read_layer(early))
    task = draft.build(own_task)
    del draft.layers[0]
    # An algorithm that needs a special kind of model names one, which overrides the task's.
    default = getattr(algorithm.loaded, "default_model", None) or getattr(task.instance, "default_model", None)
    if default is None:
        raise UsageError(f"The {task.label} has no default model; choose one with --model.")
    draft.chosen["model"] = [_Selected("model", default)]


def update_option_names(stored: RunConfig) -> RunConfig:
    """Rename options in a stored configuration to their current names; skip plugins that are not installed."""

    def rename(field: str, choice: PluginSpec) -> PluginSpec:
        try:
            cls = get_config_class(_Selected.of(field, choice).loaded)
        except MetaregError:
            return choice
        return choice.model_copy(update={"config": update_names(cls, choice.config)})

    update: dict[str, Any] = {}
    for field in PLUGIN_FIELDS:
        given = getattr(stored, field)
        listed = isinstance(given, list)
        update[field] = [rename(field, each) for each in given] if listed else given and rename(field, given)
    return stored.model_copy(update=update)


def describe_task(task: Plugin) -> PluginSpec | None:
    """Describe the task for a learner's file; None if it is not an installed plugin."""
    if task.distribution is None:
        return None
    config = getattr(task.instance, "stored_config", task.config)
    return PluginSpec(name=task.name, config=drop_paths(config) if isinstance(config, PluginConfig) else {})


@dataclass(eq=False)  # equal plugins are still distinct
class _Selected:
    """A plugin of the run whose configuration is not complete yet."""

    field: str
    plugin: str | type | object
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The options given with the plugin itself."""
    _built: tuple[dict[str, Any], Plugin] | None = None

    @classmethod
    def of(cls, field: str, value: Any) -> _Selected:
        """Create it from a name, a class, an object, a pair ``(name or class, config)``, or a mapping with both."""
        if isinstance(value, tuple | list):
            if len(value) != 2 or not isinstance(value[1], Mapping):
                raise UsageError(f"'{field}' takes a name, a class or a pair (name, config); got {value!r}.")
            return cls(field, *value)
        if isinstance(value, Mapping):
            value = validate(PluginSpec, value, f"'{field}'")
        if isinstance(value, PluginSpec):
            if value.program:
                raise UsageError(
                    f"The {PLUGIN_FIELDS[field].removesuffix('s')} '{value.name}' is not a plugin but an object from a "
                    f"program: in Python, pass it to metareg.train as {field}=…"
                )
            return cls(field, value.name, value.config)
        if value is None or isinstance(value, bool | int | float):
            raise UsageError(f"'{field}' takes the name of a plugin; got {value!r}.")
        return cls(field, value)

    @property
    def name(self) -> str:
        return get_name(self.plugin)

    @property
    def label(self) -> str:
        """The name in messages: ``augmenter 'cml'``."""
        return f"{PLUGIN_FIELDS[self.field].removesuffix('s')} '{self.name}'"

    @property
    def options(self) -> Mapping[str, Any]:
        """The fields of its `Config`."""
        return get_config_class(self.loaded).model_fields

    @cached_property  # finding a plugin reads the metadata of all distributions
    def loaded(self) -> type | object:
        """The plugin's class, or the given object."""
        if isinstance(self.plugin, str):
            return find_entry(PLUGIN_FIELDS[self.field], self.plugin).load()
        return self.plugin

    def build(self, config: dict[str, Any]) -> Plugin:
        if self._built is None or self._built[0] != config:
            self._built = config, resolve(PLUGIN_FIELDS[self.field], self.plugin, config)
        return self._built[1]

    def to_spec(self) -> PluginSpec:
        """Return the entry for a run's configuration; the plugin must be built."""
        assert self._built is not None
        plugin = self._built[1]
        name = self.plugin if isinstance(self.plugin, str) else plugin.name
        config = getattr(plugin.instance, "stored_config", plugin.config)
        return PluginSpec(
            name=name,
            config=config.model_dump(mode="json") if isinstance(config, PluginConfig) else {},
            program=not isinstance(self.plugin, str) and not self._is_installed(),
        )

    def _is_installed(self) -> bool:
        """Return whether the given class, or the object's class, is installed under its name."""
        cls = self.plugin if isinstance(self.plugin, type) else type(self.plugin)
        with suppress(MetaregError):
            return find_entry(PLUGIN_FIELDS[self.field], self.name).load() is cls
        return False


_Layer = dict[tuple[_Selected | None, str], Any]
"""Values by owner and option name; None as the owner is the run itself."""


class _Draft:
    """A run whose options are not complete yet, created from values by the field names of `RunConfig`."""

    def __init__(self, base: Mapping[str, Any]) -> None:
        given = {name: base.get(name, RunConfig.model_fields[name].default) for name in PLUGIN_FIELDS}
        listed = {
            "algo": [given["algo"]],
            "augment": split_names(given["augment"]),
            "task": [given["task"]],
            "model": [given["model"]] if given["model"] else [],
            "observers": split_names(given["observers"]),
        }
        self.chosen = {name: [_Selected.of(name, each) for each in values] for name, values in listed.items()}
        """The plugins by field; no model until the task has named one."""
        of_run: _Layer = {(None, key): value for key, value in base.items() if key not in PLUGIN_FIELDS}
        of_plugins = {(each, key): value for each in self.plugins for key, value in each.config.items()}
        self.layers: list[_Layer] = [of_run | of_plugins]
        """Values of options; the first layer that sets an option counts."""

    @property
    def plugins(self) -> list[_Selected]:
        return [each for chosen in self.chosen.values() for each in chosen]

    def get_config(self, owner: _Selected | None) -> dict[str, Any]:
        """Return one owner's options from all layers."""
        return {option: value for (each, option), value in ChainMap(*self.layers).items() if each is owner}

    def build(self, selected: _Selected) -> Plugin:
        """Build a plugin with its options from the current layers."""
        return selected.build(self.get_config(selected))

    def read_layer(self, values: Mapping[str, Any]) -> _Layer:
        """Convert values by option, or by ``NAME.OPTION``, to a layer."""
        return {(self.find_owner(key), key.rpartition(".")[2]): value for key, value in values.items()}

    def find_owner(self, key: str) -> _Selected | None:
        """Return the only plugin that has the option `key`; None if it is an option of the run."""
        if key in RunConfig.model_fields:
            return None
        plugins = self.find_plugins(key)
        name, dot, option = key.rpartition(".")
        if not plugins and dot:
            raise UnknownNameError("plugin of this run", name, {each.name for each in self.plugins})
        if not plugins:
            known = {*RunConfig.model_fields, *(each for plugin in self.plugins for each in plugin.options)}
            present = _list_present_names(key, self.plugins)
            raise unknown_option_error("option of this run", key, known - PLUGIN_FIELDS.keys(), present)
        if option not in plugins[0].options:
            labels = " or ".join(each.label for each in plugins)
            known = {each for plugin in plugins for each in plugin.options}
            present = _list_present_names(key, plugins)[-1:]
            raise unknown_option_error(f"option of {labels}", option, known, present)
        if len(plugins) > 1:
            by_name = len({each.name for each in plugins}) == len(plugins)
            choices = " or ".join(f"'{each.name if by_name else each.field}.{option}'" for each in plugins)
            raise UsageError(f"'{key}' is an option of several plugins of this run; write {choices}.")
        return plugins[0]

    def find_plugins(self, key: str) -> list[_Selected]:
        """Return all plugins that `key` can refer to, including plugins that it names but that lack the option."""
        if key in RunConfig.model_fields:
            return []
        owner, dot, option = key.rpartition(".")
        named = [each for each in self.plugins if not dot or owner in (each.name, each.field)]
        return [each for each in named if option in each.options] or (named if dot else [])


def _list_present_names(key: str, plugins: Sequence[_Selected]) -> list[str]:
    """List the current names of options of the run and of `plugins` that were once named `key`."""
    option = key.rpartition(".")[2]
    of_run = [RunConfig.former_names[option]] if option in RunConfig.former_names else []
    former = [(each.name, get_config_class(each.loaded).former_names) for each in plugins]
    return of_run + [f"{name}.{names[option]}" for name, names in former if option in names]


def _add_recommendations(draft: _Draft) -> None:
    """Append the plugins' recommendations to the layers, in the order that `assemble` describes."""
    (algorithm,), (task,), (model,) = draft.chosen["algo"], draft.chosen["task"], draft.chosen["model"]
    for_algorithm, in_general = _split_by_algorithm(draft)
    draft.layers += [
        _read_recommendations(draft, task, for_algorithm),
        _read_recommendations(draft, algorithm, _get_recommended(algorithm, algorithm.loaded)),
        _read_recommendations(draft, task, in_general),
    ]
    # The model's recommendations can depend on its options, so it is built with the layers so far.
    recommended = _get_recommended(model, draft.build(model).instance)
    draft.layers.append(_read_recommendations(draft, model, recommended))


def _get_recommended(selected: _Selected, plugin: Any) -> Mapping[str, Any]:
    recommended = getattr(plugin, "recommended", {})
    if not isinstance(recommended, Mapping):
        raise PluginError(
            f"'recommended' of the {selected.label} is a {type(recommended).__name__}; it must be a mapping of options."
        )
    return recommended


def _split_by_algorithm(draft: _Draft) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the task's recommendations for the run's algorithm, and its general ones."""
    (algorithm,), (task,) = draft.chosen["algo"], draft.chosen["task"]
    recommended = _get_recommended(task, draft.build(task).instance)
    for_algorithms = {
        key: value
        for key, value in recommended.items()
        if isinstance(value, Mapping) and key not in RunConfig.model_fields and not draft.find_plugins(key)
    }
    for name in sorted(for_algorithms.keys() - {algorithm.name}):
        known = list_names("algorithms")
        if _is_misspelt(name, known):
            raise _create_error(task, UnknownNameError("algorithm", name, known))
    general = {key: value for key, value in recommended.items() if key not in for_algorithms}
    return for_algorithms.get(algorithm.name, {}), general


def _read_recommendations(draft: _Draft, source: _Selected, recommended: Mapping[str, Any]) -> _Layer:
    """Convert a plugin's recommendations for this run to a layer."""
    layer: _Layer = {}
    for key, value in recommended.items():
        if _is_for_others(draft, key):
            continue
        try:
            owner = draft.find_owner(key)
        except UsageError as error:
            raise _create_error(source, error) from error
        if key in PLUGIN_FIELDS:
            problem = f"'{key}' is chosen by the user and is not an option; its own options are '{key}.OPTION'."
            raise _create_error(source, UsageError(problem))
        if owner is None or isinstance(owner.plugin, str | type):  # an object's options are fixed
            layer[owner, key.rpartition(".")[2]] = value
    return layer


def _is_for_others(draft: _Draft, key: str) -> bool:
    """Return whether a recommendation is for other runs: its owner is not in this run or has no such option."""
    owner, dot, option = key.rpartition(".")
    if not dot:
        return False
    plugins = draft.find_plugins(key)
    if plugins:
        return option not in plugins[0].options
    return not _is_misspelt(owner, {*PLUGIN_FIELDS, *list_names(), *(each.name for each in draft.plugins)})


def _is_misspelt(name: str, known: Collection[str]) -> bool:
    """Return whether a name is unknown but similar to known ones; others can belong to plugins not installed here."""
    return name not in known and bool(nearest(name, known))


def _create_error(source: _Selected, error: UsageError) -> PluginError:
    sentence = str(error)
    return PluginError(f"The recommendation of the {source.label} cannot be used: {sentence[0].lower()}{sentence[1:]}")
