"""How a process of metareg's own gets its memory from the system."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST = 1 << 30


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors free for the next ones, instead of giving it back to the system each time.

    A convolutional training step on a CPU frees and takes the same megabytes over and over; otherwise the system maps and
    clears their pages anew, 5 to 12 % of the step's time. The command does it; a program of one's own calls it once, at its
    start, for it holds for everything in the process.

    Returns:
        Whether the C library can be told so; that of Linux (glibc) can.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_MMAP_THRESHOLD: _LARGEST, _TRIM_THRESHOLD: _LARGEST, _TOP_PAD: 64 << 20}
    taken = {parameter: bool(mallopt(parameter, value)) for parameter, value in settings.items()}
    if not taken[_MMAP_THRESHOLD]:  # older versions take half of a heap at most
        taken[_MMAP_THRESHOLD] = bool(mallopt(_MMAP_THRESHOLD, 32 << 20))
    return all(taken.values())
