"""What a learner refuses, each in one sentence."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from learners import SignMAML, Source
from torch import nn

from metareg import MetaLearner, UsageError
from samples import MLP, episodes, tasks_of


def test_parameters_of_several_types() -> None:
    model = MLP()
    model.head.float()
    with pytest.raises(UsageError, match=r"'head\.weight'.*float32.*'body\.0\.weight'.*float64"):
        MetaLearner(model)
    model.head.weight.requires_grad_(False)
    model.head.bias = None
    MetaLearner(model)
    with pytest.raises(UsageError, match=r"parameter '0.weight' is torch.complex64; all"):
        MetaLearner(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)))


@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_autocast(strategy: str) -> None:
    learner, batch = MetaLearner(MLP(), loss="mse", strategy=strategy), episodes("mlp")
    with torch.autocast("cpu", torch.bfloat16):
        for call in (
            lambda: learner.step(batch),
            lambda: learner.evaluate(Source(), 2),
            lambda: learner.adapt(batch.support_x[0], batch.support_y[0]),
        ):
            with pytest.raises(UsageError, match="precision='bf16'"):
                call()


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.1), nn.Dropout2d(0.3), nn.LSTM(2, 2, 2, dropout=0.2), nn.MultiheadAttention(2, 1, 0.1)],
    ids=str,
)
def test_dropout_is_refused(layer: nn.Module) -> None:
    with pytest.raises(UsageError, match="would draw random numbers"):
        MetaLearner(nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 1)))


def test_dropout_of_zero_drops_nothing() -> None:
    first, last = nn.Linear(2, 2), nn.Linear(2, 1)
    learners = [
        MetaLearner(nn.Sequential(first, layer, last).double(), loss="mse")
        for layer in (nn.Dropout(0.0), nn.Identity())
    ]
    losses = [learner.step(episodes("mlp")) for learner in learners]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"algo": "mamll"}, "no algorithm named 'mamll'; did you mean 'maml'"),
        ({"augment": ["cmll"]}, "no augmenter named 'cmll'; did you mean 'cml'"),
        ({"augment": ["maml"]}, "no augmenter named 'maml'"),
        ({"augment": ("cml", {"gamma": 1})}, r"An augmenter is a name, a class or a pair \(name, config\)"),
        ({"augment": SignMAML}, "A list of plugins was expected"),
        ({"augment": [("cml", 3)]}, r"a pair \(name, config\)"),
        ({"augment": [("cml", {"gama": 1})]}, "no option of augmenter 'cml' named 'gama'; did you mean 'gamma'"),
        ({"augment": [("cml", {"gamma": -1})]}, "gamma = -1 cannot be used: it should be greater than or equal to 0"),
        ({"augment": [object()]}, "implements no hook"),
        ({"loss": "mes"}, "no loss named 'mes'; did you mean 'mse'"),
        ({"metric": "accurcy"}, "no metric named 'accurcy'; did you mean 'accuracy'"),
        ({"inner_steps": 0}, "inner_steps = 0 cannot be used"),
        ({"inner_steps": 1.5}, "inner_steps = 1.5 cannot be used"),
        ({"inner_lr": -1}, "inner_lr = -1 cannot be used: it should be greater than 0"),
        ({"inner_lr": math.nan}, "inner_lr = nan cannot be used"),
        ({"inner_lr": "fast"}, "inner_lr = 'fast' cannot be used"),
        ({"algo_config": {"inner_lrr": 1}}, "named 'inner_lrr'; did you mean 'inner_lr'"),
        ({"outer_lr": math.inf}, "outer_lr = inf cannot be used"),
        ({"strategy": "parallel"}, "strategy = 'parallel' cannot be used"),
        ({"memory": "none"}, "memory = 'none' cannot be used"),
        ({"norm": "support"}, "'norm' has been renamed: it is 'bn_statistics' now"),
        ({"bn_statistics": "batch"}, "bn_statistics = 'batch' cannot be used"),
        ({"chunk": 0}, "chunk = 0 cannot be used"),
        ({"seed": -1}, "seed = -1 cannot be used"),
        ({"first_ordr": True}, "did you mean 'first_order'"),
        ({"los": "mse"}, "did you mean 'loss'"),
        ({"device": "gpu"}, "no device 'gpu' here; there is cpu"),
        ({"device": "cuda:77"}, "no device 'cuda:77' here"),
        ({"algo": "metasgd", "inner_lr": 1, "inner_lr_max": 0.5}, "inner_lr_max = 0.5 must not be below inner_lr = 1"),
        ({"algo": SignMAML(SignMAML.Config()), "inner_lr": 1}, "is already an object; pass its class to configure it"),
    ],
)  # fmt: skip
def test_bad_options_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as error:
        MetaLearner(MLP(), **options)
    text = str(error.value)
    assert "\n" not in text
    assert "  " not in text


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("mlpp", "no model named 'mlpp'; did you mean 'mlp'"),
        ("mlp", r"needs spec=TaskSpec"),
        (nn.ReLU(), "no trainable parameter"),
        (nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)), "has no shape yet"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_bad_models(model: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        MetaLearner(model, loss="mse")


def test_name_of_a_plugin_in_the_model() -> None:
    model = nn.Sequential(OrderedDict(maml=nn.Linear(2, 2), out=nn.Linear(2, 1)))
    with pytest.raises(UsageError, match=r"'maml\.weight'.*plugin"):
        _ = MetaLearner(model, "maml").meta_parameters


def test_loss_that_is_no_scalar() -> None:
    learner = MetaLearner(MLP(), loss=lambda outputs, targets: (outputs - targets) ** 2)
    with pytest.raises(UsageError, match="must return a scalar"):
        learner.meta_gradient(episodes("mlp"))


def test_no_task_at_all() -> None:
    with pytest.raises(UsageError, match="contains no task"):
        MetaLearner(MLP()).step([])


def test_negative_steps() -> None:
    x, y = tasks_of(episodes("mlp"))[0][:2]
    with pytest.raises(UsageError, match="must not be negative; got -1"):
        MetaLearner(MLP(), loss="mse").adapt(x, y, steps=-1)


@pytest.mark.parametrize(
    "options", [{"tasks": 1}, {"tasks": 5, "inner_steps": []}, {"tasks": 5, "inner_steps": [-1, 2]}]
)
def test_bad_evaluations(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least 2 tasks and non-negative numbers of inner steps"):
        MetaLearner(MLP(), loss="mse").evaluate(Source(), **options)
