"""What to do when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from metareg.errors import MetaregError

__all__ = ["advise_on_memory"]


@contextmanager
def advise_on_memory(tasks: int) -> Iterator[None]:
    """Turn running out of memory into the advice that helps."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        smaller = f"chunk={max(1, tasks // 2)} takes fewer tasks at once" if tasks > 1 else "take a smaller batch"
        raise MetaregError(
            f"Out of memory with {tasks} task{'s' * (tasks > 1)} at once; {smaller}, and memory='recompute' keeps "
            "only the parameters of each inner step."
        ) from error
