"""MAML++ against a reference loop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from family import TASKS, WAYS, WrittenOut, check_training, model_parameters, support_gradient
from torch import Tensor

from reference import Net, Task, Tensors

K = 3
CONFIG = {"inner_lr": 0.1, "multi_step": 0}


def norms_of(meta: Tensors, step: int) -> Tensors:
    """Return BatchNorm's parameters of an inner step: in step 0 the model's own, later those of the step."""
    if step == 0:
        return {}
    rows = {name.removeprefix("mamlpp.norm."): v for name, v in meta.items() if name.startswith("mamlpp.norm.")}
    return {name: value[min(step, K - 1) - 1] for name, value in rows.items()}


def follow(net: Net, meta: Tensors, task: Task, steps: int, first_order: bool = False) -> list[Tensors]:
    """Return the parameters before the first step and after each; step k has its own BatchNorm parameters."""
    params = model_parameters(meta)
    trajectory = [params]
    for step in range(steps):
        params = {**params, **norms_of(meta, step)}
        sizes = {name: meta[f"mamlpp.step_size.{name}"] for name in params if f"mamlpp.step_size.{name}" in meta}
        grads = support_gradient(net, params, list(sizes), task, graph=not first_order)
        moved = {name: params[name] - size[min(step, K - 1)] * grads[name] for name, size in sizes.items()}
        params = {**params, **moved}
        trajectory.append(params)
    return trajectory


def adapt(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    return follow(net, meta, task, steps)[-1]


def query_loss(net: Net, params: Tensors, task: Task) -> Tensor:
    return net.loss(net.head(params, net.body(params, task[2])), task[3])


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
def test_training_equals_the_loop(net: str, cml: bool, options: dict[str, Any]) -> None:
    learner = check_training(
        net, "mamlpp", WrittenOut(adapt), CONFIG, cml=cml, inner_steps=K, evaluate=(0, 1, 3, 5), **options
    )
    norms = {name for name in learner.meta_parameters if name.startswith("mamlpp.norm.")}
    assert len(norms) == {"mlp": 0, "conv": 4}[net]


@pytest.mark.parametrize("strategy", ["serial", "traced"])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_multi_step_loss_moves_to_the_last_step(net: str, strategy: str) -> None:
    calls = itertools.count()

    def objective(net: Net, meta: Tensors, task: Task, steps: int) -> Tensor:
        done = next(calls) // TASKS  # three training steps: the weights of the earlier losses are 1/3, 1/6 and 0
        earlier = (1 - min(done, 2) / 2) / K
        losses = [query_loss(net, params, task) for params in follow(net, meta, task, steps)[1:]]
        return earlier * sum(losses[:-1]) + (1 - earlier * (K - 1)) * losses[-1]

    written = WrittenOut(adapt, objective=objective)
    check_training(net, "mamlpp", written, CONFIG | {"multi_step": 2}, inner_steps=K, strategy=strategy)


def test_one_inner_step_has_the_models_own_batch_norm() -> None:
    def adapt_once(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
        params = model_parameters(meta)
        sizes = {name: meta[f"mamlpp.step_size.{name}"] for name in params if f"mamlpp.step_size.{name}" in meta}
        for _ in range(steps):
            grads = support_gradient(net, params, list(sizes), task)
            params = {**params, **{name: params[name] - size[0] * grads[name] for name, size in sizes.items()}}
        return params

    check_training("conv", "mamlpp", WrittenOut(adapt_once), CONFIG, inner_steps=1)


@pytest.mark.parametrize("strategy", ["serial", "traced"])
def test_derivative_order_annealing(strategy: str) -> None:
    calls = itertools.count()

    def objective(net: Net, meta: Tensors, task: Task, steps: int) -> Tensor:
        first_order = next(calls) // TASKS < 2  # the third training step is second-order
        return query_loss(net, follow(net, meta, task, steps, first_order)[-1], task)

    written = WrittenOut(adapt, objective=objective)
    check_training("mlp", "mamlpp", written, CONFIG | {"first_order_steps": 2}, inner_steps=K, strategy=strategy)
