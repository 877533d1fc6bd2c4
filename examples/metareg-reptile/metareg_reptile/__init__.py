"""Reptile: move the initialisation towards what each task adapts to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from metareg import Field, PluginConfig, StepExample, hookimpl


class Reptile:
    """Meta-learning without a query loss: the meta-gradient of a task is (θ − θ_S) / α, and no derivative is taken twice.

    The inner loop is gradient descent on all parameters, θₖ₊₁ = θₖ − α ∇ℓ(θₖ; S). The query set serves for reporting
    only. Take several inner steps: with one, Reptile is joint training on all tasks.

    Reference:
        Nichol, Achiam and Schulman, On First-Order Meta-Learning Algorithms, 2018, arXiv 1803.02999, Algorithm 1 in its
        batched form, with the difference divided by α as its §2 suggests for adaptive outer optimisers. The paper's inner
        loop takes a new mini-batch in every step and Adam with β₁ = 0 in its experiments; here it is the whole support
        set and gradient descent.
    """

    contract = 1
    # With the one step that many tasks recommend it would be joint training; ten need a small step size.
    recommended: ClassVar[Mapping[str, float]] = {"inner_steps": 10, "algo.inner_lr": 0.02}
    step_examples = (StepExample(param=2.0, grad=3.0, after=1.7, config={"inner_lr": 0.1}),)

    class Config(PluginConfig):
        inner_lr: float = Field(
            0.02, gt=0, description="Step size α of the inner loop.", json_schema_extra={"search": {"factor": 10}}
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - self.config.inner_lr * grads[name] for name, value in params.items()}

    @hookimpl
    def outer_gradient(self, meta: dict[str, Tensor], adapted: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (meta[name] - value) / self.config.inner_lr for name, value in adapted.items()}
