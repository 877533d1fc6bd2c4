"""How the tasks of a batch are run, and which way is chosen where the user leaves it open."""

from __future__ import annotations

import os
import shutil
from typing import Literal

import torch

from metareg.engine.objective import TaskFunctions
from metareg.printable import format_count

__all__ = ["ONE_BY_ONE", "Strategy", "choose_strategy", "find_compiler"]

Strategy = Literal["serial", "traced", "vectorized", "compiled"]
ONE_BY_ONE = ("serial", "traced")
"""Strategies that run one task after the other."""

_STEPS_THAT_PAY = 10_000
"""Training steps from which compiling costs less than it saves.

Compiling and saving are both CPU time and grow with the number of inner steps and on a slower processor, so one number
serves all (docs/benchmarks.md). The same run always has the same strategy, which costs measured on a machine would not give.
"""


def choose_strategy(
    functions: TaskFunctions, device: torch.device, tasks: int, steps: int, stackable: bool
) -> tuple[Strategy, str]:
    """What ``strategy="auto"`` runs, and why; a function of the run's settings, never of a clock.

    Args:
        functions: what is to be run.
        device: where.
        tasks: tasks per batch.
        steps: training steps that there will be.
        stackable: whether the tasks can be stacked.
    """
    if not stackable:
        return "serial", "the task's episodes cannot be stacked"
    convolves = any(p.dim() >= 4 for p in functions.model.module.parameters())
    if device.type == "cpu" and convolves:
        return "traced", "convolutional tasks are slower in one batch than one by one on a CPU"
    if tasks == 1:
        return "vectorized", "there is one task per batch"
    if convolves:
        return "vectorized", f"compiling convolutions takes minutes on {device.type}"
    if steps < _STEPS_THAT_PAY:
        return "vectorized", f"too few steps to pay for compiling: {steps:,} of {_STEPS_THAT_PAY:,}"
    if device.type == "cpu" and find_compiler() is None:
        return "vectorized", "compiling would pay off, but there is no C++ compiler (g++ or clang++)"
    return "compiled", f"{format_count(steps, 'step')} pay for compiling"


def find_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU; None where there is none."""
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)
