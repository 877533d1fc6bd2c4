"""Comparisons of users' own objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import metareg
from metareg import Episodes, PluginConfig, UsageError, derive_seed, hookimpl
from metareg.comparison.own import name_objects

TINY: dict[str, Any] = {
    "steps": 4, "meta_batch": 2, "eval_tasks": 2, "test_tasks": 3, "test_inner_steps": [1], "strategy": "serial",
    "inner_lr": 0.1, "loss": "mae",
}  # fmt: skip


class Lines:
    def episodes(self, split: str, indices: Any, seed: int) -> Any:
        return Episodes.group([self._draw(derive_seed(seed, split, index)) for index in indices])

    @staticmethod
    def _draw(seed: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(10, 2, generator=torch.Generator().manual_seed(seed))
        return x[:5], x[:5, :1] + seed % 7, x[5:], x[5:, :1] + seed % 7


class Sign:
    class Config(PluginConfig):
        inner_lr: float = 0.01

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def inner_update(self, params: Any, grads: Any) -> Any:
        return {name: p - self.config.inner_lr * grads[name].sign() for name, p in params.items()}


def create_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


def test_pairs_of_a_class_and_options_are_objects_and_those_of_a_name_are_not() -> None:
    pair = (Sign, {"inner_lr": 0.3})
    fields, model, objects = name_objects({"algo": ["maml", pair], "tasks": "sinusoid"}, ("mlp", {"hidden": [3]}))
    assert fields == {"algo": ["maml", "sign"], "tasks": "sinusoid"}
    assert model == ("mlp", {"hidden": [3]})
    assert objects == {("algo", "sign"): pair}


def test_own_objects_are_compared_and_gone_on_with(tmp_path: Path) -> None:
    task, model = Lines(), create_net()
    out = tmp_path / "mine"
    first = metareg.compare(["maml", Sign], "cml", task, model=model, seeds=1, out=out, **TINY)
    assert (first.finished, first.left, first.broken) == (2, 0, {})
    stored = yaml.safe_load((out / "comparison.yaml").read_text())
    assert stored["program"] == {"algo": ["sign"], "task": ["lines"], "model": ["sequential"]}
    assert (stored["algo"], stored["options"]["model"]) == (["maml", "sign"], "sequential")

    comparison = metareg.compare(["maml", Sign], "cml", task, model=model, seeds=2, out=out, **TINY)
    assert (comparison.finished, comparison.left, comparison.broken) == (4, 0, {})
    alone = metareg.train(Sign, "cml", task, model=create_net(), seed=1, threads=1, out=tmp_path / "alone", **TINY)
    results = "runs/lines/sign+cml/seed-1/results.json"
    assert (out / results).read_bytes() == (alone.path / "results.json").read_bytes()

    text = metareg.report(out)
    assert "sign" in text
    assert "metareg.train(sign, ['cml'], lines, " in text
    assert "model=sequential" in text
    assert "metareg train" not in text
    with pytest.raises(UsageError, match=r"algo 'sign', task 'lines', model 'sequential'\): continue in Python"):
        metareg.compare(out=out)
    with pytest.raises(UsageError, match="do not set launcher or jobs"):
        metareg.compare("maml", task=task, model=model, jobs=2, out=tmp_path / "two")
    with pytest.raises(UsageError, match="Two objects passed as task have the name 'lines'"):
        metareg.compare("maml", task=[task, Lines()], model=model, out=tmp_path / "two")
