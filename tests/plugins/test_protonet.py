"""Prototypical networks against their definition by distances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WrittenOut, check_training
from prototypes import BIAS, WEIGHT, embed, mean_of_classes, start_at_prototypes
from torch import Tensor, nn

from metareg import Episodes, MetaLearner, UsageError
from reference import NETS, Net, Task, Tensors
from samples import MLP, ConvNet, episodes, tasks_of


def _adapt(net: Net, meta: Tensors, task: Task, _: int) -> Tensors:
    return start_at_prototypes(net, meta, task)


def _distance_loss(net: Net, meta: Tensors, task: Task, _: int) -> Tensor:
    """Compute the loss of softmax(−‖z − c‖²), without a linear layer."""
    prototypes = mean_of_classes(embed(net, meta, task[0]), task[1])
    return net.loss(-((embed(net, meta, task[2])[:, None] - prototypes) ** 2).sum(-1), task[3])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cml": True, "strategy": "serial", "memory": "recompute"},
        pytest.param({"cml": True, "strategy": "compiled"}, marks=pytest.mark.slow),
    ],
)
def test_it_is_trained_by_the_distances_to_the_prototypes(options: dict[str, Any]) -> None:
    check_training("conv", "protonet", WrittenOut(_adapt, _distance_loss), {}, **options)


def test_a_class_without_support_examples_gets_the_mean_of_all() -> None:
    task = tasks_of(episodes("conv", shots=3))[0]
    kept = (task[1] != 3) & (torch.arange(15) != 1)  # class 0 has two examples, class 3 none, the others three
    support = task[0][kept], task[1][kept]
    learner = MetaLearner(ConvNet(), "protonet")
    adapted = dict(learner.adapt(*support).named_parameters())
    expected = start_at_prototypes(NETS["conv"], learner.meta_parameters, (*support, *task[2:]))
    torch.testing.assert_close(
        {name: adapted[name].detach() for name in (WEIGHT, BIAS)}, {name: expected[name] for name in (WEIGHT, BIAS)}
    )
    loss, gradient = learner.meta_gradient(Episodes(*(part[None] for part in (*support, *task[2:]))))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradient.values())


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.Tanh()), "must be an nn.Linear"),
        (nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5, bias=False)), r"'head\.2\.weight'"),
    ],
)
def test_a_head_that_cannot_hold_prototypes_is_refused(head: nn.Module, message: str) -> None:
    model = ConvNet()
    model.head = head.double()
    with pytest.raises(UsageError, match=message):
        MetaLearner(model, "protonet").step(episodes("conv"))


def test_numbers_have_no_prototypes() -> None:
    with pytest.raises(UsageError, match="numbers"):
        MetaLearner(MLP(), "protonet", loss="mse").step(episodes("mlp"))
