"""The splits: what a task source keeps apart, and what users call it."""

from __future__ import annotations

__all__ = ["SPLITS", "TEST", "TRAIN", "VALIDATION", "find_split"]

SPLITS = TRAIN, VALIDATION, TEST = "train", "validation", "test"

_USUAL_NAMES = {
    **{name: name for name in SPLITS}, "training": TRAIN, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION,
    "testing": TEST,
}  # fmt: skip


def find_split(name: str) -> str | None:
    """The split with a common name such as ``Val`` or ``dev``, in upper or lower case; None for other names."""
    return _USUAL_NAMES.get(name.casefold())
