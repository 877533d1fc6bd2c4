"""MAML with momentum or Adam in the inner loop, against reference loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WAYS, WrittenOut, check_training, model_parameters, support_gradient

from metareg import MetaLearner
from reference import Net, Task, Tensors
from samples import MLP, episodes

LR = 0.05


def adapt_by_momentum(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    params = model_parameters(meta)
    velocity = {name: torch.zeros_like(value) for name, value in params.items()}
    for _ in range(steps):
        grads = support_gradient(net, params, list(params), task)
        velocity = {name: 0.8 * velocity[name] + grads[name] for name in params}
        params = {name: value - LR * velocity[name] for name, value in params.items()}
    return params


def adapt_by_adam(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    params = model_parameters(meta)
    m = {name: torch.zeros_like(value) for name, value in params.items()}
    v = {name: torch.zeros_like(value) for name, value in params.items()}
    for step in range(1, steps + 1):
        grads = support_gradient(net, params, list(params), task)
        m = {name: 0.7 * m[name] + 0.3 * grads[name] for name in params}
        v = {name: 0.9 * v[name] + 0.1 * grads[name] ** 2 for name in params}
        params = {
            name: value - LR * (m[name] / (1 - 0.7**step)) / torch.sqrt(v[name] / (1 - 0.9**step) + 1e-3**2)
            for name, value in params.items()
        }
    return params


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
@pytest.mark.parametrize(
    ("name", "adapt", "config"),
    [
        ("inner-momentum", adapt_by_momentum, {"momentum": 0.8}),
        ("inner-adam", adapt_by_adam, {"beta1": 0.7, "beta2": 0.9, "epsilon": 1e-3}),
    ],
)
def test_training_equals_the_loop(
    net: str, cml: bool, options: dict[str, Any], name: str, adapt: Any, config: dict[str, float]
) -> None:
    check_training(net, name, WrittenOut(adapt), {"inner_lr": LR, **config}, cml=cml, inner_steps=3, **options)


def test_a_gradient_of_zero_has_a_derivative() -> None:
    model = MLP()
    torch.nn.init.constant_(model.body[0].bias, -100.0)  # no example activates a unit
    learner = MetaLearner(model, "inner-adam", loss="mse", inner_steps=2)
    _, grads = learner.meta_gradient(episodes("mlp"))
    assert all(value.isfinite().all() for value in grads.values())
