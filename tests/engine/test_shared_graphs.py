"""Graphs shared between learners: traced once where everything but tensors is equal, and never where something differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metareg import Episodes, MetaLearner, hookimpl
from metareg.engine import step_loop, tracing
from metareg.engine.shared_graphs import SharedGraphs

FACTOR = [1.0]


class Scaled(nn.Module):
    def __init__(self, scale: Any = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 4), nn.Tanh())
        self.head = nn.Linear(4, 1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale[0] if isinstance(self.scale, list) else self.scale
        return self.head(self.body(x) * scale)


def scaled_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return FACTOR[0] * (outputs - targets).square().mean()


def freeze(module: nn.Module) -> nn.Module:
    next(module.parameters()).requires_grad_(False)
    return module


@pytest.fixture(autouse=True)
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the functions that are traced."""
    counted: list[int] = []
    create_graph = tracing.create_graph

    def count(function: Callable[..., list[Tensor]], inputs: Any) -> torch.fx.GraphModule:
        counted.append(len(inputs))
        return create_graph(function, inputs)

    monkeypatch.setattr(tracing, "create_graph", count)
    FACTOR[0] = 1.0
    return counted


def train(seed: int, model: Callable[[], nn.Module] = Scaled, steps: int = 4, **options: Any) -> dict[str, Tensor]:
    """The weights after some steps on tasks of their own."""
    torch.manual_seed(seed)
    built = model()
    given = {"strategy": "vectorized", "loss": "mse", "inner_steps": 2, "inner_lr": 0.1, **options}
    learner = MetaLearner(built, given.pop("algo", "maml"), seed=seed, **given)
    for _ in range(steps):
        x = torch.rand(3, 5, 1)
        learner.step(Episodes(x, x.sin(), x, x.sin()))
    return {name: value.clone() for name, value in learner.meta_parameters.items()}


@pytest.mark.parametrize("options", [{}, {"augment": ["cml"]}, {"algo": "metasgd"}], ids=["maml", "cml", "metasgd"])
def test_learners_that_differ_by_seed_trace_once(options: dict[str, Any], traces: list[int]) -> None:
    train(0, **options)
    assert len(traces) == 1
    shared = train(1, **options)
    assert len(traces) == 1
    tracing.SHARED = SharedGraphs(50_000)
    own = train(1, **options)
    assert len(traces) == 2
    assert all(torch.equal(shared[name], own[name]) for name in own)


@pytest.mark.parametrize(
    "changes",
    [
        {"inner_lr": 0.1001},
        {"inner_steps": 3},
        {"first_order": True},
        {"memory": "recompute"},
        {"augment": ["cml"]},
        {"algo": "anil"},
        {"loss": "mae"},
        {"model": lambda: Scaled(1.0001)},
        {"model": lambda: Scaled([1.0001])},
    ],
    ids=["step size", "steps", "first order", "memory", "augmenter", "algorithm", "loss", "a number", "a list"],
)
def test_what_differs_is_traced_anew(changes: dict[str, Any], traces: list[int]) -> None:
    train(0, lambda: Scaled([1.0]))
    train(0, **({"model": lambda: Scaled([1.0])} | changes))
    assert len(traces) > 1


@pytest.mark.parametrize(
    "model",
    [
        lambda: freeze(Scaled()),
        lambda: Scaled(torch.ones(())),
        lambda: Hooked(),
    ],
    ids=["frozen weights", "a tensor", "a hook"],
)
def test_what_cannot_be_compared_is_not_shared(model: Callable[[], nn.Module], traces: list[int]) -> None:
    train(0, model)
    train(1, model)
    assert len(traces) == 2


class Hooked(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.body.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)


def test_functions_of_the_user_are_compared_with_the_values_that_they_read(traces: list[int]) -> None:
    train(0, loss=scaled_loss)
    train(1, loss=scaled_loss)
    assert len(traces) == 1
    FACTOR[0] = 2.0
    changed = train(1, loss=scaled_loss)
    assert len(traces) == 2
    expected = train(1, loss=lambda outputs, targets: 2.0 * (outputs - targets).square().mean())
    assert len(traces) == 3
    assert all(torch.equal(changed[name], expected[name]) for name in expected)


def test_the_graphs_used_least_recently_go_first(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    train(0)
    ((_, _, size),) = tracing.SHARED._graphs.values()
    monkeypatch.setattr(tracing, "SHARED", SharedGraphs(2 * size + size // 2))
    for lr in (0.1, 0.2, 0.1, 0.3):
        train(0, inner_lr=lr)
    assert len(traces) == 4
    train(0, inner_lr=0.1)
    assert len(traces) == 4
    train(0, inner_lr=0.2)
    assert len(traces) == 5


def train_compiled(seed: int, **options: Any) -> dict[str, Tensor]:
    """The weights after some steps in one compiled program."""
    torch.manual_seed(seed)
    given = {"strategy": "compiled", "loss": "mse", "inner_lr": 0.1, **options}
    learner = MetaLearner(Scaled(), seed=seed, **given)
    learner.fit("sinusoid", 6, meta_batch=3)
    return {name: value.clone() for name, value in learner.meta_parameters.items()}


def test_learners_that_differ_by_seed_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    compile_graph = step_loop.compile_graph

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return compile_graph(graph, inputs)

    monkeypatch.setattr(step_loop, "compile_graph", count)
    train_compiled(0)
    shared = train_compiled(1)
    assert len(compiled) == 1
    other = train_compiled(1, outer_betas=(0.8, 0.99))
    assert len(compiled) == 2
    step_loop.SHARED = SharedGraphs(50_000)
    own = train_compiled(1)
    assert len(compiled) == 3
    for name, value in own.items():
        assert torch.equal(shared[name], value)
        assert not torch.equal(other[name], value)


class Decay:
    """An augmenter whose setting is an attribute of its class."""

    weight = 1e-3

    @hookimpl
    def augment_outer_loss(self, adapted: dict[str, Tensor]) -> Tensor:
        return self.weight * torch.stack([value.square().sum() for value in adapted.values()]).sum()


@pytest.mark.parametrize("strategy", ["vectorized", "compiled"])
def test_an_attribute_of_a_class_counts_with_the_value_that_it_has(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes the first gradient by less than a compiled program may differ from what it was traced from."""

    def train_at(weight: float, strategy: str) -> dict[str, Tensor]:
        monkeypatch.setattr(Decay, "weight", weight)
        return train_compiled(0, augment=[Decay], strategy=strategy)

    train_at(1e-3, strategy)
    changed, expected = train_at(2e-3, strategy), train_at(2e-3, "serial")
    for name, value in expected.items():
        torch.testing.assert_close(changed[name], value, rtol=1e-5, atol=1e-7)


@dataclass
class Unhashable:
    """A loss with a value, which has no hash because it compares by value."""

    factor: float

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.factor * (outputs - targets).square().mean()


@pytest.mark.parametrize("strategy", ["vectorized", "compiled"])
def test_a_loss_without_a_hash_is_not_shared(strategy: str) -> None:
    train_compiled(0, loss=Unhashable(1.0), strategy=strategy)
    found, expected = (train_compiled(0, loss=Unhashable(3.0), strategy=each) for each in (strategy, "serial"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
