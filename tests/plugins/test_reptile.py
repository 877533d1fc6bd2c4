"""Reptile against a reference loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WAYS, WrittenOut, check_training, model_parameters, support_gradient

from reference import Net, Task, Tensors

LR = 0.05


def descend(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    params = model_parameters(meta)
    for _ in range(steps):
        grads = support_gradient(net, params, list(params), task)
        params = {name: value - LR * grads[name] for name, value in params.items()}
    return params


def descend_by_adam(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    """Adapt with `torch.optim.Adam` itself, which needs no derivative here."""
    params = {name: value.detach().clone().requires_grad_() for name, value in model_parameters(meta).items()}
    optimizer = torch.optim.Adam(params.values(), lr=LR, betas=(0.0, 0.999))
    for _ in range(steps):
        for name, grad in support_gradient(net, params, list(params), task, graph=False).items():
            params[name].grad = grad
        optimizer.step()
    return params


def way_back(descend: Any) -> Any:
    def gradient(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
        adapted = descend(net, meta, task, steps)
        return {name: (meta[name] - value) / LR for name, value in adapted.items()}

    return gradient


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
def test_training_equals_the_loop(net: str, cml: bool, options: dict[str, Any]) -> None:
    written = WrittenOut(descend, gradient=way_back(descend))
    check_training(net, "reptile", written, {"inner_lr": LR}, cml=cml, inner_steps=3, **options)


@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_adam_inside_is_that_of_torch(strategy: str) -> None:
    written = WrittenOut(descend_by_adam, gradient=way_back(descend_by_adam))
    config = {"inner_lr": LR, "optimizer": "adam"}
    check_training("mlp", "reptile", written, config, inner_steps=3, strategy=strategy)
