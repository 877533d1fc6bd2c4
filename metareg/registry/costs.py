"""The order of an algorithm's outer derivative, and its cost relative to MAML (benchmarks/family.py)."""

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
    """A training step and an evaluation relative to those of MAML with the same model; all values are ratios."""

    time: float
    """CPU time of a training step."""
    memory: float
    """Peak memory of a training step."""
    state: float
    """Numbers carried from one inner step to the next, per adapted parameter."""
    learned: float
    """Additional numbers learned in the outer loop, per parameter of the model."""
    evaluation_time: float
    """CPU time of an evaluation."""
    evaluation_memory: float
    """Peak memory of an evaluation, in bytes of live tensors."""

    def __str__(self) -> str:
        step = f"a step {self.time:.2f} × the time, {self.memory:.2f} × the memory"
        return f"{step}; an evaluation {self.evaluation_time:.2f} × and {self.evaluation_memory:.2f} ×"


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
