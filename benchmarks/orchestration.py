"""Measures the overhead of a comparison: ``python benchmarks/orchestration.py [--runs 24] [--seconds 10] [--jobs 2]``.

The ideal time is that of the runs themselves (from the moment a run's folder gets its configuration to its results), shared
by the processes. What a comparison takes beyond it: its own start and checks, the start of the processes, which import
torch, and all that lies between two runs.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from pathlib import Path

from harness import RESULTS, Row, machine, report

from metareg import compare
from metareg.comparison.config import ComparisonConfig
from metareg.comparison.plan import Plan, PlannedRun
from metareg.comparison.pool import carry_out
from metareg.runs.folder import CONFIG
from metareg.runs.folder import RESULTS as RUN_RESULTS

TARGET = 1.15


def measure_run(run: PlannedRun) -> float:
    """Return the time of a run by itself."""
    return (run.path / RUN_RESULTS).stat().st_mtime - (run.path / CONFIG).stat().st_mtime


def choose_steps(seconds: float, folder: Path) -> int:
    """Return the number of training steps of a run that takes a given time."""
    speeds = []
    for number in range(2):  # the first run imports and warms up
        config = build_config(1, 2000)
        began = time.perf_counter()
        (run,) = Plan(folder / str(number), config).list_runs()
        carry_out(run)
        speeds.append(2000 / (time.perf_counter() - began))
    return round(speeds[-1] * seconds)


def build_config(runs: int, steps: int) -> ComparisonConfig:
    """MAML on the sinusoid, vectorized: nothing to compile, nothing to download."""
    options = {"steps": steps, "strategy": "vectorized", "threads": 1, "test_tasks": 100, "test_inner_steps": [0, 1]}
    return ComparisonConfig(algo=["maml"], seeds=list(range(runs)), options=options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    about = machine(1)
    with tempfile.TemporaryDirectory() as folder:
        steps = choose_steps(arguments.seconds, Path(folder))
        began = time.perf_counter()
        config = build_config(arguments.runs, steps)
        comparison = compare(config=config, out=Path(folder, "comparison"), jobs=arguments.jobs)
        took = time.perf_counter() - began
        if comparison.broken:
            raise SystemExit(f"{len(comparison.broken)} runs broke: {next(iter(comparison.broken.values())).error}")
        each = [measure_run(run) for run in comparison.plan.list_runs()]
    ideal = sum(each) / arguments.jobs
    mean = sum(each) / len(each)
    rounds = math.ceil(arguments.runs / arguments.jobs)
    row = Row(
        f"a comparison of {arguments.runs} runs, {arguments.jobs} at a time",
        "the time of the runs, shared",
        took,
        ideal,
        "s",
        compare="ratio",
        target=TARGET,
        note=f"A run takes {mean:.1f} s by itself; {rounds} rounds of runs.",
    )
    report([row], about, {"seconds": each, "steps": steps}, RESULTS / "orchestration.json")


if __name__ == "__main__":
    main()
