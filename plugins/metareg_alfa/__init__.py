"""ALFA: step sizes and weight decay of every inner step come from a small network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metareg import Field, PluginConfig, StepExample, hookimpl


class ALFA:
    """Adaptive learning of hyperparameters for fast adaptation: θₖ₊₁ = (1 − bₖ) θₖ − aₖ ∇ℓ(θₖ; S) for each parameter tensor.

    (a, b)ₖ = (α, β)ₖ ⊙ g_φ(τₖ). τₖ holds the means of θₖ and of ∇ℓ(θₖ; S) over each tensor; the generator g_φ is a
    perceptron with one hidden layer that has as many units as inputs, two for each tensor; α and β are learned for each
    inner step and tensor, and start at `inner_lr` and `inner_lr` · `weight_decay`. The outer loop learns θ, φ, α and β.
    g_φ starts at 1, where ALFA equals MAML with weight decay. Inner steps beyond those of training use the α and β of
    the last step.

    Reference:
        Baik, Choi, Choi, Kim and Lee, Meta-Learning with Adaptive Hyperparameters, NeurIPS 2020, arXiv 2011.00209, §3.2.
        Settings: α = 0.01, weight decay 0.0005, 5 inner steps, 2 tasks a step, Adam 1e-3. The authors' code initialises
        g_φ like torch.nn.Linear, treats the gradient in τ as a constant, and does not adapt BatchNorm's parameters,
        which are adapted here.
    """

    contract = 1
    step_examples = (
        StepExample(param=2.0, grad=3.0, after=1.7, config={"inner_lr": 0.1, "weight_decay": 0.0}),
        StepExample(param=2.0, grad=3.0, after=1.6, config={"inner_lr": 0.1, "weight_decay": 0.5}, step=1),
    )

    class Config(PluginConfig):
        inner_lr: float = Field(
            0.01,
            gt=0,
            description="Initial step size of every tensor and inner step.",
            json_schema_extra={"search": {"factor": 10}},
        )
        weight_decay: float = Field(
            0.0005, ge=0, description="Initial weight decay of every tensor and inner step, relative to the step size."
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def init_meta(self, adapted: tuple[str, ...], inner_steps: int) -> dict[str, Tensor]:
        size = 2 * len(adapted)
        hidden, last = nn.Linear(size, size), nn.Linear(size, size)
        nn.init.zeros_(last.weight)
        nn.init.ones_(last.bias)
        generator = nn.Sequential(hidden, nn.ReLU(), last)
        sizes = torch.full((inner_steps, len(adapted)), self.config.inner_lr, dtype=torch.float64)
        return {f"generator.{name}": value.detach() for name, value in generator.named_parameters()} | {
            "step_size": sizes,
            "decay": self.config.weight_decay * sizes,
        }

    @hookimpl
    def inner_update(
        self, params: dict[str, Tensor], grads: dict[str, Tensor], meta: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        means = [value.mean() for value in params.values()] + [grads[name].mean() for name in params]
        hidden = F.linear(torch.stack(means), meta["generator.0.weight"], meta["generator.0.bias"]).relu()
        factors = F.linear(hidden, meta["generator.2.weight"], meta["generator.2.bias"])
        step = min(step, len(meta["step_size"]) - 1)
        a = meta["step_size"][step] * factors[: len(params)]
        b = meta["decay"][step] * factors[len(params) :]
        return {name: (1 - b[i]) * value - a[i] * grads[name] for i, (name, value) in enumerate(params.items())}
