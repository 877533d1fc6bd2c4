"""Sharp-MAML: sharpness-aware inner and outer gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from metareg import Field, PluginConfig, TaskView, hookimpl

Tensors = dict[str, Tensor]


class Sharp:
    """Takes gradients at the worst point of a small ball around the parameters, of the inner problem or of the outer one.

    ε(g) = ρ g / ‖g‖, over all parameters together. Lower: θₖ₊₁ = θₖ − α ∇ℓ(θₖ + ε(∇ℓ(θₖ; S)); S), and the outer
    loop differentiates through ε as well. Upper: with g the meta-gradient at M, the outer optimiser receives the
    meta-gradient of the same batch at M + ε(g). Each of them doubles the number of gradients per step; both together
    quadruple it.

    The lower step is part of adaptation and stays in evaluation, as in the authors' code. The gradient passed to it
    only determines ε: list it before augmenters that change gradients.

    Settings: one ρ for both, 0.0005 in the authors' last scripts (Omniglot 20-way, inner step 0.1, 16 tasks) and 0.05 in
    their earlier ones (miniImageNet).

    Reference:
        Abbas, Xiao, Chen, Chen and Chen, Sharp-MAML: Sharpness-Aware Model-Agnostic Meta Learning, ICML 2022,
        arXiv 2206.03996.
    """

    contract = 1
    exact_gradient = False  # the outer optimiser gets the gradient at another point

    class Config(PluginConfig):
        rho: float = Field(
            0.0005,
            ge=0,
            description="Radius ρ of the ball.",
            json_schema_extra={"search": {"low": 1e-4, "high": 0.1, "log": True}},
        )
        where: Literal["lower", "upper", "both"] = Field(
            "both",
            description="The gradient to perturb: that of the inner step, the meta-gradient, or both.",
            json_schema_extra={"search": ["lower", "upper", "both"]},
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def training_only(self) -> bool:
        """Whether adaptation does not use the plugin."""
        return self.config.where == "upper"

    @hookimpl
    def augment_inner_gradient(self, grads: Tensors, params: Tensors, task: TaskView) -> Tensors:
        if self.config.where == "upper" or not grads:
            return grads
        return task.gradient(self._climb(params, grads))

    @hookimpl
    def augment_outer_gradient(
        self, grads: Tensors, every: Tensors, gradient_at: Callable[[Tensors], Tensors]
    ) -> Tensors:
        return grads if self.config.where == "lower" else gradient_at(self._climb(every, grads))

    def _climb(self, params: Tensors, grads: Tensors) -> Tensors:
        """Move the parameters by ρ along their gradient."""
        # Added inside the root, because the norm has no derivative at zero.
        norm = (torch.stack([value.square().sum() for value in grads.values()]).sum() + 1e-24).sqrt()
        return {name: value + self.config.rho / norm * grads[name] for name, value in params.items()}
