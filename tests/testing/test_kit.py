"""The conformance kit finds faults: deliberately broken plugins, at least one for each check."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ConfigDict, field_validator
from torch import Tensor, nn
from torch.func import grad

from metareg import (
    Episodes,
    Field,
    MetaregError,
    PluginConfig,
    StepExample,
    Task,
    TaskSpec,
    TaskView,
    hookimpl,
    task_uniform,
)
from metareg.engine import engine
from metareg.learner import optimizer
from metareg.testing import CheckFailed, checks

Tensors = dict[str, Tensor]


def failing(kind: str, plugin: type, name: str) -> str:
    """Return the message of the named check, which must fail."""
    (check,) = [each for each in checks(kind, plugin) if each.name == name]
    with pytest.raises((CheckFailed, MetaregError)) as caught:
        check()
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- algorithms


class Plain:
    """The basis of the broken algorithms; it passes."""

    contract = 1
    step_examples = (StepExample(param=2.0, grad=3.0, after=1.7, config={"inner_lr": 0.1}),)

    class Config(PluginConfig):
        inner_lr: float = Field(0.1, gt=0, description="Step size.")

    def __init__(self, config: Any) -> None:
        self.config = config

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value - self.config.inner_lr * grads[name] for name, value in params.items()}


class Learned(Plain):
    """Learned step sizes; it passes."""

    @hookimpl
    def init_meta(self, model: nn.Module) -> Tensors:
        return {name: torch.full_like(value, self.config.inner_lr) for name, value in model.named_parameters()}

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, meta: Tensors) -> Tensors:
        return {name: value - meta[name] * grads[name] for name, value in params.items()}


class NoContract:
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value - 0.1 * grads[name] for name, value in params.items()}


class NoHooks:
    contract = 1


class Undocumented(Plain):
    class Config(PluginConfig):
        inner_lr: float = 0.1


class TakesEverything(Plain):
    class Config(PluginConfig):
        model_config = ConfigDict(extra="ignore")
        inner_lr: float = Field(0.1, description="Step size.")


class NoRoundTrip(Plain):
    class Config(PluginConfig):
        inner_lr: float = Field(0.1, description="Step size.", validate_default=True)

        @field_validator("inner_lr")
        @classmethod
        def _halved(cls, value: float) -> float:
            return value / 2


class AlwaysFirstOrder(Plain):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return super().inner_update(params, {name: value.detach() for name, value in grads.items()})


class Halved(Plain):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value - 0.5 * self.config.inner_lr * grads[name] for name, value in params.items()}


class WrongSign(Plain):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value + self.config.inner_lr * grads[name] for name, value in params.items()}


class DoesNothing(Plain):
    @hookimpl
    def inner_update(self, params: Tensors) -> Tensors:
        return dict(params)


class NoExample(Plain):
    step_examples = ()


class DetachedStepSize(Learned):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, meta: Tensors) -> Tensors:
        return {name: value - meta[name].detach() * grads[name] for name, value in params.items()}


class HalvedInitialStepSize(Learned):
    @hookimpl
    def init_meta(self, model: nn.Module) -> Tensors:
        return {name: value / 2 for name, value in super().init_meta(model).items()}


class ChangesBuffers(Plain):
    @hookimpl
    def init_meta(self, model: nn.Module) -> None:
        self.model = model

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        for buffer in self.model.buffers():
            buffer.add_(1)
        return super().inner_update(params, grads)


class BodyMovesInAnil(Plain):
    adapts = "head"

    @hookimpl
    def adapted_parameters(self, names: Sequence[str]) -> Sequence[str]:
        return names


class HeadMovesInBoil(Plain):
    adapts = "body"


class HeadStandsStillUndeclared(Plain):
    @hookimpl
    def adapted_parameters(self, body: Sequence[str]) -> Sequence[str]:
        return body


class InPlace(Plain):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        for name in grads:
            grads[name] = grads[name] * self.config.inner_lr
        return {name: value - grads[name] for name, value in params.items()}


class GlobalRandom(Plain):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        random.random()
        return super().inner_update(params, grads)


class CountsCalls(Plain):
    calls = 0

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        self.calls += 1
        return {name: value - self.config.inner_lr / self.calls * grads[name] for name, value in params.items()}


class SinglePrecision(Plain):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value.float() for name, value in super().inner_update(params, grads).items()}


class LosesOne(Plain):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return dict(list(super().inner_update(params, grads).items())[1:])


class Forgiving(Plain):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value - self.config.inner_lr * grads.get(name, 0 * value) for name, value in params.items()}


class DataDependent(Plain):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        if sum(value.square().sum() for value in grads.values()) > 1e6:
            return params
        return super().inner_update(params, grads)


class DrawsFromTheClock(Learned):
    @hookimpl
    def init_meta(self, model: nn.Module) -> Tensors:
        draw = torch.Generator()
        draw.seed()
        return {name: 0.1 * torch.rand(value.shape, generator=draw) for name, value in model.named_parameters()}


class MomentumOnSelf(Plain):
    velocity: Tensors | None = None

    @hookimpl
    def outer_update(self, meta: Tensors, grads: Tensors) -> tuple[Tensors, dict[str, Any]]:
        before = self.velocity or {name: torch.zeros_like(value) for name, value in meta.items()}
        self.velocity = {name: 0.9 * before[name] + grads[name] for name in meta}
        return {name: value - 0.01 * self.velocity[name] for name, value in meta.items()}, {}


class UphillReptile(Plain):
    @hookimpl
    def outer_gradient(self, meta: Tensors, adapted: Tensors) -> Tensors:
        return {name: (value - meta[name]) / self.config.inner_lr for name, value in adapted.items()}


class Curved(Plain):
    """Returns (I − H/10) ∇ℓ(φ; Q) at the adapted parameters φ, with the support loss's Hessian H at φ."""

    @hookimpl
    def outer_gradient(self, adapted: Tensors, task: TaskView) -> Tensors:
        gradient = task.query_gradient(adapted)
        product = task.hessian_product(adapted, gradient)
        return {name: gradient[name] - 0.1 * product[name] for name in adapted}


