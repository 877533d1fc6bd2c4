"""BMG: learn towards the parameters that the inner loop would reach some steps later."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metareg import Field, TaskView, hookimpl
from metareg_maml import MAML

Tensors = dict[str, Tensor]


class BMG(MAML):
    """Bootstrapped meta-gradients: the outer loop pulls the adapted parameters θ_K towards a target further ahead.

    The target takes L − 1 more inner steps on the support set, then one step of size β on the query loss:

        θ̃ = θ_{K+L−1} − β ∇ℓ(θ_{K+L−1}; Q),

    and is a constant. The outer objective is its distance μ(θ̃, θ_K):

    - ``outputs``: KL(p(· | θ̃) ‖ p(· | θ_K)) of the predicted classes, averaged over the query set; for regression ½ (f(θ̃) −
      f(θ_K))², the same divergence between normal distributions of unit variance;
    - ``parameters``: ‖θ̃ − θ_K‖² / 2β. With L = 1 its gradient is that of MAML.

    Reference:
        Flennerhag, Schroecker, Zahavy, van Hasselt, Silver and Singh, Bootstrapped Meta-Learning, ICLR 2022,
        arXiv 2109.04504, Equation 2 and §6. The paper matches the outputs in few-shot classification.
    """

    exact_gradient = False

    class Config(MAML.Config):
        target_steps: int = Field(
            5, ge=1, description="Distance L of the target: L − 1 more inner steps and one on the query loss."
        )
        target_lr: float | None = Field(
            None,
            gt=0,
            description="Step size β on the query loss; by default, inner_lr.",
            json_schema_extra={"search": {"low": 1e-3, "high": 1.0, "log": True}},
        )
        matching: Literal["outputs", "parameters"] = Field("outputs", description="What is compared with the target.")

    config: Config

    @hookimpl
    def outer_objective(self, adapted: Tensors, state: object, inner_steps: int, task: TaskView) -> Tensor:
        size = self.config.target_lr or self.config.inner_lr
        target = self._find_target(adapted, state, inner_steps, size, task)
        if self.config.matching == "parameters":
            distances = [(value - target[name]).square().sum() for name, value in adapted.items()]
            return torch.stack(distances).sum() / (2 * size)
        expected, outputs = task.query_outputs(target).detach(), task.query_outputs(adapted)
        if task.query_y.is_floating_point():
            return (outputs - expected).square().mean() / 2
        log_p, log_q = expected.log_softmax(-1), outputs.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def _find_target(self, adapted: Tensors, state: object, steps: int, size: float, task: TaskView) -> Tensors:
        ahead, _ = task.adapt(adapted, state, steps, self.config.target_steps - 1)
        grads = task.query_gradient(ahead)
        return {name: (value - size * grads[name]).detach() for name, value in ahead.items()}
