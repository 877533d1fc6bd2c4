"""The baselines of a run against loops with torch.optim.Adam."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metareg import MetaLearner, Run, train
from metareg.cli.app import run as run_command
from metareg.registry.task_source import TaskSource
from metareg.runs import baselines
from metareg.runs.baselines import FINE_TUNED, FROM_SCRATCH

SMALL: dict[str, Any] = {
    "steps": 4, "meta_batch": 3, "eval_tasks": 3, "test_tasks": 5, "test_inner_steps": [0, 1], "outer_lr": 0.01,
}  # fmt: skip
RATE, STEPS = 0.02, 7


def tune(model: nn.Module, task: tuple[Any, ...]) -> float:
    """Return the error on the query set after some steps of Adam on the support set."""
    x, y, query_x, query_y = task
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return (model(query_x) - query_y).square().mean().item()


@pytest.mark.parametrize("strategy", ["serial", "auto"])
def test_baselines_are_those_of_plain_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    monkeypatch.setattr(baselines, "_RATES", (RATE,))
    monkeypatch.setattr(baselines, "_STEPS", (STEPS,))
    run = train(task="sinusoid", out=tmp_path / "run", strategy=strategy, **SMALL)
    source = TaskSource.of("sinusoid")
    tests = [source.episodes("test", [index], 0)[0].unstack(0) for index in range(5)]
    model = MetaLearner("mlp", spec=run.source.plugin.instance.spec, loss="mse", seed=0).model.module
    found = {each.name: each for each in run.evaluate_baselines()}
    assert (found[FROM_SCRATCH].rate, found[FROM_SCRATCH].steps) == (RATE, STEPS)
    scores = found[FROM_SCRATCH].evaluation.get_scores(STEPS)
    assert scores.tolist() == pytest.approx([tune(model, task) for task in tests], rel=1e-3)

    pooled = copy.deepcopy(model)
    optimizer = torch.optim.Adam(pooled.parameters(), 0.01)
    for step in range(4):
        optimizer.zero_grad()
        batch = source.episodes("train", range(3 * step, 3 * step + 3), 0)[0]
        x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
        (pooled(x.flatten(0, 1)) - y.flatten(0, 1)).square().mean().backward()
        optimizer.step()
    steps = found[FINE_TUNED].steps
    by_hand = [tune(pooled, task) if steps else (pooled(task[2]) - task[3]).square().mean().item() for task in tests]
    assert found[FINE_TUNED].evaluation.get_scores(steps).tolist() == pytest.approx(by_hand, rel=1e-3)


def test_baselines_are_computed_once_and_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(baselines, "_RATES", (RATE,))
    monkeypatch.setattr(baselines, "_STEPS", (STEPS,))
    out = str(tmp_path / "run")
    settings = [f"--set={key}={value}" for key, value in SMALL.items()]
    assert run_command(["train", "--baselines", "--out", out, *settings]) == 0
    printed = capsys.readouterr().out
    assert "from scratch" in printed
    assert "fine-tuned" in printed
    monkeypatch.setattr(baselines, "measure_baselines", None)
    first, second = Run.load(out).evaluate_baselines()
    assert (first.name, second.name) == (FROM_SCRATCH, FINE_TUNED)
    assert run_command(["eval", out, "--baselines"]) == 0
    assert f"{first.evaluation.mean(first.steps):.4g}" in capsys.readouterr().out


@pytest.mark.slow
def test_baselines_of_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(baselines, "_RATES", (RATE,))
    monkeypatch.setattr(baselines, "_STEPS", (STEPS,))
    settings = [f"--set={key}={value}" for key, value in SMALL.items() if key not in ("steps", "test_inner_steps")]
    out = tmp_path / "c"
    command = ["compare", "--seeds", "2", "--steps", "2", "--jobs", "1", "--out", str(out), "--baselines", *settings]
    assert run_command(command) == 0
    found = [Run.load(path.parent).evaluate_baselines()[0] for path in sorted(out.rglob("baselines.json"))]
    assert len(found) == 2
    mean = sum(each.evaluation.mean(each.steps) for each in found) / 2
    assert f"{mean:.4g}" in capsys.readouterr().out
