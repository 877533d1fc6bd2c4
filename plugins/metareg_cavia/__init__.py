"""CAVIA: adapt a few context parameters, and share all others between tasks."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from metareg import Field, PluginConfig, StepExample, TaskSpec, UsageError, hookimpl


class CAVIA:
    """Only context parameters φ adapt to a task, from zero; everything else is shared and learns in the outer loop.

    φ₀ = 0, φₖ₊₁ = φₖ − α ∇_φ ℓ(θ, φₖ; S), and the outer loop differentiates the query loss at (θ, φ_K) with respect to
    θ. A context parameter is any parameter of the model whose own name is `context`. The default model `context` is
    `context-conv4` for images and `context-mlp` for vectors; you can also use your own.

    Reference:
        Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson, Fast Context Adaptation via Meta-Learning, ICML 2019,
        arXiv 1810.03642, Algorithm 1. Settings: α = 1; sinusoid: 25 tasks a step, one inner step, Adam 1e-3;
        miniImageNet: 16 tasks a step, two inner steps, Adam 1e-3.
    """

    contract = 1
    adapts = "*context"
    default_model = "context"
    # Tasks recommend step sizes for weights, not for a context.
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
                "CAVIA adapts parameters named 'context', but this model has none; use the model 'context-mlp' or "
                "'context-conv4', or add self.context = nn.Parameter(torch.zeros(n)) to your module."
            )
        return context

    @hookimpl
    def start_task(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in params.items()}

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - self.config.inner_lr * grads[name] for name, value in params.items()}


class ContextMLP:
    """A multilayer perceptron with context inputs; (1 + 5)-40-40-1 on curves, as in the paper."""

    contract = 1

    class Config(PluginConfig):
        context: int = Field(5, ge=1, description="Number of context parameters.")
        hidden: list[int] = Field([40, 40], min_length=1, description="Widths of the hidden layers.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        width, outputs = self.config.hidden[-1], math.prod(spec.output_shape)
        body = _ContextPerceptron(math.prod(spec.input_shape), self.config.context, self.config.hidden)
        return nn.Sequential(OrderedDict(body=body, head=nn.Linear(width, outputs)))


class ContextConv4:
    """Conv4 whose third block is scaled and shifted channel by channel, by a linear function of the context (FiLM).

    Four blocks of 3×3 convolution, BatchNorm, 2×2 max-pooling and ReLU, then a linear layer. The features are the
    output of the fourth block before pooling, as for `conv4`.

    Reference:
        Zintgraf et al., ICML 2019, arXiv 1810.03642, §5.2; 100 context parameters and 32 channels are the defaults of the
        authors' code, and the initial weights are Kaiming's, as in that code.
    """

    contract = 1
    example_spec = TaskSpec((1, 16, 16), (5,))

    class Config(PluginConfig):
        context: int = Field(100, ge=1, description="Number of context parameters.")
        width: int = Field(32, ge=1, description="Channels of every block.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        if len(spec.input_shape) != 3 or min(spec.input_shape[1:]) < 16:
            raise UsageError(
                "The model 'context-conv4' needs images [channels, height, width] of at least 16×16 pixels; this "
                f"task's inputs are {spec.input_shape}."
            )
        channels, height, breadth = spec.input_shape
        width = self.config.width
        inputs = width * (height // 16) * (breadth // 16)
        head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(inputs, math.prod(spec.output_shape)))
        model = nn.Sequential(OrderedDict(body=_ContextBlocks(channels, width, self.config.context), head=head))
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu" if layer.weight.dim() > 2 else "linear")
        return model


class ContextModel:
    """The model with context parameters that fits the task: `context-conv4` for images, `context-mlp` for the rest."""

    contract = 1

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        if len(spec.input_shape) == 3:
            return ContextConv4(ContextConv4.Config()).build(spec)
        return ContextMLP(ContextMLP.Config()).build(spec)


class _ContextPerceptron(nn.Module):
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


class _ContextBlocks(nn.Module):
    def __init__(self, channels: int, width: int, context: int) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(context))
        self.film = nn.Linear(context, 2 * width)
        first, second, third, fourth = (_convolution(channels if n == 0 else width, width) for n in range(4))
        pool = nn.MaxPool2d(2)
        self.before = nn.Sequential(first, pool, nn.ReLU(), second, pool, nn.ReLU(), third, pool)
        self.after = nn.Sequential(nn.ReLU(), fourth, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.film(self.context)[:, None, None].chunk(2)
        features: Tensor = self.after(scale * self.before(x) + shift)
        return features


def _convolution(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after, track_running_stats=False))
