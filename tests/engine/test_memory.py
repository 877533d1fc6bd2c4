"""Peak memory of a meta-gradient in bytes of live tensors, independent of the allocator."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metareg import Episodes, MetaLearner
from metareg.testing.memory import measure_peak

INNER_LR = 0.01


def create_model() -> nn.Sequential:
    torch.manual_seed(0)
    block = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*block, nn.Flatten(), nn.Linear(8 * 8 * 8, 5))


def draw_task() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.rand(10, 8, 16, 16), torch.arange(10) % 5, torch.rand(5, 8, 16, 16), torch.arange(5)


def run_loop(inner_steps: int) -> None:
    """Compute one meta-gradient of MAML with a loop over `torch.autograd.grad`."""
    model = create_model()
    support_x, support_y, query_x, query_y = draw_task()
    params = dict(model.named_parameters())
    for _ in range(inner_steps):
        loss = F.cross_entropy(functional_call(model, params, (support_x,)), support_y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: p - INNER_LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
    F.cross_entropy(functional_call(model, params, (query_x,)), query_y).backward()


def run_learner(inner_steps: int, tasks: int = 1, **options: Any) -> None:
    learner = MetaLearner(create_model(), inner_lr=INNER_LR, inner_steps=inner_steps, **options)
    learner.meta_gradient(Episodes(*(part.expand(tasks, *part.shape) for part in draw_task())))


@pytest.mark.parametrize("tasks", [1, 2])
def test_each_stored_step_takes_what_it_takes_a_loop(tasks: int) -> None:
    """The outer derivative was once built with its own graph, which doubled the memory."""
    loop = measure_peak(lambda: run_loop(5)) - measure_peak(lambda: run_loop(2))
    few, many = (measure_peak(lambda n=n: run_learner(n, tasks, strategy="vectorized")) for n in (2, 5))
    assert many - few <= 1.1 * tasks * loop


@pytest.mark.parametrize("options", [{"memory": "recompute"}, {"algo": "imaml"}], ids=["recompute", "imaml"])
def test_memory_does_not_grow_with_inner_steps(options: dict[str, Any]) -> None:
    one, many = (measure_peak(lambda n=n: run_learner(n, strategy="serial", **options)) for n in (1, 8))
    assert many <= 1.15 * one


def count_operations() -> int:
    """The operations of all traced graphs that exist."""
    gc.collect()
    return sum(len(each.graph.nodes) for each in gc.get_objects() if issubclass(type(each), torch.fx.GraphModule))


@pytest.mark.parametrize(("algo", "strategy"), [("maml", "vectorized"), ("anil", "traced")])
def test_traced_graphs_do_not_grow_with_recomputed_steps(algo: str, strategy: str) -> None:
    sizes = []
    for inner_steps in (2, 5):
        before = count_operations()
        options = {"strategy": strategy, "memory": "recompute", "inner_steps": inner_steps, "loss": "cross_entropy"}
        learner = MetaLearner(create_model(), algo, inner_lr=INNER_LR, **options)
        for _ in range(3):
            learner.meta_gradient(Episodes(*(part.expand(2, *part.shape) for part in draw_task())))
        sizes.append(count_operations() - before)
        del learner
    assert 0 < sizes[1] <= sizes[0]
