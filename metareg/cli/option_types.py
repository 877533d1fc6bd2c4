"""Descriptions of option types."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from metareg.contract.config import PathText, PluginSpec

__all__ = ["describe_type"]

_NOUNS: dict[Any, tuple[str, str]] = {
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
    PathText: ("path", "paths"),
    PluginSpec: ("plugin", "plugins"),
}


def describe_type(field: Any) -> str:
    """Describe the type and bounds of a configuration's field: ``whole number from 0 to 4, or unset``."""
    bounds = {
        key: value
        for constraint in field.metadata
        for key in ("gt", "ge", "lt", "le", "min_length", "max_length")
        if (value := getattr(constraint, key, None)) is not None
    }
    members = _list_members(field.annotation)
    texts = [_describe(each, bounds) for each in members if each is not types.NoneType]
    return " or ".join(texts) + (", or unset" if types.NoneType in members and texts else "")


def _list_members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself if it is no union."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _describe(annotation: Any, bounds: dict[str, Any]) -> str:
    """Describe one type, with the bounds of its value or length."""
    text = _describe_many(annotation) if get_origin(annotation) is Literal else _find_nouns(annotation)[0]
    low, high = bounds.get("min_length"), bounds.get("max_length")
    if low is not None and low == high:
        return text.replace("list of ", f"list of {low} ")
    if low == 1:
        text += ", not empty"
    if "ge" in bounds and "le" in bounds:
        return f"{text} from {bounds['ge']} to {bounds['le']}"
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return " ".join(
        [text, " and ".join(f"{signs[key]} {value}" for key, value in bounds.items() if key in signs)]
    ).strip()


def _describe_many(annotation: Any) -> str:
    """Describe a type in the plural; list the choices if it is a choice."""
    if get_origin(annotation) is Literal:
        *others, last = map(str, get_args(annotation))
        return f"{', '.join(others)} or {last}" if others else last
    return _find_nouns(annotation)[1]


def _find_nouns(annotation: Any) -> tuple[str, str]:
    """Return the singular and the plural noun for a type."""
    if annotation in _NOUNS:
        return _NOUNS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _find_nouns(arguments[0])
    if origin is list:
        items = _describe_many(arguments[0])
        return f"list of {items}", f"lists of {items}"
    if origin is dict:
        keys, values = map(_describe_many, arguments)
        return f"mapping from {keys} to {values}", f"mappings from {keys} to {values}"
    name = getattr(annotation, "__name__", str(annotation))
    return name, name
