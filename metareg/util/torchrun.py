"""This process's rank among those that torchrun started, read from the environment without importing torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from metareg.errors import UsageError

__all__ = ["RankInfo", "is_follower", "is_launched", "read_rank"]


@dataclass(frozen=True)
class RankInfo:
    """The rank of a process."""

    rank: int = 0
    """The number of the process, from 0."""
    size: int = 1
    """The number of processes."""
    local_rank: int = 0
    """Its number among the processes of its machine."""


def is_launched() -> bool:
    """Return whether a launcher started this process, alone or with others."""
    # Some schedulers set only one of the two for their own purposes.
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def read_rank() -> RankInfo:
    """Read the rank from torchrun's variables RANK, WORLD_SIZE and LOCAL_RANK; without them, there is one process.

    Raises:
        UsageError: the variables contradict each other.
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
    """Return whether another process writes and prints for this one."""
    try:
        return read_rank().rank > 0
    except UsageError:
        return False
