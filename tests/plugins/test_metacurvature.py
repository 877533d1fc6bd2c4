"""Meta-Curvature as an algorithm and as an augmenter, beside the same loop written out."""

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
