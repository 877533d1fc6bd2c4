"""MAML with momentum or Adam in the inner loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from metareg import Field, StepExample, hookimpl
from metareg_maml import MAML

Tensors = dict[str, Tensor]
Moments = tuple[Tensors, Tensors]
"""The running means of the gradient and its square."""


class InnerMomentum:
    """MAML whose inner loop is gradient descent with momentum: vₖ₊₁ = μ vₖ + ∇ℓ(θₖ; S), θₖ₊₁ = θₖ − α vₖ₊₁, from v₀ = 0.

    The velocity belongs to the task; the outer loop differentiates through it.

    Reference:
        Polyak, Some Methods of Speeding up the Convergence of Iteration Methods, 1964, in the form of `torch.optim.SGD`;
        the outer loop is that of Finn, Abbeel and Levine, ICML 2017, arXiv 1703.03400.
    """

    contract = 1
    step_examples = MAML.step_examples

    class Config(MAML.Config):
        momentum: float = Field(0.9, ge=0, lt=1, description="Fraction μ of the velocity to keep.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def start_task(self, params: Tensors) -> tuple[Tensors, Tensors]:
        return params, start_at_zero(params)

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        velocity = {name: self.config.momentum * state[name] + grads[name] for name in params}
        return {name: value - self.config.inner_lr * velocity[name] for name, value in params.items()}, velocity


class InnerAdam:
    """MAML whose inner loop is Adam: θₖ₊₁ = θₖ − α m̂ / √(v̂ + ε²), with m̂ and v̂ the bias-corrected moments of the gradient.

    The moments start at zero for every task; the outer loop differentiates through them. ε is inside the root, because
    the derivative of √v̂ is infinite for a zero gradient, for example of a unit that no example activates.

    Reference:
        Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, arXiv 1412.6980, Algorithm 1; the outer loop
        is that of Finn, Abbeel and Levine, ICML 2017, arXiv 1703.03400.
    """

    contract = 1
    # The first step moves every weight by α, whatever the gradient, but tasks recommend step sizes for gradient
    # descent.
    recommended: ClassVar[Mapping[str, float]] = {"algo.inner_lr": 0.01}
    step_examples = (StepExample(param=2.0, grad=3.0, after=1.9, config={"inner_lr": 0.1}),)

    class Config(MAML.Config):
        beta1: float = Field(0.9, ge=0, lt=1, description="Decay β₁ of the mean of the gradient.")
        beta2: float = Field(0.999, ge=0, lt=1, description="Decay β₂ of the mean of its square.")
        epsilon: float = Field(1e-8, gt=0, description="ε: gradients below it give shorter steps.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def start_task(self, params: Tensors) -> tuple[Tensors, Moments]:
        return params, (start_at_zero(params), start_at_zero(params))

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, state: Moments, step: int) -> tuple[Tensors, Moments]:
        config = self.config
        return step_adam(params, grads, state, step, config.inner_lr, config.beta1, config.beta2, config.epsilon)


def start_at_zero(params: Tensors) -> Tensors:
    """Return zeros with the shapes of the parameters."""
    return {name: torch.zeros_like(value) for name, value in params.items()}


def step_adam(
    params: Tensors, grads: Tensors, moments: Moments, step: int, lr: float, beta1: float, beta2: float, epsilon: float
) -> tuple[Tensors, Moments]:
    """Return the parameters and moments after step number `step`, from 0, of Adam as defined in `InnerAdam`."""
    first = {name: beta1 * moments[0][name] + (1 - beta1) * grads[name] for name in params}
    second = {name: beta2 * moments[1][name] + (1 - beta2) * grads[name].square() for name in params}
    whole = (1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1))
    moved = {}
    for name, value in params.items():
        mean, square = first[name] / whole[0], second[name] / whole[1]
        moved[name] = value - lr * mean / (square + epsilon**2).sqrt()
    return moved, (first, second)
