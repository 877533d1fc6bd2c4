"""Saved learners made of torch.nn layers can be loaded without their class; others cannot."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

from metareg import MetaLearner, UsageError
from metareg.learner.module_json import build_module, describe_module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 5, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def test_a_learner_loads_without_its_model(tmp_path):
    learner = MetaLearner(Net(), algo="metasgd", inner_lr=0.1)
    x, y = torch.rand(5, 1, 6, 6), torch.arange(5)
    learner.save(tmp_path / "net.safetensors")

    loaded = MetaLearner.load(tmp_path / "net.safetensors")

    assert loaded.meta_parameters.keys() == learner.meta_parameters.keys()
    torch.testing.assert_close(loaded.adapt(x, y, steps=2)(x), learner.adapt(x, y, steps=2)(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 3),
        nn.Sequential(OrderedDict(first=nn.Linear(2, 4), act=nn.Tanh(), last=nn.Linear(4, 1, bias=False))),
        nn.Sequential(nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.LeakyReLU(0.3), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        nn.Sequential(nn.LayerNorm(3), nn.Dropout(0.0), nn.Sequential(nn.Linear(3, 3), nn.Identity())),
    ],
)
def test_layers_come_back_as_they_were(module):
    rebuilt = build_module(json.loads(json.dumps(describe_module(module))), module.state_dict())

    assert repr(rebuilt) == repr(module)
    for name, value in module.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], value)


class Odd(nn.Linear):
    """Not a layer of torch.nn, although it is derived from one."""


@pytest.mark.parametrize("module", [Odd(2, 2), nn.Sequential(nn.Linear(2, 2), Odd(2, 2)), nn.ModuleList([nn.ReLU()])])
def test_other_modules_are_not_described(module):
    assert describe_module(module) is None


def test_a_layer_that_stands_in_two_places():
    act = nn.ReLU()
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2), act), nn.Sequential(nn.Linear(2, 2), act))
    assert repr(build_module(describe_module(module), module.state_dict())) == repr(module)
    module[1][0] = module[0][0]
    assert describe_module(module) is None


def test_a_learner_of_another_class_asks_for_it(tmp_path):
    MetaLearner(nn.Sequential(nn.Linear(1, 4), nn.ReLU(), Odd(4, 1)), loss="mse").save(tmp_path / "odd.safetensors")

    with pytest.raises(UsageError, match="pass such a module as model="):
        MetaLearner.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    "description",
    [
        {"layer": "Sequential", "children": {"0": {"layer": "__import__", "arguments": {}}}},
        {"layer": "Module", "arguments": {}},
        {"layer": "Linear", "arguments": {"in_features": 10**12, "out_features": 10**12}},
        {"layer": "Linear", "arguments": {"in_features": -1, "out_features": 2}},
        {"layer": "Linear", "arguments": "wide"},
        {"layer": ["Linear"]},
        {},
        None,
    ],
)
def test_a_strangers_description_builds_nothing_else(description):
    with pytest.raises(UsageError):
        build_module(description, {"weight": torch.zeros(2, 1), "bias": torch.zeros(2)})
