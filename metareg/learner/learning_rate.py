"""The learning-rate schedule of the outer optimiser."""

from __future__ import annotations

import math

from metareg.errors import UsageError
from metareg.learner.config import LearnerConfig
from metareg.printable import format_count

__all__ = ["check_schedule", "compute_learning_rate", "is_constant"]


def is_constant(config: LearnerConfig) -> bool:
    """Return whether the learning rate is the same in every step."""
    return config.lr_schedule == "constant" and config.lr_warmup_steps == 0


def compute_learning_rate(config: LearnerConfig, training_step: int) -> float:
    """Return the learning rate of a training step, which depends only on its number, so resuming does not change it.

    With W = `lr_warmup_steps`, the first W steps use the fractions 1/(W+1), …, W/(W+1) of `outer_lr`, as
    `torch.optim.lr_scheduler.LinearLR` does with ``start_factor=1/(W+1)`` and ``total_iters=W``. Then the schedule is
    that of `CosineAnnealingLR` with ``T_max = lr_schedule_steps - W``, or of `StepLR` or `MultiStepLR`, which count
    steps from the start of training.

    Args:
        config: the learner's options.
        training_step: training steps before this one.
    """
    base, warmup = config.outer_lr, config.lr_warmup_steps
    if training_step < warmup:
        return base * (training_step + 1) / (warmup + 1)
    gamma = 0.1 if config.lr_gamma is None else config.lr_gamma
    if config.lr_schedule == "cosine":
        assert config.lr_schedule_steps is not None
        part = (training_step - warmup) / (config.lr_schedule_steps - warmup)
        return base * (1 + math.cos(math.pi * min(part, 1.0))) / 2
    if config.lr_schedule == "step":
        assert config.lr_step_size is not None
        return base * gamma ** (training_step // config.lr_step_size)
    if config.lr_schedule == "multistep":
        assert config.lr_milestones is not None
        return base * gamma ** sum(training_step >= milestone for milestone in config.lr_milestones)
    return base


def check_schedule(config: LearnerConfig, steps: int) -> None:
    """Refuse to train for more steps than the schedule has, because the learning rate is 0 after them.

    Raises:
        UsageError: the schedule has fewer steps.
    """
    if config.lr_schedule == "cosine" and config.lr_schedule_steps is not None and steps > config.lr_schedule_steps:
        raise UsageError(
            f"The cosine schedule ends at step {config.lr_schedule_steps} (lr_schedule_steps) with a learning rate of 0; it "
            f"cannot train for {format_count(steps, 'step')}."
        )
