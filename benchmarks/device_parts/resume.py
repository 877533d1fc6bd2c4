"""Exact resume on the device: a run that goes on from a checkpoint ends in the bits of one that never stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from device_parts.jobs import Job, Row
from metareg import resume, train
from metareg.runs.folder import FINAL, METRICS, RESULTS
from metareg.util.files import read_json

__all__ = ["Case", "compare_runs", "list_compilations", "list_jobs", "list_second_jobs"]

_IMAGES = ("glyphs", {"ways": 5, "shots": 1, "query": 5, "size": 28, "channels": 1})
TASKS: Mapping[str, Mapping[str, Any]] = {"sinusoid": {"task": "sinusoid"}, "conv4": {"task": _IMAGES}}

Case = Mapping[str, Any]
"""``setting`` (of `TASKS`), ``strategy``, ``algorithm``, and ``deterministic``: whether torch is told to be."""


def list_compilations(cases: Sequence[Case], device: str, folder: Path) -> list[Job]:
    """Jobs that compile what the compiled runs will need."""
    compiled = [case for case in cases if case["strategy"] == "compiled"]
    return [
        Job(case, _compile, {"case": case, "device": device, "out": _out(folder, case, "first")}, seconds=300)
        for case in compiled
    ]


def list_jobs(cases: Sequence[Case], steps: int, device: str, folder: Path, seconds: float) -> list[Job]:
    """Of each case: a run of twice so many steps, the same again, and one of half of them."""
    runs = {"through": 2 * steps, "again": 2 * steps, "resumed": steps}
    return [
        Job(case, _train, {"case": case, "steps": steps, "device": device, "out": _out(folder, case, name)}, seconds)
        for case in cases
        for name, steps in runs.items()
    ]


def list_second_jobs(cases: Sequence[Case], steps: int, folder: Path, seconds: float) -> list[Job]:
    """The second halves of the runs that stopped, in processes that know nothing of the first."""
    return [
        Job(case, _resume, {"case": case, "steps": 2 * steps, "out": _out(folder, case, "resumed")}, seconds)
        for case in cases
    ]


def compare_runs(cases: Sequence[Case], steps: int, folder: Path) -> Iterator[Row]:
    """What the runs ended in; to be called once all of them have ended."""
    for case in cases:
        through, again, resumed = (_out(folder, case, name) for name in ("through", "again", "resumed"))
        if unfinished := [path.name for path in (through, again, resumed) if not _has_ended(path, 2 * steps)]:
            yield {**case, "status": "failed", "reason": f"{', '.join(unfinished)} did not end"}
            continue
        row = {"repeated": _count_differences(through, again), "resumed": _count_differences(through, resumed)}
        row["metrics"] = (through / METRICS).read_bytes() == (resumed / METRICS).read_bytes()
        same = row["resumed"] == 0 and row["metrics"]
        yield {**case, **row, "status": "same" if same else "differs"}


def _train(case: Case, steps: int, device: str, out: Path) -> Iterator[Row]:
    _prepare(case)
    train(
        case["algorithm"], ["cml"], **TASKS[case["setting"]], out=out, device=device, strategy=case["strategy"], steps=steps,
        inner_steps=2, eval_every=10, eval_tasks=20, log_every=5, test_tasks=20, test_inner_steps=[1, 5], seed=3,
    )  # fmt: skip
    yield from ()


def _compile(case: Case, device: str, out: Path) -> Iterator[Row]:
    began = time.perf_counter()
    yield from _train(case, 1, device, out)
    yield {"status": "compiled", "seconds": round(time.perf_counter() - began, 1)}


def _resume(case: Case, steps: int, out: Path) -> Iterator[Row]:
    _prepare(case)
    resume(out, steps=steps)
    yield from ()


def _prepare(case: Case) -> None:
    if case["deterministic"]:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True


def _out(folder: Path, case: Case, name: str) -> Path:
    return folder / "-".join([*(str(value) for value in case.values()), name])


def _has_ended(run: Path, steps: int) -> bool:
    """Whether a run has been tested after so many steps."""
    return (run / RESULTS).is_file() and read_json(run / RESULTS)["weights"]["step"] == steps


def _count_differences(one: Path, other: Path) -> int:
    """How many entries of the final weights have other bits."""
    ours, theirs = (load_file(path / FINAL) for path in (one, other))
    assert ours.keys() == theirs.keys()
    return sum(int((ours[name] != theirs[name]).sum()) for name in ours)
