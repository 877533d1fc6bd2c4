"""Reading a comparison's folder that is complete, unfinished or damaged."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comparisons import INNER_STEPS, SMALL, break_run, write_comparison, write_run
from metareg.cli import app as cli
from metareg.comparison.config import ComparisonConfig
from metareg.comparison.plan import Plan
from metareg.comparison.results import format_command, read_results
from metareg.runs.options import assemble


@pytest.fixture
def small(tmp_path: Path) -> Plan:
    """Write a comparison that tests damage."""
    return write_comparison(tmp_path / "small", SMALL, tasks=7)


def test_everything_is_read(tmp_path: Path) -> None:
    demo = write_comparison(tmp_path).folder
    found = read_results(demo)
    assert (found.finished, found.planned, found.gaps) == (120, 120, ())
    assert [task.metric for task in found.tasks] == ["mse", "accuracy"]
    sinusoid, omniglot = found.tasks
    assert (omniglot.higher_is_better, omniglot.bn_statistics) == (True, ("transductive",))
    arm = sinusoid.arms[1]
    assert arm.arm.name == "maml+cml"
    assert arm.seeds == (0, 1, 2, 3, 4)
    assert arm.scores.shape == (5, len(INNER_STEPS), 100)
    stored = json.loads((demo / "runs/sinusoid-10-shot/maml+cml/seed-3/results.json").read_text())
    assert arm.by_seed(5)[3].tolist() == stored["steps"][2]["scores"]
    lines = map(json.loads, (demo / "runs/sinusoid-10-shot/maml+cml/seed-3/metrics.jsonl").read_text().splitlines())
    validation = {line["step"]: line["mse"] for line in lines if line["split"] == "validation"}
    assert arm.curves[3] == validation
    timing = (demo / "runs/sinusoid-10-shot/maml+cml/seed-3/timing.jsonl").read_text().splitlines()
    seconds = [1 / json.loads(line)["steps_per_second"] for line in timing]
    assert arm.seconds_per_step[3] == pytest.approx(np.median(seconds))
    assert arm.peak_bytes[3] == max(json.loads(line)["peak_bytes"] for line in timing)
    assert arm.chosen is not None
    assert (dict(arm.chosen.options), arm.chosen.trials) == ({"inner_lr": 0.03, "cml.gamma": 0.35}, 8)
    assert found.environment["torch"] == {"2.13.0": 120}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"steps": 50, "cml.gamma": 0.5, "inner_lr": 1e-05}, {}),
        ({"test_inner_steps": [0, 3], "eval_every": None, "first_order": True}, {"gradient-noise.sigma": 0.25}),
        ({"model": {"name": "mlp", "config": {"hidden": [8, 8]}}, "shots": 3}, {"cml.gamma": 0.125}),
        ({"model": "mlp", "device": "cpu"}, {"inner_lr": 0.3}),
    ],
)
def test_the_command_of_an_arm_trains_its_runs(
    options: dict[str, Any], chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {"algo": ["metasgd"], "augment": ["gradient-noise+cml"], "seeds": [7], "options": options}
    plan = Plan(tmp_path, ComparisonConfig.model_validate(config))
    (run,) = plan.list_arm_runs(plan.arms[0], chosen)
    given: list[Any] = []
    monkeypatch.setattr("metareg.runs.training.train", lambda **rest: given.append(rest))
    monkeypatch.setattr("metareg.cli.tables.print_results", lambda *_: None)

    assert cli.run(shlex.split(format_command(run).replace("SEED", "7"))[1:]) == 0

    fields = {"out", "config", "observers", "resume"}
    typed = assemble({}, {key: value for key, value in given[0].items() if key not in fields})
    assert typed.config == assemble(run.config, run.options).config


@pytest.mark.parametrize(
    ("how", "state", "reason"),
    [
        ("diverged", "diverged", "Training diverged at step 7."),
        ("error", "broken", "RuntimeError: runs/sinusoid/maml+cml/seed-1/x is full"),
        ("unfinished", "unfinished", "has begun"),
        ("gone", "not begun", "not begun"),
        ("split", "broken", "split 'validation'"),
        ("metric", "broken", "its metric is 'accuracy'"),
        ("unequal", "broken", "equal length"),
        ("{", "broken", "cannot be read as JSON"),
        ("[]", "broken", "not what metareg writes"),
        ('{"metric": "mse", "higher_is_better": false, "steps": []}', "broken", "not what metareg writes"),
        (
            '{"metric": "mse", "higher_is_better": false, "steps": [{"inner_steps": 1, "scores": ["x"]}]}',
            "broken",
            "not what",
        ),
    ],
)
def test_a_run_that_does_not_count_is_named(small: Plan, how: str, state: str, reason: str) -> None:
    path = small.folder / "runs/sinusoid/maml+cml/seed-1"
    break_run(path, how)

    found = read_results(small.folder)

    (gap,) = found.gaps
    assert (gap.what, gap.seed, gap.state, str(gap.path)) == (
        "maml+cml on sinusoid",
        "1",
        state,
        "runs/sinusoid/maml+cml/seed-1",
    )
    assert reason in gap.reason
    assert not re.search(f"{small.folder}|/home/me|Traceback", gap.reason)
    assert found.tasks[0].arms[1].seeds == (0, 5)


def test_other_test_tasks_or_steps_within_an_arm_do_not_count(small: Plan) -> None:
    runs = {run.path.relative_to(small.folder).as_posix(): run for run in small.list_runs()}
    write_run(runs["runs/sinusoid/maml/seed-1"], tasks=8)
    write_run(runs["runs/sinusoid/anil/seed-5"], tasks=7, steps=(0, 1))
    reasons = [gap.reason for gap in read_results(small.folder).gaps]
    assert len(reasons) == 2
    assert "8 test tasks" in reasons[0]
    assert "0, 1 inner steps" in reasons[1]


@pytest.mark.parametrize("content", ['{"split": "validation"}\nnull\n', '["validation"]'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "environment.json"])
def test_a_damaged_file_costs_only_what_is_in_it(small: Plan, name: str, content: str) -> None:
    (small.folder / "runs/sinusoid/maml/seed-1" / name).write_text(content)
    found = read_results(small.folder)
    assert found.finished == 18
    (gap,) = found.gaps
    assert gap.state == "damaged"
    assert name in gap.reason


def test_settings_that_are_not_chosen_yet(tmp_path: Path) -> None:
    plan = write_comparison(tmp_path, SMALL | {"tune": {"trials": 4, "space": {"inner_lr": [0.1, 0.2]}}}, tasks=3)
    chosen = tmp_path / "tuning/sinusoid/maml+cml/chosen.json"
    chosen.unlink()
    trial = chosen.parent / "trial-2" / "seed-0"
    trial.mkdir(parents=True)
    (trial / "error.txt").write_text(f"MemoryError: {tmp_path}/x\n\nTraceback …")
    (tmp_path / "tuning/sinusoid/anil/chosen.json").write_text("{}")
    failed = tmp_path / "tuning/sinusoid/anil+cml/chosen.json"
    content = json.loads(failed.read_text())
    content["trials"][1]["score"] = None
    failed.write_text(json.dumps(content))
    for seed in plan.config.seeds:
        shutil.rmtree(tmp_path / f"runs/sinusoid/maml+cml/seed-{seed}")
    gaps = {(gap.what, gap.seed): (gap.state, gap.reason) for gap in read_results(tmp_path).gaps}
    assert gaps["maml+cml on sinusoid", "5"][0] == "not begun"
    assert "settings" in gaps["maml+cml on sinusoid", "5"][1]
    assert gaps["maml+cml on sinusoid, trial 2", "0"] == ("broken", "MemoryError: x")
    assert gaps["tuning of anil on sinusoid", ""][0] == "damaged"
    anil = next(each.chosen for each in read_results(tmp_path).tasks[0].arms if each.arm.name == "anil+cml")
    assert anil is not None
    assert (anil.options["cml.gamma"], anil.trials, anil.failed) == (0.35, 8, 1)
