"""Meta-Curvature as an algorithm and as an augmenter, against a reference loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WAYS, WrittenOut, check_training, model_parameters, support_gradient
from torch import Tensor

from reference import Net, Task, Tensors

LR = 0.1


def transform(meta: Tensors, name: str, grad: Tensor) -> Tensor:
    """The Kronecker product of the mode's matrices times the gradient as a vector."""
    if grad.dim() == 1:
        return meta[f"metacurvature.scale.{name}"] * grad
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for mode in range(min(grad.dim(), 3)):
        matrix = torch.kron(matrix, meta[f"metacurvature.mode{mode}.{name}"])
    return (matrix @ grad.reshape(-1)).reshape(grad.shape)


def adapt(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    params = model_parameters(meta)
    for _ in range(steps):
        grads = support_gradient(net, params, list(params), task)
        params = {name: value - LR * transform(meta, name, grads[name]) for name, value in params.items()}
    return params


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
def test_training_equals_the_loop(net: str, cml: bool, options: dict[str, Any]) -> None:
    check_training(net, "metacurvature", WrittenOut(adapt), {"inner_lr": LR}, cml=cml, **options)


def adapt_by_adam(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    """`inner-adam` on transformed gradients."""
    params = model_parameters(meta)
    m = {name: torch.zeros_like(value) for name, value in params.items()}
    v = {name: torch.zeros_like(value) for name, value in params.items()}
    for step in range(1, steps + 1):
        grads = support_gradient(net, params, list(params), task)
        grads = {name: transform(meta, name, grad) for name, grad in grads.items()}
        m = {name: 0.9 * m[name] + 0.1 * grads[name] for name in params}
        v = {name: 0.999 * v[name] + 0.001 * grads[name] ** 2 for name in params}
        params = {
            name: value - LR * (m[name] / (1 - 0.9**step)) / torch.sqrt(v[name] / (1 - 0.999**step) + 1e-2**2)
            for name, value in params.items()
        }
    return params


@pytest.mark.parametrize(("net", "cml", "options"), WAYS[:-1])
@pytest.mark.parametrize(
    ("name", "adapt", "config"),
    [("maml", adapt, {"inner_lr": LR}), ("inner-adam", adapt_by_adam, {"inner_lr": LR, "epsilon": 1e-2})],
)
def test_the_augmenter_stays_beside_other_algorithms(
    net: str, cml: bool, options: dict[str, Any], name: str, adapt: Any, config: dict[str, float]
) -> None:
    check_training(net, name, WrittenOut(adapt), config, augment=["metacurvature"], cml=cml, **options)
