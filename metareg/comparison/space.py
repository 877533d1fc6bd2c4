"""The search space of an arm's settings, from the user and from its plugins' declarations.

Options have the same names as in ``metareg train --set``. An option applies to an arm only if the run, or the arm's
algorithm, augmenters or model have it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from metareg.comparison.config import GRID, Tuning
from metareg.contract.search import (
    Domain,
    Range,
    RelativeRange,
    check_distinct,
    check_domain,
    format_domain,
    get_declared_domain,
)
from metareg.errors import UnknownNameError, UsageError
from metareg.registry.plugins import Plugin, get_config_class
from metareg.runs.config import RunConfig
from metareg.runs.options import Selection, parse_assignments
from metareg.util.yaml_files import parse_yaml

__all__ = ["Dimension", "check_tuning", "list_dimensions", "split_assignments"]

_LARGEST_GRID = 1000

_OF_A_RUN = (
    "steps", "meta_batch", "inner_steps", "first_order", "outer_lr", "outer_optimizer",
    "outer_weight_decay", "outer_momentum", "lr_schedule", "lr_warmup_steps", "reset_optimizer_every", "select",
)  # fmt: skip
"""Options of the run that can be tuned, because they define how it learns."""


def split_assignments(assignments: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Split ``["steps=300", "inner_lr=0.01,0.1"]`` into options with one value and options with several.

    Several values are a YAML list without brackets. A list in brackets is one value, as in ``metareg train``:
    ``hidden=[40,40]`` is a list, and ``hidden=[40,40],[80]`` are two.

    Raises:
        UsageError: an assignment is malformed, or an option is given twice.
    """
    fixed: dict[str, Any] = {}
    swept: dict[str, list[Any]] = {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        key = key.strip()
        if key in fixed or key in swept:
            raise UsageError(f"--set {key} is given twice; to choose among values, write {key}=VALUE,VALUE.")
        values = None
        with suppress(ValueError):
            values = parse_yaml(f"[{text}]")
        if key and isinstance(values, list) and len(values) > 1:
            swept[key] = check_distinct(key, values)
        else:
            fixed |= parse_assignments([assignment])
    return fixed, swept


@dataclass(frozen=True)
class Dimension:
    """One option of an arm and its search space."""

    key: str
    """The name, as in ``--set``."""
    domain: Range | list[Any]
    default: Any
    """The value without tuning: the comparison's, the task's or the plugin's."""

    @property
    def whole(self) -> bool:
        """Whether the space is a range of whole numbers."""
        return isinstance(self.domain, Range) and isinstance(self.domain.low, int)

    def __str__(self) -> str:
        return f"{self.key}: {format_domain(self.domain)}"


@dataclass(frozen=True)
class _Option:
    """An option and its owner."""

    owner: str
    """The plugin's label; empty for the run itself."""
    field: FieldInfo
    name: str
    default: Any

    def choose_domain(self, key: str, given: Domain | None = None) -> Range | list[Any] | None:
        """Return the user's search space, or the one that the plugin declares, or None.

        Raises:
            UsageError: the option named `key` cannot have one of these values.
        """
        domain = given or get_declared_domain(self.owner, self.name, self.field)
        if isinstance(domain, RelativeRange):
            domain = domain.around(self.default)
        return None if domain is None else check_domain(key, self.field, domain)


def check_tuning(tuning: Tuning, arms: Mapping[str, Selection]) -> None:
    """Raise a `UsageError` if an option in `tuning.space` belongs to none of these arms, or cannot be tuned."""
    if tuning.trials != GRID and importlib.util.find_spec("optuna") is None:
        raise UsageError("A search needs Optuna, which is not installed: pip install 'metareg[search]'.")
    for key in tuning.space:
        if not any(_find_options(key, selection) for selection in arms.values()):
            options = (_list_options(selection, "algo", "augment", "model") for selection in arms.values())
            known = {name for of_arm in options for name, _ in of_arm}
            raise UnknownNameError("option to choose", key, {*known, *_OF_A_RUN})
    spaces = []
    for name, selection in arms.items():
        try:
            spaces.append(list_dimensions(tuning, selection))
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
    if not any(spaces):
        lack = "no algorithm or augmenter of the comparison declares values of an option"
        raise UsageError(f"There is nothing to search: {lack}; give values, such as --set KEY=VALUE,VALUE.")


def list_dimensions(tuning: Tuning, selection: Selection) -> list[Dimension]:
    """List the search space of an arm, the algorithm's options first.

    Raises:
        UsageError: an option cannot have these values, or two keys name the same option.
    """
    if not tuning.space:
        options = _list_options(selection, "algo", "augment")
        return [Dimension(key, domain, each.default) for key, each in options if (domain := each.choose_domain(key))]
    chosen: dict[tuple[str, str], tuple[str, _Option]] = {}
    for key in tuning.space:
        for option in _find_options(key, selection):
            place = option.owner, option.name
            other = chosen.get(place, ("", option))[0]
            if other and ("." in key) == ("." in other):
                raise UsageError(f"'{other}' and '{key}' are the same option; use one of these names.")
            if not other or "." in key:  # a key that names the plugin takes precedence
                chosen[place] = key, option
    space = [_make_dimension(key, option, tuning) for key, option in chosen.values()]
    if tuning.trials == GRID:
        size = math.prod(len(each.domain) for each in space if isinstance(each.domain, list))
        if size > _LARGEST_GRID:
            fix = "give fewer values, or a number of trials"
            raise UsageError(f"A grid of {size} settings is larger than {_LARGEST_GRID}; {fix}.")
    return space


def _make_dimension(key: str, option: _Option, tuning: Tuning) -> Dimension:
    domain = option.choose_domain(key, tuning.space[key])
    if domain is None:
        raise UsageError(
            f"'{key}' declares no search range; give values, such as --set {key}=VALUE,VALUE, or a range in a file, "
            f"such as tune: {{space: {{{key}: {{low: …, high: …}}}}}}; a plugin declares one in the option's Field "
            "with json_schema_extra={'search': …}."
        )
    if tuning.trials == GRID and isinstance(domain, Range):
        fix = f"give some, such as {key}=VALUE,VALUE, or a number of trials (--search N)"
        raise UsageError(f"A grid needs values of '{key}', not the range {domain}; {fix}.")
    return Dimension(key, domain, option.default)


def _list_plugins(selection: Selection) -> list[tuple[str, Plugin]]:
    augmenters = [("augment", plugin) for plugin in selection.augmenters]
    return [("algo", selection.algorithm), *augmenters, ("model", selection.model), ("task", selection.task)]


def _list_options(selection: Selection, *fields: str) -> Iterator[tuple[str, _Option]]:
    """Yield the options of some plugins of an arm by the names that users type, the algorithm's without its name."""
    plugins = _list_plugins(selection)
    every = [option.name for _, plugin in plugins for option in _list_plugin_options(plugin)]
    named = [plugin.name for _, plugin in plugins]
    for field, plugin in plugins:
        owner = plugin.name if named.count(plugin.name) == 1 else field
        for option in _list_plugin_options(plugin) if field in fields else ():
            ambiguous = every.count(option.name) > 1 or option.name in RunConfig.model_fields
            yield option.name if field == "algo" and not ambiguous else f"{owner}.{option.name}", option


def _list_plugin_options(plugin: Plugin) -> list[_Option]:
    fields = get_config_class(plugin.instance).model_fields
    return [_Option(plugin.label, field, name, getattr(plugin.config, name)) for name, field in fields.items()]


def _find_options(key: str, selection: Selection) -> list[_Option]:
    """Find the options of an arm that `key` names; raise a `UsageError` if it cannot be tuned."""
    owner, dot, name = key.partition(".")
    option_name = name if dot else key
    if not dot and key in RunConfig.model_fields:
        if key not in _OF_A_RUN:
            raise _refuse_choice(key)
        return [_Option("", RunConfig.model_fields[key], key, getattr(selection.config, key))]
    found = [
        (field, option)
        for field, plugin in _list_plugins(selection)
        if not dot or owner in (field, plugin.name)
        for option in _list_plugin_options(plugin)
        if option.name == option_name
    ]
    if any(field == "task" for field, _ in found):
        raise _refuse_choice(key)
    if len(found) > 1:
        raise UsageError(f"'{key}' is an option of several plugins of an arm; write it as PLUGIN.{option_name}.")
    return [option for _, option in found]


def _refuse_choice(key: str) -> UsageError:
    return UsageError(
        f"'{key}' cannot be tuned: only options of how an arm learns can be, those of its algorithm, augmenters and "
        f"model, and {', '.join(_OF_A_RUN)}."
    )
