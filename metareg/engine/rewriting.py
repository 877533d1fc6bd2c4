"""Rewriting of traced graphs to fewer and cheaper operations with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from metareg.engine.products import VIEWS
from metareg.util.torch_internals import UNSAFE_VIEW, returns_view, writes_in_place

__all__ = ["PRODUCTS", "call_torch_functions", "remove_idle_operations", "writes"]

_ATEN = torch.ops.aten
_TRANSPOSITIONS = (_ATEN.t.default, _ATEN.transpose.int)
_MOVES_NOTHING = (*VIEWS, *_TRANSPOSITIONS)
PRODUCTS = (_ATEN.mul.Tensor, _ATEN.mul.Scalar)
"""Products of a tensor and a tensor or a number, element by element."""
_FUNCTIONS: dict[Any, Callable[..., Any] | str] = {
    _ATEN.add.Tensor: torch.add, _ATEN.sub.Tensor: torch.sub, _ATEN.mul.Tensor: torch.mul, _ATEN.mul.Scalar: torch.mul,
    _ATEN.div.Tensor: torch.div, _ATEN.div.Scalar: torch.div, _ATEN.neg.default: torch.neg, _ATEN.exp.default: torch.exp,
    _ATEN.tanh.default: torch.tanh, _ATEN.relu.default: torch.relu, _ATEN.mm.default: torch.mm,
    _ATEN.bmm.default: torch.bmm, _ATEN.t.default: torch.t, _ATEN.transpose.int: torch.transpose,
    _ATEN.select.int: torch.select, _ATEN.sum.dim_IntList: torch.sum, _ATEN.mean.dim: torch.mean,
    _ATEN.view.default: torch.reshape, UNSAFE_VIEW: torch.reshape, _ATEN.expand.default: "expand",
}  # fmt: skip
"""Torch's functions and methods for the operations that small models consist of.

Fake tensors sometimes have another order in memory than real ones, such as gradients of weights for channels-last images;
`reshape` copies where a view is impossible."""


def remove_idle_operations(graph: GraphModule) -> GraphModule:
    """Remove operations whose result another node already has.

    `torch.func` leaves many of them: views with the same shape, transposes of transposes, products with 1, the same view
    twice. Signs become part of factors. The time of small tasks depends on the number of operations, not on arithmetic. A
    graph with in-place operations stays as it is.
    """
    if writes(graph):
        return graph
    views: dict[Hashable, Node] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or not node.args or not isinstance(node.meta.get("val"), Tensor):
            continue
        _fold_sign(node)
        equal = _find_equal(node)
        if equal is None and node.target in _MOVES_NOTHING and not node.kwargs:
            equal = views.setdefault(_describe(node), node)
        if equal is not None and equal is not node:
            node.replace_all_uses_with(equal)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def call_torch_functions(graph: GraphModule) -> GraphModule:
    """Call torch's functions instead of the operations behind them, in place.

    Python calls them in two thirds of the time, a microsecond less.
    """
    for node in graph.graph.nodes:
        function = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
        if function is not None and not node.kwargs:
            node.target = function
            node.op = "call_method" if isinstance(function, str) else "call_function"
    graph.recompile()
    return graph


def writes(graph: GraphModule) -> bool:
    """Return whether the graph has in-place operations."""
    return any(writes_in_place(node.target) for node in graph.graph.nodes)


def _fold_sign(node: Node) -> None:
    """Multiply by the negative number instead of multiplying the negative."""
    if node.target not in PRODUCTS:
        return
    source, factor = node.args
    if isinstance(factor, float) and isinstance(source, Node) and source.target is _ATEN.neg.default:
        value = source.meta["val"]
        if value.is_floating_point() and _has_one_layout(value):  # integers wrap around
            node.args = (source.args[0], -factor)


def _find_equal(node: Node) -> Node | None:
    """Return the argument of an operation that has the same value and memory layout as its result, if there is one."""
    source = node.args[0]
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    if node.target is _ATEN.detach.default:
        return source
    if node.target in _TRANSPOSITIONS and source.target is node.target and source.args[1:] == node.args[1:]:
        return cast("Node", source.args[0])
    value = source.meta["val"]
    if _layout(node.meta["val"]) != _layout(value) or not _has_one_layout(value):
        return None
    if node.target in PRODUCTS:
        factor = node.args[1]
        is_idle = (factor == 1 or _is_one(factor)) and not value.is_complex() and not _is_returned(node)
        return source if is_idle else None
    return source if node.target in VIEWS else None


def _is_returned(node: Node) -> bool:
    """Return whether a graph returns a node's memory, which must then be no other tensor's: users write to results."""
    return any(user.op == "output" or (_can_be_view(user) and _is_returned(user)) for user in node.users)


def _can_be_view(node: Node) -> bool:
    """Return whether the result of an operation may share memory with an argument."""
    return node.target in VIEWS or returns_view(node.target)


def _is_one(factor: Any) -> bool:
    """Return whether a node is a tensor of ones."""
    while isinstance(factor, Node) and factor.target in VIEWS:
        factor = factor.args[0]
    return isinstance(factor, Node) and factor.target is _ATEN.ones_like.default


def _describe(node: Node) -> Hashable:
    """Describe an operation and its arguments."""
    source, *others = node.args
    return node.target, source, *(tuple(each) if isinstance(each, list) else each for each in others)


def _layout(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.shape, value.stride()


def _has_one_layout(value: Tensor) -> bool:
    """Return whether a view with the same shape always has the same strides.

    A view resets the stride of a dimension of size 1, which fake tensors do not show. No element moves, but matrix products
    choose their kernel by strides, so the last bit of the result can change.
    """
    return 1 not in value.shape or value.stride() == torch.empty(value.shape, device="meta").stride()
