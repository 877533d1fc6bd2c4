"""bfloat16: close to full precision in every strategy, with parameters and updates in the model's own precision."""

from __future__ import annotations

import pytest
import torch
from samples import ConvNet

from metareg import Episodes, MetaLearner, UsageError


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


@pytest.mark.parametrize("strategy", ["serial", "traced", "vectorized"])
@pytest.mark.parametrize("bn_statistics", ["transductive", "support"])
def test_bf16_is_close_to_full_precision(strategy: str, bn_statistics: str) -> None:
    full = gradient("full", strategy="serial", bn_statistics=bn_statistics)
    rounded = gradient("bf16", strategy=strategy, bn_statistics=bn_statistics)
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    assert 1e-5 < distance(rounded, full) < 0.5


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