class AloneOnly(Plain):
    @hookimpl
    def outer_gradient(self, meta: Tensors, adapted: Tensors) -> Tensors:
        if meta.keys() != adapted.keys():
            raise ValueError("whose are the others?")
        return {name: meta[name] - value for name, value in adapted.items()}


class ScheduleOnSelf(Plain):
    """Its step size decreases in every training step, which a traced graph does not see."""

    rate = 1.0

    @hookimpl
    def outer_loss_weights(self, training_step: int) -> None:
        self.rate = 1 / (1 + training_step)

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return super().inner_update(params, {name: self.rate * value for name, value in grads.items()})


class OnTheCPU(Plain):
    """Creates a tensor on the default device instead of its arguments'."""

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {
            name: value - self.config.inner_lr * grads[name] * torch.ones(value.shape, dtype=value.dtype)
            for name, value in params.items()
        }


class Flipped(Plain):
    """Moves each entry by the gradient of another entry."""

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return super().inner_update(
            params, {name: value.flatten().flip(0).view(value.shape) for name, value in grads.items()}
        )


class Enumerated(Plain):
    """Indexes step sizes by the positions of the model's parameters, some of which may be frozen."""

    @hookimpl
    def init_meta(self, model: nn.Module) -> Tensors:
        return {str(n): torch.full_like(value, self.config.inner_lr) for n, value in enumerate(model.parameters())}

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, meta: Tensors) -> Tensors:
        return {name: value - meta[str(n)] * grads[name] for n, (name, value) in enumerate(params.items())}


class OneSizeForEachStep(Plain):
    """Has no step sizes for inner steps beyond those of training."""

    @hookimpl
    def init_meta(self, inner_steps: int) -> Tensors:
        return {"size": torch.full((inner_steps,), self.config.inner_lr)}

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, meta: Tensors, step: int) -> Tensors:
        return {name: value - meta["size"][step] * grads[name] for name, value in params.items()}


