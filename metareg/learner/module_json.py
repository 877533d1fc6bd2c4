"""Conversion of models of `torch.nn` layers to JSON and back, to load a saved learner without its model's class.

Only layers of `torch.nn` are written and built, from plain constructor arguments, so an untrusted file can build
nothing else.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metareg.errors import UsageError
from metareg.util.files import MALFORMED
from metareg.util.torch_internals import list_places

__all__ = ["BodyHead", "build_module", "describe_module"]

Description = dict[str, Any]

_PLACES = frozenset({"device", "dtype"})
_MOST_LAYERS, _DEEPEST = 10_000, 50


class BodyHead(nn.Module):
    """``head(body(x))``: replaces the class of a model with a body and a head."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, x: Any) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        return outputs


def describe_module(module: nn.Module) -> Description | None:
    """Describe the structure of a module; None if it does not consist only of `torch.nn` layers.

    A module of another class is accepted if it has only a body and a head, and so computes ``head(body(x))``.
    """
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if list_places(module).keys() == {"body", "head"} and not own:
        module = BodyHead(module.get_submodule("body"), module.get_submodule("head"))
        parts = {name: _describe_layers(part) for name, part in list_places(module).items() if part is not None}
        description = {"layer": "BodyHead", "children": parts} if all(parts.values()) else None
    else:
        description = _describe_layers(module)
    if description is None:
        return None
    rebuilt = _build_on_meta(description)
    same = (
        repr(module) == repr(rebuilt)
        and _get_shapes(module.state_dict()) == _get_shapes(rebuilt.state_dict())
        and _list_trainable(module) == _list_trainable(rebuilt)
    )
    return description if same else None


def build_module(description: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build the module that `describe_module` described, with its values from `tensors`.

    Allocates nothing if the structure's names and shapes differ from those of the tensors.

    Raises:
        UsageError: the description is invalid, or the tensors do not fit it.
    """
    try:
        module = _build_on_meta(description)
        shapes = _get_shapes(module.state_dict())
    except MALFORMED as error:
        raise UsageError(f"The file's description of the model cannot be built: {error}.") from error
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            found = f"the shape {tuple(tensors[name].shape)}" if name in tensors else "no weights"
            raise UsageError(
                f"The file's weights do not fit its model: '{name}' has {found} instead of the shape {shape}."
            )
    module.load_state_dict({name: tensors[name] for name in module.state_dict()}, assign=True)
    return module


def _list_trainable(module: nn.Module) -> list[str]:
    """List the trainable parameters, without frozen ones, and with one name for tied ones."""
    return [name for name, p in module.named_parameters() if p.requires_grad]


def _describe_layers(module: nn.Module) -> Description | None:
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind or not _is_layer(kind):
        return None
    if kind is nn.Sequential:
        children = {name: _describe_layers(child) for name, child in module.named_children()}
        return {"layer": "Sequential", "children": children} if all(children.values()) else None
    if list_places(module):
        return None
    arguments = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name == "self" or name in _PLACES or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, name, parameter.default)
        if name == "bias":  # the argument is a flag, the attribute the tensor itself
            value = value is not None and value is not False
        if not _is_plain(value):
            return None
        arguments[name] = value
    return {"layer": kind.__name__, "arguments": arguments}


def _build_on_meta(description: Any) -> nn.Module:
    with torch.device("meta"):  # shapes without memory
        return _build_layer(description, itertools.count(1))


def _build_layer(description: Any, number: Iterator[int], depth: int = 0) -> nn.Module:
    """Build a layer and its sublayers; `number` counts all layers."""
    if depth > _DEEPEST or next(number) > _MOST_LAYERS:
        raise ValueError(f"it has more than {_MOST_LAYERS} layers, or nests more than {_DEEPEST}")
    name = description["layer"]
    children = {key: _build_layer(child, number, depth + 1) for key, child in description.get("children", {}).items()}
    if name == "BodyHead":
        return BodyHead(**children)
    if name == "Sequential":
        module = nn.Sequential()
        for key, child in children.items():
            module.add_module(key, child)
        return module
    kind = getattr(nn, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and _is_layer(kind)):
        raise ValueError(f"'{name}' is not a layer of torch.nn")
    arguments = {
        key: tuple(value) if isinstance(value, list) else value for key, value in description["arguments"].items()
    }
    for key in arguments.keys() & _PLACES:
        raise ValueError(f"a file must not set '{key}'")
    layer: nn.Module = kind(**arguments)
    return layer


def _is_layer(kind: type) -> bool:
    return kind is not nn.Module and kind.__module__.startswith("torch.nn.modules.")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def _get_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}
