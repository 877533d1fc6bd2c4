"""Python state that functions read besides their arguments: variables, attributes and containers.

A traced graph freezes their values at the time of tracing.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from metareg.util.torch_internals import MODULE_INTERNALS, list_attributes

__all__ = ["SIMPLE", "PythonState"]

Values = dict[Any, Any]

_Accessors = tuple[Callable[[], Values], Callable[[Values], None]]
"""Functions that read the values of a namespace or container, and restore them."""

SIMPLE = (bool, int, float, complex, str, bytes, type(None))
"""Types whose values are compared by value."""
_LIBRARIES = ("torch", "numpy", "builtins", "functools", "math", "metareg", "torchvision", "timm", "dgl", "pandas")
"""Packages whose functions and classes do not keep users' state between calls."""
_MOST_ENTRIES = 64
"""Larger containers are treated as data and compared only by identity."""
_MOST_DEPTH = 6


@dataclass(frozen=True)
class _Place:
    """A namespace or container, and its recorded values."""

    name: Callable[[Any], str]
    """Returns the name of an entry, given its key."""
    read: Callable[[], Values]
    write: Callable[[Values], None]
    saved: Values


class PythonState:
    """A record of the values that some functions and objects can read.

    It covers closures, defaults, global names in a function's code, attributes of objects and modules, the entries of small
    lists, dicts and sets, and all that for the functions and methods that a function's code names. Tensors and arrays are
    compared by identity.

    Args:
        roots: functions, modules and callable objects.
    """

    def __init__(self, *roots: Any) -> None:
        self._places: list[_Place] = []
        self._seen: set[int] = set()
        self._methods: set[tuple[type, types.FunctionType]] = set()
        for root in roots:
            self._visit(root, "", 0)

    def find_changes(self) -> Iterator[str]:
        """Yield the names of values that have changed."""
        for place in self._places:
            now, saved = place.read(), place.saved
            for key in saved if now.keys() == saved.keys() else now.keys() | saved.keys():
                if key not in now or key not in saved or not _is_same(now[key], saved[key]):
                    yield place.name(key)

    def restore(self) -> None:
        """Restore every value."""
        for place in self._places:
            now = place.read()
            if now.keys() != place.saved.keys() or any(now[key] is not value for key, value in place.saved.items()):
                place.write(place.saved)

    def _visit(self, value: Any, label: str, depth: int) -> None:
        if isinstance(value, SIMPLE) or depth > _MOST_DEPTH or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self._visit_module(value, label, depth)
        elif isinstance(value, types.FunctionType):
            self._visit_function(value, depth)
        elif isinstance(value, types.MethodType):
            self._visit(value.__self__, label, depth)
            self._visit(value.__func__, label, depth)
            self._visit_method(type(value.__self__), value.__name__, depth)
        elif isinstance(value, partial):
            for part in (value.func, value.args, value.keywords):
                self._visit(part, label, depth)
        elif isinstance(value, list | tuple | dict | set):
            self._visit_container(value, label, depth)
        elif not isinstance(value, type | types.ModuleType) and not _is_of_library(type(value)) and _has_dict(value):
            self._add(partial(_join, label), *_accessors_of_dict(vars(value)), depth)
            self._visit_method(type(value), "__call__", depth)

    def _visit_module(self, module: nn.Module, label: str, depth: int) -> None:
        for name, each in module.named_modules():
            path = _join(label, name)
            self._seen.add(id(each))
            for values in list_attributes(each):
                self._add(partial(_join, path), *_accessors_of_dict(values, MODULE_INTERNALS), depth)
            if not _is_of_library(type(each)):
                self._visit_method(type(each), "forward", depth)

    def _visit_method(self, owner: type, name: str, depth: int) -> None:
        """Visit a method, and those methods of the class that its code names."""
        method = _find_function(inspect.getattr_static(owner, name, None))
        if method is None or depth > _MOST_DEPTH or (owner, method) in self._methods or _is_of_library(method):
            return
        self._methods.add((owner, method))
        self._visit(method, name, depth)
        for each in set(_list_names(method.__code__)):
            self._visit_method(owner, each, depth + 1)

    def _visit_function(self, function: types.FunctionType, depth: int) -> None:
        if _is_of_library(function):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._add(partial(_join, name), *_accessors_of_cell(cell), depth)
        self._visit(function.__defaults__, function.__name__, depth)
        self._visit(function.__kwdefaults__, function.__name__, depth)
        names = set(_list_names(function.__code__))
        found = {name: function.__globals__[name] for name in names if name in function.__globals__}
        spaces = {name: each for name, each in found.items() if isinstance(each, type | types.ModuleType)}
        own = found.keys() - spaces.keys()
        self._add(str, *_accessors_of_names(function.__globals__, own), depth)
        for name, space in spaces.items():
            data = [key for key in names if key in vars(space) and not _is_code(vars(space)[key])]
            if data:
                self._add(partial(_join, name), *_accessors_of_space(space, data), depth)
            for key in (names & vars(space).keys()).difference(data):
                self._visit(_find_function(vars(space)[key]) or vars(space)[key], key, depth + 1)

    def _visit_container(self, value: Any, label: str, depth: int) -> None:
        if len(value) > _MOST_ENTRIES:
            return
        if isinstance(value, tuple):
            for number, each in enumerate(value):
                self._visit(each, f"{label}[{number}]", depth + 1)
            return
        if isinstance(value, list):
            accessors = _accessors_of_list(value)
        else:
            accessors = _accessors_of_set(value) if isinstance(value, set) else _accessors_of_dict(value)
        self._add(lambda key: f"{label}[{key!r}]", *accessors, depth)

    def _add(
        self, name: Callable[[Any], str], read: Callable[[], Values], write: Callable[[Values], None], depth: int
    ) -> None:
        saved = read()
        self._places.append(_Place(name, read, write, saved))
        for key, each in saved.items():
            self._visit(each, name(key), depth + 1)


