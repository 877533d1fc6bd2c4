"""Reptile: move the initialisation towards the adapted parameters of each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from metareg import Field, PluginConfig, StepExample, hookimpl
from metareg_inner_optimizers import Moments, start_at_zero, step_adam


class Reptile:
    """Meta-learning without a query loss: the meta-gradient of a task is (θ − θ_K) / α, without second derivatives.

    The inner loop is gradient descent on all parameters, θₖ₊₁ = θₖ − α ∇ℓ(θₖ; S), so the meta-gradient is the sum of
    the inner gradients; or Adam with β₁ = 0. The query set is used only for reporting. Take several inner steps: with
    one, Reptile is joint training on all tasks.

    Reference:
        Nichol, Achiam and Schulman, On First-Order Meta-Learning Algorithms, 2018, arXiv 1803.02999, Algorithm 2 (the
        batched form), with the difference divided by α as its §2 suggests for adaptive outer optimisers. The authors'
        runs on Omniglot and miniImageNet take Adam with β₁ = 0 and α from 0.00022 to 0.0015, 3 to 19 inner steps in
        training and 5 to 100 in evaluation, a new mini-batch of 9 to 15 training shots in each, and in the outer loop
        θ ← θ − ε (θ − θ_K) with ε falling to 0. Here, every inner step uses the whole support set, and the outer loop
        is Adam.
    """

    contract = 1
    # With one inner step, which many tasks recommend, Reptile is joint training; ten steps need a small step size.
    recommended: ClassVar[Mapping[str, float]] = {"inner_steps": 10, "algo.inner_lr": 0.02}
    step_examples = (
        StepExample(param=2.0, grad=3.0, after=1.7, config={"inner_lr": 0.1}),
        StepExample(param=2.0, grad=3.0, after=1.9, config={"inner_lr": 0.1, "optimizer": "adam"}),
    )

    class Config(PluginConfig):
        inner_lr: float = Field(
            0.02, gt=0, description="Step size α of the inner loop.", json_schema_extra={"search": {"factor": 10}}
        )
        optimizer: Literal["sgd", "adam"] = Field(
            "sgd", description="The inner loop: gradient descent, or Adam with β₁ = 0, which needs a smaller inner_lr."
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def start_task(self, params: dict[str, Tensor]) -> tuple[dict[str, Tensor], Moments] | None:
        if self.config.optimizer == "sgd":
            return None
        return params, (start_at_zero(params), start_at_zero(params))

    @hookimpl
    def inner_update(
        self, params: dict[str, Tensor], grads: dict[str, Tensor], state: Moments, step: int
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], Moments]:
        lr = self.config.inner_lr
        if self.config.optimizer == "sgd":
            return {name: value - lr * grads[name] for name, value in params.items()}
        return step_adam(params, grads, state, step, lr, beta1=0.0, beta2=0.999, epsilon=1e-8)

    @hookimpl
    def outer_gradient(self, start: dict[str, Tensor], adapted: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (start[name] - value) / self.config.inner_lr for name, value in adapted.items()}
