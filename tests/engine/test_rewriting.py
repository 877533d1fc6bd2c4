"""Rewritten graphs compute the same bits with fewer operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metareg.engine.rewriting import call_torch_functions, remove_idle_operations
from metareg.util.torch_internals import trace

X, Y = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)), torch.arange(60).view(4, 3, 5)


def negate(x: Tensor, y: Tensor) -> list[Tensor]:
    return [x - 0.1 * (-x), (-x) * 0.25, (-x) * y, -y * 2.0, -y.to(torch.uint8) * 0.5]


def multiply_by_one(x: Tensor, y: Tensor) -> list[Tensor]:
    ones = torch.ones_like(x.mean([1, 2])).view(4, 1, 1)
    return [(x * ones).sin(), (y * torch.ones_like(y)).neg(), (x.sin() * 1).sin(), (y.neg() * 1.0).sin()]


def multiply_by_more(x: Tensor, y: Tensor) -> list[Tensor]:
    """Products with ones that change the shape, the type or the layout."""
    ones = torch.ones_like(x)
    return [x.mean([0], True) * ones, y * ones, x.transpose(1, 2)[:, :1] * ones.transpose(1, 2)[:, :1]]


def view_twice(x: Tensor, y: Tensor) -> list[Tensor]:
    one, other = x.transpose(1, 2), x.transpose(1, 2)
    return [one.bmm(x) + other.bmm(x), x.view(12, 5).mm(x.view(12, 5).t()), x.transpose(0, 1) + y.transpose(0, 1)]


@pytest.mark.parametrize(
    ("function", "removed"), [(negate, 2), (multiply_by_one, 7), (multiply_by_more, 0), (view_twice, 2)]
)
def test_fewer_operations_give_the_same_bits(function: Callable[[Tensor, Tensor], list[Tensor]], removed: int) -> None:
    graph = trace(function, (X, Y))
    before = len(graph.graph.nodes)
    graph = remove_idle_operations(graph)
    assert before - len(graph.graph.nodes) == removed
    for _ in range(2):
        for found, expected in zip(graph(X, Y), function(X, Y), strict=True):
            assert found.dtype == expected.dtype
            assert found.stride() == expected.stride()
            assert torch.equal(found, expected)
        graph = call_torch_functions(graph)


def test_results_share_no_memory_that_they_did_not_share_before() -> None:
    """Optimisers write to meta-parameters, and users to gradients."""

    def return_products(x: Tensor, y: Tensor) -> list[Tensor]:
        sine = x.sin()
        return [x * 1.0, (x * torch.ones_like(x)).view(60), sine, sine * 1.0, y * 1]

    graph = call_torch_functions(remove_idle_operations(trace(return_products, (X, Y))))
    addresses = [value.data_ptr() for value in (X, Y, *graph(X, Y))]
    assert len(set(addresses)) == len(addresses)


def test_torchs_functions_are_those_behind_the_operations() -> None:
    def use_all(x: Tensor, y: Tensor) -> list[Tensor]:
        product = x.bmm(x.transpose(1, 2))
        return [
            x + y, x + 1, torch.add(x, y, alpha=2), x - y, y - 2.5, x * y, y * 2, x / y, y / 2, -y, y.exp(), x.tanh(),
            x.relu(), x[0].mm(x[0].t()), product, x.sum([1], True), y.sum([0, 1]), x.mean([-1]), x.view(-1),
            x[1].expand(2, 3, 5), torch.sum(y, [0], dtype=torch.float64),
        ]  # fmt: skip

    graph = call_torch_functions(trace(use_all, (X, Y)))
    called = {node.target for node in graph.graph.nodes}
    assert {torch.add, torch.mul, torch.bmm, torch.sum, torch.reshape, "expand"} <= called
    for found, expected in zip(graph(X, Y), use_all(X, Y), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
