"""ALFA against a reference loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WAYS, WrittenOut, check_training, model_parameters, support_gradient

from reference import Net, Task, Tensors

CONFIG = {"inner_lr": 0.1, "weight_decay": 0.3}


def adapt(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    params = model_parameters(meta)
    layers = len(params)
    for step in range(steps):
        grads = support_gradient(net, params, list(params), task)
        state = torch.stack([value.mean() for value in params.values()] + [value.mean() for value in grads.values()])
        hidden = torch.relu(meta["alfa.generator.0.weight"] @ state + meta["alfa.generator.0.bias"])
        generated = meta["alfa.generator.2.weight"] @ hidden + meta["alfa.generator.2.bias"]
        row = min(step, 1)
        new = {}
        for number, name in enumerate(params):
            alpha = meta["alfa.step_size"][row, number] * generated[number]
            beta = meta["alfa.decay"][row, number] * generated[layers + number]
            new[name] = (1 - beta) * params[name] - alpha * grads[name]
        params = new
    return params


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
def test_training_equals_the_loop(net: str, cml: bool, options: dict[str, Any]) -> None:
    learner = check_training(net, "alfa", WrittenOut(adapt), CONFIG, cml=cml, **options)
    assert learner.meta_parameters["alfa.step_size"].shape[0] == 2
    assert learner.meta_parameters["alfa.generator.2.weight"].abs().sum() > 0
