"""Traced graphs that the learners of a process share, such as those of a comparison's runs that differ only by seed."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import nn

from metareg.contract.losses import Loss, Metric
from metareg.engine.context import TaskOptions
from metareg.engine.python_state import SIMPLE, PythonState
from metareg.engine.split_model import SplitModel
from metareg.engine.stages import Stages
from metareg.util.torch_internals import MODULE_INTERNALS

__all__ = ["SHARED", "SharedGraphs", "identify"]

_MOST_OPERATIONS = 50_000
"""Some 200 MB: an operation of a graph takes 4 kB."""
_COMPARABLE = (*SIMPLE, type, types.FunctionType, types.BuiltinFunctionType, torch.dtype, torch.device)


class SharedGraphs:
    """Graphs by what they were traced from, as many as hold some number of operations; the least recently used go first.

    Args:
        most_operations: the number of operations of all graphs together.
    """

    def __init__(self, most_operations: int) -> None:
        self._most_operations = most_operations
        self._graphs: OrderedDict[Hashable, tuple[Any, PythonState, int]] = OrderedDict()
        self._lock = Lock()

    def find(self, key: Hashable) -> Any:
        """Return what runs the graph of a key; None if there is none, or a variable that it read has changed since."""
        with self._lock:
            found = self._graphs.get(key)
            if found is None:
                return None
            run, state, _ = found
            if next(state.find_changes(), None) is not None:
                del self._graphs[key]
                return None
            self._graphs.move_to_end(key)
            return run

    def add(self, key: Hashable, graph: torch.fx.GraphModule, run: Any, state: PythonState) -> None:
        """Keep a graph, unless it holds tensors, such as frozen weights, which other learners do not have.

        Args:
            key: what it was traced from.
            graph: the graph.
            run: what runs it.
            state: the variables that it read.
        """
        if graph.graph.find_nodes(op="get_attr"):
            return
        with self._lock:
            self._graphs[key] = run, state, len(graph.graph.nodes)
            while sum(size for _, _, size in self._graphs.values()) > self._most_operations:
                self._graphs.popitem(last=False)


SHARED = SharedGraphs(_MOST_OPERATIONS)


def identify(model: SplitModel, stages: Stages, loss: Loss, metric: Metric, options: TaskOptions) -> Hashable | None:
    """Describe everything but tensors and their shapes that the graphs of a learner are traced from.

    Returns:
        A description that is equal for learners whose graphs are equal; None if the model has attributes that cannot be
        compared, or a plugin is an object without a configuration.
    """
    plugins = [(name, type(each.instance), each.config) for name, each in stages.plugins.items()]
    if any(config is None for *_, config in plugins):
        return None
    try:
        description = (
            tuple((name, _describe_class(kind), repr(dict(config))) for name, kind, config in plugins),
            tuple(_describe_module(name, each) for name, each in model.module.named_modules()),
            (model.names, model.head_names, model.body_prefix, model.head_prefix),
            (loss, metric.name, metric.function),
            tuple(
                getattr(options, name)
                for name in ("inner_steps", "first_order", "memory", "bn_statistics", "precision")
            ),
            torch.get_default_dtype(),
        )
        hash(description)
    except TypeError:
        return None
    return description


def _describe_class(kind: type) -> Hashable:
    """Describe a class and the values of its and its bases' simple attributes."""
    values = ((name, value) for base in kind.__mro__ for name, value in vars(base).items())
    return kind, tuple((name, value) for name, value in values if isinstance(value, SIMPLE))


def _describe_module(name: str, module: nn.Module) -> Hashable:
    """Describe a module without its submodules and tensors; raise a TypeError if its attributes cannot be compared."""
    hooks = (value for key, value in vars(module).items() if key.endswith("_hooks"))
    if any(hooks):
        raise TypeError(f"{name} has hooks")
    attributes = {key: value for key, value in vars(module).items() if key not in MODULE_INTERNALS}
    return (
        name,
        _describe_class(type(module)),
        tuple((key, _freeze(value)) for key, value in sorted(attributes.items())),
    )


def _freeze(value: Any) -> Hashable:
    if isinstance(value, _COMPARABLE):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_freeze, value))
    if isinstance(value, Mapping):
        return type(value), tuple((key, _freeze(each)) for key, each in value.items())
    raise TypeError(f"{type(value).__name__} cannot be compared")
