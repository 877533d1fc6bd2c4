"""Compares trainings and evaluations of an algorithm with a reference loop, on the networks of `samples` in float64.

A test implements the algorithm as a `WrittenOut`, with plain tensors and `torch.autograd.grad`, without metareg and
torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from learners import Source
from torch import Tensor, nn

from metareg import MetaLearner
from reference import NETS, Net, Task, Tensors, difference, mean_squared_error
from samples import LOSSES, MODELS, episodes, tasks_of

STEPS, TASKS, OUTER_LR, GAMMA, TOLERANCE = 3, 3, 0.01, 0.7, 1e-6
WAYS = [
    pytest.param("mlp", False, {"strategy": "serial"}, id="mlp, serial"),
    pytest.param("mlp", True, {"strategy": "vectorized"}, id="mlp, cml, vectorized"),
    pytest.param(
        "conv", False, {"strategy": "vectorized", "memory": "recompute"}, id="conv, vectorized, recompute",
        marks=pytest.mark.slow,
    ),
    pytest.param("conv", True, {"strategy": "traced"}, id="conv, cml, traced"),
    pytest.param("mlp", True, {"strategy": "compiled"}, id="mlp, cml, compiled", marks=pytest.mark.slow),
]  # fmt: skip
"""Networks, with and without CML, and options of training for most algorithms, as ``("net", "cml", "options")``."""
_IN_FRONT_OF_BATCH_NORM = ("body.0.bias", "body.4.bias", "colearner.0.bias", "colearner.3.bias")


@dataclass(frozen=True)
class WrittenOut:
    """A reference implementation for one task. `meta` holds every meta-parameter by its full name, requiring gradients."""

    adapt: Callable[[Net, Tensors, Task, int], Tensors]
    """``adapt(net, meta, task, steps)`` returns all of the model's parameters after the inner steps, with their graph."""
    objective: Callable[[Net, Tensors, Task, int], Tensor] | None = None
    """``objective(net, meta, task, steps)``, if it differs from the query loss."""
    gradient: Callable[[Net, Tensors, Task, int], Mapping[str, Tensor]] | None = None
    """``gradient(net, meta, task, steps)``, if it is not a derivative; parameters that it omits have gradient zero."""


def support_gradient(net: Net, params: Tensors, names: Sequence[str], task: Task, graph: bool = True) -> Tensors:
    """Return the gradient of the support loss for some of the parameters."""
    loss = net.loss(net.head(params, net.body(params, task[0])), task[1])
    grads = torch.autograd.grad(loss, [params[name] for name in names], create_graph=graph, retain_graph=True)
    return dict(zip(names, grads, strict=True))


def model_parameters(meta: Mapping[str, Tensor]) -> Tensors:
    """Return the meta-parameters that belong to the model itself."""
    return {name: value for name, value in meta.items() if name.startswith(("body.", "head."))}


def task_gradient(net: Net, meta: Mapping[str, Tensor], task: Task, steps: int, algo: WrittenOut, cml: bool) -> Tensors:
    """Return the meta-gradient of one task."""
    meta = {name: value.detach().clone().requires_grad_() for name, value in meta.items()}
    adapted = algo.adapt(net, meta, task, steps)
    features = net.body(adapted, task[2])
    total = torch.zeros((), dtype=torch.float64)
    if algo.gradient is None and algo.objective is None:
        total = net.loss(net.head(adapted, features), task[3])
    elif algo.objective is not None:
        total = algo.objective(net, meta, task, steps)
    if cml:
        total = total + GAMMA * net.loss(net.colearner(meta, features), task[3])
    found: Sequence[Tensor | None] = [None] * len(meta)
    if total.requires_grad:
        found = torch.autograd.grad(total, list(meta.values()), allow_unused=True)
    extra = algo.gradient(net, meta, task, steps) if algo.gradient is not None else {}
    grads = {}
    for (name, value), grad in zip(meta.items(), found, strict=True):
        grads[name] = torch.zeros_like(value) if grad is None else grad
        if name in extra:
            grads[name] = grads[name] + extra[name].detach()
    return {name: value.detach() for name, value in grads.items()}


