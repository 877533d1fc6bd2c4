"""Functions traced to graphs of operations, replayed or compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize

from metareg.contract.episodes import Episodes
from metareg.engine.graph_passes import mutates, remove_idle_operations
from metareg.engine.memory import advise_on_memory
from metareg.engine.objective import Task, Tensors
from metareg.errors import MetaregError
from metareg.util.layout import make_contiguous, settle_layout
from metareg.util.torch_internals import compile_graph, trace, tree_flatten, tree_unflatten

__all__ = ["CompileError", "Program"]

Function = Callable[[Tensors, Task, Mapping[str, Any]], list[Tensor]]


class CompileError(MetaregError):
    """torch.compile did not produce a program, most often because there is no C++ compiler."""


_CALLS_OF_ANOTHER_SHAPE = 32


class Program:
    """A function of meta-parameters, tasks and extra inputs that is traced to a graph of operations for each set of shapes.

    Tracing runs the function's Python, plugins and `torch.func` transforms included, and keeps only the
    operations; replaying them costs a fraction of the original and gives the same bits. `torch.compile` gets the traced
    graph, in which no Python of a plugin is left to break it.

    Args:
        function: pure; its control flow depends on nothing but shapes.
        compiled: hand the graph to `torch.compile`.
    """

    def __init__(self, function: Function, *, compiled: bool) -> None:
        self._function = function
        self._compiled = compiled
        self._graphs: dict[Any, Callable[..., list[Tensor]]] = {}
        self._calls: Counter[Any] = Counter()

    def __call__(self, meta: Tensors, episodes: Episodes, extra: Mapping[str, Any]) -> list[Tensor]:
        inputs, structure = _flatten(episodes.parts, extra)
        # A graph is for one layout in memory, and bits can depend on it: every way of running gets a settled one. A map over
        # tasks takes nothing channels last: the second derivative of max-pooling has no batching rule there.
        settled = settle_layout if len(episodes) == 1 else make_contiguous
        inputs = [settled(leaf) for leaf in inputs]
        key = (structure, *[(leaf.shape, leaf.stride(), leaf.dtype) for leaf in inputs])
        with torch.no_grad(), advise_on_memory(len(episodes)):
            graph = self._graphs.get(key)
            if graph is None:
                self._calls[key] += 1
                # Tracing costs as much as a dozen calls or more: not worth it for a function that is called once, nor for
                # each of the many shapes that tasks of unequal sizes come in.
                worth = 1 if not self._graphs else _CALLS_OF_ANOTHER_SHAPE
                if self._calls[key] <= worth and not self._compiled:
                    return self._function(meta, *_unflatten(inputs, structure))
                graph = self._graphs[key] = self._trace(meta, inputs, structure)
            return graph(*meta.values(), *inputs)

    def _trace(self, meta: Tensors, inputs: Sequence[Tensor], structure: Any) -> Callable[..., list[Tensor]]:
        names, leaves = tuple(meta), (*meta.values(), *inputs)

        def flat(*leaves: Tensor) -> list[Tensor]:
            parts, extra = _unflatten(leaves[len(names) :], structure)
            return self._function(dict(zip(names, leaves, strict=False)), parts, extra)

        graph = trace(flat, leaves)
        if mutates(graph):
            graph = trace(functionalize(graph), leaves)
        graph = remove_idle_operations(graph)
        if not self._compiled:
            traced: Callable[..., list[Tensor]] = graph.forward
            return traced
        try:
            compiled = compile_graph(graph, leaves)
            compiled(*leaves)
        except Exception as error:
            raise CompileError(
                f"torch.compile failed ({type(error).__name__}: {str(error).strip().splitlines()[0]}); "
                "strategy='vectorized' needs no compiler."
            ) from error
        return compiled


def _flatten(parts: Task, extra: Mapping[str, Any]) -> tuple[Sequence[Tensor], Any]:
    """The tensors of tasks and extra inputs, and how they were arranged; None where there is nothing but the four parts."""
    if not extra and type(parts[0]) is Tensor and type(parts[2]) is Tensor:
        return parts, None
    return tree_flatten((parts, extra))


def _unflatten(leaves: Sequence[Tensor], structure: Any) -> tuple[Task, Mapping[str, Any]]:
    """The inverse of `_flatten`."""
    if structure is None:
        support_x, support_y, query_x, query_y = leaves
        return (support_x, support_y, query_x, query_y), {}
    parts, noise = tree_unflatten(leaves, structure)
    return parts, noise
