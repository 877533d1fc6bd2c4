"""Runs that stop early, and runs with schedules: when they stop, what they report, and how they continue."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import metareg
from metareg import UsageError
from metareg.comparison.results import _read_steps

SMALL: dict[str, Any] = {
    "steps": 40, "meta_batch": 2, "log_every": 3, "eval_every": 2, "eval_tasks": 2, "test_tasks": 2,
    "test_inner_steps": [1], "strategy": "serial", "checkpoint_every": 4, "keep_checkpoints": 100,
}  # fmt: skip
RESULT = ("metrics.jsonl", "results.json", "checkpoints/final.safetensors")


def read(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in RESULT}


def cut(path: Path, to: Path, step: int) -> Path:
    """Return a copy of a run as if it had been killed after some step."""
    shutil.copytree(path, to)
    for name in RESULT[1:]:
        (to / name).unlink()
    for file in (to / "checkpoints").glob("step-*"):
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()
    return to


def find_stop(scores: list[float], patience: int) -> tuple[int, int]:
    """Return the validation at which to stop and the best one before it, by going through them one by one."""
    best, best_number, waited = math.inf, 0, 0
    for number, score in enumerate(scores, 1):
        if score < best:
            best, best_number, waited = score, number, 0
        else:
            waited += 1
        if waited == patience:
            return number, best_number
    raise AssertionError("the run was to stop")


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_run_stops_when_its_patience_is_exhausted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, select: str
) -> None:
    caplog.set_level(logging.INFO, "metareg")
    harmful = SMALL | {"outer_lr": 0.5, "select": select}
    whole = metareg.train(out=tmp_path / "whole", **harmful)
    scores = [line["mse"] for line in whole.metrics() if line["split"] == "validation"]
    stop, best = find_stop(scores, 3)
    caplog.clear()
    run = metareg.train(out=tmp_path / "run", patience=3, **harmful)
    stop, best = 2 * stop, 2 * best
    assert stop < 40
    (line,) = [record.getMessage() for record in caplog.records if "stops early" in record.getMessage()]
    assert f"after step {stop}:" in line
    assert f"after step {best}." in line
    validations = [line for line in whole.metrics() if line["split"] == "validation" and line["step"] <= stop]
    assert [line for line in run.metrics() if line["split"] == "validation"] == validations
    results = json.loads((run.path / "results.json").read_text())
    assert results["trained_steps"] == stop
    assert results["stopped_early"] == {"of_steps": 40, "patience": 3, "best_step": best}
    assert results["weights"] == {"select": select, "step": best if select == "best" else stop}
    assert max(line["step"] for line in run.metrics()) == stop

    before = read(run.path)
    for step in (0, best, stop):
        again = cut(run.path, tmp_path / f"again-{step}", step)
        metareg.resume(again)
        assert read(again) == before
    caplog.clear()
    written = (run.path / "results.json").stat().st_mtime_ns
    metareg.Run.load(run.path)
    metareg.resume(run.path)
    assert (run.path / "results.json").stat().st_mtime_ns == written
    assert [record.levelname for record in caplog.records if record.levelname != "INFO"] == []

    longer = metareg.resume(run.path, patience=1000)
    assert longer.metrics() == whole.metrics()
    assert "stopped_early" not in json.loads((run.path / "results.json").read_text())


def test_a_run_with_a_schedule_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    options = SMALL | {
        "steps": 12, "outer_optimizer": "sgd", "outer_momentum": 0.9, "outer_weight_decay": 0.1, "lr_schedule": "cosine",
        "lr_warmup_steps": 3, "outer_lr": 0.01,
    }  # fmt: skip
    run = metareg.train("maml", "cml", out=tmp_path / "run", **options)
    assert run.config.lr_schedule_steps == 12
    rates = {line["step"]: line["lr"] for line in run.metrics() if line["split"] == "train"}
    expected = {3: 0.0075} | {n: 0.005 * (1 + math.cos(math.pi * (n - 1 - 3) / 9)) for n in (6, 9, 12)}
    assert rates == pytest.approx(expected)
    before = read(run.path)
    again = cut(run.path, tmp_path / "again", 8)
    metareg.resume(again)
    assert read(again) == before
    with pytest.raises(UsageError, match="cosine schedule ends at step 12"):
        metareg.resume(run.path, steps=20)
    assert read(run.path) == before


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lr_warmup_steps = 40 must be less than lr_schedule_steps, 40"):
        metareg.train(out=tmp_path / "run", lr_schedule="cosine", lr_warmup_steps=40, **SMALL)
    assert not (tmp_path / "run").exists()


def test_a_lost_best_checkpoint_begins_the_count_anew(tmp_path: Path) -> None:
    run = metareg.train(out=tmp_path / "run", patience=3, outer_lr=0.5, **SMALL)
    results = json.loads((run.path / "results.json").read_text())
    stop, best = results["trained_steps"], results["stopped_early"]["best_step"]
    again = cut(run.path, tmp_path / "again", stop - 2)
    (again / "checkpoints" / f"step-{best:09d}.safetensors").unlink()
    metareg.resume(again)
    results = json.loads((again / "results.json").read_text())
    assert results["trained_steps"] > stop
    assert results["stopped_early"]["best_step"] > best


def test_fit_stops_by_its_own_validations_alone() -> None:
    learner = metareg.MetaLearner("mlp", spec=metareg.TaskSpec((1,), (1,)), loss="mse", outer_lr=0.5, strategy="serial")
    options: dict[str, Any] = {"meta_batch": 2, "eval_every": 1, "eval_tasks": 2, "patience": 2}
    for _ in range(2):
        before = learner.steps_done
        learner.fit("sinusoid", steps=40, **options)
        assert before + 3 <= learner.steps_done < before + 40
    with pytest.raises(UsageError, match="eval_every"):
        learner.fit("sinusoid", steps=40, patience=2)


def test_a_comparison_takes_a_run_that_stopped_early_for_complete(tmp_path: Path) -> None:
    for name, content in (
        ("stopped", {"trained_steps": 8, "stopped_early": {"of_steps": 40}}),
        ("whole", {"trained_steps": 8}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"metric": "mse", **content}, indent=2))
    steps = [_read_steps(SimpleNamespace(path=tmp_path / name)) for name in ("stopped", "whole")]
    assert steps == [40, 8]
