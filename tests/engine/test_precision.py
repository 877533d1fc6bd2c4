"""bfloat16: close to full precision in every strategy, with parameters and updates in the model's own precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from metareg import Episodes, MetaLearner, UsageError
from metareg_image.glyphs import Glyphs
from reference import NETS, Net, train
from samples import MLP, ConvNet, episodes, tasks_of


def batch() -> Episodes:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(5).repeat(2).expand(3, 10)
    return Episodes(torch.rand(3, 10, 1, 8, 8, generator=draw), y, torch.rand(3, 10, 1, 8, 8, generator=draw), y)


def gradient(precision: str, **options: object) -> dict[str, torch.Tensor]:
    learner = MetaLearner(ConvNet().float(), "maml", ["cml"], inner_lr=0.1, precision=precision, **options)
    return learner.meta_gradient(batch())[1]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    flat_a, flat_b = (torch.cat([value.flatten() for value in each.values()]) for each in (a, b))
    return ((flat_a - flat_b).norm() / flat_b.norm()).item()


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("strategy", ["serial", "traced", "vectorized"])
@pytest.mark.parametrize("bn_statistics", ["transductive", "support"])
def test_bf16_is_close_to_full_precision(strategy: str, bn_statistics: str, memory: str) -> None:
    full = gradient("full", strategy="serial", bn_statistics=bn_statistics)
    rounded = gradient("bf16", strategy=strategy, bn_statistics=bn_statistics, memory=memory)
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    assert 1e-5 < distance(rounded, full) < 0.5


def in_bf16(net: Net) -> Net:
    """A network that runs in bfloat16, with losses in float32."""

    def low(tree: Mapping[str, Tensor] | Tensor) -> Any:
        if isinstance(tree, Tensor):
            return tree.to(torch.bfloat16)
        return {name: value.to(torch.bfloat16) for name, value in tree.items()}

    return Net(
        lambda p, x, *_: net.body(low(p), low(x)),
        lambda p, f, *_: net.head(low(p), f).float(),
        lambda p, f: net.colearner(low(p), f).float(),
        net.loss,
    )


@pytest.mark.parametrize("strategy", ["serial", "traced", "vectorized"])
def test_bf16_steps_are_those_of_a_loop_in_bf16(strategy: str) -> None:
    """Kernels of bfloat16 round differently under vmap. With another entry's gradient, the error is as large as the step."""
    learner = MetaLearner(
        MLP().float(), "maml", ["cml"], loss="mse", inner_lr=0.1, outer_lr=0.01, precision="bf16", strategy=strategy
    )
    batches = [episodes("mlp", seed=seed).to("cpu", torch.float32) for seed in range(4)]
    learner.initialize(batches[0].support_x[0])
    before = {name: value.clone() for name, value in learner.meta_parameters.items()}
    expected = train(
        in_bf16(NETS["mlp"]), before, [tasks_of(each) for each in batches], outer_lr=0.01, algo="maml", inner_lr=0.1,
        inner_steps=1, gamma=0.2,
    )  # fmt: skip
    for each in batches:
        learner.step(each)
    moved = {name: value - before[name] for name, value in learner.meta_parameters.items()}
    assert distance(moved, {name: value - before[name] for name, value in expected.items()}) < 0.3


@pytest.mark.parametrize("strategy", ["serial", "traced", "vectorized"])
def test_entries_of_convolutions_in_bf16_are_moved_by_their_own_gradients(strategy: str) -> None:
    task = Glyphs(Glyphs.Config(query=5, size=32))
    learner = MetaLearner(
        "conv4", spec=task.spec, model_options={"width": 8}, inner_lr=0.4, precision="bf16", strategy=strategy
    )
    images = task.episodes("train", range(1), 0)
    _, grads = learner.meta_gradient(images)
    meta = {name: value.clone() for name, value in learner.meta_parameters.items()}
    for name, value in meta.items():
        value.grad = grads[name]
    torch.optim.Adam(meta.values(), foreach=False, fused=False).step()
    learner.step(images)
    torch.testing.assert_close(learner.meta_parameters, meta, rtol=0, atol=2e-5)


def test_bf16_trains_and_adapts() -> None:
    learner = MetaLearner(ConvNet().float(), "anil", inner_lr=0.1, inner_steps=2, precision="bf16", memory="recompute")
    before = learner.meta_parameters
    before = {name: value.clone() for name, value in before.items()}
    losses = [learner.step(batch()).item() for _ in range(10)]
    assert losses[-1] < losses[0]
    assert all(value.dtype == torch.float32 for value in learner.meta_parameters.values())
    assert any(not torch.equal(value, before[name]) for name, value in learner.meta_parameters.items())
    assert learner.logs["accuracy"] * 30 == pytest.approx(round(learner.logs["accuracy"] * 30))
    adapted = learner.adapt(batch().support_x[0], batch().support_y[0])
    assert adapted(batch().query_x[0]).dtype == torch.float32


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="'full' or 'bf16'"):
        MetaLearner(ConvNet(), precision="fp8")
