"""Gradient clipping by the norm."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metareg import Field, PluginConfig, hookimpl

Tensors = dict[str, Tensor]


class Clip:
    """Scales the inner gradient or the meta-gradient down if its Euclidean norm exceeds c.

    g ← g · min(1, c / ‖g‖), over all parameters together. Inner gradients are also clipped in evaluation and
    adaptation, and the outer loop differentiates through the scale.

    Reference:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, ICML 2013, arXiv 1211.5063,
        Algorithm 1. (MAML's own code clips each entry of the meta-gradient to ±10 on miniImageNet.)
    """

    contract = 1
    exact_gradient = False  # a clipped meta-gradient is not the objective's gradient

    class Config(PluginConfig):
        max_norm: float = Field(
            10.0, gt=0, description="The largest norm c.", json_schema_extra={"search": {"factor": 10}}
        )
        where: Literal["inner", "outer"] = Field("outer", description="The gradient to clip.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def training_only(self) -> bool:
        """Whether adaptation does not use the plugin."""
        return self.config.where == "outer"

    @hookimpl
    def augment_inner_gradient(self, grads: Tensors) -> Tensors:
        return self._clip(grads) if self.config.where == "inner" and grads else grads

    @hookimpl
    def augment_outer_gradient(self, grads: Tensors) -> Tensors:
        return self._clip(grads) if self.config.where == "outer" else grads

    def _clip(self, grads: Tensors) -> Tensors:
        # Added inside the root, because the norm has no derivative at zero.
        norm = (torch.stack([value.square().sum() for value in grads.values()]).sum() + 1e-24).sqrt()
        scale = (self.config.max_norm / norm).clamp(max=1)
        return {name: value * scale for name, value in grads.items()}
