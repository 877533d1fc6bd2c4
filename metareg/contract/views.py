"""What observers and pictures see of a learner and of a run, whose classes stand on higher floors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metareg.contract.config import PluginConfig
from metareg.contract.evaluation import Evaluation
from metareg.contract.splits import TEST

__all__ = ["LearnerView", "RunView"]


class LearnerView(Protocol):
    """A `metareg.MetaLearner`, as hooks see it."""

    config: PluginConfig
    """Its options, as ``learner.config.inner_steps``."""
    device: torch.device
    """Where its parameters are."""
    meta_parameters: dict[str, Tensor]
    """Every meta-parameter by name."""

    def adapt(self, x: Any, y: Tensor, steps: int | None = None) -> nn.Module:
        """A module adapted to one task: support inputs ``[examples, …]`` and targets, without a task dimension."""

    def evaluate(
        self, task_source: Any, tasks: int = 600, *, split: str = TEST, inner_steps: Sequence[int] = (0, 1, 5, 10),
        seed: int | None = None,
    ) -> Evaluation:  # fmt: skip
        """The metric over tasks, after each number of inner steps."""


class RunView(Protocol):
    """A `metareg.Run`, as observers see it."""

    path: Path
    """Its folder."""
    config: PluginConfig
    """Its complete configuration, a `metareg.RunConfig`."""
    learner: LearnerView
    """What is trained."""
    evaluation: Evaluation | None
    """The test at the end; None until then."""
