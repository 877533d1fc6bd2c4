"""What hooks see of a task, a learner and a run, whose classes stand on higher floors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metareg.contract.config import PluginConfig
from metareg.contract.evaluation import Evaluation
from metareg.contract.splits import TEST

__all__ = ["LearnerView", "RunView", "TaskView"]

Tensors = dict[str, Tensor]


class TaskView(Protocol):
    """One task as pure functions, without a task dimension; the argument `task` of the stages.

    `params` are values of any model parameters by name; parameters that are left out have the values of the
    meta-parameters.
    """

    @property
    def support_x(self) -> Any:
        """Support inputs ``[examples, …]``."""

    @property
    def support_y(self) -> Tensor:
        """Support targets ``[examples]`` or ``[examples, outputs]``."""

    @property
    def query_x(self) -> Any:
        """Query inputs ``[query, …]``; None if there are none (`MetaLearner.adapt`).

        Raises:
            PluginError: used in an inner stage, but no plugin of the run declares ``transductive = True``.
        """

    @property
    def query_y(self) -> Tensor:
        """Query targets, in the outer stages.

        Raises:
            PluginError: used in an inner stage.
        """

    @property
    def body_names(self) -> tuple[str, ...]:
        """The names of the feature extractor's parameters."""

    @property
    def head_names(self) -> tuple[str, ...]:
        """The names of the head's parameters."""

    @property
    def output_layer(self) -> tuple[str, str | None]:
        """The names of the weight ``[outputs, inputs]`` and the bias ``[outputs]`` of the head's last layer.

        Raises:
            UsageError: the head does not end in an `nn.Linear`.
        """

    def body(self, params: Tensors, x: Any) -> Tensor:
        """Features of inputs."""

    def head(self, params: Tensors, features: Tensor) -> Tensor:
        """The outputs for features."""

    def embed(self, params: Tensors, features: Tensor) -> Tensor:
        """The inputs of the head's last layer ``[examples, inputs]``, for the body's features."""

    def outputs(self, params: Tensors, x: Any) -> Tensor:
        """The model's outputs for inputs."""

    def support_features(self, params: Tensors) -> Tensor:
        """Features of the support inputs; computed once if only the head adapts."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The task's loss, a scalar."""

    def support_loss(self, params: Tensors) -> Tensor:
        """The task's loss on the support set, a scalar."""

    def gradient(self, params: Tensors) -> Tensors:
        """The gradient of the inner loss, including learned parts and terms, for each of `params`.

        A constant for the outer loop if ``first_order`` is set.
        """

    def hessian_product(self, params: Tensors, vector: Tensors) -> Tensors:
        """The Hessian of the inner loss at `params` times a vector."""

    def query_outputs(self, params: Tensors) -> Tensor:
        """The outputs for the query set, as in `query_loss` and the test; in the outer stages."""

    def query_loss(self, params: Tensors) -> Tensor:
        """The task's loss on the query set, in the outer stages."""

    def query_gradient(self, params: Tensors) -> Tensors:
        """The gradient of `query_loss` for each of `params`, in the outer stages."""

    def adapt(self, params: Tensors, state: Any, first: int, steps: int) -> tuple[Tensors, Any]:
        """Take more inner steps without training-only augmenters; returns parameters and state. In the outer stages.

        Args:
            params: the adapted parameters before them.
            state: the state before them.
            first: the number of the first of them.
            steps: how many.
        """


class LearnerView(Protocol):
    """A `metareg.MetaLearner`, as hooks see it."""

    config: PluginConfig
    """Its options, as ``learner.config.inner_steps``."""
    device: torch.device
    """Where its parameters are."""
    meta_parameters: dict[str, Tensor]
    """Every meta-parameter by name."""

    def adapt(self, x: Any, y: Tensor, steps: int | None = None, query_x: Any = None) -> nn.Module:
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
