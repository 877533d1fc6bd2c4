"""Protocols of the task, learner and run that hooks receive; the classes are in higher packages."""

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
        """Return the features of inputs."""

    def head(self, params: Tensors, features: Tensor) -> Tensor:
        """Return the outputs for features."""

    def embed(self, params: Tensors, features: Tensor) -> Tensor:
        """Return the inputs of the head's last layer ``[examples, inputs]`` for the body's features."""

    def outputs(self, params: Tensors, x: Any) -> Tensor:
        """Return the model's outputs for inputs."""

    def support_features(self, params: Tensors) -> Tensor:
        """Return the features of the support inputs, which are computed once if only the head adapts."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the task's loss, a scalar."""

    def support_loss(self, params: Tensors) -> Tensor:
        """Return the task's loss on the support set, a scalar."""

    def gradient(self, params: Tensors) -> Tensors:
        """Return the gradient of the inner loss, including learned losses and added terms, for each of `params`.

        With ``first_order``, it is a constant for the outer loop.
        """

    def hessian_product(self, params: Tensors, vector: Tensors) -> Tensors:
        """Return the product of the inner loss's Hessian at `params` and a vector."""

    def query_outputs(self, params: Tensors) -> Tensor:
        """Return the outputs for the query set, as in `query_loss` and the test; only in the outer stages."""

    def query_loss(self, params: Tensors) -> Tensor:
        """Return the task's loss on the query set; only in the outer stages."""

    def query_gradient(self, params: Tensors) -> Tensors:
        """Return the gradient of `query_loss` for each of `params`; only in the outer stages."""

    def adapt(self, params: Tensors, state: Any, first: int, steps: int) -> tuple[Tensors, Any]:
        """Take more inner steps without training-only augmenters; only in the outer stages.

        Args:
            params: the adapted parameters before these steps.
            state: the state before these steps.
            first: the number of the first of these steps.
            steps: the number of steps.

        Returns:
            The adapted parameters and the state after the steps.
        """


class LearnerView(Protocol):
    """The interface of a `metareg.MetaLearner` for hooks."""

    config: PluginConfig
    """Its options, as ``learner.config.inner_steps``."""
    device: torch.device
    """The device of its parameters."""
    meta_parameters: dict[str, Tensor]
    """Every meta-parameter by name."""

    def adapt(self, x: Any, y: Tensor, steps: int | None = None, query_x: Any = None) -> nn.Module:
        """Return a module adapted to one task, given support inputs ``[examples, …]`` and targets."""

    def evaluate(
        self, task_source: Any, tasks: int = 600, *, split: str = TEST, inner_steps: Sequence[int] = (0, 1, 5, 10),
        seed: int | None = None,
    ) -> Evaluation:  # fmt: skip
        """Evaluate the metric over tasks after each number of inner steps."""


class RunView(Protocol):
    """The interface of a `metareg.Run` for observers."""

    path: Path
    """The run's folder."""
    config: PluginConfig
    """The complete configuration, a `metareg.RunConfig`."""
    learner: LearnerView
    """The learner being trained."""
    evaluation: Evaluation | None
    """The final test; None before it."""
