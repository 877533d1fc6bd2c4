"""BMG against a reference loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WAYS, WrittenOut, check_training, model_parameters, support_gradient
from torch import Tensor

from metareg import MetaLearner
from reference import Net, Task, Tensors, difference
from samples import LOSSES, MODELS, episodes

LR, TARGET_LR, AHEAD = 0.05, 0.2, 3
CONFIG = {"inner_lr": LR, "target_lr": TARGET_LR, "target_steps": AHEAD}


def _descend(net: Net, params: Tensors, task: Task, steps: int, graph: bool = True) -> Tensors:
    for _ in range(steps):
        grads = support_gradient(net, params, list(params), task, graph)
        params = {name: p - LR * grads[name] for name, p in params.items()}
    return params


def _adapt(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    return _descend(net, model_parameters(meta), task, steps)


def _target(net: Net, adapted: Tensors, task: Task) -> Tensors:
    ahead = _descend(net, {name: p.detach().requires_grad_() for name, p in adapted.items()}, task, AHEAD - 1)
    loss = net.loss(net.head(ahead, net.body(ahead, task[2])), task[3])
    grads = torch.autograd.grad(loss, list(ahead.values()))
    return {name: (p - TARGET_LR * grad).detach() for (name, p), grad in zip(ahead.items(), grads, strict=True)}


def _match_outputs(net: Net, meta: Tensors, task: Task, steps: int) -> Tensor:
    adapted = _adapt(net, meta, task, steps)
    target = _target(net, adapted, task)
    expected, outputs = (net.head(params, net.body(params, task[2])) for params in (target, adapted))
    if task[3].is_floating_point():
        return ((outputs - expected) ** 2).mean() / 2
    p, q = torch.softmax(expected, 1), torch.softmax(outputs, 1)
    return (p * torch.log(p / q)).sum() / len(p)


def _match_parameters(net: Net, meta: Tensors, task: Task, steps: int) -> Tensor:
    adapted = _adapt(net, meta, task, steps)
    target = _target(net, adapted, task)
    total = torch.zeros((), dtype=torch.float64)
    for name, p in adapted.items():
        total = total + ((p - target[name]) ** 2).sum()
    return total / (2 * TARGET_LR)


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
def test_training_equals_the_loop(net: str, cml: bool, options: dict[str, Any]) -> None:
    check_training(net, "bmg", WrittenOut(_adapt, objective=_match_outputs), CONFIG, cml=cml, **options)


@pytest.mark.parametrize(("net", "cml"), [("mlp", False), ("conv", True)])
def test_matching_parameters_equals_the_loop(net: str, cml: bool) -> None:
    config = {**CONFIG, "matching": "parameters"}
    check_training(net, "bmg", WrittenOut(_adapt, objective=_match_parameters), config, cml=cml)


def test_one_step_ahead_is_maml() -> None:
    """If the target is one step on the query loss ahead, the meta-gradient is that of MAML."""
    options: dict[str, Any] = {"loss": LOSSES["conv"], "inner_steps": 2, "strategy": "vectorized"}
    config = {"inner_lr": LR, "target_lr": TARGET_LR, "target_steps": 1, "matching": "parameters"}
    _, found = MetaLearner(MODELS["conv"](), "bmg", algo_config=config, **options).meta_gradient(episodes("conv"))
    maml = MetaLearner(MODELS["conv"](), "maml", algo_config={"inner_lr": LR}, **options)
    assert difference(found, maml.meta_gradient(episodes("conv"))[1]) < 1e-10
