"""Pauses of Python's collector of cyclic garbage, while packages are imported and graphs are traced."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collect_no_garbage", "own_collector", "pause_collector"]


def own_collector() -> None:
    """Say that this process is the command's or a worker's, so that `pause_collector` may change its collector."""
    gc.freeze()


@contextmanager
def collect_no_garbage() -> Iterator[None]:
    """Collect no garbage in a block that creates many lasting objects, which the collector would visit again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def pause_collector() -> Iterator[None]:
    """Collect no garbage while a block imports, and exempt what it imported from later collections.

    Imported objects live as long as the process. torch and its compiler create half a million, which the collector
    visits again and again: without it, the imports of a run take 2.5 s of CPU instead of 3.1. In a process that is not
    metareg's own, this does nothing, because the program's garbage would be exempt as well.
    """
    if not (gc.isenabled() and gc.get_freeze_count()):
        yield
        return
    with collect_no_garbage():
        try:
            yield
        finally:
            gc.freeze()
