"""Meta-SGD: learn a step size for every weight."""

from __future__ import annotations

import torch
from pydantic import model_validator
from torch import Tensor, nn

from metareg import Field, PluginConfig, StepExample, hookimpl


class MetaSGD:
    """MAML with learned step sizes: θₖ₊₁ = θₖ − a ⊙ ∇ℓ(θₖ; S), where the outer loop learns θ and a.

    Each weight has its own step size, with sign and magnitude, which starts at `inner_lr` or is drawn uniformly from
    [`inner_lr`, `inner_lr_max`].

    Reference:
        Li, Zhou, Chen and Li, Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017, arXiv 1707.09835,
        Equation 2 and Algorithm 1.
    """

    contract = 1
    step_examples = (StepExample(param=2.0, grad=3.0, after=1.7, config={"inner_lr": 0.1}),)

    class Config(PluginConfig):
        inner_lr: float = Field(
            0.01, gt=0, description="Initial step size of every weight.", json_schema_extra={"search": {"factor": 10}}
        )
        inner_lr_max: float | None = Field(
            None, gt=0, description="Draw the initial step sizes uniformly between inner_lr and this."
        )

        @model_validator(mode="after")
        def _check_order(self) -> MetaSGD.Config:
            if self.inner_lr_max is not None and self.inner_lr_max < self.inner_lr:
                raise ValueError(f"inner_lr_max = {self.inner_lr_max} must not be below inner_lr = {self.inner_lr}")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def init_meta(self, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        low = self.config.inner_lr
        high = self.config.inner_lr_max or low
        sizes = {}
        for name, value in model.named_parameters():
            if value.requires_grad:
                drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                sizes[f"step_size.{name}"] = (low + (high - low) * drawn).to(value)
        return sizes

    @hookimpl
    def inner_update(
        self, params: dict[str, Tensor], grads: dict[str, Tensor], meta: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {name: value - meta[f"step_size.{name}"] * grads[name] for name, value in params.items()}
