"""L2F against a reference loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WAYS, WrittenOut, check_training, model_parameters, support_gradient

from reference import Net, Task, Tensors

LR = 0.1


def adapt(net: Net, meta: Tensors, task: Task, steps: int, first_order: bool = False) -> Tensors:
    params = model_parameters(meta)
    grads = support_gradient(net, params, list(params), task)
    embedding = torch.stack([grad.mean() for grad in grads.values()])
    if first_order:
        embedding = embedding.detach()
    hidden = torch.relu(meta["l2f.attenuator.0.weight"] @ embedding + meta["l2f.attenuator.0.bias"])
    gamma = torch.sigmoid(meta["l2f.attenuator.2.weight"] @ hidden + meta["l2f.attenuator.2.bias"])
    params = {name: gamma[number] * value for number, (name, value) in enumerate(params.items())}
    for _ in range(steps):
        grads = support_gradient(net, params, list(params), task, graph=not first_order)
        params = {name: value - LR * grads[name] for name, value in params.items()}
    return params


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
def test_training_equals_the_loop(net: str, cml: bool, options: dict[str, Any]) -> None:
    check_training(net, "l2f", WrittenOut(adapt), {"inner_lr": LR}, cml=cml, **options)


def test_the_embedding_is_a_constant_of_first_order() -> None:
    written = WrittenOut(lambda *args: adapt(*args, first_order=True))
    check_training("mlp", "l2f", written, {"inner_lr": LR}, first_order=True)
