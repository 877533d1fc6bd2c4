"""Meta-LSTM: an LSTM whose cell state is the model's parameters takes the inner steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metareg import Field, PluginConfig, TaskView, hookimpl

Tensors = dict[str, Tensor]

_P = 10.0


class MetaLSTM:
    """The LSTM meta-learner: gates, computed for every coordinate, decide how much a step forgets and how far it goes.

    For each coordinate of θ with gradient g, by networks that all coordinates share,

        h_t = LSTM(pre(ℓ_t), pre(g_t)),
        f_t = σ(W_F · [h_t, θ_{t−1}, f_{t−1}] + b_F),    i_t = σ(W_I · [h_t, θ_{t−1}, i_{t−1}] + b_I),
        θ_t = f_t ⊙ θ_{t−1} − i_t ⊙ g_t.

    pre(x) is (log|x| / p, sgn x) if |x| ≥ e⁻ᵖ and (−1, eᵖ x) otherwise, with p = 10. Weights start within ±0.01, b_F
    within [4, 5] and b_I within [−5, −4], so the first steps are nearly gradient descent with a step size of 0.01.

    The networks' inputs, loss and gradient, are constants for the outer loop. With `first_order`, which is recommended,
    so is g_t in the last line. This is the paper's assumption; the networks still learn.

    The paper trains with Adam at 0.001, clips the meta-gradient at a norm of 0.25, and takes 12 inner steps for 1 shot
    and 5 for 5 shots.

    Reference:
        Ravi and Larochelle, Optimization as a Model for Few-Shot Learning, ICLR 2017, §3, Equations 2 to 4, Algorithm 1;
        pre is from Andrychowicz et al., NeurIPS 2016, arXiv 1606.04474, Appendix A. The authors' code passes f and i on
        before the sigmoid, and takes the 5-shot steps on mini-batches of the support set; here, each step uses the
        whole set.
    """

    contract = 1
    exact_gradient = False
    recommended: ClassVar[Mapping[str, bool]] = {"first_order": True}
    step_examples = None  # the gates are drawn

    class Config(PluginConfig):
        width: int = Field(20, ge=1, description="Hidden width of the LSTM that sees loss and gradient.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def init_meta(self, model: nn.Module, generator: torch.Generator) -> Tensors:
        like = next(model.parameters())

        def draw(low: float, high: float, *shape: int) -> Tensor:
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
            return (low + (high - low) * drawn).to(like)

        width = self.config.width
        return {
            "lstm.weight": draw(-0.01, 0.01, 4 * width, 4 + width),
            "lstm.bias": draw(-0.01, 0.01, 4 * width),
            "forget.weight": draw(-0.01, 0.01, 1, width + 2),
            "forget.bias": draw(4, 5, 1),
            "input.weight": draw(-0.01, 0.01, 1, width + 2),
            "input.bias": draw(-5, -4, 1),
        }

    @hookimpl
    def start_task(self, params: Tensors) -> tuple[Tensors, Tensors]:
        theta = _flatten(params)
        nothing, no_gate = theta.new_zeros(len(theta), self.config.width), torch.zeros_like(theta)
        return params, {"hidden": nothing, "cell": nothing, "forget": no_gate, "input": no_gate}

    @hookimpl
    def inner_update(
        self, params: Tensors, grads: Tensors, meta: Tensors, state: Tensors, task: TaskView
    ) -> tuple[Tensors, Tensors]:
        theta, grad = _flatten(params), _flatten(grads)
        loss = task.support_loss(params).expand_as(grad)
        seen = torch.cat([_preprocess(loss.detach()), _preprocess(grad.detach())], 1)
        hidden, cell = _run_lstm(seen, state["hidden"], state["cell"], meta)
        forget, step = (
            F.linear(torch.cat([hidden, theta, state[gate]], 1), meta[f"{gate}.weight"], meta[f"{gate}.bias"]).sigmoid()
            for gate in ("forget", "input")
        )
        new = _unflatten(forget * theta - step * grad, params)
        return new, {"hidden": hidden, "cell": cell, "forget": forget, "input": step}


def _run_lstm(seen: Tensor, hidden: Tensor, cell: Tensor, meta: Tensors) -> tuple[Tensor, Tensor]:
    """Take one step of an LSTM without peepholes, for all coordinates ``[coordinates, …]``."""
    gates = F.linear(torch.cat([seen, hidden], 1), meta["lstm.weight"], meta["lstm.bias"])
    take, keep, show, new = gates.chunk(4, 1)
    cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


def _preprocess(x: Tensor) -> Tensor:
    """Return the magnitude and sign of ``[coordinates, 1]`` as two columns of comparable size."""
    size = x.abs()
    large = size >= math.exp(-_P)
    return torch.cat([torch.where(large, size.log() / _P, -1.0), torch.where(large, x.sign(), math.exp(_P) * x)], 1)


def _flatten(tensors: Tensors) -> Tensor:
    """Concatenate all coordinates into a column."""
    return torch.cat([value.flatten() for value in tensors.values()])[:, None]


def _unflatten(column: Tensor, like: Tensors) -> Tensors:
    parts = column.flatten().split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}
