"""The outer optimiser: the tensors that it passes to fused kernels, and equality with `torch.optim.Adam`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from metareg import Episodes, MetaLearner, PluginConfig, hookimpl
from metareg.engine.stages import Stages
from metareg.learner import optimizer
from metareg.learner.config import LearnerConfig
from metareg.learner.optimizer import Adam, OuterOptimizer
from metareg.registry.plugins import resolve
from metareg_image.glyphs import Glyphs


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """A tensor of shape [3, 4, 2, 5] with any memory layout: permuted, sliced or expanded."""
    shape = (3, 4, 2, 5)
    order = draw(st.permutations(range(4)))
    step = draw(st.integers(1, 2))
    expanded = draw(st.booleans())
    sizes = [shape[dim] for dim in order]
    sizes[-1] *= step
    if expanded:
        sizes[0] = 1
    values = torch.randn(sizes, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))[..., ::step]
    if expanded:
        values = values.expand(shape[order[0]], *values.shape[1:])
    return values.permute([order.index(dim) for dim in range(4)])


@settings(deadline=None)
@given(st.lists(strided(), min_size=2, max_size=4), strided())
def test_any_strides_give_the_steps_of_torch(grads: list[Tensor], moment: Tensor) -> None:
    """Gradients and loaded moments may have any memory layout."""
    start = torch.linspace(-1, 1, 120).reshape(3, 4, 2, 5)
    ours, theirs = start.clone(), nn.Parameter(start.clone())
    adam, reference = Adam({"w": ours}), torch.optim.Adam([theirs], lr=0.1, foreach=False, fused=False)
    adam.load_state({"w": {"exp_avg": moment, "exp_avg_sq": moment**2, "step": torch.tensor(7.0)}})
    reference.state[theirs] = {
        "step": torch.tensor(7.0),
        "exp_avg": moment.clone(memory_format=torch.contiguous_format),
        "exp_avg_sq": (moment**2).clone(memory_format=torch.contiguous_format),
    }
    for grad in grads:
        adam.step({"w": grad}, 0.1)
        theirs.grad = grad.clone(memory_format=torch.contiguous_format)
        reference.step()
    torch.testing.assert_close(ours, theirs.data)


class Turned:
    """Changes the memory layout of every gradient, and nothing else."""

    class Config(PluginConfig):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def augment_outer_gradient(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.mT.contiguous().mT if value.dim() > 1 else value for name, value in grads.items()}


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Record the strides of parameter, gradient and moments at every step of Adam."""
    seen: list[tuple[Any, ...]] = []
    kernel = optimizer.adam

    def record(params: Any, grads: Any, first: Any, second: Any, *rest: Any, **options: Any) -> None:
        columns = zip(params, grads, first, second, strict=True)
        seen.extend(tuple((each.stride(), each.dtype, each.device) for each in column) for column in columns)
        kernel(params, grads, first, second, *rest, **options)

    monkeypatch.setattr(optimizer, "adam", record)
    yield seen
    assert seen
    assert [column for column in seen if len(set(column)) > 1] == []


@pytest.mark.usefixtures("handed_over")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("strategy", ["serial", "traced", "vectorized"])
def test_kernels_get_tensors_that_lie_alike(strategy: str, channels_last: bool) -> None:
    """In fit, step and take_step, after loading a state, with a channels-last model."""
    task = Glyphs(Glyphs.Config(query=5))
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    learner = MetaLearner(model, "maml", ["cml", Turned], inner_lr=0.4, strategy=strategy)
    learner.fit(task, steps=1, meta_batch=1)
    batch = task.episodes("train", range(2), 0)
    assert isinstance(batch, Episodes)
    learner.step(batch)
    learner.load_state(learner.state())
    learner.take_step(batch)
    assert all(value.is_contiguous() for value in learner.meta_parameters.values())


class Momentum:
    """An algorithm with its own outer update."""

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - 0.1 * grads[name] for name, value in params.items()}

    @hookimpl
    def outer_update(
        self, meta: dict[str, Tensor], grads: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        velocity = {name: 0.5 * state.get(name, torch.zeros_like(grad)) + grad for name, grad in grads.items()}
        return {name: value - velocity[name] for name, value in meta.items()}, velocity


def create_optimizer(algo: str | type, **options: Any) -> OuterOptimizer:
    return OuterOptimizer(Stages(resolve("algorithms", algo), []), LearnerConfig(**options))


def run_updates(optimizer: OuterOptimizer, steps: range, start: Tensor) -> Tensor:
    meta = {"w": start.clone()}
    for step in steps:
        meta = optimizer.update(meta, {"w": torch.full_like(start, step + 1.0)}, step)
    return meta["w"]


@pytest.mark.parametrize("algo", ["maml", Momentum])
def test_a_reset_forgets_everything(algo: str | type) -> None:
    start = torch.ones(3)
    optimizer = create_optimizer(algo, reset_optimizer_every=2)
    after_two = run_updates(optimizer, range(2), start)
    after_three = run_updates(optimizer, range(2, 3), after_two)
    assert after_three.equal(run_updates(create_optimizer(algo), range(2, 3), after_two))
    assert not after_three.equal(run_updates(create_optimizer(algo), range(3), start))


@pytest.mark.parametrize("algo", ["maml", Momentum])
def test_a_loaded_state_goes_on(algo: str | type) -> None:
    optimizer, other = create_optimizer(algo), create_optimizer(algo)
    meta = {"w": run_updates(optimizer, range(2), torch.ones(3))}
    copied = {"w": meta["w"].clone()}
    other.load_state(copy.deepcopy(optimizer.state()), copied)
    expected = optimizer.update(meta, {"w": torch.ones(3)}, 2)["w"]
    assert other.update(copied, {"w": torch.ones(3)}, 2)["w"].equal(expected)
