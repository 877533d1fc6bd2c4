"""Checks of examples: labels of any integer type are accepted, and impossible examples are refused with one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metareg import DivergenceError, Episodes, MetaLearner, UsageError, find_metric
from metareg.learner.config import Schedule
from metareg.learner.training import fit
from metareg.registry.task_source import TaskSource

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(4, 6, 5, generator=DRAW)
Y = torch.randint(3, (4, 6), generator=DRAW)
NUMBERS = torch.randn(4, 6, 1, generator=DRAW)


class Given:
    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts

    def episodes(self, indices: Sequence[int]) -> Episodes:
        return Episodes(*(part[[index % 4 for index in indices]] for part in self.parts))


class Net(nn.Module):
    def __init__(self, outputs: int, flat: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(8, outputs), nn.Flatten(0) if flat else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def build(outputs: int = 3, flat: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(outputs, flat)


def changed(values: Tensor, value: float) -> Tensor:
    values = values.clone()
    values[2, 1] = value
    return values


CALLS: dict[str, Callable[[MetaLearner, Sequence[Tensor]], Any]] = {
    "step": lambda learner, parts: learner.step(Episodes(*parts)),
    "meta_gradient": lambda learner, parts: learner.meta_gradient(Episodes(*parts))[0],
    "evaluate": lambda learner, parts: learner.evaluate(Given(parts), 4, inner_steps=(1,)).scores.mean(),
    "adapt": lambda learner, parts: [learner.adapt(parts[0][task], parts[1][task])(X[task]) for task in range(4)][2],
}


def call(name: str, parts: Sequence[Tensor], model: nn.Module | None = None, **options: Any) -> Any:
    return CALLS[name](MetaLearner(model or build(), inner_lr=0.1, **options), parts)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.bool])
@pytest.mark.parametrize("strategy", ["auto", "serial"])
def test_labels_of_any_integer_type(dtype: torch.dtype, strategy: str) -> None:
    labels = Y if dtype != torch.bool else Y > 0
    for name in CALLS:
        expected = call(name, (X, labels.long(), X, labels.long()), strategy=strategy)
        assert call(name, (X, labels.to(dtype), X, labels.to(dtype)), strategy=strategy).equal(expected)


def test_whole_numbers_are_numbers_for_an_error_of_numbers() -> None:
    whole = (4 * NUMBERS).round()
    for name in CALLS:
        expected = call(name, (X, whole, X, whole), build(1), loss="mse")
        assert call(name, (X, whole.int(), X, whole.int()), build(1), loss="mse").equal(expected)


IMPOSSIBLE: dict[str, tuple[Any, Any, Tensor, Tensor, str]] = {
    "too large": (build, "cross_entropy", X, changed(Y, 3), "numbers from 0 to 3; the model has 3 outputs"),
    "too large, by its class": (build, nn.CrossEntropyLoss, X, changed(Y, 3), "numbers from 0 to 3"),
    "too large, by an object": (
        build,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        X,
        changed(Y, 3),
        "numbers from 0 to 3",
    ),
    "too large, by a function": (build, F.cross_entropy, X, changed(Y, 3), "numbers from 0 to 3"),
    "negative": (build, "cross_entropy", X, changed(Y, -1), "numbers from -1 to"),
    "one-hot": (build, "cross_entropy", X, F.one_hot(Y, 3), r"argmax\(2\)"),
    "a column": (build, "cross_entropy", X, Y[..., None], r"squeeze\(2\)"),
    "floating-point": (build, "cross_entropy", X, Y.float(), r"y\.long\(\)"),
    "two probabilities": (build, "cross_entropy", X, torch.ones(4, 6, 2) / 2, r"probabilities \[tasks, examples, 3\]"),
    "one output": (lambda: build(1, flat=True), "cross_entropy", X, Y, r"needs outputs \[examples, classes\]"),
    "a column of numbers": (lambda: build(1, flat=True), "mse", X, NUMBERS, r"squeeze\(-1\)"),
    "the same, by an object": (lambda: build(1, flat=True), nn.MSELoss(), X, NUMBERS, r"squeeze\(-1\)"),
    "no column": (lambda: build(1), "mse", X, NUMBERS[..., 0], r"unsqueeze\(-1\)"),
    "several outputs": (build, "mae", X, NUMBERS, r"\[tasks, examples, 3\]"),
    "NaN": (build, "cross_entropy", changed(X, math.nan), Y, "NaN or infinite"),
    "infinite": (build, "cross_entropy", changed(X, math.inf), Y, "NaN or infinite"),
    "NaN targets": (lambda: build(1), "mse", X, changed(NUMBERS, math.nan), "support_y of task .* NaN or infinite"),
    "no example": (build, "cross_entropy", X[:, :0], Y[:, :0], "at least one example per task"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_right_is_said(case: str) -> None:
    new_model, loss, x, y, sentence = IMPOSSIBLE[case]
    for name in CALLS:
        learner = MetaLearner(new_model(), inner_lr=0.1, loss=loss)
        with pytest.raises(UsageError, match=sentence):
            CALLS[name](learner, (x, y, x, y))
        assert learner.steps_done == 0


def test_an_ignored_label_is_none_that_is_out_of_range() -> None:
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    found = call("step", (X, changed(Y, -1), X, changed(Y, -1)), loss=loss)
    assert math.isfinite(found)
    assert found != call("step", (X, Y, X, Y), loss=loss)


def test_a_model_may_know_what_to_do_with_nan() -> None:
    model = build()
    model.body.insert(0, type("Fill", (nn.Module,), {"forward": lambda self, x: x.nan_to_num(0.0)})())
    missing = changed(X, math.nan)
    for name in CALLS:
        found = call(name, (missing, Y, missing, Y), model)
        assert found.equal(call(name, (missing.nan_to_num(0.0), Y, missing, Y), model))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_training_leaves_out_a_batch_with_nan_where_it_may(policy: str) -> None:
    source = Given((changed(X, math.nan), Y, X, Y))
    learner = MetaLearner(build(), inner_lr=0.1)
    schedule = Schedule(steps=4, meta_batch=1, on_nonfinite=policy)
    if policy == "skip":
        fit(learner, TaskSource.of(source), schedule)
        assert learner.steps_done == 4
        return
    with pytest.raises(DivergenceError, match="Step 3 was not taken") as error:
        fit(learner, TaskSource.of(source), schedule)
    assert isinstance(error.value, UsageError)
    assert learner.steps_done == 2


def test_losses_by_their_class_and_metrics_by_a_function() -> None:
    parts = (X, Y, X, Y)
    expected = call("step", parts)
    assert call("step", parts, loss=nn.CrossEntropyLoss).equal(expected)
    assert call("step", parts, loss=nn.CrossEntropyLoss()).equal(expected)
    assert MetaLearner(build(), loss=nn.CrossEntropyLoss(label_smoothing=0.1)).metric.name == "accuracy"
    assert MetaLearner(build(), loss=nn.L1Loss).metric.name == "mae"
    with pytest.raises(UsageError, match="A loss is a name"):
        MetaLearner(build(), loss=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="A metric is a name"):
        MetaLearner(build(), metric=3)  # type: ignore[arg-type]


def test_a_metric_that_is_a_function_says_which_values_are_better(caplog: pytest.LogCaptureFixture) -> None:
    def share(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).double().mean()

    learner = MetaLearner(build(), metric=share)
    assert (learner.metric.name, learner.metric.higher_is_better) == ("share", True)
    assert "Higher values of the metric 'share' count as better" in caplog.text
    caplog.clear()
    assert not MetaLearner(build(), metric=F.cross_entropy).metric.higher_is_better
    assert not caplog.messages
    expected = MetaLearner(build()).evaluate(Given((X, Y, X, Y)), 4).scores
    torch.testing.assert_close(learner.evaluate(Given((X, Y, X, Y)), 4).scores, expected, check_dtype=False)


@pytest.mark.parametrize("metric", ["accuracy", "cross_entropy"])
def test_metrics_of_a_model_in_bfloat16_are_computed_in_float32(metric: str) -> None:
    x, y = torch.randn(2, 1245, 5, generator=DRAW), torch.randint(3, (2, 1245), generator=DRAW)
    learner = MetaLearner(build().bfloat16(), metric=metric, strategy="serial")
    scores = learner.evaluate(Given((x, y, x, y)), 2, inner_steps=(0,)).scores
    outputs = learner.adapt(x[0], y[0], steps=0)(x[0].bfloat16())
    expected = (
        (outputs.argmax(1) == y[0]).double().mean() if metric == "accuracy" else F.cross_entropy(outputs.float(), y[0])
    )
    assert scores[0, 0].item() == pytest.approx(expected.item(), abs=1e-7)


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "auroc"])
def test_metrics_of_classes_refuse_other_shapes(metric: str) -> None:
    for outputs, targets in ((NUMBERS[0, :, 0], Y[0]), (X[0], Y[0, :, None]), (X[0], Y[0].float())):
        with pytest.raises(UsageError, match=r"class numbers \[examples\]"):
            find_metric(metric, "mse")(outputs, targets)
    images = torch.randn(2, 3, 4, 4, generator=DRAW)
    if metric == "accuracy":  # a class for each pixel
        assert find_metric(metric, "mse")(images, images.argmax(1)).item() == 1
