"""Devices by name, and the memory that was used on them."""

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


@contextmanager
def use_deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Let a block repeat itself on a GPU to the last bit; where torch has no kernel that does, it warns.

    By default cuDNN's convolutions add their gradients up in any order, so that two runs of one seed differ.
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
