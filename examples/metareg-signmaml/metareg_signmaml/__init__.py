"""Sign-MAML: the inner loop follows the signs of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from metareg import Field, PluginConfig, StepExample, hookimpl


class SignMAML:
    """MAML whose inner loop is sign descent: θₖ₊₁ = θₖ − α sign(∇ℓ(θₖ; S)).

    The sign is constant almost everywhere, so that ∂θ_K/∂θ₀ is the identity: the exact meta-gradient is ∇ℓ(θ_K; Q), without
    second derivatives and at the cost of first-order MAML.

    Reference:
        Fan, Ram and Liu, Sign-MAML: Efficient Model-Agnostic Meta-Learning by SignSGD, 2021, arXiv 2109.07497.
    """

    contract = 1
    # What tasks recommend is meant for steps as long as the gradient.
    recommended: ClassVar[Mapping[str, float]] = {"algo.inner_lr": 0.01}
    step_examples = (
        StepExample(param=2.0, grad=3.0, after=1.9, config={"inner_lr": 0.1}),
        StepExample(param=2.0, grad=-0.5, after=2.1, config={"inner_lr": 0.1}),
    )

    class Config(PluginConfig):
        inner_lr: float = Field(
            0.01,
            gt=0,
            description="Length α of a step along every coordinate.",
            json_schema_extra={"search": {"factor": 10}},
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - self.config.inner_lr * grads[name].sign() for name, value in params.items()}