class LearnsInVain(Plain):
    @hookimpl
    def init_meta(self) -> Tensors:
        return {"unused": torch.ones(3)}


class ForgetsTheBody(Plain):
    @hookimpl
    def outer_update(self, meta: Tensors, grads: Tensors) -> Any:
        return {
            name: value if name.startswith("body") else value - 0.05 * grads[name] for name, value in meta.items()
        }, {}


class OtherForEachObject(Plain):
    """Depends on values that are not in its configuration."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.factor = random.SystemRandom().uniform(0.5, 1.5)

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return super().inner_update(params, {name: self.factor * value for name, value in grads.items()})


class ForClasses(Plain):
    """Counts classes, so it needs class targets; it passes."""

    targets = "classes"

    @hookimpl
    def inner_loss(self, outputs: Tensor, targets: Tensor, loss: Any) -> Tensor:
        share = (targets[:, None] == torch.arange(outputs.shape[-1], device=targets.device)).to(outputs).mean(0)
        return loss(outputs - share, targets)


class Normalised(Plain):
    """Takes steps of fixed length, which depend on the whole gradient; it passes."""

    step_examples = (
        StepExample(param=2.0, grad=3.0, after=lambda entries: 2 - 0.1 / entries**0.5, config={"inner_lr": 0.1}),
    )

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        norm = torch.stack([value.square().sum() for value in grads.values()]).sum().sqrt() + 1e-12
        return super().inner_update(params, {name: value / norm for name, value in grads.items()})


class AdaptsNothing(Plain):
    """Trains an ordinary model in the outer loop; it passes."""

    adapts = "none"
    step_examples = Plain.step_examples

    @hookimpl
    def adapted_parameters(self) -> tuple[str, ...]:
        return ()


class WithMomentum(Plain):
    """Has a state from step to step, and an outer optimiser with small steps; it passes."""

    @hookimpl
    def start_task(self, params: Tensors) -> Any:
        return params, {name: torch.zeros_like(value) for name, value in params.items()}

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, state: Any) -> Any:
        state = {name: 0.5 * state[name] + value for name, value in grads.items()}
        return super().inner_update(params, state), state

    @hookimpl
    def outer_update(self, meta: Tensors, grads: Tensors) -> Any:
        return {name: value - 0.02 * grads[name] for name, value in meta.items()}, {}


def test_message_says_what_where_and_how_to_mend() -> None:
    message = failing("algorithms", Halved, "step-examples")
    assert "'halved'" in message
    assert "1.85" in message
    assert "1.7" in message
    assert "To fix it: " in message


# ----------------------------------------------------------------------------------------------------------- augmenters


class CoLearner:
    """A linear co-learner; it passes."""

    contract = 1

    @hookimpl
    def init_meta(self, features: Tensor, outputs: Tensor) -> Tensors:
        return dict(nn.Linear(features.flatten(1).shape[1], outputs.shape[1]).named_parameters())

    @hookimpl
    def augment_outer_loss(self, features: Tensor, targets: Tensor, meta: Tensors, loss: Any) -> Tensor:
        return 0.1 * loss(self.predicted(meta, features), targets)

    @staticmethod
    def predicted(meta: Tensors, features: Tensor) -> Tensor:
        return features.flatten(1) @ meta["weight"].T + meta["bias"]


class Adapted(CoLearner):
    """Gives the co-learner its own inner step."""

    @hookimpl
    def augment_outer_loss(self, features: Tensor, targets: Tensor, meta: Tensors, loss: Any) -> Tensor:
        grads = grad(lambda meta: loss(self.predicted(meta, features), targets))(meta)
        adapted = {name: value - 0.1 * grads[name] for name, value in meta.items()}
        return loss(self.predicted(adapted, features), targets)


class AdaptedAcrossTasks(CoLearner):
    """Changes the co-learner from task to task."""

    @hookimpl
    def augment_outer_loss(self, features: Tensor, targets: Tensor, meta: Tensors, loss: Any) -> Tensor:
        self.kept = {name: value * 1.1 for name, value in getattr(self, "kept", meta).items()}
        return loss(self.predicted(self.kept, features), targets)


class Kept(CoLearner):
    """Makes the co-learner a part of the model."""

    @hookimpl
    def init_meta(self, model: nn.Module, features: Tensor, outputs: Tensor) -> Tensors:
        layer = nn.Linear(features.flatten(1).shape[1], outputs.shape[1])
        model.add_module("colearner", layer)
        return {name: value.detach() for name, value in layer.named_parameters()}


class OwnInnerRule(CoLearner):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value - 0.2 * grads[name] for name, value in params.items()}


class DetachedFeatures(CoLearner):
    @hookimpl
    def augment_outer_loss(self, features: Tensor, targets: Tensor, meta: Tensors, loss: Any) -> Tensor:
        return 0.1 * loss(self.predicted(meta, features.detach()), targets)


class WrongWidth(CoLearner):
    @hookimpl
    def augment_outer_loss(self, features: Tensor, targets: Tensor, meta: Tensors, loss: Any) -> Tensor:
        flat = features.flatten(1)[:, : meta["weight"].shape[1]]
        return 0.1 * loss(self.predicted(meta, flat), targets)


class Uphill:
    contract = 1

    @hookimpl
    def augment_outer_gradient(self, grads: Tensors) -> Tensors:
        return {name: -value for name, value in grads.items()}


class NoiseOfItsOwn:
    contract = 1

    @hookimpl
    def augment_inner_gradient(self, grads: Tensors) -> Tensors:
        return {name: value + 0.1 * torch.randn(value.shape) for name, value in grads.items()}


class NumpyNoise:
    contract = 1

    @hookimpl
    def draw_noise(self, shapes: dict[str, tuple[int, ...]], inner_steps: int) -> list[Tensors]:
        return [{name: torch.from_numpy(np.random.rand(*shape)) for name, shape in shapes.items()}] * inner_steps

    @hookimpl
    def augment_inner_gradient(self, grads: Tensors, noise: list[Tensors], step: int) -> Tensors:
        return {name: value * noise[step][name] for name, value in grads.items()}


class BodyAndHeadInTurn:
    """Trains one part in even steps and another in odd ones, with hidden state on the instance."""

    contract = 1
    odd = True

    @hookimpl
    def draw_noise(self) -> None:
        self.odd = not self.odd

    @hookimpl
    def augment_outer_gradient(self, grads: Tensors) -> Tensors:
        return {name: value * (name.startswith("head.") == self.odd) for name, value in grads.items()}


class FirstGradientForever:
    contract = 1
    first: Tensors | None = None

    @hookimpl
    def augment_outer_gradient(self, grads: Tensors) -> Tensors:
        self.first = self.first or grads
        return self.first


# ---------------------------------------------------------------------------------------------------------- whole steps


class Transposed:
    """Returns correct values with another memory layout; it passes."""

    contract = 1

    @hookimpl
    def augment_outer_gradient(self, grads: Tensors) -> Tensors:
        return {name: value.T.contiguous().T if value.dim() == 2 else value for name, value in grads.items()}


def as_they_come(grads: Tensors, params: Tensors) -> Tensors:
    """Replaces `match_strides`: gradients keep any memory layout."""
    return {name: grads[name] for name in params}


@pytest.mark.parametrize(
    ("kind", "plugin", "config"),
    [("algorithms", Plain, {}), ("tasks", "glyphs", {"query": 5}), ("models", "conv4", {"width": 8})],
    ids=["algorithm", "task", "model"],
)
def test_an_entry_moved_by_the_gradient_of_another_is_noticed(
    monkeypatch: pytest.MonkeyPatch, kind: str, plugin: Any, config: dict[str, Any]
) -> None:
    for module in (engine, optimizer):
        monkeypatch.setattr(module, "match_strides", as_they_come)
    (check,) = [each for each in checks(kind, plugin, config) if each.name == "whole-steps"]
    with pytest.raises(CheckFailed, match="differ from the same steps in a plain loop"):
        check()


def test_an_optimiser_that_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = optimizer.Adam.step

    def forgetful(self: optimizer.Adam, grads: Tensors, lr: float) -> None:
        self._moments = optimizer.Adam(self._params)._moments
        step(self, grads, lr)

    monkeypatch.setattr(optimizer.Adam, "step", forgetful)
    failing("algorithms", Plain, "whole-steps")


def test_gradients_may_lie_in_memory_as_they_like(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = [each for each in checks("augmenters", Transposed) if each.name == "whole-steps"]
    check()
    monkeypatch.setattr(optimizer, "match_strides", as_they_come)
    with pytest.raises(CheckFailed):
        check()


# ------------------------------------------------------------------------------------------------------ tasks and models


class Lines(Task):
    """Lines through the origin; it passes."""

    contract = 1
    default_model = "mlp"

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec((1,), (1,))

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> Episodes:
        return self.stacked(task_uniform(seed, split, indices, 9))

    def stacked(self, numbers: np.ndarray) -> Episodes:
        drawn = torch.from_numpy(numbers).float().unsqueeze(-1)
        x, y = drawn[:, 1:], drawn[:, :1] * drawn[:, 1:]
        return Episodes(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])


class DependsOnTheOthers(Lines):
    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> Episodes:
        return self.stacked(task_uniform(seed, split, range(len(indices)), 9))


class IgnoresTheSplit(Lines):
    @hookimpl
    def episodes(self, indices: Sequence[int], seed: int) -> Episodes:
        return self.stacked(task_uniform(seed, "train", indices, 9))


class GlobalTasks(Lines):
    @hookimpl
    def episodes(self, indices: Sequence[int]) -> Episodes:
        return self.stacked(np.random.rand(len(indices), 9))


class InOtherPlaces(Lines):
    stackable = False

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> list[Episodes]:
        drawn = super().episodes(split, sorted(indices), seed)
        return Episodes.group([tuple(part[row, row % 2 :] for part in drawn.parts) for row in range(len(indices))])


class OtherSpec(Lines):
    @property
    def spec(self) -> TaskSpec:
        return TaskSpec((2,), (1,))


class HoldsNaN(Lines):
    def stacked(self, numbers: np.ndarray) -> Episodes:
        return super().stacked(np.log(numbers - 0.5 + 0 * numbers, where=numbers > 0.5, out=numbers * np.nan))


class NoModel(Lines):
    default_model = None


class RecommendsAMisspeltOption(Lines):
    recommended: ClassVar[dict[str, Any]] = {"stepz": 100}


class RecommendsAnImpossibleValue(Lines):
    recommended: ClassVar[dict[str, Any]] = {"steps": 0}


class RecommendsAnImpossibleValueForAnAlgorithm(Lines):
    recommended: ClassVar[dict[str, Any]] = {"anil": {"algo.inner_lr": -1.0}}


class OtherAfterAWhile(Lines):
    """Draws like from a cache that is refilled when it is empty."""

    calls = 0

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> Episodes:
        self.calls += split == "train"
        return self.stacked(task_uniform(seed, split, indices, 9, "again" if self.calls > 6 else ""))


class OtherInBlocks(Lines):
    """Has a fast path for many tasks that draws different ones."""

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> Episodes:
        return self.stacked(task_uniform(seed, split, indices, 9, "many" if len(indices) > 5 else ""))


class Network(nn.Module):
    def __init__(self, spec: TaskSpec) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(spec.input_shape[0], 4), nn.Tanh())
        self.head = nn.Linear(4, spec.output_shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Model:
    """It passes."""

    contract = 1

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        return Network(spec)


class Pairs(Lines):
    """Tasks whose inputs are pairs of vectors."""

    def stacked(self, numbers: np.ndarray) -> Episodes:
        support_x, support_y, query_x, query_y = super().stacked(numbers).parts
        return Episodes({"x": support_x, "of": [-support_x]}, support_y, {"x": query_x, "of": [-query_x]}, query_y)


class TakesPairs(Model):
    """It passes."""

    example_task = Pairs

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        network = Network(TaskSpec((2,), spec.output_shape))
        network.body.insert(0, _Join())
        return network


class _Join(nn.Module):
    def forward(self, x: dict[str, Any]) -> Tensor:
        return torch.cat([x["x"], *x["of"]], -1)


class TakesUndeclaredPairs(TakesPairs):
    example_task = None


class Unseeded(Model):
    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        network = Network(spec)
        draw = torch.Generator()
        draw.seed()
        nn.init.normal_(network.head.weight, generator=draw)
        return network


class Zeros(Model):
    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        network = Network(spec)
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        return network


class NumpyWeights(Model):
    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        np.random.rand()
        return Network(spec)


class Unsplit(Model):
    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        network = Network(spec)
        network.body, network.top = nn.Sequential(network.body, network.head), nn.Identity()
        del network.head
        network.forward = network.body.forward  # type: ignore[method-assign]
        return network


class WrongOutputs(Model):
    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        return Network(TaskSpec(spec.input_shape, (spec.output_shape[0] + 1,)))


class AnySize(Model):
    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        network = Network(spec)
        network.body = nn.Sequential(_Cut(spec.input_shape[0]), network.body)
        return network


class _Cut(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.width]


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x


class CountsForwards(Model):
    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        network = Network(spec)
        network.body = nn.Sequential(_Counting(), network.body)
        return network


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() < 1e6 else -x


class Branches(Model):
    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        network = Network(spec)
        network.body = nn.Sequential(_Branching(), network.body)
        return network


class Unused(Model):
    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        network = Network(spec)
        network.body.register_parameter("unused", nn.Parameter(torch.ones(2)))
        return network


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "plugin"),
    [("algorithms", ScheduleOnSelf), ("tasks", OtherAfterAWhile), ("tasks", OtherInBlocks)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_only_whole_steps_tell(kind: str, plugin: type) -> None:
    problems = {check.name: check.problem() for check in checks(kind, plugin)}
    assert [name for name, problem in problems.items() if problem] == ["whole-steps"]


# ------------------------------------------------------------------------------------------------------------- observers


class Watching:
    """It passes."""

    contract = 1

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        self.path = run.path

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        (self.path / "step.txt").write_text(f"{step} {logs['loss']}")


class Meddling(Watching):
    @hookimpl
    def on_run_start(self, run: Any) -> None:
        super().on_run_start(run)
        next(iter(run.learner.meta_parameters.values())).add_(1)


class Littering(Watching):
    @hookimpl
    def on_step(self, step: int) -> None:
        Path("log.txt").write_text(str(step))


class ChangesLogs(Watching):
    @hookimpl
    def on_step(self, logs: dict[str, float]) -> None:
        logs.clear()


# --------------------------------------------------------------------------------------------------------------- the rest


BROKEN: dict[str, dict[str, list[type]]] = {
    "algorithms": {
        "contract": [NoContract, NoHooks],
        "configuration": [Undocumented, TakesEverything, NoRoundTrip],
        "finite-differences": [AlwaysFirstOrder, DetachedStepSize],
        "step-examples": [Halved, WrongSign, DoesNothing, NoExample, HalvedInitialStepSize, Flipped],
        "adapted": [DoesNothing, BodyMovesInAnil, HeadMovesInBoil, HeadStandsStillUndeclared],
        "model-unchanged": [ChangesBuffers],
        "purity": [InPlace, GlobalRandom, CountsCalls],
        "shapes": [SinglePrecision, LosesOne],
        "wrong-shapes": [Forgiving],
        "devices": [OnTheCPU],
        "frozen-layers": [Enumerated],
        "more-steps": [OneSizeForEachStep],
        "meta-parameters": [LearnsInVain],
        "outer-update": [ForgetsTheBody],
        "reload": [OtherForEachObject],
        "strategies": [DataDependent],
        "whole-steps": [DataDependent, ScheduleOnSelf],
        "determinism": [DrawsFromTheClock],
        "resume": [MomentumOnSelf],
        "learns": [UphillReptile],
        "composition": [AloneOnly],
    },
    "augmenters": {
        "outer-terms": [Adapted],
        "purity": [AdaptedAcrossTasks, Kept, NoiseOfItsOwn, NumpyNoise],
        "export": [Kept],
        "inner-rule": [OwnInnerRule],
        "finite-differences": [DetachedFeatures],
        "wrong-shapes": [WrongWidth],
        "learns": [Uphill],
        "determinism": [NumpyNoise],
        "whole-steps": [BodyAndHeadInTurn, FirstGradientForever],
    },
    "tasks": {
        "function": [DependsOnTheOthers, IgnoresTheSplit, GlobalTasks, InOtherPlaces],
        "shapes": [OtherSpec, HoldsNaN],
        "trains": [NoModel],
        "recommended": [
            RecommendsAMisspeltOption,
            RecommendsAnImpossibleValue,
            RecommendsAnImpossibleValueForAnAlgorithm,
        ],
        "whole-steps": [OtherAfterAWhile, OtherInBlocks],
    },
    "models": {
        "seed": [Unseeded, Zeros, NumpyWeights],
        "split": [Unsplit, WrongOutputs, AnySize, TakesUndeclaredPairs],
        "trains": [CountsForwards, Unused],
        "whole-steps": [Branches],
    },
    "observers": {
        "run": [Meddling, Littering],
        "logs": [ChangesLogs],
    },
}
"""Plugins by kind, with the check that must refuse them."""

SOUND: list[tuple[str, type]] = [
    ("algorithms", Learned), ("augmenters", CoLearner), ("tasks", Lines), ("models", Model),
    ("models", TakesPairs), ("observers", Watching),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "check", "plugin"),
    [(kind, check, plugin) for kind, table in BROKEN.items() for check, plugins in table.items() for plugin in plugins],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_broken_plugin_fails(kind: str, check: str, plugin: type) -> None:
    failing(kind, plugin, check)


@pytest.mark.parametrize(("kind", "plugin"), SOUND)
def test_sound_plugin_passes(kind: str, plugin: type) -> None:
    for check in checks(kind, plugin):
        check()


FURTHER = [Plain, ForClasses, Normalised, AdaptsNothing, WithMomentum, Curved]
TAKE_LONG = ("strategies", "whole-steps", "determinism", "composition")


@pytest.mark.parametrize("plugin", FURTHER)
def test_no_false_alarm(plugin: type) -> None:
    for check in checks("algorithms", plugin):
        if check.name not in TAKE_LONG:
            check()


@pytest.mark.slow
@pytest.mark.parametrize("plugin", FURTHER)
def test_no_false_alarm_of_whole_trainings(plugin: type) -> None:
    for check in checks("algorithms", plugin):
        if check.name in TAKE_LONG:
            check()


def test_a_model_of_other_inputs_is_asked_for_them() -> None:
    sentence = failing("models", TakesUndeclaredPairs, "split")
    assert "example_spec" in sentence
    assert "example_task" in sentence


def test_every_check_is_broken_by_some_plugin() -> None:
    names = {check.name for kind, plugin in SOUND for check in checks(kind, plugin)}
    assert names <= {check for table in BROKEN.values() for check in table}


def test_declared_exceptions_leave_checks_out() -> None:
    class Declared(AlwaysFirstOrder):
        exact_gradient = False

    assert "finite-differences" not in {check.name for check in checks("algorithms", Declared)}
