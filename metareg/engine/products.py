"""Products of matrices in traced graphs, replaced by cheaper operations."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from metareg.util.torch_internals import UNSAFE_VIEW

__all__ = ["VIEWS", "simplify_products"]

_ATEN = torch.ops.aten
VIEWS = (_ATEN.view.default, UNSAFE_VIEW, _ATEN.expand.default)
"""Operations that give a tensor another shape without moving its elements."""


def simplify_products(graph: GraphModule) -> None:
    """Replace products of matrices by cheaper operations with the same values up to rounding.

    A mean over tasks of products becomes one product that sums over tasks, so that no matrix per task is written: most of an
    outer gradient's memory traffic, where the inner loop does not change a weight. A product with a row or a column becomes
    element-wise operations, which the compiler fuses with their neighbours.

    Args:
        graph: a graph of aten operations with the values of fake tensors, in which nothing is written in place.
    """
    for node in graph.graph.find_nodes(op="call_function", target=_ATEN.mean.dim):
        source, *options = _arguments(node)
        if options == [[0]] and not node.kwargs:
            with graph.graph.inserting_before(node):
                _replace(node, _average(source))
    for node in graph.graph.find_nodes(op="call_function", target=_ATEN.mm.default):
        with graph.graph.inserting_before(node):
            _replace(node, _multiply_elements(*_arguments(node)))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _average(tasks: Node) -> Node | None:
    """Compute the mean of ``[tasks, …]`` without each task's values; None if something else needs these."""
    if len(tasks.users) > 1:
        return None
    if _calls(tasks, _ATEN.add.Tensor):
        left, right = _arguments(tasks)
        return _average_sum(left, right, _shape(tasks))
    source, (count, *shape) = _skip_views(tasks), _shape(tasks)
    total = None
    if _calls(source, _ATEN.bmm.default) and _shape(source) == _shape(tasks):
        total = _multiply_over_tasks(*_arguments(source))
    elif _calls(source, _ATEN.sum.dim_IntList) and _shape(source)[0] == count:
        value, dims, *_ = _arguments(source)
        if 0 not in dims:
            total = _call(_ATEN.view.default, _call(_ATEN.sum.dim_IntList, value, [0, *dims]), shape)
    return None if total is None else _call(_ATEN.div.Scalar, total, count)


def _average_sum(left: Any, right: Any, shape: torch.Size) -> Node | None:
    """Compute the mean of ``left + right`` over tasks, as `_average` does."""
    terms = (left, right)
    if not all(isinstance(term, Node) and _shape(term) == shape for term in terms):
        return None
    means = [_average(term) for term in terms]
    if means == [None, None]:
        return None
    first, second = (mean or _call(_ATEN.mean.dim, term, [0]) for mean, term in zip(means, terms, strict=True))
    return _call(_ATEN.add.Tensor, first, second)


def _multiply_over_tasks(left: Node, right: Node) -> Node | None:
    """Sum the products of ``[tasks, rows, inner]`` and ``[tasks, inner, columns]`` over tasks.

    None if `left` is not the transposition of a tensor, as it is in the gradient of a weight: it would have to be copied.
    """
    transposition = _skip_views(left)
    if not _calls(transposition, _ATEN.transpose.int) or _shape(transposition) != _shape(left):
        return None
    source, *dims = _arguments(transposition)
    if sorted(dims) != [1, 2]:
        return None
    left, right = (_call(_ATEN.reshape.default, each, [-1, _shape(each)[2]]) for each in (source, right))
    return _call(_ATEN.mm.default, _call(_ATEN.t.default, left), right)


def _multiply_elements(left: Node, right: Node) -> Node | None:
    """Compute a product of matrices by element-wise products and sums; None if neither is a row or a column."""
    (rows, inner), columns = _shape(left), _shape(right)[1]
    if inner == 1:
        return _call(_ATEN.mul.Tensor, left, right)
    if columns == 1:
        return _call(_ATEN.sum.dim_IntList, _call(_ATEN.mul.Tensor, left, _call(_ATEN.t.default, right)), [1], True)
    if rows == 1:
        return _call(_ATEN.sum.dim_IntList, _call(_ATEN.mul.Tensor, _call(_ATEN.t.default, left), right), [0], True)
    return None


def _skip_views(node: Node) -> Node:
    """Return the tensor behind views that keep all of its elements, if nothing else needs it."""
    while node.target in VIEWS and len(node.users) == 1:
        (source, *_) = _arguments(node)
        if _shape(source).numel() != _shape(node).numel() or len(source.users) > 1:
            break
        node = source
    return node


def _calls(node: Node, function: Any) -> bool:
    """Return whether a node calls a function without options such as a factor of the second term or another type."""
    return node.target is function and not node.kwargs


def _call(function: Any, source: Node, *args: Any) -> Node:
    """Add a call of a function to the graph of its first argument, with its value for fake tensors."""
    node = source.graph.call_function(function, (source, *args))
    node.meta["val"] = function(*torch.fx.map_arg(node.args, lambda each: each.meta["val"]))
    return node


def _replace(node: Node, new: Node | None) -> None:
    if new is not None:
        node.replace_all_uses_with(new)


def _arguments(node: Node) -> Any:
    return node.args


def _shape(node: Node) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape
