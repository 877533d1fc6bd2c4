"""Augmenters that stay in evaluation, adaptation, and saved and loaded learners."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import Source, same
from torch import Tensor

import metareg_dropgrad
from metareg import Field, MetaLearner, MetaregError, PluginConfig, PluginError, UsageError, hookimpl
from metareg.engine.tracing import Program
from metareg.util.seeding import create_generator
from reference import NETS
from samples import MLP, episodes, tasks_of

Tensors = dict[str, Tensor]


class Descent:
    """Gradient descent with step size 0.05, in a class that no package installs."""

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value - 0.05 * grads[name] for name, value in params.items()}


class Gain:
    """Multiplies the inner gradient by a learned factor for each parameter, an option, and a random number."""

    training_only = False

    class Config(PluginConfig):
        strength: float = Field(1.0, description="A factor.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def init_meta(self, adapted: tuple[str, ...]) -> Tensors:
        return {name: torch.tensor(0.5) for name in adapted}

    @hookimpl
    def draw_noise(self, inner_steps: int, generator: torch.Generator) -> Tensor:
        return torch.rand(inner_steps, generator=generator)

    @hookimpl
    def augment_inner_gradient(self, grads: Tensors, meta: Tensors, step: int, noise: Tensor) -> Tensors:
        strength = self.config.strength * noise[step]
        return {name: strength * meta[name] * value for name, value in grads.items()}


class Passing(Gain):
    training_only = True


def new_learner(*augment: Any, **options: Any) -> MetaLearner:
    augmenters = [*augment, (Gain, {"strength": 3.0}), "cml"]
    learner = MetaLearner(MLP(), Descent, augmenters, loss="mse", inner_steps=2, seed=3, **options)
    return learner.fit(Source(), 2, meta_batch=2)


def adapt(meta: Tensors, task: Any, drawn: Tensor) -> Tensors:
    """A reference inner loop with the gradient that `Gain` changes."""
    params = {name: value.clone().requires_grad_() for name, value in meta.items() if not name.startswith("gain.")}
    for noise in drawn:
        loss = NETS["mlp"].loss(predict(params, task[0]), task[1])
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        changed = {name: 3.0 * noise * meta[f"gain.{name}"] * grad for name, grad in grads.items()}
        params = {name: value - 0.05 * changed[name] for name, value in params.items()}
    return params


def predict(params: Tensors, x: Tensor) -> Tensor:
    return NETS["mlp"].head(params, NETS["mlp"].body(params, x))


@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_an_augmenter_that_stays_adapts_in_evaluation_and_in_the_loaded_learner(strategy: str, tmp_path: Path) -> None:
    learner = new_learner(Passing, strategy=strategy)
    meta = learner.plain_meta_parameters
    assert {name.partition(".")[0] for name in meta} == {"body", "head", "gain"}
    assert meta["gain.head.bias"].item() != 0.5
    learner.save(tmp_path / "learner")
    loaded = MetaLearner.load(tmp_path / "learner", MLP(seed=5), algo=Descent, augment=[Gain])
    assert same(loaded.meta_parameters, meta)
    assert [(each.name, each.config.strength) for each in loaded.augmenters] == [("gain", 3.0)]
    tasks = tasks_of(Source().episodes("test", range(3)))
    for each in (learner, loaded):
        found = each.evaluate(Source(), 3, inner_steps=[0, 2]).scores[:, 1]
        for number, task in enumerate(tasks):
            drawn = torch.rand(2, generator=create_generator(3, "noise", "adapt", "gain", "test", number))
            expected = NETS["mlp"].loss(predict(adapt(meta, task, drawn), task[2]), task[3])
            assert found[number].item() == pytest.approx(expected.item(), rel=1e-6)
        drawn = torch.rand(4, generator=create_generator(3, "noise", "adapt", "gain"))
        expected = predict(adapt(meta, tasks[0], drawn), tasks[0][2])
        torch.testing.assert_close(each.adapt(*tasks[0][:2], steps=4)(tasks[0][2]), expected)
    _, grads = loaded.meta_gradient(episodes("mlp"))  # and it continues to learn
    assert grads["gain.head.bias"].item() != 0


def test_what_a_loaded_learner_needs_of_augmenters_is_said(tmp_path: Path) -> None:
    new_learner().save(tmp_path / "learner")
    load = {"path": tmp_path / "learner", "model": MLP(), "algo": Descent}
    with pytest.raises(UsageError, match=r"the augmenter 'gain', which no package installs; pass augment="):
        MetaLearner.load(**load)
    with pytest.raises(UsageError, match=r"without an augmenter 'passing'; it contains: gain"):
        MetaLearner.load(**load, augment=[Gain, Passing])
    ready = Gain(Gain.Config(strength=7.0))
    assert MetaLearner.load(**load, augment=[ready]).augmenters[0].instance is ready


def test_an_installed_augmenter_comes_back_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metareg_dropgrad.DropGrad, "training_only", False, raising=False)
    learner = MetaLearner(MLP(), augment=[("dropgrad", {"rate": 0.4})], loss="mse", inner_lr=0.1)
    learner.save(tmp_path / "learner")
    loaded = MetaLearner.load(tmp_path / "learner", MLP())
    assert [(each.name, each.config.rate) for each in loaded.augmenters] == [("dropgrad", 0.4)]
    plain = MetaLearner(MLP(), loss="mse", inner_lr=0.1)
    scores = [each.evaluate(Source(), 4, inner_steps=[3]).scores for each in (learner, loaded, plain)]
    assert scores[0].equal(scores[1])
    assert not scores[0].equal(scores[2])


def test_namesakes_of_which_some_stay_are_refused() -> None:
    with pytest.raises(PluginError, match="Several augmenters 'gain' must either all stay"):
        new_learner(type("Gain", (Passing,), {}))
    learner = new_learner(Gain)
    assert {"gain.head.bias", "gain-2.head.bias"} <= learner.plain_meta_parameters.keys()


def test_an_evaluation_runs_as_many_tasks_at_once_as_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    learner = new_learner(strategy="vectorized")
    compute, sizes, limit = Program._compute, [], 5

    def compute_few(self: Program, key: Any, call: Any) -> list[Tensor]:
        sizes.append(len(call.inputs[0]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(self, key, call)

    expected = learner.evaluate(Source(), 24, inner_steps=[1, 2]).scores
    monkeypatch.setattr(Program, "_compute", compute_few)
    for expected_sizes in ([24, 12, 6, *[3] * 8], [3] * 8):
        torch.testing.assert_close(learner.evaluate(Source(), 24, inner_steps=[1, 2]).scores, expected)
        assert sizes == expected_sizes
        sizes.clear()
    said = [re.findall(r"\d+", record.getMessage()) for record in caplog.records if record.name == "metareg"]
    assert said == [["12", "24"], ["6", "12"], ["3", "6"]]
    limit = 0
    with pytest.raises(MetaregError, match="Out of memory with 1 task"):
        learner.evaluate(Source(), 24)


class Reusing(Gain):
    """Draws into one dict again and again."""

    drawn: dict[str, Tensor]

    @hookimpl
    def draw_noise(self, inner_steps: int, generator: torch.Generator) -> dict[str, Tensor]:
        self.drawn = getattr(self, "drawn", {})
        self.drawn["number"] = torch.rand(inner_steps, generator=generator)
        return self.drawn

    @hookimpl
    def augment_inner_gradient(self, grads: Tensors, meta: Tensors, step: int, noise: dict[str, Tensor]) -> Tensors:
        return {name: noise["number"][step] * meta[name] * value for name, value in grads.items()}


def test_each_task_has_its_own_draws_in_a_container_that_is_used_again() -> None:
    (found, expected) = (
        MetaLearner(MLP(), Descent, [augmenter], loss="mse", seed=3, strategy="vectorized").meta_gradient(
            episodes("mlp")
        )
        for augmenter in (type("gain", (Reusing,), {}), type("gain", (Gain,), {}))
    )
    assert same(found[1], expected[1])


def test_the_mean_factor_of_dropgrad_is_one_in_low_precision() -> None:
    stages = MetaLearner(MLP(), augment=[("dropgrad", {"rate": 0.95})], loss="mse").stages
    like = torch.zeros((), dtype=torch.bfloat16)
    (drawn,) = stages.draw_noise("task", {"head.bias": torch.zeros(1_000_000)}, like, 1, 0, [(0, 0)])
    assert drawn["dropgrad"][0]["head.bias"].double().mean().item() == pytest.approx(0.05, abs=0.001)
