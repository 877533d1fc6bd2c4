"""UNICORN-MAML against a reference loop, and its invariance to the numbers of the classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WrittenOut, check_training, model_parameters, support_gradient
from prototypes import BIAS, CLASSES, WEIGHT

from metareg import MetaLearner
from reference import Net, Task, Tensors
from samples import ConvNet, episodes, tasks_of

INNER_LR = 0.1


def _adapt(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    params = model_parameters(meta)
    params[WEIGHT] = torch.stack([meta["unicorn-maml.weight"]] * CLASSES)
    params[BIAS] = torch.stack([meta["unicorn-maml.bias"]] * CLASSES)
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
    # Before the first step, all classes have the same output, and rounding decides.
    check_training("conv", "unicorn-maml", WrittenOut(_adapt), {"inner_lr": INNER_LR}, evaluate=(1, 4), **options)


def test_a_permutation_of_the_classes_permutes_the_outputs() -> None:
    (task,) = tasks_of(episodes("conv", tasks=1))
    order = torch.tensor([2, 0, 1, 4, 3])
    learner = MetaLearner(ConvNet(), "unicorn-maml", inner_lr=INNER_LR)
    before, after = (learner.adapt(task[0], labels, steps=3)(task[2]) for labels in (task[1], order[task[1]]))
    torch.testing.assert_close(after[:, order], before)
