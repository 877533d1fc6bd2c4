"""Meta-LSTM against a reference loop over tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from family import WAYS, WrittenOut, check_training, model_parameters, support_gradient
from torch import Tensor

from metareg import MetaLearner
from reference import Net, Task, Tensors
from samples import LOSSES, MODELS, episodes

WIDTH = 4


def _see(x: Tensor) -> Tensor:
    """Return the magnitude and sign of each number as a row."""
    rows = [
        [math.log(abs(v)) / 10, math.copysign(1, v)] if abs(v) >= math.exp(-10) else [-1, math.exp(10) * v]
        for v in x.flatten().tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _adapt(first_order: bool) -> Any:
    def adapt(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
        own = {name.removeprefix("meta-lstm."): value for name, value in meta.items() if name.startswith("meta-lstm.")}
        params = model_parameters(meta)
        memory = {
            name: [torch.zeros(p.numel(), width, dtype=torch.float64) for width in (WIDTH, WIDTH, 1, 1)]
            for name, p in params.items()
        }
        for _ in range(steps):
            loss = net.loss(net.head(params, net.body(params, task[0])), task[1])
            grads = support_gradient(net, params, list(params), task)
            for name, p in params.items():
                grad = grads[name].detach() if first_order else grads[name]
                params[name], memory[name] = _step(own, p, grad, loss, memory[name])
        return params

    return adapt


def _step(own: Tensors, p: Tensor, grad: Tensor, loss: Tensor, memory: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    hidden, cell, forget, take = memory
    seen = torch.cat([_see(loss).expand(p.numel(), 2), _see(grad), hidden], 1)
    gates = [
        seen @ w.T + b for w, b in zip(own["lstm.weight"].split(WIDTH), own["lstm.bias"].split(WIDTH), strict=True)
    ]
    cell = torch.sigmoid(gates[1]) * cell + torch.sigmoid(gates[0]) * torch.tanh(gates[3])
    hidden = torch.sigmoid(gates[2]) * torch.tanh(cell)
    column = p.reshape(-1, 1)
    forget = torch.sigmoid(torch.cat([hidden, column, forget], 1) @ own["forget.weight"].T + own["forget.bias"])
    take = torch.sigmoid(torch.cat([hidden, column, take], 1) @ own["input.weight"].T + own["input.bias"])
    return (forget * column - take * grad.reshape(-1, 1)).view(p.shape), [hidden, cell, forget, take]


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
def test_training_equals_the_loop(net: str, cml: bool, options: dict[str, Any]) -> None:
    check_training(net, "meta-lstm", WrittenOut(_adapt(False)), {"width": WIDTH}, cml=cml, **options)


@pytest.mark.parametrize(("net", "cml"), [("mlp", True), ("conv", False)])
def test_first_order_equals_the_loop_and_everything_learns(net: str, cml: bool) -> None:
    algo = WrittenOut(_adapt(True))
    learner = check_training(net, "meta-lstm", algo, {"width": WIDTH}, cml=cml, inner_steps=3, first_order=True)
    _, grads = learner.meta_gradient(episodes(net))
    assert {name: bool(grad.any()) for name, grad in grads.items()} == dict.fromkeys(grads, True)


def test_first_steps_are_nearly_gradient_descent() -> None:
    """θ keeps 98 to 99.4 % of its value and moves by 0.6 to 1.9 % of the gradient: σ(b) for b in [4, 5] and [−5, −4]."""
    learner = MetaLearner(MODELS["mlp"](), "meta-lstm", loss=LOSSES["mlp"], seed=3)
    learner.initialize(episodes("mlp").support_x[0])
    meta = learner.meta_parameters
    assert 4 <= meta["meta-lstm.forget.bias"].item() <= 5
    assert -5 <= meta["meta-lstm.input.bias"].item() <= -4
    weights = torch.cat([meta[f"meta-lstm.{part}.weight"].flatten() for part in ("lstm", "forget", "input")])
    assert 0.009 < weights.abs().max() <= 0.01
