"""How the checks compare what plugins computed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metareg.util.torch_internals import tree_flatten, tree_map

__all__ = ["ROUNDING", "are_equal", "difference", "snapshot", "watch_global_randomness"]

ROUNDING = 1e-9
"""What rounding alone makes of two orders of summation stays below this in float64, for sums of a few hundred numbers."""


def snapshot(tree: Any) -> Any:
    """A copy that later changes in place do not reach; a module stands for its state."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        if isinstance(leaf, nn.Module):
            return {name: value.detach().clone() for name, value in leaf.state_dict().items()}
        return leaf

    return tree_map(copied, tree)


def are_equal(a: Any, b: Any) -> bool:
    """Whether two pytrees have the same structure and the same bits."""
    first, structure = tree_flatten(a)
    second, other = tree_flatten(b)
    if structure != other:
        return False
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or bool(x == y)
        for x, y in zip(first, second, strict=True)
    )


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference between two dicts of tensors relative to the largest entry, and where it is."""
    scale = max(1e-12, *(value.abs().max().item() for value in a.values()))
    worst = {name: (a[name] - b[name]).abs().max().item() / scale for name in a}
    name = max(worst, key=lambda each: worst[each] if worst[each] == worst[each] else float("inf"))
    return worst[name], name


@contextmanager
def watch_global_randomness() -> Iterator[list[str]]:
    """Restores the global random generators after the block, and says which of them it moved."""
    moved: list[str] = []
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield moved
        after = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
        if not torch.equal(before[0], after[0]):
            moved.append("torch")
        if not all(np.array_equal(x, y) for x, y in zip(before[1], after[1], strict=True)):
            moved.append("numpy")
        if before[2] != after[2]:
            moved.append("random")
    finally:
        torch.random.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
