"""What augmenters draw at random in training, with the type and device of the parameters that it is for.

A draw is a function of the learner's seed, the training step and the task's number in the batch, whichever process or
strategy runs the task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metareg.engine.stages import Stages
from metareg.learner.config import LearnerConfig
from metareg.util.devices import move_tensors

__all__ = ["draw_batch_noise", "draw_task_noise"]


def draw_task_noise(
    stages: Stages, config: LearnerConfig, params: Mapping[str, Tensor], training_step: int, tasks: range
) -> list[dict[str, Any]]:
    """What the augmenters draw for some tasks of a batch, by augmenter; an empty list where none draws anything.

    Args:
        stages: the hooks.
        config: the learner's seed and number of inner steps.
        params: the parameters that the inner loop adapts.
        training_step: training steps before this batch.
        tasks: the tasks' numbers in the batch.
    """
    if not stages.draws_noise:
        return []
    shapes = {name: tuple(value.shape) for name, value in params.items()}
    drawn = (stages.draw_noise("task", shapes, config.inner_steps, config.seed, training_step, task) for task in tasks)
    return [_match(noise, params) for noise in drawn]


def draw_batch_noise(
    stages: Stages, config: LearnerConfig, meta: Mapping[str, Tensor], training_step: int
) -> dict[str, Any]:
    """What the augmenters draw for the gradient of a whole batch, by augmenter.

    Args:
        stages: the hooks.
        config: the learner's seed and number of inner steps.
        meta: every meta-parameter by name.
        training_step: training steps before this batch.
    """
    shapes = {name: tuple(value.shape) for name, value in meta.items()}
    return _match(stages.draw_noise("batch", shapes, config.inner_steps, config.seed, training_step), meta)


def _match(noise: Mapping[str, Any], params: Mapping[str, Tensor]) -> dict[str, Any]:
    """The noise on the device of the parameters, and floating-point numbers in their type."""
    like = next(iter(params.values()))
    return {name: move_tensors(drawn, like.device, like.dtype) for name, drawn in noise.items() if drawn is not None}
