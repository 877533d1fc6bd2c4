"""The hooks of a run's plugins, resolved once to plain functions.

pluggy registers and validates the plugins, but the inner loop does not call it, so `torch.func` and the tracer see
ordinary function calls.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import pluggy

from metareg.contract import hookspecs
from metareg.contract.hookspecs import HOOKS, Reduction
from metareg.errors import MetaregError, PluginError, describe_error, nearest
from metareg.registry.plugins import Plugin

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Implementation", "create_plugin_manager", "find_hook", "find_implementations", "list_hooks"]


_STAGES = ("parameters", "inner", "augmentation", "outer")
_PARTS = {"algorithms": _STAGES, "augmenters": _STAGES, "observers": ("observers",)}
"""The parts of the hooks that plugins of each kind implement, used to detect a forgotten `hookimpl`."""
_METHODS = (types.FunctionType, staticmethod, classmethod)


@dataclass(frozen=True)
class Implementation:
    """One plugin's implementation of one hook, called with the arguments that it names."""

    plugin: Plugin
    name: str
    """The plugin's name in this run: unique, and the prefix of its meta-parameters."""
    hook: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]

    def __call__(self, **available: Any) -> Any:
        try:
            return self.function(**{argument: available[argument] for argument in self.arguments})
        except MetaregError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"The {self.plugin.label} failed in its hook {self.hook}: {describe_error(error)}"
            ) from error

    def own(self, meta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the plugin's own meta-parameters, without its prefix."""
        prefix = f"{self.name}."
        return {name[len(prefix) :]: value for name, value in meta.items() if name.startswith(prefix)}

    def reject(self, problem: str) -> NoReturn:
        """Raise a PluginError for a result that violates the contract."""
        raise PluginError(f"The {self.plugin.label} broke the contract of {self.hook}: {problem}.")


def create_plugin_manager(plugins: Sequence[Plugin]) -> tuple[pluggy.PluginManager, dict[str, Plugin]]:
    """Create a manager for a run's plugins, and a dict of them by name; refuse plugins that violate the contract."""
    manager = pluggy.PluginManager("metareg")
    manager.add_hookspecs(hookspecs)
    named: dict[str, Plugin] = {}
    for plugin in plugins:
        name, count = plugin.name, 1
        while name in named:
            count += 1
            name = f"{plugin.name}-{count}"
        try:
            manager.register(plugin.instance, name)
        except pluggy.PluginValidationError as error:
            raise PluginError(_explain_refusal(plugin)) from error
        except ValueError as error:
            raise PluginError(f"The {plugin.label} cannot be used twice as one object; pass its class.") from error
        named[name] = plugin
    for plugin in plugins:
        for attribute, method in _list_marked(plugin.instance):
            attribute = getattr(method, "metareg_impl")["specname"] or attribute  # noqa: B009 - set by pluggy
            if attribute not in HOOKS:
                close = nearest(attribute, HOOKS)
                hint = f"; did you mean '{close[0]}'?" if close else f"; the hooks are {', '.join(HOOKS)}."
                raise PluginError(f"The {plugin.label} implements '{attribute}', which is not a hook of metareg{hint}")
        for name in _list_unmarked(plugin):
            raise PluginError(
                f"The {plugin.label} has a method {name} without @metareg.hookimpl: it would never be called."
            )
    return manager, named


def find_implementations(manager: pluggy.PluginManager, named: Mapping[str, Plugin], hook: str) -> list[Implementation]:
    """Return a hook's implementations in the order of its reduction, those with `tryfirst` first."""
    found = getattr(manager.hook, hook).get_hookimpls()
    if HOOKS[hook].reduction is Reduction.FIRST:
        found = found[::-1]
    result = []
    for each in sorted(found, key=lambda each: each.trylast - each.tryfirst):
        plugin = named[each.plugin_name]
        if each.wrapper or each.hookwrapper:
            raise PluginError(f"The {plugin.label} implements {hook} as a wrapper; stages are plain functions.")
        result.append(Implementation(plugin, each.plugin_name, hook, each.function, tuple(each.argnames)))
    return result


def find_hook(plugin: Plugin, hook: str) -> Implementation | None:
    """Return a single plugin's implementation of a hook, or None."""
    manager, named = create_plugin_manager([plugin])
    found = find_implementations(manager, named, hook)
    return found[0] if found else None


def list_hooks(cls: type) -> list[str]:
    """List the hooks that a plugin class implements, in alphabetical order."""
    return [name for name in sorted(dir(cls)) if _is_marked(inspect.getattr_static(cls, name))]


def _list_marked(instance: Any) -> list[tuple[str, Callable[..., Any]]]:
    """List the attributes marked with `hookimpl`, looked up on the class so that no property runs."""
    names = (name for name in dir(type(instance)) if _is_marked(inspect.getattr_static(instance, name)))
    return [(name, getattr(instance, name)) for name in names]


def _list_unmarked(plugin: Plugin) -> list[str]:
    """List the methods that are named like a hook of the plugin's kind but not marked with `hookimpl`."""
    cls = type(plugin.instance)
    found = {
        name: inspect.getattr_static(cls, name, None)
        for name, hook in HOOKS.items()
        if hook.part in _PARTS.get(plugin.kind, ())
    }
    return [name for name, each in found.items() if isinstance(each, _METHODS) and not _is_marked(each)]


def _is_marked(attribute: Any) -> bool:
    return hasattr(getattr(attribute, "__func__", attribute), "metareg_impl")


def _explain_refusal(plugin: Plugin) -> str:
    """Explain why pluggy refused a plugin."""
    for name, method in _list_marked(plugin.instance):
        if name not in HOOKS:
            continue
        allowed = list(inspect.signature(getattr(hookspecs, name)).parameters)
        unknown = next((each for each in inspect.signature(method).parameters if each not in allowed), None)
        if unknown is not None:
            close = nearest(unknown, allowed)
            hint = f"; did you mean '{close[0]}'?" if close else "."
            return (
                f"The {plugin.label} asks for the argument '{unknown}' in {name}, which that hook does not have; "
                f"it has {', '.join(allowed)}{hint}"
            )
    return f"The {plugin.label} cannot be registered: its hooks do not match their specifications."
