"""R2-D2 against the authors' form of ridge regression, with rows and targets divided by √n."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WrittenOut, check_training
from prototypes import BIAS, CLASSES, WEIGHT, embed
from torch import Tensor

from metareg import Episodes, MetaLearner
from reference import NETS, Net, Task, Tensors
from samples import ConvNet, episodes, tasks_of

RIDGE = 0.3


def _regress(rows: Tensor, targets: Tensor, meta: Tensors, scale: float) -> Tensor:
    """Return the solution ``[features + 1, outputs]``, with the inverse of the system of the size of the features."""
    count = len(rows)
    rows = torch.cat([rows, torch.ones(count, 1, dtype=rows.dtype)], 1) / count**0.5
    system = rows.T @ rows + meta["r2d2.log_ridge"].exp() * torch.eye(rows.shape[1], dtype=rows.dtype)
    return scale * meta["r2d2.log_scale"].exp() * torch.linalg.inv(system) @ rows.T @ (targets / count**0.5)


def _adapt(net: Net, meta: Tensors, task: Task, _: int) -> Tensors:
    if net is NETS["mlp"]:
        solution = _regress(net.body(meta, task[0]), task[1], meta, 1.0)
        return {**meta, "head.weight": solution[:-1].T, "head.bias": solution[-1] + meta["r2d2.offset"]}
    one_hot = torch.nn.functional.one_hot(task[1], CLASSES).double()
    solution = _regress(embed(net, meta, task[0]), one_hot, meta, 10.0)
    return {**meta, WEIGHT: solution[:-1].T, BIAS: solution[-1]}


@pytest.mark.parametrize(
    ("net", "options"),
    [
        ("mlp", {"strategy": "serial"}),
        ("mlp", {"cml": True}),
        ("conv", {"strategy": "serial", "memory": "recompute"}),
        ("conv", {"cml": True, "strategy": "traced"}),
        pytest.param("conv", {"cml": True, "strategy": "compiled"}, marks=pytest.mark.slow),
    ],
)
def test_training_and_evaluation_are_those_of_the_loop(net: str, options: dict[str, Any]) -> None:
    learner = check_training(net, "r2d2", WrittenOut(_adapt), {"ridge": RIDGE}, **options)
    meta = learner.meta_parameters
    assert meta["r2d2.log_ridge"].exp() != RIDGE
    assert meta["r2d2.log_scale"] != 0
    assert (meta["r2d2.offset"] != 0) == (net == "mlp")


def test_a_class_without_support_examples_has_the_output_zero() -> None:
    task = tasks_of(episodes("conv", shots=3))[0]
    kept = (task[1] != 3) & (torch.arange(15) != 1)  # class 0 has two examples, class 3 none, the others three
    support, query = (task[0][kept], task[1][kept]), task[2:]
    learner = MetaLearner(ConvNet(), "r2d2")
    outputs = learner.adapt(*support)(query[0])
    assert outputs[:, 3].abs().max() < 1e-12 < outputs[:, :3].abs().min()
    loss, gradient = learner.meta_gradient(Episodes(*(part[None] for part in (*support, *query))))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradient.values())
