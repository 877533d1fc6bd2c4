"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST = 1 << 30


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for later tensors instead of returning it to the system each time.

    A convolutional training step on a CPU repeatedly frees and allocates the same megabytes; otherwise, the system maps
    and clears their pages each time, which takes 5 to 12 % of the step. The command does this. Call it once at the
    start of your own program: it affects the whole process.

    Returns:
        Whether the C library supports it; Linux's glibc does.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_MMAP_THRESHOLD: _LARGEST, _TRIM_THRESHOLD: _LARGEST, _TOP_PAD: 64 << 20}
    taken = {parameter: bool(mallopt(parameter, value)) for parameter, value in settings.items()}
    if not taken[_MMAP_THRESHOLD]:  # older versions accept at most half a heap
        taken[_MMAP_THRESHOLD] = bool(mallopt(_MMAP_THRESHOLD, 32 << 20))
    return all(taken.values())
