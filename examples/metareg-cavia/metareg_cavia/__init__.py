"""CAVIA: adapt a few context parameters, and share all others between tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from metareg import Field, PluginConfig, StepExample, TaskSpec, UsageError, hookimpl


class CAVIA:
    """Only context parameters φ adapt to a task, from zero; everything else is shared and learns in the outer loop.

    φ₀ = 0, φₖ₊₁ = φₖ − α ∇_φ ℓ(θ, φₖ; S), and the outer loop differentiates the query loss at (θ, φ_S) by θ. A context
    parameter is any parameter of the model whose own name is `context`.

    Reference:
        Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson, Fast Context Adaptation via Meta-Learning, ICML 2019,
        arXiv 1810.03642, Algorithm 1.
    """

    contract = 1
    adapts = "*context"
    default_model = "context-mlp"
    # The paper's step size for curves: what tasks recommend is meant for weights, not for context.
    recommended: ClassVar[Mapping[str, float]] = {"algo.inner_lr": 1.0}
    step_examples = (StepExample(param=2.0, grad=3.0, after=-1.0, config={"inner_lr": 1.0}),)

    class Config(PluginConfig):
        inner_lr: float = Field(
            1.0, gt=0, description="Step size α of the inner loop.", json_schema_extra={"search": {"factor": 10}}
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def adapted_parameters(self, names: tuple[str, ...]) -> list[str]:
        context = [name for name in names if name.rpartition(".")[2] == "context"]
        if not context:
            raise UsageError(
                "CAVIA adapts parameters named 'context', and this model has none; take the model 'context-mlp', or add "
                "self.context = nn.Parameter(torch.zeros(n)) to a module of yours."
            )
        return context

    @hookimpl
    def start_task(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in params.items()}

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - self.config.inner_lr * grads[name] for name, value in params.items()}


class ContextMLP:
    """A multilayer perceptron that sees context parameters beside its input; (1 + 5)-40-40-1 on curves, as in the paper."""

    contract = 1

    class Config(PluginConfig):
        context: int = Field(5, ge=1, description="Number of context parameters.")
        hidden: list[int] = Field([40, 40], min_length=1, description="Widths of the hidden layers.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        return _Perceptron(spec, self.config.context, self.config.hidden)


class _Perceptron(nn.Module):
    def __init__(self, spec: TaskSpec, context: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.body = _WithContext(math.prod(spec.input_shape), context, hidden)
        self.head = nn.Linear(hidden[-1], math.prod(spec.output_shape))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        return outputs


class _WithContext(nn.Module):
    def __init__(self, inputs: int, context: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(context))
        layers: list[nn.Module] = []
        width = inputs + context
        for each in hidden:
            layers += [nn.Linear(width, each), nn.ReLU()]
            width = each
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context.expand(x.shape[0], -1)
        features: Tensor = self.layers(torch.cat([x.flatten(1), context], 1))
        return features
