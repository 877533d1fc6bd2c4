"""How strategy="auto" checks its choice, and what a resumed training knows about it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from learners import Source, same
from torch import Tensor, nn

from metareg import Episodes, MetaLearner
from metareg.engine.engine import Engine
from samples import MLP, episodes


class Body(nn.Sequential):
    """vmap and tracing have no rule for an operation of its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.detach().sum()) < 1e6 else -x)


def new_learner(at_once: bool, **options: Any) -> MetaLearner:
    model = MLP()
    if not at_once:
        model.body = Body(*model.body)
    return MetaLearner(model, loss="mse", inner_lr=0.05, **options)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_resumed_training_takes_the_strategy_that_was_proven(at_once: bool, caplog: pytest.LogCaptureFixture) -> None:
    learner = new_learner(at_once)
    resumed = new_learner(at_once)
    resumed.load_state(learner.state())  # from before the first batch: it checks the choice itself
    for each in (learner, resumed):
        each.fit(Source(), 2, meta_batch=3)
    assert learner.strategy == resumed.strategy == ("vectorized" if at_once else "traced")
    assert same(learner.meta_parameters, resumed.meta_parameters)
    assert len([line for line in caplog.messages if "for training" in line]) == 2 * (not at_once)
    caplog.clear()
    late = new_learner(at_once)
    late.load_state(learner.state())
    learner.step(episodes("mlp"))
    late.step(episodes("mlp"))
    assert late.strategy == learner.strategy
    assert same(learner.meta_parameters, late.meta_parameters)
    assert not [line for line in caplog.messages if "for training" in line]


def test_the_proof_is_made_once_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = []
    find = Engine.find_disagreement

    def count(self: Engine, *arguments: Any) -> str | None:
        proofs.append(len(arguments[1]))
        return find(self, *arguments)

    monkeypatch.setattr(Engine, "find_disagreement", count)
    learners = [new_learner(True, strategy=strategy, augment=["dropgrad"]) for strategy in ("auto", "vectorized")]
    before = torch.get_rng_state()
    for learner in learners:
        for seed in range(3):
            learner.step(episodes("mlp", seed=seed))
        learner.evaluate(Source(), 4)
    assert proofs == [2]
    assert torch.get_rng_state().equal(before)
    assert same(*(learner.meta_parameters for learner in learners))


def test_another_gradient_at_once_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Imitates a batching rule of torch that treated BatchNorm's statistics as constants."""
    compute = Engine._map_gradient

    def wrong(self: Engine, meta: Any, tasks: Any, extra: Any) -> tuple[list[Tensor], Any]:
        found, description = compute(self, meta, tasks, extra)
        return [1.5 * value for value in found] if len(tasks[1]) > 1 else found, description

    monkeypatch.setattr(Engine, "_map_gradient", wrong)
    learner, expected = new_learner(True), new_learner(True, strategy="serial")
    for each in (learner, expected):
        for _ in range(3):
            each.step(episodes("mlp"))
    assert learner.strategy == "traced"
    assert "at once, they differ by 50 %" in caplog.text
    torch.testing.assert_close(learner.meta_parameters, expected.meta_parameters)


def test_evaluation_falls_back_too(caplog: pytest.LogCaptureFixture) -> None:
    scores = [new_learner(False, strategy=strategy).evaluate(Source(), 4).scores for strategy in ("auto", "serial")]
    torch.testing.assert_close(*scores)
    assert len([line for line in caplog.messages if "for evaluation" in line]) == 1


def test_a_graph_that_computes_something_else_is_not_replayed(caplog: pytest.LogCaptureFixture) -> None:
    draws = torch.Generator().manual_seed(0)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean() * (1 + torch.rand((), generator=draws).item())

    learner = new_learner(True, strategy="traced")
    learner.engine.training.loss = learner.engine.plain.loss = loss
    losses = [learner.meta_gradient(episodes("mlp"))[0].item() for _ in range(5)]
    assert len(set(losses)) == 5
    assert "untraced" in caplog.text


class Scale(nn.Module):
    """A model whose only parameter is a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.factor * inputs


def test_numbers_are_compared_like_arrays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    draws, compute = torch.Generator().manual_seed(0), Engine._map_gradient

    def wrong(self: Engine, meta: Any, tasks: Any, extra: Any) -> tuple[list[Tensor], Any]:
        found, description = compute(self, meta, tasks, extra)
        return [1.5 * value for value in found], description

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean() * (1 + torch.rand((), generator=draws).item())

    x = torch.rand(2, 6, 1)
    batch = Episodes(x, 2 * x, x, 2 * x)
    MetaLearner(Scale(), strategy="traced", loss=loss, inner_lr=0.1).fit([batch] * 3, steps=3)
    assert "untraced" in caplog.text
    monkeypatch.setattr(Engine, "_map_gradient", wrong)
    learner = MetaLearner(Scale(), loss="mse", inner_lr=0.1)
    learner.step(batch)
    assert learner.strategy == "traced"


def test_anomaly_mode(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "metareg")
    expected = [new_learner(True, strategy="serial").step(episodes("mlp")).item() for _ in range(1)]
    with torch.autograd.set_detect_anomaly(True):
        learner = new_learner(True)
        found = [learner.step(episodes("mlp")).item() for _ in range(3)]
    assert found[0] == pytest.approx(expected[0])
    assert learner.strategy == "vectorized"
    assert "untraced, which is slower: tracing failed" in caplog.text
