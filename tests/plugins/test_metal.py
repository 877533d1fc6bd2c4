"""MeTAL against a reference loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WAYS, WrittenOut, check_training, model_parameters
from torch import Tensor

from metareg import MetaLearner, UsageError
from reference import Net, Task, Tensors
from samples import LOSSES, MODELS, episodes

LR, STEPS = 0.05, 2


def _adapt(transductive: bool) -> Any:
    def adapt(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
        params = model_parameters(meta)
        for step in range(steps):
            loss = _support_loss(net, params, meta, task, min(step, STEPS - 1))
            if transductive:
                loss = loss + _query_loss(net, params, meta, task, min(step, STEPS - 1))
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - LR * grad for (name, p), grad in zip(params.items(), grads, strict=True)}
        return params

    return adapt


def _support_loss(net: Net, params: Tensors, meta: Tensors, task: Task, step: int) -> Tensor:
    outputs = net.head(params, net.body(params, task[0]))
    targets = task[1] if task[1].is_floating_point() else torch.eye(outputs.shape[1], dtype=torch.float64)[task[1]]
    loss = net.loss(outputs, task[1])
    state = torch.stack([loss, *(p.sum() / p.numel() for p in params.values())])
    rows = torch.stack([torch.cat([state, out, y]) for out, y in zip(outputs, targets, strict=True)])
    return loss + _learned(meta, "metal.support.", step, _scaled(rows), _scaled(state))


def _query_loss(net: Net, params: Tensors, meta: Tensors, task: Task, step: int) -> Tensor:
    outputs = net.head(params, net.body(params, task[2]))
    p = torch.softmax(outputs, 1)
    means = torch.stack([p.sum() / p.numel() for p in params.values()])
    rows = torch.stack(
        [torch.cat([means, out, (q * torch.log(q)).sum()[None]]) for out, q in zip(outputs, p, strict=True)]
    )
    rows = _scaled(rows)
    return _learned(meta, "metal.query.", step, rows, rows.sum(0) / len(rows))


def _learned(meta: Tensors, prefix: str, step: int, rows: Tensor, state: Tensor) -> Tensor:
    own = {name.removeprefix(prefix): value[step] for name, value in meta.items() if name.startswith(prefix)}
    hidden = torch.relu(own["adapter.0.weight"] @ state + own["adapter.0.bias"])
    numbers = own["adapter.2.weight"] @ hidden + own["adapter.2.bias"]
    w1, b1, w2 = (
        (1 + own["scale"][i] * numbers[i]) * own[name] + own["shift"][i] * numbers[3 + i]
        for i, name in enumerate(["loss.0.weight", "loss.0.bias", "loss.2.weight"])
    )
    return torch.stack([w2 @ torch.relu(w1 @ row + b1) for row in rows]).mean()


def _scaled(x: Tensor) -> Tensor:
    centred = x - x.sum() / x.numel()
    return centred / (torch.sqrt((centred**2).sum() / (x.numel() - 1)) + 1e-12)


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
def test_training_equals_the_loop(net: str, cml: bool, options: dict[str, Any]) -> None:
    algo = WrittenOut(_adapt(False))
    learner = check_training(net, "metal", algo, {"inner_lr": LR}, cml=cml, inner_steps=STEPS, **options)
    assert bool(learner.meta_parameters["metal.support.scale"].all())


@pytest.mark.parametrize("cml", [False, True], ids=["alone", "cml"])
def test_transductive_training_equals_the_loop(cml: bool) -> None:
    algo, config = WrittenOut(_adapt(True)), {"inner_lr": LR, "transductive": True}
    learner = check_training("conv", "metal", algo, config, cml=cml, inner_steps=STEPS)
    assert bool(learner.meta_parameters["metal.query.scale"].all())


def test_transductive_needs_classes_and_query_inputs() -> None:
    config = {"inner_lr": LR, "transductive": True}
    learner = MetaLearner(MODELS["mlp"](), "metal", loss=LOSSES["mlp"], algo_config=config)
    with pytest.raises(UsageError, match="classes"):
        learner.step(episodes("mlp"))
    learner = MetaLearner(MODELS["conv"](), "metal", loss=LOSSES["conv"], algo_config=config)
    batch = episodes("conv")
    learner.step(batch)
    with pytest.raises(UsageError, match="query inputs"):
        learner.adapt(batch.support_x[0], batch.support_y[0])
