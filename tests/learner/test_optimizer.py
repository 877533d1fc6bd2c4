"""The outer optimiser: what it hands to fused kernels, and that it is `torch.optim.Adam`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from metareg import Episodes, MetaLearner, PluginConfig, hookimpl
from metareg.learner import optimizer
from metareg.learner.optimizer import Adam
from metareg_image.glyphs import Glyphs


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """A tensor of shape [3, 4, 2, 5] that lies in memory in any way: permuted, sliced or expanded."""
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
    """Gradients and loaded moments may lie in any order."""
    start = torch.linspace(-1, 1, 120).reshape(3, 4, 2, 5)
    ours, theirs = start.clone(), nn.Parameter(start.clone())
    adam, reference = Adam({"w": ours}, lr=0.1), torch.optim.Adam([theirs], lr=0.1, foreach=False, fused=False)
    adam.load_state({"w": {"exp_avg": moment, "exp_avg_sq": moment**2, "step": torch.tensor(7.0)}})
    reference.state[theirs] = {
        "step": torch.tensor(7.0),
        "exp_avg": moment.clone(memory_format=torch.contiguous_format),
        "exp_avg_sq": (moment**2).clone(memory_format=torch.contiguous_format),
    }
    for grad in grads:
        adam.step({"w": grad})
        theirs.grad = grad.clone(memory_format=torch.contiguous_format)
        reference.step()
    torch.testing.assert_close(ours, theirs.data)


class Turned:
    """Turns every gradient in memory, and nothing else."""

    class Config(PluginConfig):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def augment_outer_gradient(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.mT.contiguous().mT if value.dim() > 1 else value for name, value in grads.items()}


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The strides of parameter, gradient and moments, side by side, at every step of Adam."""
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
    """In fit, step and take_step, after a state was loaded, with a model that lies channels last itself."""
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
