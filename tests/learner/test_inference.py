"""Adapted modules, and scores of many tasks."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from learners import AUGMENTERS, Source, same
from scipy import stats
from torch import Tensor, nn

from metareg import Episodes, MetaLearner, Metric, UsageError, hookimpl
from reference import NETS, difference, inner_loop
from samples import LOSSES, MLP, MODELS, ConvNet, episodes, tasks_of


def test_adapt_returns_an_ordinary_module() -> None:
    batch = episodes("mlp")
    learner = MetaLearner(MLP(), "maml", AUGMENTERS, loss="mse", inner_lr=0.1, inner_steps=2)
    learner.step(batch)
    meta = learner.meta_parameters
    adapted = learner.adapt(batch.support_x[0], batch.support_y[0], steps=3)
    assert type(adapted) is MLP
    assert not adapted.training
    assert all(p.requires_grad and p.is_leaf for p in adapted.parameters())
    expected = inner_loop(
        NETS["mlp"], {name: value.clone().requires_grad_() for name, value in meta.items()}, tasks_of(batch)[0],
        algo="maml", inner_lr=0.1, inner_steps=3,
    )  # fmt: skip
    assert difference(dict(adapted.named_parameters()), expected) < 1e-12
    assert pickle.loads(pickle.dumps(adapted.state_dict())).keys() == MLP().state_dict().keys()
    # Users may change the adapted module: it shares nothing with the learner or other tasks.
    other = learner.adapt(batch.support_x[0], batch.support_y[0], steps=0)
    adapted.head.weight.data.zero_()
    assert other.head.weight.equal(learner.meta_parameters["head.weight"])
    other.head.weight.data.zero_()
    assert learner.meta_parameters["head.weight"].any()


def test_adapt_takes_the_steps_of_training_by_default() -> None:
    batch = episodes("mlp")
    learner = MetaLearner(MLP(), loss="mse", inner_steps=2, inner_lr=0.1)
    x, y = batch.support_x[0], batch.support_y[0]
    assert same(learner.adapt(x, y).state_dict(), learner.adapt(x, y, steps=2).state_dict())


@pytest.mark.parametrize("bn_statistics", ["transductive", "support"])
def test_adapted_module_predicts_what_evaluation_scores(bn_statistics: str) -> None:
    learner = MetaLearner(ConvNet(), inner_lr=0.4, bn_statistics=bn_statistics)
    source = Source("conv")
    evaluation = learner.evaluate(source, 5, inner_steps=[0, 2])
    assert evaluation.bn_statistics == bn_statistics
    for number, (x, y, query_x, query_y) in enumerate(tasks_of(source.episodes("test", range(5)))):
        for column, steps in enumerate((0, 2)):
            adapted = learner.adapt(x, y, steps, bn_statistics=bn_statistics)
            accuracy = (adapted(query_x).argmax(-1) == query_y).double().mean()
            assert evaluation.scores[number, column].item() == pytest.approx(accuracy.item())


@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
@pytest.mark.parametrize("algo", ["maml", "anil", "boil"])
def test_policies_are_scored_together_as_alone(algo: str, strategy: str) -> None:
    learner, source = MetaLearner(ConvNet(), algo, inner_lr=0.4, strategy=strategy), Source("conv")
    policies = ["transductive", "support"]
    together = learner.evaluate_policies([*policies, "support"], source, 4, "test", [0, 1, 2])
    alone = [learner.evaluate(source, 4, inner_steps=[0, 1, 2], bn_statistics=policy) for policy in policies]
    assert [each.to_dict() for each in together] == [each.to_dict() for each in alone]


def test_a_test_of_tasks_at_once_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*_: object) -> None:
        raise AssertionError("tracing costs more than the test")

    monkeypatch.setattr("metareg.engine.tracing.create_graph", trace)
    learner = MetaLearner(MLP(), loss="mse", inner_lr=0.1, strategy="vectorized")
    for _ in range(3):
        learner.evaluate(Source("mlp"), 4, inner_steps=[0, 1])


def test_a_task_is_adapted_to_once_for_all_policies() -> None:
    steps: list[int] = []

    class Counted:
        @hookimpl
        def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor], step: int) -> dict[str, Tensor]:
            steps.append(step)
            return {name: value - 0.4 * grads[name] for name, value in params.items()}

    learner = MetaLearner(ConvNet(), Counted, strategy="serial")
    learner.evaluate_policies(["transductive", "support"], Source("conv"), 3, "test", [0, 2])
    assert steps == [0, 1] * 3


@pytest.mark.parametrize("algo", ["maml", "anil"])
@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_one_example_at_a_time_is_predicted_as_evaluation_says(algo: str, strategy: str) -> None:
    learner, source = MetaLearner(ConvNet(), algo, inner_lr=0.4, strategy=strategy), Source("conv")
    one_by_one = learner.evaluate(source, 3, inner_steps=[0, 2], bn_statistics="support")
    assert one_by_one.bn_statistics == "support"
    for number, (x, y, query_x, query_y) in enumerate(tasks_of(source.episodes("test", range(3)))):
        for column, steps in enumerate((0, 2)):
            adapted = learner.adapt(x, y, steps)
            alone = torch.cat([adapted(query[None]) for query in query_x])
            torch.testing.assert_close(alone, adapted(query_x))
            right = [int(outputs.argmax()) == int(target) for outputs, target in zip(alone, query_y, strict=True)]
            assert one_by_one.scores[number, column].item() == pytest.approx(sum(right) / len(right))
    transductive = learner.adapt(x, y, bn_statistics="transductive")
    assert (transductive(query_x[:2]) - transductive(query_x)[:2]).abs().max() > 1e-3
    with pytest.raises(UsageError, match="did you mean 'support'"):
        learner.adapt(x, y, bn_statistics="suport")


def test_a_batch_norm_in_several_places_keeps_the_statistics_of_none() -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(2, 3), norm, nn.Linear(3, 3), norm, nn.Linear(3, 1)).double()
    learner, (x, y, *_) = MetaLearner(model, loss="mse"), tasks_of(episodes("mlp"))[0]
    with pytest.raises(UsageError, match="'1' is applied several times"):
        learner.adapt(x, y)
    assert learner.adapt(x, y, bn_statistics="transductive")(x).isfinite().all()


def test_running_statistics_do_not_leak_between_tasks() -> None:
    """A task's scores do not depend on earlier evaluations, and evaluation does not change the weights."""
    model = ConvNet()
    model(episodes("conv").query_x.flatten(0, 1) * 3 + 1)  # running statistics that would show a change
    batch = episodes("conv", tasks=4)
    learner = MetaLearner(model, inner_lr=0.4)
    x, y, query_x, _ = tasks_of(batch)[3]
    alone = {
        statistics: learner.adapt(x, y, bn_statistics=statistics)(query_x) for statistics in ("support", "transductive")
    }
    for other_x, other_y, other_query, _ in tasks_of(batch)[:3]:
        learner.adapt(other_x, other_y)(other_query)
    learner.meta_gradient(batch)
    for statistics, outputs in alone.items():
        assert learner.adapt(x, y, bn_statistics=statistics)(query_x).equal(outputs)
    assert learner.bn_statistics == "transductive"
    assert MetaLearner(MLP(), loss="mse").bn_statistics == "none"


