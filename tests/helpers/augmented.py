"""Compares trainings of MAML with an augmenter with reference loops, on the networks of `samples` in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from family import GAMMA, OUTER_LR, STEPS, TASKS, TOLERANCE, WrittenOut, model_parameters, scores, support_gradient
from family import task_gradient as compute_task_gradient
from learners import Source
from torch import Tensor

from metareg import MetaLearner
from reference import NETS, Net, Task, Tensors, difference
from samples import LOSSES, MODELS, episodes, tasks_of

INNER_LR = 0.1


def adapt_plainly(
    net: Net, meta: Tensors, task: Task, steps: int, gradient: Callable[..., Tensors] = support_gradient
) -> Tensors:
    """Run MAML's inner loop, optionally with another gradient: ``gradient(net, params, names, task)``."""
    params = model_parameters(meta)
    for _ in range(steps):
        grads = gradient(net, params, list(params), task)
        params = {name: value - INNER_LR * grads[name] for name, value in params.items()}
    return params


def norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together."""
    return torch.sqrt(sum((value**2).sum() for value in tensors.values()))


@dataclass(frozen=True)
class Augmenter:
    """A reference implementation of what an augmenter changes in MAML."""

    adapt: Callable[[Net, Tensors, Task, int], Tensors] = adapt_plainly
    combine: Callable[[Sequence[Tensors], Tensor], Tensors] | None = None
    """Combines the meta-gradients and objectives of a batch's tasks; None for the mean."""
    change: Callable[[Tensors, Tensors, Callable[[Tensors], Tensors]], Tensors] | None = None
    """``change(meta, grads, gradient_at)`` returns the meta-gradient for the optimiser; None if it does not change."""
    stays: bool = False
    """Whether evaluation also adapts with `adapt`."""


def check_augmenter(
    net: str, name: str, config: Mapping[str, Any], written: Augmenter, *, cml: bool = False, inner_steps: int = 2,
    **options: Any,
) -> float:  # fmt: skip
    """Compare some training steps with the augmenter `name`, and the scores after them; returns the largest difference."""
    learner = MetaLearner(
        MODELS[net](), "maml", [*([("cml", {"gamma": GAMMA})] if cml else []), (name, config)], loss=LOSSES[net],
        inner_lr=INNER_LR, inner_steps=inner_steps, outer_lr=OUTER_LR, seed=5, **{"strategy": "vectorized", **options},
    )  # fmt: skip
    batches = [episodes(net, TASKS, seed=20 + number) for number in range(STEPS)]
    learner.initialize(batches[0].support_x[0])
    before = {name: value.clone() for name, value in learner.meta_parameters.items()}
    expected = _train(NETS[net], before, [tasks_of(batch) for batch in batches], inner_steps, written, cml)
    for batch in batches:
        learner.step(batch)
    found = learner.meta_parameters
    # BatchNorm cancels a convolution's bias: its gradient is rounding error, which Adam turns into full steps.
    kept = found.keys() - {f"{name.removesuffix('weight')}bias" for name, value in found.items() if value.dim() == 4}
    assert sum((found[name] - before[name]).norm() for name in kept) > 0
    wrong = difference({name: found[name] for name in kept}, {name: expected[name] for name in kept})
    assert wrong < TOLERANCE, f"{name} on {net}: parameters after {STEPS} steps differ by {wrong:.2g}"
    source, wanted = Source(net), (0, 1, 4)
    evaluation = learner.evaluate(source, 5, inner_steps=wanted)
    tasks = tasks_of(source.episodes("test", range(5)))
    algo = WrittenOut(adapt=written.adapt if written.stays else adapt_plainly)
    by_hand = scores(NETS[net], model_parameters(found), algo, tasks, wanted)
    torch.testing.assert_close(evaluation.scores.double(), by_hand, rtol=TOLERANCE, atol=TOLERANCE)
    return wrong


def _train(
    net: Net, meta: Mapping[str, Tensor], batches: Sequence[Sequence[Task]], steps: int, written: Augmenter, cml: bool
) -> Tensors:
    """Return the meta-parameters after one step of `torch.optim.Adam` per batch."""
    meta = {name: value.detach().clone() for name, value in meta.items()}
    optimizer = torch.optim.Adam(meta.values(), lr=OUTER_LR, foreach=False, fused=False)
    algo = WrittenOut(adapt=written.adapt)

    def gradient_at(tasks: Sequence[Task], meta: Tensors) -> Tensors:
        grads = [compute_task_gradient(net, meta, task, steps, algo, cml) for task in tasks]
        if written.combine is None:
            return {name: torch.stack([each[name] for each in grads]).mean(0) for name in meta}
        losses = [_objective(net, meta, task, steps, algo, cml) for task in tasks]
        return written.combine(grads, torch.stack(losses))

    for tasks in batches:
        at = partial(gradient_at, tasks)
        grads = at(meta) if written.change is None else written.change(meta, at(meta), at)
        for name, value in meta.items():
            value.grad = grads[name]
        optimizer.step()
    return meta


def _objective(net: Net, meta: Tensors, task: Task, steps: int, algo: WrittenOut, cml: bool) -> Tensor:
    """Return the query loss of one task plus CML's term."""
    params = {name: value.detach().requires_grad_() for name, value in meta.items()}
    adapted = algo.adapt(net, params, task, steps)
    features = net.body(adapted, task[2])
    loss = net.loss(net.head(adapted, features), task[3])
    return (loss + GAMMA * net.loss(net.colearner(params, features), task[3]) if cml else loss).detach()
