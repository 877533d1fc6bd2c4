"""L2F: learning to forget; each task starts from an attenuated initialisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metareg import TaskView, hookimpl
from metareg_maml import MAML


class L2F(MAML):
    """MAML whose start is attenuated task by task: θ₀ = γ ⊙ θ, one γ in (0, 1) for each parameter tensor.

    γ = g_φ(τ), where τ contains the mean of ∇ℓ(θ; S) over each tensor, and g_φ is a perceptron with as many units as
    there are tensors, with ReLU and a final sigmoid. The outer loop learns θ and φ. Then θₖ₊₁ = θₖ − α ∇ℓ(θₖ; S). This
    lets a task forget parts of the shared initialisation that harm it, before adaptation.

    Reference:
        Baik, Hong and Lee, Learning to Forget for Meta-Learning, CVPR 2020, arXiv 1906.05097, Algorithm 1. Settings:
        α = 0.01, 5 inner steps, 2 tasks a step, Adam 1e-3. The derivative goes through τ; in the authors' code τ is a
        constant, as here with ``first_order``. They do not change BatchNorm's parameters, which are adapted and
        attenuated here like the others.
    """

    @hookimpl
    def init_meta(self, adapted: tuple[str, ...]) -> dict[str, Tensor]:
        size = len(adapted)
        attenuator = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
        return {f"attenuator.{name}": value.detach() for name, value in attenuator.named_parameters()}

    @hookimpl
    def start_task(self, params: dict[str, Tensor], meta: dict[str, Tensor], task: TaskView) -> dict[str, Tensor]:
        grads = task.gradient(params)
        embedding = torch.stack([grads[name].mean() for name in params])
        hidden = F.linear(embedding, meta["attenuator.0.weight"], meta["attenuator.0.bias"]).relu()
        gamma = F.linear(hidden, meta["attenuator.2.weight"], meta["attenuator.2.bias"]).sigmoid()
        return {name: factor * value for (name, value), factor in zip(params.items(), gamma.unbind(), strict=True)}