def _accessors_of_dict(values: dict[Any, Any], without: Collection[str] = ()) -> _Accessors:
    def read() -> Values:
        return {key: value for key, value in values.items() if key not in without}

    def write(saved: Values) -> None:
        for key in read().keys() - saved.keys():
            del values[key]
        values.update(saved)

    return read, write


def _accessors_of_names(values: dict[str, Any], names: Collection[str]) -> _Accessors:
    return lambda: {name: values[name] for name in names if name in values}, values.update


def _accessors_of_space(space: type | types.ModuleType, names: Collection[str]) -> _Accessors:
    def write(saved: Values) -> None:
        for name, value in saved.items():
            setattr(space, name, value)

    return lambda: {name: vars(space)[name] for name in names if name in vars(space)}, write


def _accessors_of_list(values: list[Any]) -> _Accessors:
    def write(saved: Values) -> None:
        values[:] = saved.values()

    return lambda: dict(enumerate(values)), write


def _accessors_of_set(values: set[Any]) -> _Accessors:
    def write(saved: Values) -> None:
        values.clear()
        values.update(saved)

    return lambda: {value: value for value in values}, write


def _accessors_of_cell(cell: types.CellType) -> _Accessors:
    def read() -> Values:
        try:
            return {"": cell.cell_contents}
        except ValueError:  # an empty cell
            return {}

    def write(saved: Values) -> None:
        for value in saved.values():
            cell.cell_contents = value

    return read, write


def _list_names(code: types.CodeType) -> Iterator[str]:
    """Yield the global names and attributes in a function's code, including nested functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _list_names(constant)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path and name else path or str(name)


def _has_dict(value: Any) -> bool:
    return isinstance(getattr(value, "__dict__", None), Mapping)


def _find_function(value: Any) -> types.FunctionType | None:
    """Return the function that an attribute of a module or class is or calls; None if there is none."""
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return function if isinstance(function, types.FunctionType) else None


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, types.ModuleType | staticmethod | classmethod | property)


def _is_of_library(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _is_same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    return type(now) is type(before) and isinstance(now, SIMPLE) and (now == before or now != now)