def train(
    net: Net, meta: Mapping[str, Tensor], batches: Sequence[Any], steps: int, algo: WrittenOut, cml: bool
) -> Tensors:
    """Return the meta-parameters after one step of `torch.optim.Adam` per batch."""
    meta = {name: value.detach().clone() for name, value in meta.items()}
    optimizer = torch.optim.Adam(meta.values(), lr=OUTER_LR, foreach=False, fused=False)
    for batch in batches:
        of_tasks = [task_gradient(net, meta, task, steps, algo, cml) for task in tasks_of(batch)]
        for name, value in meta.items():
            value.grad = torch.stack([grads[name] for grads in of_tasks]).mean(0)
        optimizer.step()
    return meta


def scores(
    net: Net, meta: Mapping[str, Tensor], algo: WrittenOut, tasks: Sequence[Task], wanted: Sequence[int]
) -> Tensor:
    """Return the metric of some tasks after each number of inner steps ``[tasks, len(wanted)]``."""
    meta = {name: value.detach().clone().requires_grad_() for name, value in meta.items()}
    rows = []
    for task in tasks:
        row = []
        for steps in wanted:
            params = algo.adapt(net, meta, task, steps)
            outputs = net.head(params, net.body(params, task[2]))
            regression = net.loss is mean_squared_error
            right = net.loss(outputs, task[3]) if regression else (outputs.argmax(1) == task[3]).double().mean()
            row.append(right.detach())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def check_training(
    net: str, name: str | type, algo: WrittenOut, config: Mapping[str, Any], *, cml: bool = False, inner_steps: int = 2,
    evaluate: Sequence[int] = (0, 1, 4), augment: Sequence[Any] = (),
    model: tuple[Callable[[], nn.Module], Net] | None = None, **options: Any,
) -> MetaLearner:  # fmt: skip
    """Compare some training steps of an algorithm, and the scores after them, with the loop; return the learner.

    Args:
        net: ``"mlp"`` or ``"conv"``.
        name: the algorithm's name or class.
        algo: its reference implementation.
        config: the algorithm's options.
        cml: whether to add CML.
        inner_steps: adaptation steps in training.
        evaluate: the numbers of adaptation steps in evaluation.
        augment: further augmenters, which `algo` implements too.
        model: another model than the network's, with its reference implementation.
        options: options of the learner, such as its strategy.
    """
    augment = [*augment, *([("cml", {"gamma": GAMMA})] if cml else [])]
    build, functions = model or (MODELS[net], NETS[net])
    learner = MetaLearner(
        build(), name, augment, loss=LOSSES[net], algo_config=config, inner_steps=inner_steps, outer_lr=OUTER_LR,
        seed=5, **{"strategy": "vectorized", **options},
    )  # fmt: skip
    batches = [episodes(net, TASKS, seed=20 + number) for number in range(STEPS)]
    learner.initialize(batches[0].support_x[0])
    before = {name: value.clone() for name, value in learner.meta_parameters.items()}
    after = train(functions, before, batches, inner_steps, algo, cml)
    for batch in batches:
        learner.step(batch)
    found = learner.meta_parameters
    kept = [name for name in after if not (net == "conv" and name.endswith(_IN_FRONT_OF_BATCH_NORM))]
    assert found.keys() == after.keys()
    assert sum((found[name] - before[name]).norm() for name in kept) > 0
    wrong = difference({name: found[name] for name in kept}, {name: after[name] for name in kept})
    assert wrong < TOLERANCE, f"{name} on {net}: parameters after {STEPS} steps differ by {wrong:.2g}"
    source = Source(net)
    evaluation = learner.evaluate(source, 5, inner_steps=evaluate)
    tasks = tasks_of(source.episodes("test", range(5)))
    expected = scores(functions, learner.plain_meta_parameters, algo, tasks, evaluate)
    torch.testing.assert_close(evaluation.scores.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    return learner
