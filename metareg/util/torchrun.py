"""This process's place among those that torchrun started together. Reads the environment only, and needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from metareg.errors import UsageError

__all__ = ["RankInfo", "is_follower", "is_launched", "read_rank"]


@dataclass(frozen=True)
class RankInfo:
    """One of some processes."""

    rank: int = 0
    """Its number."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number among those of its machine."""


def is_launched() -> bool:
    """Whether a launcher started this process, be it as one of several or alone."""
    # Some schedulers set one of the two for purposes of their own; only both are an order to work together.
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def read_rank() -> RankInfo:
    """The place that torchrun's variables RANK, WORLD_SIZE and LOCAL_RANK give; the only one where they are not set.

    Raises:
        UsageError: they make no sense.
    """
    if not is_launched():
        return RankInfo()
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
    except ValueError:
        rank, size, local_rank = -1, 0, -1
    if not 0 <= rank < size or local_rank < 0:
        given = ", ".join(f"{name}={os.environ.get(name)!r}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        raise UsageError(
            f"The environment variables {given} do not describe one of several processes; torchrun sets them, and "
            "without them there is one process."
        )
    return RankInfo(rank, size, local_rank)


def is_follower() -> bool:
    """Whether another process speaks for this one too."""
    try:
        return read_rank().rank > 0
    except UsageError:
        return False
