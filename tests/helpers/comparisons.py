"""Writes the folders of comparisons without training, and trains comparisons in this process."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from metareg.comparison.config import ComparisonConfig
from metareg.comparison.plan import Plan, PlannedRun
from metareg.comparison.pool import Outcome, carry_out
from metareg.util.intervals import compute_half_width

INNER_STEPS = (0, 1, 5, 10)
STEPS = 5000

_GAIN = {"none": 0.0, "cml": 0.12, "dropgrad": -0.06}
_COST = {"none": 1.0, "cml": 1.3, "dropgrad": 1.08}

ENVIRONMENT = {
    "metareg": "0.1.0", "python": "3.11.7", "platform": "Linux-6.8-x86_64", "processor": "x86_64", "torch": "2.13.0",
    "torch_threads": 1, "cuda": None, "gpus": [], "libraries": {"numpy": "2.4.6"}, "device": "cpu", "strategy": "vectorized",
    "plugins": [{"kind": "algorithms", "name": "maml", "distribution": "metareg", "version": "0.1.0"}],
}  # fmt: skip

DEMO: dict[str, Any] = {
    "title": "Does cooperative meta-learning help?",
    "notes": "Five paired seeds, *one machine*. See [the paper](https://arxiv.org/abs/2406.00001) and `inner_lr`.\n\n"
    "- drawn at random, nothing was trained\n- <script>alert(1)</script>",
    "algo": ["maml", "anil", "boil", "metasgd"],
    "augment": ["none", "cml", "dropgrad"],
    "tasks": [
        {"task": "sinusoid", "label": "sinusoid, 10-shot", "options": {"shots": 10}},
        {"task": "omniglot-small", "label": "omniglot-small, 5-way 1-shot", "options": {"ways": 5, "shots": 1}},
    ],
    "seeds": 5,
    "options": {"steps": STEPS, "threads": 1},
    "tune": {"trials": 8, "space": {"inner_lr": [0.01, 0.03, 0.1]}},
}


SMALL: dict[str, Any] = {
    "algo": ["maml", "anil"],
    "augment": ["none", "cml", "dropgrad+cml"],
    "tasks": ["sinusoid"],
    "seeds": [0, 1, 5],
    "options": {"steps": 100},
}


class InThisProcess:
    """A launcher that trains each run at once, in this process."""

    capacity = 1

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.submitted: list[PlannedRun] = []

    def submit(self, run: PlannedRun) -> None:
        self.submitted.append(run)
        self.outcomes.append(carry_out(run))

    def wait(self, _seconds: float) -> list[Outcome]:
        ended, self.outcomes = self.outcomes, []
        return ended

    def stop(self) -> None: ...

    def close(self) -> None: ...


def write_comparison(folder: Path, config: dict[str, Any] | None = None, *, tasks: int = 100) -> Plan:
    """Write a comparison whose runs have all finished."""
    plan = Plan(folder, ComparisonConfig.model_validate(DEMO if config is None else config))
    plan.write()
    if plan.config.tune:
        for number, arm in enumerate(plan.arms):
            chosen = {"inner_lr": (0.01, 0.03, 0.1)[number % 3]} | ({"cml.gamma": 0.35} if "cml" in arm.name else {})
            trials = [{"options": chosen, "score": 0.1 * each, "seeds": [0]} for each in range(8)]
            path = folder / "tuning" / arm.folder / "chosen.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"options": chosen, "trials": trials}))
    for run in plan.list_runs():
        write_run(run, tasks)
    return plan


def write_run(
    run: PlannedRun, tasks: int = 100, *, metric: str | None = None, steps: tuple[int, ...] = INNER_STEPS
) -> None:
    """Write a finished run. For a given seed, the tasks and weights have the same effect on every arm's scores."""
    metric = metric or ("accuracy" if "omniglot" in run.arm.task else "mse")
    shared = np.random.default_rng(zlib.crc32(f"{run.arm.task}/{run.seed}".encode()))
    own = np.random.default_rng(zlib.crc32(f"{run}".encode()))
    hardness, luck = shared.gamma(2, 0.5, tasks), shared.normal(0, 0.06)
    gain = sum(_GAIN.get(each, 0.05) for each in run.arm.augmenters) * (1.6 if run.arm.algorithm == "metasgd" else 1)
    level = 0.35 - gain + luck + own.normal(0, 0.02)
    errors = [hardness * (0.12 + level + 2.2 * np.exp(-0.9 * k)) * own.lognormal(0, 0.2, tasks) for k in steps]
    values = [np.round(20 * np.exp(-0.7 * each)) / 20 for each in errors] if metric == "accuracy" else errors
    run.path.mkdir(parents=True, exist_ok=True)
    results = {
        "metric": metric,
        "higher_is_better": metric == "accuracy",
        "bn_statistics": "transductive" if metric == "accuracy" else "none",
        "split": "test",
        "steps": [
            {
                "inner_steps": k,
                "mean": float(each.mean()),
                "ci95": compute_half_width(each),
                "tasks": tasks,
                "scores": each.tolist(),
            }
            for k, each in zip(steps, values, strict=True)
        ],
    }
    (run.path / "results.json").write_text(json.dumps(results))
    (run.path / "config.yaml").write_text(f"steps: {run.options.get('steps', STEPS)}\n")
    (run.path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (run.path / "metrics.jsonl").write_text("".join(map(_line, _metrics(metric, level, own))))
    (run.path / "timing.jsonl").write_text("".join(map(_line, _timing(run, own))))


_ERRORS = {
    "diverged": "DivergenceError: Training diverged at step 7.\n",
    "error": 'RuntimeError: {folder}/x is full\n\nTraceback (most recent call last):\n  File "/home/me/runs.py", line 3\n',
}


def break_run(path: Path, how: str) -> None:
    """Break a finished run in one of the ways below, or replace the content of its results.json."""
    if how in _ERRORS:
        (path / "results.json").unlink(missing_ok=True)
        (path / "error.txt").write_text(_ERRORS[how].format(folder=path))
    elif how == "unfinished":
        (path / "results.json").unlink()
    elif how == "gone":
        shutil.rmtree(path)
    elif how == "split":
        content = json.loads((path / "results.json").read_text())
        (path / "results.json").write_text(json.dumps(content | {"split": "validation"}))
    elif how == "metric":
        content = json.loads((path / "results.json").read_text())
        (path / "results.json").write_text(json.dumps(content | {"metric": "accuracy"}))
    elif how == "unequal":
        content = json.loads((path / "results.json").read_text())
        content["steps"][1]["scores"].pop()
        (path / "results.json").write_text(json.dumps(content))
    else:
        (path / "results.json").write_text(how)


def _metrics(metric: str, level: float, own: np.random.Generator) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(100, STEPS + 1, 100):
        error = 0.12 + level + 3 * np.exp(-step / 700) + own.normal(0, 0.02)
        value = float(np.exp(-0.7 * error) if metric == "accuracy" else error)
        lines.append({"step": step, "split": "train", "loss": float(error), metric: value})
        if step % 500 == 0:
            lines.append({"step": step, "split": "validation", "inner_steps": 1, metric: value, "ci95": 0.05})
    return lines


def _timing(run: PlannedRun, own: np.random.Generator) -> list[dict[str, Any]]:
    slow = np.prod([_COST.get(each, 1.2) for each in run.arm.augmenters]) * (8 if "omniglot" in run.arm.task else 1)
    return [
        {
            "step": step,
            "steps_per_second": float(220 / slow * own.normal(1, 0.03)),
            "peak_bytes": int(400e6 * (1 + 0.1 * slow)),
            "time": "2026-01-01T00:00:00+00:00",
        }
        for step in range(100, STEPS + 1, 100)
    ]


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content) + "\n"
