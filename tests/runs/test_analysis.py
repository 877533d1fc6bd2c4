"""`metareg analyse` against reference loops with torch.autograd."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from metareg import Run, UsageError, train
from metareg.cli.app import run as run_command
from metareg.registry.task_source import TaskSource
from metareg.runs import adaptation
from metareg.runs.analysis import analyse
from metareg.runs.checkpoints import Checkpoints
from samples import write_tables

RATE, GAMMA, TASKS, STEPS = 0.05, 0.3, 6, 2
SMALL: dict[str, Any] = {
    "steps": 8, "meta_batch": 3, "eval_tasks": 3, "test_tasks": 4, "test_inner_steps": [0, 1], "outer_lr": 0.01,
    "inner_steps": STEPS, "inner_lr": RATE, "strategy": "serial",
}  # fmt: skip
BODY = ("body.1.weight", "body.1.bias", "body.3.weight", "body.3.bias")
HEAD = ("head.weight", "head.bias")


def features(params: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.relu(x @ params[BODY[0]].T + params[BODY[1]])
    return torch.relu(hidden @ params[BODY[2]].T + params[BODY[3]])


def error(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (features(params, x) @ params[HEAD[0]].T + params[HEAD[1]] - y).square().mean()


def adapt(meta: dict[str, Tensor], x: Tensor, y: Tensor, names: tuple[str, ...], steps: int) -> list[dict[str, Tensor]]:
    """Run gradient descent on some of the parameters, and return them after 0, 1, … steps."""
    found = [dict(meta)]
    for _ in range(steps):
        now = found[-1]
        grads = torch.autograd.grad(error(now, x, y), [now[name] for name in names], create_graph=True)
        found.append(now | {name: now[name] - RATE * grad for name, grad in zip(names, grads, strict=True)})
    return found


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}


def check_means(found: list[adaptation.Mean], values: np.ndarray) -> None:
    """Return the means over tasks ``[tasks, steps]`` with their intervals."""
    assert [each.mean for each in found] == pytest.approx(values.mean(0), rel=1e-4)
    half = stats.sem(values, axis=0) * stats.t.ppf(0.975, len(values) - 1)
    assert [each.ci95 for each in found] == pytest.approx(half, rel=1e-3)


def test_every_number_is_that_of_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "_BATCHES", 4)
    options = {"cml.gamma": GAMMA, "checkpoint_every": 8}
    run = train(task="sinusoid", algo="maml", augment=["cml"], out=tmp_path / "run", **SMALL, **options)
    found = analyse(run.path, TASKS)

    meta = leaves(run.learner.plain_meta_parameters)
    assert set(meta) == {*BODY, *HEAD}
    source = TaskSource.of("sinusoid")
    tests = [source.episodes("test", [index], 0)[0].unstack(0) for index in range(TASKS)]
    assert (found.inner_steps, found.tasks, found.metric, found.augmenters) == (STEPS, TASKS, "mse", "cml")
    parts = {"all": BODY + HEAD, "body": BODY, "head": HEAD}
    scores = {
        part: np.array(
            [[error(each, qx, qy).item() for each in adapt(meta, x, y, names, STEPS)] for x, y, qx, qy in tests]
        )
        for part, names in parts.items()
    }
    assert list(found.adapting) == list(scores)
    for part, values in scores.items():
        check_means(found.adapting[part], values)
    assert not np.allclose(scores["body"], scores["head"], rtol=1e-2), "else the parts could be exchanged"
    trained = [source.episodes("train", [index], 0)[0].unstack(0) for index in range(TASKS)]
    check_means(
        found.train,
        np.array(
            [[error(e, qx, qy).item() for e in adapt(meta, x, y, BODY + HEAD, STEPS)] for x, y, qx, qy in trained]
        ),
    )

    layers = {"body.1": ("body", BODY[:2]), "body.3": ("body", BODY[2:]), "head": ("head", HEAD)}
    assert [(each.layer, each.part) for each in found.layers] == [(name, part) for name, (part, _) in layers.items()]
    for layer, (_, names) in zip(found.layers, layers.values(), strict=True):
        moved = []
        for x, y, *_ in tests:
            steps = [
                torch.cat([each[name].flatten() for name in names]) for each in adapt(meta, x, y, BODY + HEAD, STEPS)
            ]
            moved.append([((each - steps[0]).norm() / steps[0].norm()).item() for each in steps[1:]])
        check_means(layer.relative, np.array(moved))

    # The separate gradients of the two losses at the end of training.
    state = Checkpoints(run.path / "checkpoints", 3).load_newest()
    assert state is not None
    ends = leaves(state["learner"]["meta"])
    model = {name: ends[name] for name in meta}
    colearner = [ends[f"cml.colearner.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    degrees, ratios = {"body": [], "head": []}, {"body": [], "head": []}
    for batch in range(4):
        own = loss = torch.zeros(())
        for index in range(3 * batch, 3 * batch + 3):
            x, y, qx, qy = source.episodes("train", [index], 0)[0].unstack(0)
            last = adapt(model, x, y, BODY + HEAD, STEPS)[-1]
            hidden = torch.relu(features(last, qx) @ colearner[0].T + colearner[1])
            own = own + error(last, qx, qy) / 3
            loss = loss + GAMMA * (hidden @ colearner[2].T + colearner[3] - qy).square().mean() / 3
        for part, names in (("body", BODY), ("head", HEAD)):
            one, other = (
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(each, [model[n] for n in names], retain_graph=True)]
                )
                for each in (own, loss)
            )
            degrees[part].append(math.degrees(torch.acos(one @ other / one.norm() / other.norm()).item()))
            ratios[part].append((other.norm() / one.norm()).item())
    assert [angle.part for angle in found.angles] == ["body", "head"]
    for angle in found.angles:
        assert angle.degrees.mean == pytest.approx(np.mean(degrees[angle.part]), rel=1e-3)
        assert angle.ratio.mean == pytest.approx(np.mean(ratios[angle.part]), rel=1e-3)
        assert angle.degrees.ci95 == pytest.approx(stats.sem(degrees[angle.part]) * stats.t.ppf(0.975, 3), rel=1e-2)

    stored = json.loads((run.path / "analysis.json").read_text())
    assert stored["adapting"]["head"][-1]["mean"] == found.adapting["head"][-1].mean
    assert stored["angles"][0]["degrees"]["mean"] == found.angles[0].degrees.mean
    assert (run.path / "plots" / "analysis.png").stat().st_size > 10_000


def test_what_a_run_lacks_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(task="sinusoid", algo="anil", augment=["cml"], out=tmp_path / "anil", **SMALL)
    for path in (run.path / "checkpoints").glob("step-*"):
        path.unlink()
    capsys.readouterr()
    assert run_command(["analyse", str(run.path), "--tasks", "3", "--inner-steps", "1"]) == 0
    output, messages = capsys.readouterr()
    assert "checkpoint" in messages
    assert "body" not in output
    found = json.loads((run.path / "analysis.json").read_text())
    assert (list(found["adapting"]), found["angles"], found["inner_steps"]) == (["all"], [], 1)
    assert [layer["layer"] for layer in found["layers"]] == ["head"]
    assert run_command(["analyse", str(tmp_path / "nothing")]) == 2
    with pytest.raises(UsageError, match="at least 2 tasks"):
        analyse(Run.load(run.path), tasks=1)


def test_data_that_has_moved_is_read_from_where_it_is(tmp_path: Path) -> None:
    tables = write_tables(tmp_path / "tables")
    options = {"task.data": str(tables), "task.target": "y", "shots": 2}
    run = train(task="table-folder", algo="maml", augment=["cml"], out=tmp_path / "run", **SMALL, **options)
    expected = analyse(run.path, TASKS)
    assert len(expected.angles) == 2
    (run.path / "analysis.json").unlink()
    tables.rename(tmp_path / "moved")
    assert run_command(["analyse", str(run.path), "--tasks", str(TASKS), "--data", str(tmp_path / "moved")]) == 0
    found = json.loads((run.path / "analysis.json").read_text())
    assert [each["degrees"]["mean"] for each in found["angles"]] == [each.degrees.mean for each in expected.angles]
    assert found["adapting"]["all"][-1]["mean"] == expected.adapting["all"][-1].mean
