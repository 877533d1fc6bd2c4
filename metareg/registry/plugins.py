"""Installed plugins: listing and loading.

Listing plugins reads only entry-point metadata and imports neither plugins nor torch. A run loads only the plugins that
it selects, so a plugin that cannot be imported affects only the runs that use it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metareg._version import __version__
from metareg.contract.hookspecs import CONTRACT_VERSION, OLDEST_CONTRACT
from metareg.errors import PluginError, UnknownNameError, UsageError, describe_error

if TYPE_CHECKING:
    from metareg.contract.config import PluginConfig

__all__ = [
    "DISABLE_VARIABLE",
    "KINDS",
    "Entry",
    "Plugin",
    "check_contract",
    "find_entry",
    "get_config_class",
    "get_name",
    "list_entries",
    "list_names",
    "resolve",
]

log = logging.getLogger("metareg")

KINDS = ("algorithms", "augmenters", "tasks", "models", "observers")
DISABLE_VARIABLE = "METAREG_DISABLE_PLUGINS"

_OWN_NAME = "metareg"
_SINGULAR = {kind: kind.removesuffix("s") for kind in KINDS}


@dataclass(frozen=True)
class Entry:
    """An entry point: the facts about a plugin that are known without importing it."""

    kind: str
    name: str
    distribution: str
    version: str
    target: str
    """``module:attribute``."""

    @property
    def qualified(self) -> str:
        """``DIST:NAME``, which is unique even if two distributions use the name."""
        return f"{self.distribution}:{self.name}"

    @property
    def label(self) -> str:
        """The name in messages: ``algorithm 'maml' of metareg 1.0 (metareg_maml:MAML)``."""
        return f"{_SINGULAR[self.kind]} '{self.name}' of {self.distribution} {self.version} ({self.target})"

    @property
    def disabled(self) -> bool:
        """Whether the variable ``METAREG_DISABLE_PLUGINS`` contains it."""
        names = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")}
        return bool({self.name, self.qualified} & names)

    def load(self) -> Any:
        """Import the plugin's class; any error becomes a PluginError."""
        group = f"metareg.{self.kind}"
        try:
            loaded = importlib.metadata.EntryPoint(self.name, self.target, group).load()
        except KeyboardInterrupt:
            raise
        # A plugin's module can raise anything on import, including SystemExit.
        except BaseException as error:
            raise PluginError(f"The {self.label} cannot be imported: {describe_error(error)}") from error
        if not isinstance(loaded, type):
            raise PluginError(f"The {self.label} is a {type(loaded).__name__}; the entry point must name a class.")
        check_contract(loaded, self.label)
        return loaded


@dataclass(frozen=True)
class Plugin:
    """A plugin in use: the object with the hooks, its configuration and its origin."""

    kind: str
    name: str
    instance: Any
    config: Any
    """The validated `Config` of the class; None if the user passed an object."""
    distribution: str | None
    version: str | None

    @property
    def label(self) -> str:
        """The name in messages: ``augmenter 'cml'``."""
        return f"{_SINGULAR[self.kind]} '{self.name}'"


def list_entries(kind: str | None = None) -> list[Entry]:
    """List the installed plugins of one kind or all, ordered by `KINDS` and name.

    Omits plugins in the variable ``METAREG_DISABLE_PLUGINS`` (``NAME`` or ``DIST:NAME``, separated by commas).
    """
    return [entry for entry in _read_entries(kind) if not entry.disabled]


def list_names(kind: str | None = None) -> set[str]:
    """Return the names of the installed plugins of one kind or all, including disabled ones."""
    kinds = KINDS if kind is None else (kind,)
    return {point.name for each in kinds for point in _list_points(each)}


def find_entry(kind: str, name: str) -> Entry:
    """Find the installed plugin named `name` or ``DIST:NAME``; refuse a disabled one."""
    installed = [entry for entry in _read_entries(kind, get_name(name)) if name in (entry.name, entry.qualified)]
    found = [entry for entry in installed if not entry.disabled]
    singular = _SINGULAR[kind]
    if not found and installed:
        raise UsageError(f"The {singular} '{name}' is installed but disabled by --no-plugin or {DISABLE_VARIABLE}.")
    if not found:
        known = {entry.name for entry in list_entries(kind)}
        raise UnknownNameError(singular, name, known, "`metareg plugins` lists the installed plugins.")
    if len(found) > 1:
        owners = " and ".join(entry.distribution for entry in found)
        choices = " or ".join(f"'{entry.qualified}'" for entry in found)
        raise PluginError(f"The {singular} name '{name}' is used by {owners}; write {choices} to choose one.")
    return found[0]


