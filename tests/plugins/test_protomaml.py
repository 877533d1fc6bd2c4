"""ProtoMAML against a reference loop."""

from __future__ import annotations

from typing import Any

import pytest
from family import WrittenOut, check_training, model_parameters, support_gradient
from prototypes import start_at_prototypes

from reference import Net, Task, Tensors

INNER_LR = 0.05


def _adapt(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    params = start_at_prototypes(net, model_parameters(meta), task)
    for _ in range(steps):
        grads = support_gradient(net, params, list(params), task)
        params = {name: value - INNER_LR * grads[name] for name, value in params.items()}
    return params


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "serial"},
        {"cml": True},
        {"cml": True, "strategy": "traced", "memory": "recompute"},
        pytest.param({"cml": True, "strategy": "compiled"}, marks=pytest.mark.slow),
    ],
)
def test_training_and_evaluation_are_those_of_the_loop(options: dict[str, Any]) -> None:
    check_training("conv", "protomaml", WrittenOut(_adapt), {"inner_lr": INNER_LR}, **options)
