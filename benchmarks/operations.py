"""Measures the CPU time and the floating-point operations of each kind of operation in a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import flop_registry

from metareg.util.torch_internals import OperationMode

KINDS = {
    "convolutions": ("convolution", "convolution_backward"),
    "BatchNorm with pooling and ReLU": ("block", "block_backward", "block_sums", "block_gather", "block_scatter"),
    "BatchNorm": ("native_batch_norm", "native_batch_norm_backward", "batch_norm_update_stats", "addcmul"),
    "pooling": ("max_pool2d_with_indices", "max_pool2d_with_indices_backward", "gather"),
    "ReLU": ("relu", "threshold_backward"),
}
"""Kinds of operations. The others are mostly sums and products of maps, for BatchNorm's second derivative."""


@dataclass
class Share:
    """The cost of one kind of operation."""

    calls: int = 0
    seconds: float = 0.0
    """CPU time."""
    flops: int = 0
    """Of convolutions and matrix products; a multiply-add counts as two."""


class OperationClock(OperationMode):
    """Counts and times the operations in a block by kind, excluding its own overhead."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: dict[str, Share] = defaultdict(Share)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        outputs = func(*args, **(kwargs or {}))
        seconds = time.process_time() - start
        name = func.overloadpacket.__name__
        share = self.shares[next((kind for kind, names in KINDS.items() if name in names), "others")]
        share.calls += 1
        share.seconds += seconds
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            share.flops += count(*args, **(kwargs or {}), out_val=outputs)
        return outputs


def time_operations(step: Callable[[], object], rounds: int) -> dict[str, Share]:
    """Return the cost of each kind of operation in one step, in the fastest of some rounds."""
    found = []
    for _ in range(rounds):
        with OperationClock() as clock:
            step()
        found.append(dict(clock.shares))
    return min(found, key=lambda shares: sum(share.seconds for share in shares.values()))
