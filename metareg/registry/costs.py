"""The order of an algorithm's outer derivative, and the cost of a step relative to MAML (benchmarks/family.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from metareg.registry.dispatch import list_hooks
from metareg.registry.plugins import Entry

__all__ = ["PATH", "SETTING", "Cost", "describe_order", "find_cost"]

PATH = Path(__file__).with_name("costs.json")
"""The measured costs by entry-point target, and the machine that measured them."""

SETTING = "5-way 1-shot images, 4 tasks, 5 inner steps, vectorized"
"""The setting of the measurements."""


@dataclass(frozen=True)
class Cost:
    """A training step relative to one of MAML with the same model; all values are ratios."""

    time: float
    """Its CPU time."""
    memory: float
    """Its peak memory."""
    state: float
    """Numbers carried from one inner step to the next, per adapted parameter."""
    learned: float
    """Additional numbers learned in the outer loop, per parameter of the model."""

    def __str__(self) -> str:
        return f"{self.time:.2f} × the time, {self.memory:.2f} × the memory"


def find_cost(entry: Entry) -> Cost | None:
    """Return the measured cost of an algorithm; None if it was not measured."""
    figures = json.loads(PATH.read_text("utf-8"))["figures"]
    return Cost(**figures[entry.target]) if entry.target in figures else None


def describe_order(cls: type) -> str:
    """Describe the order of an algorithm's outer derivative, from its hooks and recommendations."""
    hooks = list_hooks(cls)
    if "outer_gradient" in hooks:
        return "its own meta-gradient, not through the inner loop"
    if "inner_loss" in hooks:
        return "second; with first_order its loss learns nothing"
    if getattr(cls, "recommended", {}).get("first_order"):
        return "first recommended, or second"
    return "second, or first with first_order"