def resolve(kind: str, plugin: str | type | object, config: Mapping[str, Any] | None = None) -> Plugin:
    """Return the plugin for a name, class or object, ready for use.

    Args:
        kind: one of `KINDS`.
        plugin: the name of an installed plugin, a plugin class, or a ready-made object with hooks. A `Plugin` is
            returned as it is.
        config: values for the class's `Config`; None or empty for the defaults.

    Raises:
        UsageError: the name is unknown, or the class refuses the configuration.
        PluginError: the plugin cannot be imported or built.
    """
    from metareg.contract.config import validate

    if isinstance(plugin, Plugin):
        return plugin
    config = dict(config or {})
    name = get_name(plugin)
    label = f"{_SINGULAR[kind]} '{name}'"
    if not isinstance(plugin, str | type):
        if config:
            raise UsageError(
                f"The {_SINGULAR[kind]} {plugin!r} is already an object; pass its class to configure it with "
                f"{', '.join(config)}."
            )
        check_contract(plugin, label)
        return Plugin(kind, name, plugin, getattr(plugin, "config", None), None, None)

    distribution = version = None
    if isinstance(plugin, str):
        entry = find_entry(kind, plugin)
        cls, distribution, version = entry.load(), entry.distribution, entry.version
    else:
        cls = plugin
        check_contract(cls, label)

    validated_config = validate(get_config_class(cls), config, label)
    takes_config = cls.__init__ is not object.__init__
    try:
        instance = cls(validated_config) if takes_config else cls()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"The {label} cannot be built: {describe_error(error)}") from error
    return Plugin(kind, name, instance, validated_config, distribution, version)


def get_name(plugin: str | type | object) -> str:
    """Return the name of a plugin given as a name, class or object."""
    if isinstance(plugin, str):
        return plugin.rpartition(":")[2]
    cls = plugin if isinstance(plugin, type) else type(plugin)
    return str(getattr(plugin, "name", None) or cls.__name__.lower())


def get_config_class(plugin: type | object) -> type[PluginConfig]:
    """Return the `Config` of a plugin class or object, or an empty one."""
    from metareg.contract.config import PluginConfig

    config = getattr(plugin, "Config", PluginConfig)
    if not (isinstance(config, type) and issubclass(config, PluginConfig)):
        name = (plugin if isinstance(plugin, type) else type(plugin)).__name__
        raise PluginError(f"The plugin class '{name}' has a Config that is not a metareg.PluginConfig.")
    return config


def check_contract(plugin: Any, label: str) -> None:
    """Refuse a plugin class or object written for a contract that this metareg does not support.

    A class without a contract version is accepted, so that you can try it before packaging it.
    """
    stated = getattr(plugin, "contract", None)
    if stated is None:
        return
    if not isinstance(stated, int) or isinstance(stated, bool):
        raise PluginError(
            f"The {label} states contract = {stated!r}; it must be a number, currently {CONTRACT_VERSION}."
        )
    if stated > CONTRACT_VERSION:
        raise PluginError(
            f"The {label} was written for contract {stated}; metareg {__version__} supports contract "
            f"{CONTRACT_VERSION}. Upgrade metareg, or install an older version of the plugin."
        )
    if stated < OLDEST_CONTRACT:
        raise PluginError(
            f"The {label} was written for contract {stated}, which metareg {__version__} no longer supports (it "
            f"supports {OLDEST_CONTRACT} to {CONTRACT_VERSION}). Upgrade the plugin, or install an older metareg."
        )


def _read_entries(kind: str | None, name: str | None = None) -> list[Entry]:
    """Read the entries of a kind, or only those with a name, because reading distributions' metadata is slow."""
    found: dict[tuple[str, str, str], Entry] = {}
    identify = cache(_identify)  # a distribution has many entry points
    for each in KINDS if kind is None else (kind,):
        for point in _list_points(each):
            if name not in (None, point.name):
                continue
            distribution, version = identify(point.dist)
            entry = Entry(each, point.name, distribution, version, point.value)
            # A distribution can be on the path twice (an old install beside an editable one); the first one counts.
            found.setdefault((each, point.name, _normalize(distribution)), entry)
    return sorted(found.values(), key=lambda entry: (KINDS.index(entry.kind), entry.name, entry.distribution))


def _identify(distribution: importlib.metadata.Distribution | None) -> tuple[str, str]:
    """Return the name and version of a distribution; each access to its metadata parses the whole file."""
    metadata: Mapping[str, Any] = distribution.metadata.json if distribution else {}
    return str(metadata.get("name") or "unknown"), str(metadata.get("version") or "unknown")


def _list_points(kind: str) -> list[importlib.metadata.EntryPoint]:
    """List the entry points of a kind; ignore other distributions named metareg."""
    group, own = f"metareg.{kind}", _find_own_distribution()
    points = importlib.metadata.entry_points(group=group)
    if own is None:
        return list(points)
    of_others = [point for point in points if not (point.dist and _normalize(point.dist.name or "") == _OWN_NAME)]
    return [*own.entry_points.select(group=group), *of_others]


def _find_own_distribution() -> importlib.metadata.Distribution | None:
    """Find this package's own distribution if several have its name; otherwise None."""
    named = list(importlib.metadata.distributions(name=_OWN_NAME))
    own = next(filter(_holds_this_package, named), None) if len(named) > 1 else None
    if own is not None:
        points = set(own.entry_points)
        for other in named:
            if not points.issuperset(other.entry_points):
                _report_namesake(str(other.locate_file("")))
    return own


def _holds_this_package(distribution: importlib.metadata.Distribution) -> bool:
    from urllib.parse import urlsplit
    from urllib.request import url2pathname  # a slow import

    package = Path(__file__).resolve().parents[1]
    if Path(str(distribution.locate_file(package.name))).resolve() == package:
        return True
    with suppress(ValueError, TypeError, KeyError):  # an editable install records its source folder
        source = urlsplit(json.loads(distribution.read_text("direct_url.json") or "")["url"]).path
        return Path(url2pathname(source), package.name).resolve() == package
    return False


@cache
def _report_namesake(folder: str) -> None:
    log.warning("Ignoring the plugins of a second distribution named metareg, in %s.", folder)


def _normalize(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
