"""The names of the splits: what a task source keeps apart."""

from __future__ import annotations

__all__ = ["SPLITS", "TEST", "TRAIN", "VALIDATION"]

SPLITS = TRAIN, VALIDATION, TEST = "train", "validation", "test"