def test_buffers_of_the_model_are_used_and_kept() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 5)
            self.register_buffer("scale", torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.linear(x)

    model = nn.Sequential(Body(), nn.Linear(5, 1)).double()
    adapted = MetaLearner(model, loss="mse").adapt(*tasks_of(episodes("mlp"))[0][:2], steps=0)
    x = episodes("mlp").query_x[0]
    assert adapted(x).equal(model(x))
    assert adapted[0].scale.item() == 3


def test_the_interval_is_students_over_tasks() -> None:
    evaluation = MetaLearner(MLP(), loss="mse", inner_lr=0.1).evaluate(Source(), 30, inner_steps=[3, 0, 1, 1])
    assert evaluation.inner_steps == (0, 1, 3)
    assert evaluation.scores.shape == (30, 3)
    scores = evaluation.scores[:, 2].numpy()
    assert evaluation.mean(3) == pytest.approx(scores.mean(), rel=1e-12)
    assert evaluation.ci95(3) == pytest.approx(stats.t.interval(0.95, 29, 0, stats.sem(scores))[1], rel=1e-12)
    assert "after inner steps 0: " in str(evaluation)
    with pytest.raises(UsageError, match=r"after 2 inner steps.*0, 1, 3"):
        evaluation.mean(2)


@pytest.mark.parametrize("algo", ["maml", "anil"])
@pytest.mark.parametrize("net", MODELS)
def test_evaluation_does_not_depend_on_how_it_is_run(net: str, algo: str) -> None:
    def scores(**options: Any) -> Tensor:
        learner = MetaLearner(MODELS[net](), algo, loss=LOSSES[net], inner_lr=0.1, **options)
        return learner.evaluate(Source(net), 12).scores

    serial = scores(strategy="serial")
    assert scores(strategy="traced").equal(serial)
    for options in ({"strategy": "vectorized"}, {"strategy": "vectorized", "chunk": 5}):
        torch.testing.assert_close(scores(**options), serial, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bn_statistics", ["transductive", "support"])
def test_the_features_that_stay_are_computed_once_in_an_evaluation(bn_statistics: str) -> None:
    seen: list[int] = []
    learner = MetaLearner(ConvNet(), "anil", strategy="serial", bn_statistics=bn_statistics)
    learner.evaluate(Source("conv"), 3, inner_steps=[0])
    learner.model.module.body.register_forward_hook(lambda *_: seen.append(1))
    learner.evaluate(Source("conv"), 3, inner_steps=[0])
    alone = len(seen)
    learner.evaluate(Source("conv"), 3, inner_steps=[0, 1, 2, 5])
    assert len(seen) == 2 * alone > 0


def test_evaluation_uses_no_augmenter() -> None:
    scores = [
        MetaLearner(MLP(), "maml", augment, loss="mse", inner_lr=0.1).evaluate(Source(), 5).scores
        for augment in ([], AUGMENTERS)
    ]
    assert scores[0].equal(scores[1])


def test_more_tasks_begin_with_the_same_tasks() -> None:
    learner = MetaLearner(MLP(), loss="mse", inner_lr=0.1)
    few, many = (learner.evaluate(Source(), tasks).scores for tasks in (7, 130))
    torch.testing.assert_close(many[:7], few, rtol=1e-9, atol=0)


class OfSeveralSizes:
    """Every third task has fewer queries; `arrange` stacks the tasks."""

    def __init__(self, arrange: Callable[[list[Any]], list[Episodes]]) -> None:
        self.arrange = arrange

    def episodes(self, indices: Sequence[int]) -> list[Episodes]:
        drawn = (episodes("mlp", 1, query=1 + (index % 3 > 0), seed=index) for index in indices)
        return self.arrange([tasks_of(one)[0] for one in drawn])


def backwards_and_silent(tasks: list[Any]) -> list[Episodes]:
    return [Episodes(*stack.parts) for stack in Episodes.group(tasks)[::-1]]


def in_two_groups(tasks: list[Any]) -> list[Episodes]:
    """Positions that start from 0 in each half do not determine positions in the whole."""
    return Episodes.group(tasks[: len(tasks) // 2]) + Episodes.group(tasks[len(tasks) // 2 :])


def placed(tasks: list[Any]) -> list[Episodes]:
    """Return one stack per task, in reverse order."""
    alone = [Episodes(*(part[None] for part in task)).placed([place]) for place, task in enumerate(tasks)]
    return alone[::-1]


def cut(tasks: list[Any]) -> list[Episodes]:
    return [part for stack in Episodes.group(tasks) for part in (stack[1:], stack[:1])]


@pytest.mark.parametrize("arrange", [Episodes.group, backwards_and_silent, in_two_groups, placed, cut])
@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_scores_are_in_the_order_of_the_tasks(arrange: Any, strategy: str) -> None:
    source = OfSeveralSizes(arrange)
    learner = MetaLearner(MLP(), loss="mse", inner_lr=0.1, strategy=strategy)
    scores = learner.evaluate(source, 130, inner_steps=[0, 2]).scores
    for number in (*range(12), 99, 100, 101, 102, 129):
        (task,) = (one for stack in source.episodes([number]) for one in tasks_of(stack))
        for column, steps in enumerate((0, 2)):
            outputs = learner.adapt(task[0], task[1], steps)(task[2])
            assert scores[number, column].item() == pytest.approx(nn.functional.mse_loss(outputs, task[3]).item())


def test_stacks_keep_the_positions_of_their_tasks() -> None:
    stack = episodes("mlp", 5).placed([4, 2, 0, 1, 3])
    assert stack.to("cpu").contiguous()[1:4].positions == (2, 0, 1)
    assert [part.positions for part in stack.chunks(2)] == [(4, 2), (0, 1), (3,)]
    assert episodes("mlp", 2)[:1].positions is None
    with pytest.raises(UsageError, match="2 positions for 5 tasks"):
        stack.placed([0, 1])


def test_metric_of_ones_own() -> None:
    worst = Metric("worst", lambda outputs, targets: (outputs - targets).abs().max(), higher_is_better=False)
    learner = MetaLearner(MLP(), loss="mse", metric=worst)
    learner.step(episodes("mlp"))
    assert "worst" in learner.logs
    assert learner.evaluate(Source(), 3).metric == "worst"
