"""MAML: adapt every parameter by plain gradient steps."""

from __future__ import annotations

from torch import Tensor

from metareg import Field, PluginConfig, StepExample, hookimpl


class MAML:
    """Model-agnostic meta-learning: the inner loop is gradient descent on all parameters.

    θₖ₊₁ = θₖ − α ∇ℓ(θₖ; S), and the outer loop differentiates the query loss at θ_K through every step.

    Reference:
        Finn, Abbeel and Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017,
        arXiv 1703.03400, Algorithm 2. With ``first_order=True`` it is the FOMAML of §5.2.
    """

    contract = 1
    step_examples = (StepExample(param=2.0, grad=3.0, after=1.7, config={"inner_lr": 0.1}),)

    class Config(PluginConfig):
        inner_lr: float = Field(
            0.01, gt=0, description="Step size α of the inner loop.", json_schema_extra={"search": {"factor": 10}}
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - self.config.inner_lr * grads[name] for name, value in params.items()}
