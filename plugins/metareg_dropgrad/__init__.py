"""DropGrad: multiplicative noise on the inner gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metareg import Field, PluginConfig, hookimpl


class DropGrad:
    """Multiplies every entry of the inner gradient by noise of mean 1, drawn anew for every task and inner step.

    With `kind="bernoulli"`, an entry is dropped with probability `rate` and divided by 1 − rate otherwise; with
    `kind="gaussian"` the noise is N(1, rate / (1 − rate)), which has the same variance.

    Reference:
        Tseng, Chen, Tsai, Liu, Lin and Yang, Regularizing Meta-Learning via Gradient Dropout, ACCV 2020,
        arXiv 2004.05859.
    """

    contract = 1

    class Config(PluginConfig):
        rate: float = Field(
            0.1,
            ge=0,
            lt=1,
            description="Probability that an entry of the gradient is dropped.",
            # Higher rates multiply the rest of the gradient by more than 5.
            json_schema_extra={"search": {"low": 0.0, "high": 0.8}},
        )
        kind: Literal["bernoulli", "gaussian"] = Field(
            "bernoulli",
            description="Distribution of the noise.",
            json_schema_extra={"search": ["bernoulli", "gaussian"]},
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def draw_noise(
        self, shapes: dict[str, tuple[int, ...]], generator: torch.Generator, inner_steps: int
    ) -> list[dict[str, Tensor]]:
        return [{name: self._draw(shape, generator) for name, shape in shapes.items()} for _ in range(inner_steps)]

    @hookimpl
    def augment_inner_gradient(
        self, grads: dict[str, Tensor], noise: list[dict[str, Tensor]], step: int
    ) -> dict[str, Tensor]:
        return {name: self._scale(value, noise[step][name]) for name, value in grads.items()}

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw which entries stay, or normal numbers."""
        if self.config.kind == "bernoulli":
            return torch.rand(shape, generator=generator) >= self.config.rate
        return torch.randn(shape, generator=generator)

    def _scale(self, grad: Tensor, drawn: Tensor) -> Tensor:
        """Multiply a gradient by the factors that were drawn; what is computed here is in the graph for all tasks."""
        rate = self.config.rate
        if self.config.kind == "bernoulli":
            return grad * (drawn.to(grad.dtype) / (1 - rate))
        return grad * (1 + (rate / (1 - rate)) ** 0.5 * drawn)
