"""CML's co-learner in all its forms beside loops written out, and what it says of models that it cannot help."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from metareg import MetaLearner, UsageError
from reference import NETS, difference, train
from samples import LOSSES, MODELS, episodes, tasks_of

INNER_LR, OUTER_LR = 0.1, 0.01


def learner_with(net: str, strategy: str = "vectorized", **config: Any) -> MetaLearner:
    learner = MetaLearner(
        MODELS[net](), "maml", [("cml", config)], loss=LOSSES[net], inner_lr=INNER_LR, outer_lr=OUTER_LR, seed=5,
        strategy=strategy,
    )  # fmt: skip
    learner.initialize(episodes(net).support_x[0])
    return learner


def colearner_shapes(learner: MetaLearner) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for name, value in learner.meta_parameters.items() if name.startswith("cml.")]


@pytest.mark.parametrize(
    ("net", "config", "gamma"),
    [
        ("mlp", {}, 0.2),
        ("mlp", {"depth": 0}, 0.2),
        ("mlp", {"depth": 3, "width": 4, "gamma": 0.7}, 0.7),
        ("conv", {}, 1.0),
        *[("conv", {"depth": depth}, 1.0) for depth in (0, 1, 3, 4)],
    ],
)
def test_trainings_equal_a_loop(net: str, config: dict[str, Any], gamma: float) -> None:
    """The loop takes the co-learner's layers as they come; γ is that of the code or the paper where none is given."""
    learner = learner_with(net, **config)
    batches = [episodes(net, seed=20 + number) for number in range(3)]
    expected = train(
        NETS[net], learner.meta_parameters, [tasks_of(batch) for batch in batches], outer_lr=OUTER_LR, algo="maml",
        inner_lr=INNER_LR, inner_steps=1, gamma=gamma,
    )  # fmt: skip
    for batch in batches:
        learner.step(batch)
    found = learner.meta_parameters
    # BatchNorm takes a convolution's bias away again: Adam makes whole steps of what rounding leaves of its gradient.
    before_norm = {f"{name.removesuffix('weight')}bias" for name, value in found.items() if value.dim() == 4}
    kept = found.keys() - before_norm
    assert difference({name: found[name] for name in kept}, {name: expected[name] for name in kept}) < 1e-6


def test_the_papers_colearners() -> None:
    """One hidden layer of the body's width on vectors; two convolutions, the second pooled, on maps."""
    assert colearner_shapes(learner_with("mlp")) == [(5, 5), (5,), (1, 5), (1,)]
    conv = [(4, 4, 3, 3), (4,), (4,), (4,)]
    assert colearner_shapes(learner_with("conv")) == [*conv, *conv, (5, 16), (5,)]
    assert colearner_shapes(learner_with("conv", depth=0)) == [(5, 16), (5,)]


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_a_frozen_colearner_keeps_its_bits_while_body_and_head_learn_through_it(net: str, strategy: str) -> None:
    def after(**config: Any) -> dict[str, torch.Tensor]:
        learner = learner_with(net, strategy, **config)
        for number in range(3):
            learner.step(episodes(net, seed=number))
        return learner.meta_parameters

    start, frozen, none = learner_with(net).meta_parameters, after(frozen=True), after(gamma=0)
    for name, value in frozen.items():
        assert value.equal(start[name]) == name.startswith("cml."), name
    assert not frozen["body.0.weight"].equal(none["body.0.weight"])


@pytest.mark.parametrize(("algo", "lines"), [("anil", 1), ("boil", 0), ("maml", 0)])
def test_it_says_where_the_colearner_can_learn_nothing(algo: str, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    """ANIL's features are the same before and after adaptation: nothing carries a task's labels to the co-learner."""
    learner = MetaLearner(MODELS["conv"](), algo, ["cml"])
    for number in range(2):
        learner.step(episodes("conv", seed=number))
    assert sum("learn nothing" in record.message for record in caplog.records) == lines


def test_outputs_need_a_dimension_of_their_own() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
            self.head = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))

    with pytest.raises(UsageError, match=r"\(3, 4\) and \(3,\)"):
        MetaLearner(Scalar(), augment=["cml"], loss="mse").initialize(torch.zeros(3, 1))
