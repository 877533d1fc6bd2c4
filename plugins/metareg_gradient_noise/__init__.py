"""Gaussian noise on gradients: a random baseline for CML."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metareg import Field, PluginConfig, hookimpl


class GradientNoise:
    """Adds Gaussian noise to the inner gradient (`where="inner"`) or to the meta-gradient (`where="outer"`).

    g ← g + σ ε with ε ~ N(0, 1), drawn anew for every task and inner step, or for every outer step. With
    `relative=True`, the expected norm of the noise is σ times the gradient's norm: g ← g + σ ‖g‖ ε / √n, where n is the
    number of entries of the gradient.

    Reference:
        Neelakantan et al., Adding Gradient Noise Improves Learning for Very Deep Networks, 2015, arXiv 1511.06807
        (on the ordinary gradient, absolute, and decreasing over training).
    """

    contract = 1
    exact_gradient = False  # the meta-gradient treats the scale of relative noise as a constant

    class Config(PluginConfig):
        sigma: float = Field(
            0.1, ge=0, description="Standard deviation σ of the noise.", json_schema_extra={"search": {"factor": 10}}
        )
        where: Literal["inner", "outer"] = Field(
            "inner",
            description="The gradient to which noise is added.",
            json_schema_extra={"search": ["inner", "outer"]},
        )
        # Not searched, because the best σ depends on it.
        relative: bool = Field(True, description="Measure σ relative to the gradient's norm.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def draw_noise(
        self, shapes: dict[str, tuple[int, ...]], generator: torch.Generator, inner_steps: int, stage: str
    ) -> list[dict[str, Tensor]] | None:
        if stage != ("task" if self.config.where == "inner" else "batch"):
            return None
        draws = inner_steps if stage == "task" else 1
        return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(draws)]

    @hookimpl
    def augment_inner_gradient(
        self, grads: dict[str, Tensor], noise: list[dict[str, Tensor]] | None, step: int
    ) -> dict[str, Tensor]:
        return grads if noise is None else self._add_noise(grads, noise[step])

    @hookimpl
    def augment_outer_gradient(
        self, grads: dict[str, Tensor], noise: list[dict[str, Tensor]] | None
    ) -> dict[str, Tensor]:
        return grads if noise is None else self._add_noise(grads, noise[0])

    def _add_noise(self, grads: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        scale: Tensor | float = self.config.sigma
        if self.config.relative:
            # A constant for the meta-gradient, because the norm's derivative is infinite at a gradient of zero.
            squares = sum(value.detach().square().sum() for value in grads.values())
            count = sum(value.numel() for value in grads.values())
            scale = scale * torch.as_tensor(squares / count).sqrt()
        return {name: value + scale * noise[name] for name, value in grads.items()}
