"""One 95 % interval, Student's t, wherever its half-width is written, printed or drawn."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

import metareg
from comparisons import write_comparison
from metareg import Evaluation
from metareg.cli.tables import create_evaluation_table
from metareg.comparison.config import ComparisonConfig
from metareg.comparison.plan import Plan
from metareg.comparison.recipe import Recipe
from metareg.comparison.reproduction import judge
from metareg.comparison.statistics import over_seeds, over_tasks
from metareg.reporting import report
from metareg.runs.plots import plot_inner_steps
from metareg.runs.run import Run
from metareg.util.intervals import compute_half_width


def scipys(scores: Any) -> float:
    """Return the half-width of scipy's interval."""
    low, high = stats.t.interval(0.95, len(scores) - 1, loc=np.mean(scores), scale=stats.sem(scores))
    return float(high - low) / 2


def of_scores(*scores: float) -> Evaluation:
    return Evaluation("mse", False, (1,), torch.tensor(scores, dtype=torch.float64)[:, None], "none")


@pytest.mark.parametrize("count", [2, 3, 5, 100, 600])
def test_it_is_scipys(count: int) -> None:
    scores = np.random.default_rng(count).gamma(2, 0.5, count)
    expected = pytest.approx(scipys(scores), rel=1e-12)
    assert of_scores(*scores).ci95(1) == expected
    # one function: the same bits
    assert (
        of_scores(*scores).ci95(1) == compute_half_width(scores) == over_tasks([scores]).half == over_seeds(scores).half
    )


def test_what_is_none_and_what_is_zero() -> None:
    assert of_scores(0.1, 0.1, 0.1).ci95(1) == 0
    assert of_scores(1e300, -1e300).ci95(1) == pytest.approx(12.7062 * 1e300, rel=1e-5)
    assert all(math.isnan(of_scores(*scores).ci95(1)) for scores in ((0.5,), (0.5, math.inf), (0.5, 0.7, math.nan)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run tested on six tasks, where a factor of 1.96 would be far off."""
    return metareg.train(
        "maml", task="sinusoid", out=tmp_path_factory.mktemp("intervals") / "run", observers=["jsonl"], steps=2,
        eval_tasks=2, test_tasks=6, test_inner_steps=[1], strategy="serial",
    )  # fmt: skip


def test_files_of_a_run(run: Run) -> None:
    (tested,) = json.loads((run.path / "results.json").read_text())["steps"]
    half = pytest.approx(scipys(tested["scores"]), rel=1e-12)
    assert tested["ci95"] == half
    assert [line["ci95"] for line in run.metrics() if line["split"] == "test"] == [half]
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event.get("split") == "test"]
    assert event["steps"][0]["ci95"] == half


def test_what_a_person_sees_of_a_run(run: Run) -> None:
    assert run.evaluation is not None
    half = scipys(run.evaluation.scores[:, 0].double().numpy())
    assert f"± {half:.2g}" in str(run.evaluation)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(create_evaluation_table(run.evaluation))
    assert f"± {half:.4f}" in console.export_text()
    (axes,) = plot_inner_steps(run.evaluation, "a run").axes
    ((_, _, (bars,)),) = axes.containers
    (segment,) = bars.get_segments()
    assert (segment[1, 1] - segment[0, 1]) / 2 == pytest.approx(half, rel=1e-9)


def test_reports_and_verdicts_of_a_single_seed(tmp_path: Path) -> None:
    config = {"algo": ["maml"], "tasks": ["sinusoid"], "seeds": [0]}
    write_comparison(tmp_path, config, tasks=6)
    plan = Plan(tmp_path, ComparisonConfig(**config))
    (planned,) = plan.list_runs()
    tested = json.loads((planned.path / "results.json").read_text())["steps"]
    for row, each in zip(csv.DictReader(io.StringIO(report(tmp_path, "csv"))), tested, strict=True):
        assert float(row["ci95"]) == pytest.approx(scipys(each["scores"]), rel=1e-12)
    assert f"± {scipys(tested[-1]['scores']):.3f}" in report(tmp_path, "markdown")
    recipe = Recipe(
        summary="Short.", algo="maml", task="sinusoid", seeds=[0], metric="mse", inner_steps=tested[-1]["inner_steps"],
        expected=None, unknown="A test.", minutes=1, hardware="any",
    )  # fmt: skip
    low, high = judge(recipe, [planned]).interval
    assert (high - low) / 2 == pytest.approx(scipys(tested[-1]["scores"]), rel=1e-9)
