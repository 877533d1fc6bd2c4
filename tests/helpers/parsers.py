"""Parsers for `metareg.parse_in_child`; most imitate what a library may do with a damaged file."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np

from metareg import UsageError

__all__ = ["abort", "crash", "fill", "hang", "leave", "read", "refuse", "stumble"]


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the bytes of the file, and its name."""
    return {"bytes": np.frombuffer(path.read_bytes(), np.uint8), "name": np.array([path.name])}


def refuse(path: Path) -> dict[str, np.ndarray]:
    raise UsageError(f"{path} is not for me.")


def stumble(path: Path) -> dict[str, np.ndarray]:
    raise IndexError(f"4711\nin {path}")


def crash(_path: Path) -> dict[str, np.ndarray]:
    return {"x": np.array([ctypes.string_at(0)])}


def abort(_path: Path) -> dict[str, np.ndarray]:
    os.abort()


def leave(_path: Path) -> dict[str, np.ndarray]:
    os._exit(0)


def hang(_path: Path) -> dict[str, np.ndarray]:
    while True:
        pass


def fill(_path: Path) -> dict[str, np.ndarray]:
    return {"x": np.ones(1 << 32)}
