"""Devices by name, and the memory that was used on them."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metareg.errors import UsageError
from metareg.util.torch_internals import tree_map

__all__ = ["find_device", "move_tensors", "peak_memory", "reset_peak_memory"]


def find_device(name: str) -> torch.device:
    """The device that a user named; ``auto`` is a CUDA GPU where there is one.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise UsageError(f"There is no device '{name}' here; there is {', '.join(available)}.") from error
    return device


def move_tensors(tree: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """A pytree with its tensors on a device, floating-point ones as `dtype` where one is given."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None)

    return tree_map(move, tree)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` measure from now on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that tensors took on a GPU, or that the whole process took; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else None
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None
