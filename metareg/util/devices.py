"""Devices by name, and their peak memory."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metareg.errors import UsageError
from metareg.util.torch_internals import tree_map

__all__ = ["find_device", "move_tensors", "peak_memory", "reset_peak_memory", "use_deterministic_kernels"]


def find_device(name: str) -> torch.device:
    """Find a device by name; ``auto`` is a CUDA GPU if there is one, otherwise the CPU.

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


@contextmanager
def use_deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Make a block reproducible bit for bit on a GPU; torch warns if it has no deterministic kernel.

    By default, cuDNN's convolutions sum gradients in varying order, so two runs with the same seed differ.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic = cudnn


def move_tensors(tree: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """Move a pytree's tensors to a device, and convert floating-point tensors to `dtype` if it is given."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None)

    return tree_map(move, tree)


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of `peak_memory` from now on, if the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of tensors on a GPU, or of the whole process, in bytes; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else None
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None
