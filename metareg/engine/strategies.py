"""The strategies that run the tasks of a batch, and the choice of `auto`."""

from __future__ import annotations

from typing import Literal

import torch

from metareg.engine.objective import TaskFunctions
from metareg.printable import format_count
from metareg.util.native import find_compiler

__all__ = ["ONE_BY_ONE", "Strategy", "choose_strategy", "has_convolutions"]

Strategy = Literal["serial", "traced", "vectorized", "compiled"]
ONE_BY_ONE = ("serial", "traced")
"""Strategies that run one task after the other."""

_STEPS_THAT_PAY = 5_000
"""The number of training steps from which compiling saves more time than it takes.

Both times grow with the number of inner steps and with slower processors, so one number serves all (docs/benchmarks.md).
It is fixed, so that the same run always has the same strategy, which times measured on a machine would not guarantee.
"""
_STEPS_THAT_PAY_ON_CUDA = 200_000
"""The same where CUDA graphs launch the kernels: compiling saves little more, and takes longer."""


def choose_strategy(
    functions: TaskFunctions, device: torch.device, tasks: int, steps: int, stackable: bool
) -> tuple[Strategy, str]:
    """Return the strategy that ``"auto"`` stands for, and why: it depends on the run's settings, never on measured times.

    Args:
        functions: the functions to run.
        device: the device that runs them.
        tasks: the number of tasks per batch.
        steps: the number of training steps.
        stackable: whether the tasks can be stacked.
    """
    if not stackable:
        return "serial", "the task's episodes cannot be stacked"
    convolves = has_convolutions(functions)
    if device.type == "cpu" and convolves:
        return "traced", "convolutional tasks are slower in one batch than one by one on a CPU"
    if tasks == 1:
        return "vectorized", "there is one task per batch"
    if convolves:
        return "vectorized", f"compiling convolutions takes minutes on {device.type}"
    steps_that_pay = _STEPS_THAT_PAY_ON_CUDA if device.type == "cuda" else _STEPS_THAT_PAY
    if steps < steps_that_pay:
        return "vectorized", f"too few steps to pay for compiling: {steps:,} of {steps_that_pay:,}"
    if device.type == "cpu" and find_compiler() is None:
        return "vectorized", "compiling would pay off, but there is no C++ compiler (g++ or clang++)"
    return "compiled", f"{format_count(steps, 'step')} pay for compiling"


def has_convolutions(functions: TaskFunctions) -> bool:
    """Return whether the model has weights of two-dimensional convolutions."""
    return any(parameter.dim() >= 4 for parameter in functions.model.module.parameters())
