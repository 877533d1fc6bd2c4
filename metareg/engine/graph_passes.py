"""Passes over a traced graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metareg.util.torch_internals import UNSAFE_VIEW, writes_in_place

__all__ = ["mutates", "remove_idle_operations"]

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, UNSAFE_VIEW, _ATEN.expand.default)
_TRANSPOSITIONS = (_ATEN.t.default, _ATEN.transpose.int)


def remove_idle_operations(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph less the operations that give back what they were given.

    `torch.func` leaves many of them: views as the same shape, transpositions of transpositions, products with 1. Small
    tasks spend their time on the number of operations, not on arithmetic. A graph in which something is written in place
    stays as it is.
    """
    if mutates(graph):
        return graph
    for node in graph.graph.nodes:
        source = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, torch.fx.Node) or not isinstance(node.meta.get("val"), Tensor):
            continue
        if node.target in _TRANSPOSITIONS and source.target is node.target and source.args[1:] == node.args[1:]:
            node.replace_all_uses_with(source.args[0])
        elif node.target is _ATEN.detach.default or (
            (
                (node.target in _VIEWS and _has_one_layout(source.meta["val"]))
                or (node.target is _ATEN.mul.Scalar and node.args[1] == 1)
            )
            and _layout(node.meta["val"]) == _layout(source.meta["val"])
        ):
            node.replace_all_uses_with(source)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def mutates(graph: torch.fx.GraphModule) -> bool:
    """Whether something is written in place."""
    return any(writes_in_place(node.target) for node in graph.graph.nodes)


def _layout(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.shape, value.stride()


def _has_one_layout(value: Tensor) -> bool:
    """Whether a view of the same shape has the same strides too.

    A view sets that of a dimension of size 1 anew, which fake tensors do not show. No element's place depends on it, but
    products choose their kernel by it, and so the last bit of their result.
    """
    return 1 not in value.shape or value.stride() == torch.empty(value.shape, device="meta").stride()
