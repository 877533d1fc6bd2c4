"""Products in traced graphs: cheaper ones, with the same values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from metareg.engine.products import simplify_products
from metareg.util.torch_internals import trace

ATEN = torch.ops.aten


def sum_over_tasks(x: Tensor, y: Tensor) -> Tensor:
    """The shared gradient of a weight and its bias, in several terms."""
    one, other, third = ((factor * x).transpose(1, 2).bmm(y) for factor in (1.0, 2.0, 3.0))
    biases = x.sum([1], True).view(5, 4) + y.sum([1], True).view(5, 6)[:, :4]
    return (one + (other + third.sin())).mean([0]) + biases.mean([0]).unsqueeze(1)


def keep_tasks(x: Tensor, y: Tensor) -> Tensor:
    """Products that are needed for each task, that have a factor, or whose tasks a view has moved."""
    needed = x.transpose(1, 2).bmm(y)
    scaled = needed.add((2 * x).transpose(1, 2).bmm(y), alpha=-3.0)
    moved = x.transpose(1, 2).bmm(y).view(4, 5, 6)
    sums = x.reshape(10, 2, 3).sum([1]).view(5, 6)
    return needed.mean([0]) + scaled.mean([0]) + moved.mean([0]).sum() + sums.mean([0]).sum()


def multiply_vectors(x: Tensor, y: Tensor) -> Tensor:
    column, row, matrix = x[0, :, :1], y[0, :1], y[0]
    return column.mm(row) + matrix.mm(row.t()) + column.t().mm(matrix)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (sum_over_tasks, {ATEN.mm.default: 2, ATEN.bmm.default: 1}),
        (keep_tasks, {ATEN.bmm.default: 3}),
        (multiply_vectors, {}),
    ],
)
def test_products_change_but_not_values(function: Callable[[Tensor, Tensor], Tensor], expected: dict[Any, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 3, size, generator=generator, dtype=torch.float64) for size in (4, 6))
    graph = trace(function, [x, y])
    simplify_products(graph)
    operations = Counter(node.target for node in graph.graph.nodes)
    assert {name: operations[name] for name in (ATEN.mm.default, ATEN.bmm.default) if operations[name]} == expected
    torch.testing.assert_close(graph(x, y), function(x, y), rtol=1e-12, atol=1e-12)
