"""A short run of `benchmarks/device.py` on a CPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_device(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the command once, and return its files."""
    command = [sys.executable, str(BENCHMARKS / "device.py"), "--device", "cpu", "--out", str(folder), *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=500)
    assert (folder / "device.md").read_text("utf-8").startswith("# On cpu")
    content: dict[str, Any] = json.loads((folder / "device.json").read_text("utf-8"))
    return content


def test_jobs_that_break_hang_or_die_leave_rows_and_the_next_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from device_parts.jobs import Job, run_jobs

    jobs = [
        Job({"name": "hangs"}, functools.partial(time.sleep, 600), seconds=0.5),
        Job({"name": "breaks"}, functools.partial(json.loads, "no JSON")),
        Job({"name": "dies"}, functools.partial(os._exit, 3)),
        Job({"name": "works"}, functools.partial(iter, [{"status": "one"}, {"status": "two"}])),
    ]
    late = [
        Job({"name": "is cut off"}, functools.partial(time.sleep, 600)),
        Job({"name": "comes too late"}, functools.partial(iter, [{"status": "never"}])),
    ]
    rows = list(run_jobs(jobs, 1, time.monotonic() + 60, tmp_path / "log"))
    rows += run_jobs(late, 1, time.monotonic() + 0.5, tmp_path / "log")
    assert [(row["name"], row["status"]) for row in rows] == [
        ("hangs", "failed"), ("breaks", "failed"), ("dies", "failed"), ("works", "one"), ("works", "two"),
        ("is cut off", "failed"), ("comes too late", "not run"),
    ]  # fmt: skip
    assert "JSONDecodeError" in rows[1]["reason"]
    assert "3" in rows[2]["reason"]


def test_steps_are_compared_in_every_strategy(tmp_path: Path) -> None:
    content = run_device(tmp_path, "--quick", "--only", "parity", "--algorithms", "maml")
    cells = {(row["augmenter"], row["strategy"]): row for row in content["parity"]}
    assert cells.keys() == {
        (augment, name) for augment in ("none", "cml") for name in ("serial", "traced", "vectorized")
    }
    assert {row["status"] for row in cells.values()} == {"same"}
    assert all(row["compared"] > 0.3 for row in cells.values())


def test_steps_of_another_training_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from device_parts import parity

    from metareg.testing.steps import PRECISIONS

    monkeypatch.setattr(parity, "STEPS", 1)
    (same,) = parity.compare_steps("maml", "none", "sinusoid", ["serial"], PRECISIONS[:1], "cpu")
    trained = parity._train_on_cpu

    def train_longer(select: Any) -> parity.Reference:
        monkeypatch.setattr(parity, "STEPS", 2)
        try:
            return trained(select)
        finally:
            monkeypatch.setattr(parity, "STEPS", 1)

    monkeypatch.setattr(parity, "_train_on_cpu", train_longer)
    (other,) = parity.compare_steps("maml", "none", "sinusoid", ["serial"], PRECISIONS[:1], "cpu")
    assert (same["status"], other["status"]) == ("same", "differs")


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    content = run_device(tmp_path, "--quick", "--minutes", "8")
    assert "problems" not in content
    assert {row["status"] for row in content["resume"]} == {"same"}
    assert {row["status"] for row in content["strategies"]} == {"timed"}
    assert {row["seed"] for row in content["pairs"] if row["status"] == "done"} == {2000, 2001}
    assert all(row["test"]["cml"].keys() == {"1", "5", "10"} for row in content["pairs"] if row["status"] == "done")
