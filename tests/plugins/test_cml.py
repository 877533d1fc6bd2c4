"""All forms of CML's co-learner against reference loops, and the messages for models that it cannot help."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import Source, same
from torch import nn

from metareg import Evaluation, MetaLearner, UsageError
from reference import NETS, Task, colearner_on_maps, difference, inner_loop, train
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
    """The loop uses any co-learner's layers; by default, γ is that of the code or the paper."""
    learner = learner_with(net, **config)
    batches = [episodes(net, seed=20 + number) for number in range(3)]
    expected = train(
        NETS[net], learner.meta_parameters, [tasks_of(batch) for batch in batches], outer_lr=OUTER_LR, algo="maml",
        inner_lr=INNER_LR, inner_steps=1, gamma=gamma,
    )  # fmt: skip
    for batch in batches:
        learner.step(batch)
    found = learner.meta_parameters
    # BatchNorm cancels a convolution's bias: its gradient is rounding error, which Adam turns into full steps.
    before_norm = {f"{name.removesuffix('weight')}bias" for name, value in found.items() if value.dim() == 4}
    kept = found.keys() - before_norm
    assert difference({name: found[name] for name in kept}, {name: expected[name] for name in kept}) < 1e-6


def test_the_papers_colearners() -> None:
    """On vectors, one hidden layer with the body's width; on maps, two convolutions, the second with pooling."""
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


def predict_by_colearner(
    net: str, meta: dict[str, torch.Tensor], task: Task, steps: int, algo: str, rows: int | None = None
) -> torch.Tensor:
    """CML†: only the body adapts, with the head's loss on the support set; the co-learner gets its features."""
    meta = {name: value.detach().requires_grad_() for name, value in meta.items()}
    steps = 0 if algo == "anil" else steps
    params = inner_loop(NETS[net], meta, task, algo="boil", inner_lr=INNER_LR, inner_steps=steps)
    if rows is None:
        return NETS[net].colearner(meta, NETS[net].body(params, task[2])).detach()
    both = NETS[net].body(params, torch.cat([task[0], task[2]]), rows)
    return colearner_on_maps(meta, both, rows)[rows:].detach()


@pytest.mark.parametrize("algo", ["maml", "boil", "anil"])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_the_colearner_predicts_on_the_adapted_body(net: str, algo: str) -> None:
    learner, plain = (
        MetaLearner(
            MODELS[net](), algo, [("cml", {"predictor": predictor})], loss=LOSSES[net], inner_lr=INNER_LR, outer_lr=OUTER_LR,
            seed=5, inner_steps=2,
        )
        for predictor in ("colearner", "head")
    )  # fmt: skip
    for number in range(3):
        for each in (learner, plain):
            each.step(episodes(net, seed=number))
    assert same(learner.meta_parameters, plain.meta_parameters)
    source = Source(net)
    evaluation = learner.evaluate(source, 4, inner_steps=(0, 1, 3))
    assert evaluation.predictor == Evaluation.from_dict(evaluation.to_dict()).predictor == "cml"
    assert plain.evaluate(source, 4, inner_steps=(1,)).predictor == "head"
    for number, task in enumerate(tasks_of(source.episodes("test", range(4)))):
        for column, steps in enumerate((0, 1, 3)):
            outputs = predict_by_colearner(net, learner.meta_parameters, task, steps, algo)
            torch.testing.assert_close(evaluation.scores[number, column], learner.metric(outputs, task[3]))
            if steps:
                adapted = learner.adapt(task[0], task[1], steps, bn_statistics="transductive")
                torch.testing.assert_close(adapted(task[2]).detach(), outputs)


def test_the_colearner_keeps_to_the_support_sets_statistics() -> None:
    learner = MetaLearner(MODELS["conv"](), "maml", [("cml", {"predictor": "colearner"})], bn_statistics="support",
        inner_lr=INNER_LR, seed=5)  # fmt: skip
    learner.step(episodes("conv"))
    source = Source("conv")
    evaluation = learner.evaluate(source, 4, inner_steps=(1,))
    for number, task in enumerate(tasks_of(source.episodes("test", range(4)))):
        outputs = predict_by_colearner("conv", learner.meta_parameters, task, 1, "maml", rows=len(task[0]))
        torch.testing.assert_close(evaluation.scores[number, 0], learner.metric(outputs, task[3]))
        adapted = copy.deepcopy(learner.adapt(task[0], task[1], 1))
        torch.testing.assert_close(adapted(task[2]).detach(), outputs)
        torch.testing.assert_close(adapted(task[2][:2]).detach(), outputs[:2])


def test_a_saved_learner_predicts_by_its_colearner(tmp_path: Path) -> None:
    learner = MetaLearner(
        MODELS["mlp"](), "metasgd", [("cml", {"predictor": "colearner"})], loss="mse", inner_lr=INNER_LR
    )
    learner.step(episodes("mlp"))
    learner.save(tmp_path / "learner.safetensors")
    loaded = MetaLearner.load(tmp_path / "learner.safetensors", MODELS["mlp"]())
    before, after = (each.evaluate(Source("mlp"), 4, inner_steps=(0, 2)) for each in (learner, loaded))
    assert after.predictor == "cml"
    assert after.scores.equal(before.scores)
    x, y, query, _ = tasks_of(episodes("mlp"))[0]
    module = loaded.adapt(x, y)
    program = torch.export.export(module, (query,)).module()
    torch.testing.assert_close(program(query), module(query))


@pytest.mark.parametrize(("algo", "lines"), [("anil", 1), ("boil", 0), ("maml", 0)])
def test_it_says_where_the_colearner_can_learn_nothing(algo: str, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    """ANIL's features are the same before and after adaptation, so the co-learner learns nothing about a task's labels."""
    learner = MetaLearner(MODELS["conv"](), algo, ["cml"])
    for number in range(2):
        learner.step(episodes("conv", seed=number))
    assert sum("cannot learn anything" in record.message for record in caplog.records) == lines


def test_outputs_need_a_dimension_of_their_own() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
            self.head = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))

    with pytest.raises(UsageError, match=r"\(3, 4\) and \(3,\)"):
        MetaLearner(Scalar(), augment=["cml"], loss="mse").initialize(torch.zeros(3, 1))
