"""The splits of a task source, and the names that users give them."""

from __future__ import annotations

__all__ = ["SPLITS", "TEST", "TRAIN", "VALIDATION", "find_split"]

SPLITS = TRAIN, VALIDATION, TEST = "train", "validation", "test"

_USUAL_NAMES = {
    **{name: name for name in SPLITS}, "training": TRAIN, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION,
    "testing": TEST,
}  # fmt: skip


def find_split(name: str) -> str | None:
    """Find the split with a common name such as ``Val`` or ``dev``, ignoring case; None for other names."""
    return _USUAL_NAMES.get(name.casefold())
