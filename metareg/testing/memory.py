"""The peak memory of a computation, counted in bytes of live tensors, which no allocator blurs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metareg.util.torch_internals import OperationMode, tree_leaves

__all__ = ["measure_peak"]


def measure_peak(run: Callable[[], object]) -> int:
    """Return the largest number of bytes that tensors created during `run` have at the same time."""
    with _LiveTensors() as live:
        run()
    return live.peak


class _LiveTensors(OperationMode):  # type: ignore[misc]
    """Counts the bytes of the tensors that operations inside the block create, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for each in tree_leaves(outputs):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        self.peak = max(self.peak, self._now)
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def forget(_: Any) -> None:
            self._now -= size
            del self._known[key]

        self._now += size
        self._known[key] = weakref.ref(storage, forget)
