"""Declarations of plugin classes are checked on loading; the hooks for MAML++ and CAVIA are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metareg import Episodes, MetaLearner, hookimpl
from metareg.contract.hookspecs import CONTRACT_VERSION
from metareg.errors import PluginError
from metareg.registry.plugins import resolve

Tensors = dict[str, Tensor]


class Steps:
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value - 0.1 * grads[name] for name, value in params.items()}


@pytest.mark.parametrize(
    ("stated", "advice"),
    [(CONTRACT_VERSION + 1, "Upgrade metareg"), (0, "Upgrade the plugin"), ("one", "it must be a number")],
)
def test_other_contract_is_refused(stated: Any, advice: str) -> None:
    plugin = type("Other", (Steps,), {"contract": stated})
    with pytest.raises(PluginError, match=advice):
        resolve("algorithms", plugin)
    with pytest.raises(PluginError, match=advice):
        resolve("algorithms", plugin())


def test_class_without_a_statement_can_be_tried() -> None:
    assert resolve("algorithms", Steps).name == "steps"


def small(**options: Any) -> tuple[MetaLearner, Episodes]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    parts = [torch.randn(3, 5, width, dtype=torch.float64) for width in (3, 2, 3, 2)]
    return MetaLearner(model, loss="mse", inner_steps=3, **options), Episodes(*parts)


def flat(values: Tensors) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


class Weighted(Steps):
    """Weights that change from one training step to the next."""

    @hookimpl
    def outer_loss_weights(self, inner_steps: int, training_step: int) -> list[float]:
        return [0.1 * (step + 1) + training_step for step in range(inner_steps)]


def by_hand(learner: MetaLearner, episodes: Episodes, weights: list[float]) -> tuple[Tensor, Tensors]:
    """Return the weighted query losses after each inner step, for plain autograd."""
    meta = {name: value.clone().requires_grad_() for name, value in learner.meta_parameters.items()}
    total = torch.zeros((), dtype=torch.float64)

    def loss(params: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(torch.func.functional_call(learner.model.module, params, (x,)), y)

    for support_x, support_y, query_x, query_y in zip(*episodes.parts, strict=True):
        params = dict(meta)
        for weight in weights:
            grads = torch.autograd.grad(loss(params, support_x, support_y), list(params.values()), create_graph=True)
            params = {name: params[name] - 0.1 * each for name, each in zip(params, grads, strict=True)}
            total = total + weight * loss(params, query_x, query_y) / len(episodes)
    return total, dict(zip(meta, torch.autograd.grad(total, list(meta.values())), strict=True))


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_multi_step_loss_is_that_written_by_hand(strategy: str, memory: str) -> None:
    learner, episodes = small(algo=Weighted, strategy=strategy, memory=memory)
    for training_step in range(3):  # the third call runs traced operations, with its own weights
        expected_loss, expected = by_hand(
            learner, episodes, [0.1 + training_step, 0.2 + training_step, 0.3 + training_step]
        )
        loss, grads = learner.meta_gradient(episodes)
        torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(flat(grads), flat(expected), rtol=1e-9, atol=1e-11)
        learner.step(episodes)


def test_wrong_number_of_weights_is_refused() -> None:
    class One(Steps):
        @hookimpl
        def outer_loss_weights(self) -> list[float]:
            return [1.0]

    learner, episodes = small(algo=One, strategy="serial")
    with pytest.raises(PluginError, match="1 weight for 3 inner steps"):
        learner.step(episodes)


class Reset(Steps):
    """The head starts at zero in every task."""

    @hookimpl
    def start_task(self, params: Tensors) -> Tensors:
        return {name: torch.zeros_like(value) if name.startswith("2.") else value for name, value in params.items()}


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_what_every_task_resets_gets_no_gradient_and_is_reset(memory: str) -> None:
    learner, episodes = small(algo=Reset, strategy="vectorized", memory=memory)
    _, grads = learner.meta_gradient(episodes)
    assert not grads["2.weight"].any()
    assert grads["0.weight"].any()
    before = learner.adapt(episodes.support_x[0], episodes.support_y[0], steps=0)
    assert not before(episodes.query_x[0]).any()


def test_model_that_an_algorithm_needs_stands_before_the_tasks() -> None:
    from metareg.runs.options import assemble

    class Needs(Steps):
        default_model = "gcn"

    assert assemble({"algo": Needs, "task": "sinusoid"}, {}).model.name == "gcn"
