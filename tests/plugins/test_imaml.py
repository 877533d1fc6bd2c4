"""iMAML against a reference loop with dense linear systems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import WAYS, WrittenOut, check_training, model_parameters, support_gradient
from torch import Tensor

from metareg import MetaLearner
from reference import NETS, Net, Task, Tensors, difference
from samples import LOSSES, MODELS, episodes, tasks_of

LR, STRENGTH, DAMPING = 0.02, 3.0, 0.5
CONFIG = {"inner_lr": LR, "strength": STRENGTH, "damping": DAMPING}


def _adapt(net: Net, meta: Tensors, task: Task, steps: int, strength: float = STRENGTH) -> Tensors:
    start = model_parameters(meta)
    params = dict(start)
    for _ in range(steps):
        grads = support_gradient(net, params, list(params), task)
        params = {name: p - LR * (grads[name] + strength * (p - start[name])) for name, p in params.items()}
    return params


def _solve(iterations: int | None) -> WrittenOut:
    """Return iMAML's gradient with the linear system solved exactly, or in the Krylov space of some iterations."""

    def gradient(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
        params = {name: p.detach().requires_grad_() for name, p in _adapt(net, meta, task, steps).items()}
        grads = support_gradient(net, params, list(params), task)
        rows = [
            _flatten(torch.autograd.grad(entry, list(params.values()), retain_graph=True))
            for entry in _flatten(list(grads.values()))
        ]
        matrix = torch.eye(len(rows), dtype=torch.float64) + torch.stack(rows) / (STRENGTH + DAMPING)
        right = _flatten(
            torch.autograd.grad(net.loss(net.head(params, net.body(params, task[2])), task[3]), list(params.values()))
        )
        if iterations is None:
            solution = torch.linalg.solve(matrix, right)
        else:
            basis = _krylov_basis(matrix, right, iterations)
            solution = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ right)
        parts = solution.split([p.numel() for p in params.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)}

    return WrittenOut(_adapt, gradient=gradient)


def _krylov_basis(matrix: Tensor, vector: Tensor, size: int) -> Tensor:
    columns = [vector / vector.norm()]
    for _ in range(size - 1):
        new = matrix @ columns[-1]
        for _ in range(2):
            for column in columns:
                new = new - (column @ new) * column
        columns.append(new / new.norm())
    return torch.stack(columns, 1)


def _flatten(tensors: Any) -> Tensor:
    return torch.cat([value.flatten() for value in tensors])


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
def test_training_equals_the_loop(net: str, cml: bool, options: dict[str, Any]) -> None:
    check_training(net, "imaml", _solve(5), CONFIG, cml=cml, inner_steps=3, **options)


def test_first_order_changes_nothing() -> None:
    check_training("mlp", "imaml", _solve(5), CONFIG, inner_steps=3, strategy="serial", first_order=True)


def test_many_iterations_solve_the_system() -> None:
    config = {**CONFIG, "cg_steps": 90}
    check_training("mlp", "imaml", _solve(None), config, inner_steps=3, strategy="serial")


def test_gradient_is_the_derivative_of_the_solution() -> None:
    """At the solution of the inner problem, the unrolled loop has the same meta-gradient."""
    net, batch, strength, steps = NETS["mlp"], episodes("mlp", 1, seed=2), 10.0, 200
    config = {"inner_lr": LR, "strength": strength, "damping": 0.0, "cg_steps": 60}
    learner = MetaLearner(
        MODELS["mlp"](), "imaml", loss=LOSSES["mlp"], algo_config=config, inner_steps=steps, strategy="serial"
    )
    _, found = learner.meta_gradient(batch)
    meta = {name: p.detach().clone().requires_grad_() for name, p in learner.meta_parameters.items()}
    (task,) = tasks_of(batch)
    adapted = _adapt(net, meta, task, steps, strength)
    loss = net.loss(net.head(adapted, net.body(adapted, task[2])), task[3])
    unrolled = dict(zip(meta, torch.autograd.grad(loss, list(meta.values())), strict=True))
    assert difference(found, unrolled) < 1e-6
