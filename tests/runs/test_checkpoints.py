"""Checkpoints, resuming, disk failures, signals, locks and divergence."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from torch import Tensor

import metareg
from metareg import (
    DivergenceError,
    Episodes,
    Interrupted,
    MetaLearner,
    MetaregError,
    PluginConfig,
    Run,
    UsageError,
    hookimpl,
)
from metareg.engine.step_loop import Batches
from metareg.learner.config import Schedule
from metareg.learner.training import Progress, fit
from metareg.registry.task_source import TaskSource
from metareg.runs.checkpoints import CheckpointManager, Checkpoints
from metareg.util.files import LinesFile, lock_folder
from metareg.util.signals import StopRequest
from processes import environment

SMALL: dict[str, Any] = {
    "steps": 20, "meta_batch": 2, "log_every": 3, "eval_every": 7, "eval_tasks": 2, "test_tasks": 2,
    "test_inner_steps": [1], "strategy": "serial", "checkpoint_every": 4, "keep_checkpoints": 100,
}  # fmt: skip
RESULT = ("metrics.jsonl", "results.json", "checkpoints/final.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small uninterrupted run with plots; tests must not change it."""
    path = tmp_path_factory.mktemp("finished") / "run"
    with pictures.drawn():
        metareg.train("maml", "cml", "sinusoid", out=path, **SMALL)
    return path


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    """Restore the global generators."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the run as it was after 12 steps."""
    return _stopped(finished, tmp_path / "stopped")


def _stopped(finished: Path, path: Path, step: int = 12) -> Path:
    shutil.copytree(finished, path)
    (path / "results.json").unlink()
    (path / "checkpoints" / "final.safetensors").unlink()
    for file in (path / "checkpoints").glob("step-*"):
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()
    return path


def _results(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in RESULT}


def _checkpoint(path: Path, step: int) -> Path:
    return path / "checkpoints" / f"step-{step:09d}.safetensors"


# ------------------------------------------------------------------------------------------------------------ resuming


def test_metrics_hold_no_step_twice_and_nothing_of_the_clock(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    places = [(line["step"], line["split"], line.get("inner_steps")) for line in lines]
    assert len(places) == len(set(places))
    assert [line["step"] for line in lines if line["split"] == "train"] == [3, 6, 9, 12, 15, 18, 20]
    assert [line["step"] for line in lines if line["split"] == "validation"] == [7, 14, 20]
    assert not any("per_second" in key or "time" in key for line in lines for key in line)
    timing = [json.loads(line) for line in (finished / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timing] == [3, 6, 9, 12, 15, 18, 20]


@pytest.mark.parametrize("step", [0, 4, 7, 20])
def test_resumed_run_equals_one_left_alone(finished: Path, tmp_path: Path, step: int) -> None:
    path = _stopped(finished, tmp_path / "run", step)
    run = metareg.resume(path)
    assert _results(path) == _results(finished)
    assert run.evaluation is not None
    assert run.config.eval_every == 7


def test_auto_goes_on_with_the_strategy_of_the_checkpoint(tmp_path: Path) -> None:
    settings = SMALL | {"strategy": "auto", "steps": 4}
    metareg.train(out=tmp_path / "run", **settings)
    run = metareg.resume(tmp_path / "run", steps=5)
    assert run.learner.strategy is None or run.learner.strategy == "vectorized"
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["strategy"] == "vectorized"
    assert "resumed" not in environment


def test_raised_steps_give_the_run_that_was_planned_so(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    metareg.train("maml", "cml", "sinusoid", out=path, **SMALL | {"steps": 10})
    metareg.resume(path, steps=20)
    assert _results(path) == _results(finished)


def test_data_that_moved_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREG_CACHE", str(tmp_path / "cache"))
    for number in range(9):
        (tmp_path / "photos" / str(number)).mkdir(parents=True)
        for value in range(3):
            Image.new("L", (8, 8), 20 * number + 30 * value).save(tmp_path / "photos" / str(number) / f"{value}.png")
    options = {"ways": 2, "shots": 1, "query": 1, "eval_query": 1, "size": 16, "channels": 1, "width": 2}
    small = SMALL | {"steps": 4, "eval_every": 4} | options
    for name in ("alone", "run"):
        metareg.train(task="image-folder", data=str(tmp_path / "photos"), out=tmp_path / name, **small)
    shutil.copytree(tmp_path / "photos", tmp_path / "others")
    (tmp_path / "photos").rename(tmp_path / "moved")
    for path in (tmp_path / "others").rglob("*.png"):
        Image.new("L", (8, 8), 255).save(path)
    for data, problem in (("photos", "There is no folder"), ("others", "differs from the data that the run at")):
        with pytest.raises(UsageError, match=problem):
            metareg.resume(tmp_path / "run", steps=6, data=str(tmp_path / data))
    (tmp_path / "moved").rename(tmp_path / "photos")
    metareg.resume(tmp_path / "alone", steps=6)
    (tmp_path / "photos").rename(tmp_path / "moved")
    run = metareg.resume(tmp_path / "run", steps=6, data=str(tmp_path / "moved"))
    assert run.config.task.config["data"] == str(tmp_path / "moved")
    assert _results(tmp_path / "run") == _results(tmp_path / "alone")


@pytest.mark.parametrize("how", ["refused", "interrupted", "interrupted in the test"])
def test_a_finished_run_is_kept_until_its_successor_is_written(
    how: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run"
    metareg.train("maml", "cml", "sinusoid", out=path, **SMALL | {"steps": 10})
    before = _results(path)
    kept = ("results.json", "checkpoints/final.safetensors")
    if how == "refused":
        with pytest.raises(UsageError):
            metareg.resume(path, steps=20, device="cuda:99")
        assert _results(path) == before
    else:
        where = "step" if how == "interrupted" else "evaluate"
        calls = itertools.count()

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            if where == "step":
                real = MetaLearner.take_step
                patch.setattr(
                    MetaLearner, "take_step", lambda *given: interrupt() if next(calls) == 5 else real(*given)
                )
            else:
                patch.setattr(Run, "evaluate_one_by_one", interrupt)
            with pytest.raises(Interrupted):
                metareg.resume(path, steps=20)
        assert {name: (path / name).read_bytes() for name in kept} == {name: before[name] for name in kept}
        stopped = Run.load(path)
        assert stopped.evaluation is not None
        assert "is configured for 20 steps; its learner and results are from step 10" in caplog.text
        assert metareg.resume(path).config.steps == 20
    metareg.resume(path, steps=20)
    assert _results(path) == _results(finished)


def test_finished_run_is_returned_at_once(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    run = metareg.resume(path)
    assert run.evaluation is not None
    assert len(run.plots) == 3
    assert _results(path) == _results(finished)


def test_train_resume_begins_and_goes_on(finished: Path, stopped: Path, tmp_path: Path) -> None:
    for path in (stopped, tmp_path / "new"):
        metareg.train("maml", "cml", "sinusoid", out=path, resume=True, **SMALL)
        assert _results(path) == _results(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"algo": "anil"}, "its algo is {'name': 'maml'"),
        ({"augment": ["cml", "dropgrad"]}, "its augment is"),
        ({"eval_every": 3}, "its eval_every is 7, not 3"),
        ({"steps": 19}, "20 steps; you can raise this number"),
        ({"shots": 5}, "its task is"),
    ],
)
def test_another_meaning_is_refused(stopped: Path, change: dict[str, Any], message: str) -> None:
    settings = {"algo": "maml", "augment": "cml", "task": "sinusoid", **SMALL, **change}
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=message.replace("{", r"\{")):
        metareg.train(out=stopped, resume=True, **settings)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("inner_lr: 0.01", "inner_lr: 0.5", "its algo is .*0.01.*, not .*0.5.*config.yaml was edited"),
        ("seed: 0", "seed: 1", "its seed is 0, not 1.*config.yaml was edited"),
        ("steps: 20", "steps: 14", "20 steps; you can raise this number"),
    ],
)
def test_an_edited_configuration_is_refused(stopped: Path, old: str, new: str, message: str) -> None:
    config = stopped / "config.yaml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(f"{old}\n", f"{new}\n"))
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=message):
        metareg.resume(stopped)
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_was_killed_at_its_very_beginning_begins_anew(finished: Path, tmp_path: Path) -> None:
    """Only the file that is written first exists, or none does."""
    for number, names in enumerate([[".lock", ".owner.json", ".config.yaml.1.tmp"], ["config.yaml"]]):
        path = tmp_path / str(number)
        path.mkdir()
        for name in names:
            (path / name).write_bytes((finished / name).read_bytes() if (finished / name).exists() else b"{")
        metareg.train("maml", "cml", "sinusoid", out=path, resume=True, **SMALL)
        assert _results(path) == _results(finished)
        assert not list(path.rglob("*.tmp"))


def test_config_is_the_first_file_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("metareg.util.files.write_text", stop)
    monkeypatch.setattr("metareg.runs.training.write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        metareg.train(out=tmp_path / "run", **SMALL)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock", ".owner.json"}


def test_a_folder_that_is_taken_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"metareg resume"):
        metareg.train(out=finished)
    with pytest.raises(UsageError, match="no run"):
        metareg.resume(tmp_path)
    with pytest.raises(UsageError, match="--out"):
        metareg.train(resume=True)


def test_best_weights_are_tested_and_kept(tmp_path: Path) -> None:
    settings = SMALL | {"select": "best", "outer_lr": 0.5, "keep_checkpoints": 1, "eval_every": 2}
    run = metareg.train(out=tmp_path / "run", **settings)
    validation = [line for line in run.metrics() if line["split"] == "validation"]
    best = min(validation, key=lambda line: line["mse"])["step"]
    assert best < 20, "a step size of 0.5 was to do harm"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["weights"] == {"select": "best", "step": best}
    store = Checkpoints(tmp_path / "run" / "checkpoints", 1)
    assert store.list_steps() == [best, 20]
    kept = store.load(best)["learner"]["meta"]
    assert all(torch.equal(value, kept[name]) for name, value in run.learner.meta_parameters.items())
    before = _results(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    metareg.resume(tmp_path / "run")
    assert _results(tmp_path / "run") == before


class Momentum:
    """An outer optimiser with its own state."""

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - 0.01 * grads[name] for name, value in params.items()}

    @hookimpl
    def outer_update(
        self, meta: dict[str, Tensor], grads: dict[str, Tensor], state: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        zero = {name: torch.zeros_like(value) for name, value in meta.items()}
        momentum = {name: 0.9 * state.get("momentum", zero)[name] + value for name, value in grads.items()}
        count = state.get("count", 0) + 1
        new = {name: value - 0.01 / count**0.5 * momentum[name] for name, value in meta.items()}
        return new, {"momentum": momentum, "count": count, "pair": (count, [None, "text", 0.1, True])}


def test_state_of_a_plugins_outer_update_is_kept(tmp_path: Path) -> None:
    settings = SMALL | {"algo": Momentum, "steps": 8}
    metareg.train(out=tmp_path / "alone", **settings)
    metareg.train(out=tmp_path / "resumed", **settings | {"steps": 5})
    metareg.train(out=tmp_path / "resumed", resume=True, **settings)
    assert _results(tmp_path / "resumed") == _results(tmp_path / "alone")
    state = Checkpoints(tmp_path / "alone" / "checkpoints", 1).load(8)["learner"]["outer_state"]
    assert state["pair"] == (8, [None, "text", 0.1, True])


def test_state_that_no_checkpoint_can_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(MetaregError, match=r"the object at 'learner\.outer_state\.odd'"):
        Checkpoints(tmp_path, 1).save(1, {"learner": {"outer_state": {"odd": object()}}})


class Recorder:
    """A task source with two task sizes that records the requests."""

    stackable = False

    def __init__(self) -> None:
        self.asked: list[int] = []

    def episodes(self, split: str, indices: list[int]) -> list[Episodes]:
        tasks = []
        for index in indices:
            if split == "train":
                self.asked.append(index)
            x = torch.linspace(-1, 1, 4 + index % 2).unsqueeze(-1) + index
            tasks.append((x, x.sin(), x, x.sin()))
        return Episodes.group(tasks)


def test_tasks_of_unequal_sizes_go_on_where_they_were() -> None:
    def learner() -> MetaLearner:
        torch.manual_seed(0)
        return MetaLearner(torch.nn.Linear(1, 1), loss="mse", inner_lr=0.01)

    alone, first, second = learner(), learner(), learner()
    alone.fit(Recorder(), 6, meta_batch=3)
    first.fit(Recorder(), 2, meta_batch=3)
    second.load_state(first.state())
    source = Recorder()
    second.fit(source, 4, meta_batch=3)
    assert set(source.asked) == set(range(6, 18))
    for name, value in alone.meta_parameters.items():
        assert torch.equal(value, second.meta_parameters[name])


# ------------------------------------------------------------------------------------------------------------- damage


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_flip, lambda path: os.truncate(path, path.stat().st_size - 1)])
def test_damaged_checkpoint_is_named_skipped_and_kept(
    finished: Path, stopped: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    damage(_checkpoint(stopped, 12))
    metareg.resume(stopped)
    assert str(_checkpoint(stopped, 12)) in caplog.text
    assert _checkpoint(stopped, 12).with_suffix(".damaged").is_file()
    assert _results(stopped) == _results(finished)


def test_without_any_good_checkpoint_it_begins_anew(finished: Path, stopped: Path) -> None:
    for path in (stopped / "checkpoints").glob("step-*"):
        _flip(path)
    metareg.resume(stopped)
    assert _results(stopped) == _results(finished)


def test_a_lost_best_checkpoint_is_named(finished: Path, stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    _checkpoint(stopped, 7).unlink()
    metareg.resume(stopped)
    assert "The best checkpoint so far, after step 7, is lost" in caplog.text
    assert _results(stopped) == _results(finished)


def test_changed_metrics_are_named_and_their_legible_lines_kept(
    stopped: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = stopped / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0][:-9], b"\n", *lines[1:3], lines[2]]))
    metareg.resume(stopped)
    assert "metrics.jsonl is not what this run wrote" in caplog.text
    lines_after = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in lines_after]
    expected = lines[1:3] + [line for line, step in zip(lines_after, steps, strict=True) if step > 12]
    assert path.read_bytes() == b"".join(expected)


def test_lost_metrics_are_named(stopped: Path, finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    (stopped / "metrics.jsonl").unlink()
    metareg.resume(stopped)
    assert "metrics.jsonl is missing" in caplog.text
    lines = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert (stopped / "metrics.jsonl").read_bytes() == b"".join(line for line in lines if json.loads(line)["step"] > 12)


def test_checkpoint_of_another_model_is_refused_with_the_difference(stopped: Path) -> None:
    (stopped / "environment.json").unlink()  # which holds the configuration
    (stopped / "config.yaml").write_text((stopped / "config.yaml").read_text().replace("- 40", "- 41"))
    with pytest.raises(UsageError, match=r"'body\.1\.weight'.*\(40, 1\)"):
        metareg.resume(stopped)
    assert _checkpoint(stopped, 12).is_file()


def test_renamed_checkpoint_is_not_taken_for_another(stopped: Path) -> None:
    _checkpoint(stopped, 12).rename(_checkpoint(stopped, 13))
    store = Checkpoints(stopped / "checkpoints", 3)
    state = store.load_newest()
    assert state is not None
    assert state["learner"]["steps_done"] == 8


# ---------------------------------------------------------------------------------------------------- faults of the disk


class Shim:
    """Makes the n-th file operation fail, like a full or broken disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail_at: int | None = None
        self.count = 0
        self.operations: list[str] = []
        write, fsync, rename = Path.write_bytes, os.fsync, Path.replace

        def half_written(path: Path, content: bytes) -> int:
            if self._fails("write"):
                write(path, bytes(content)[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(path, content)

        def failing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def operation(*arguments: Any) -> Any:
                if self._fails(name):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return function(*arguments)

            return operation

        monkeypatch.setattr(Path, "write_bytes", half_written)
        monkeypatch.setattr(os, "fsync", failing("fsync", fsync))
        monkeypatch.setattr(Path, "replace", failing("rename", rename))

    def _fails(self, name: str) -> bool:
        self.count += 1
        self.operations.append(name)
        return self.count == self.fail_at


class Training:
    """A small training with checkpoints, without the rest of a run."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.learner = MetaLearner(torch.nn.Linear(1, 1), loss="mse", inner_lr=0.01, strategy="serial")
        self.progress = Progress()
        self.lines = LinesFile(folder / "metrics.jsonl")
        self.store = Checkpoints(folder, 2)
        self.manager = CheckpointManager(
            self.store, self.learner, self.progress, [self.lines],
            every_steps=2, every_minutes=60, stop=StopRequest(),
        )  # fmt: skip

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        self.lines.append({"step": step, "loss": logs["loss"]})

    def run(self) -> tuple[dict[str, Tensor], bytes]:
        """Train to the end from the current step; return the weights and the lines."""
        if not self.manager.restore():
            self.manager.save()
        schedule = Schedule(steps=7, meta_batch=2, log_every=3)
        fit(self.learner, TaskSource.of(Recorder()), schedule, [self], progress=self.progress, manager=self.manager)
        return self.learner.meta_parameters, self.lines.path.read_bytes()


def _failure(function: Callable[[], Any]) -> str:
    """Return the message of the error that ends it; empty without an error."""
    try:
        function()
    except MetaregError as error:
        return str(error)
    return ""


@pytest.mark.strangers
def test_a_checkpoint_that_fails_at_any_step_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Callable[..., None]
) -> None:
    (tmp_path / "alone").mkdir()
    expected, expected_lines = Training(tmp_path / "alone").run()
    shim = Shim(monkeypatch)
    (tmp_path / "counted").mkdir()
    Training(tmp_path / "counted").run()
    assert set(shim.operations) == {"write", "fsync", "rename"}
    failed = 0
    for number in range(1, shim.count + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        shim.count, shim.fail_at = 0, number
        training = Training(folder)
        message = _failure(training.run)
        saved = training.manager.last_saved
        if message and saved is not None:
            assert f"The checkpoint after step {saved} is still valid." in message
            training.store.load(saved)
        failed += "cannot be written" in message
        assert not list(folder.glob(".*")), "an unfinished file was left"
        shim.fail_at = None
        weights, lines = Training(folder).run()
        assert all(torch.equal(value, weights[name]) for name, value in expected.items())
        assert lines == expected_lines
        tried("disks")
    assert failed >= 3 * 5, "each of five checkpoints was to fail in write, fsync and rename"


@pytest.mark.strangers
def test_a_full_disk_is_one_sentence(stopped: Path, finished: Path, tried: Callable[..., None]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(MetaregError, match=r"File too large.*step 12"):
            metareg.resume(stopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metareg.resume(stopped)
    assert _results(stopped) == _results(finished)
    tried("disks")


class Vanishing:
    """An observer that removes the run's folder, as another program might."""

    @hookimpl
    def on_run_start(self, run: metareg.Run) -> None:
        self.path = run.path

    @hookimpl
    def on_step(self) -> None:
        shutil.rmtree(self.path)


@pytest.mark.strangers
def test_a_folder_that_vanishes_is_one_sentence_and_stays_away(tmp_path: Path, tried: Callable[..., None]) -> None:
    with pytest.raises(MetaregError, match="cannot be written"):
        metareg.train(out=tmp_path / "run", observers=[Vanishing()], **SMALL)
    assert not (tmp_path / "run").exists()
    tried("disks")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MetaregError, match="cannot be created"):
        metareg.train(out=tmp_path / "file" / "run", **SMALL)


# ------------------------------------------------------------------------------------------------------ locks and signals


def test_only_one_process_works_on_a_run(stopped: Path, finished: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from metareg.util.files import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print(flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(stopped)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UsageError, match=rf"process {other.pid}"):
            metareg.resume(stopped)
        other.kill()
    metareg.resume(stopped)
    assert _results(stopped) == _results(finished)


def test_a_lock_is_for_one_thread_too(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(UsageError, match=f"process {os.getpid()}"), lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path):
        pass


class Signalling:
    """An observer that sends a signal to its own process."""

    def __init__(self, number: int, when: str, times: int = 1) -> None:
        self._number, self._when, self._times = number, when, times

    def _signal(self) -> None:
        for _ in range(self._times):
            signal.raise_signal(self._number)

    @hookimpl
    def on_step(self, step: int) -> None:
        if self._when == "step" and step == 6:
            self._signal()

    @hookimpl
    def on_evaluation(self, split: str) -> None:
        if self._when == split:
            self._signal()


@pytest.mark.parametrize(
    ("number", "when", "times", "goes_on_from"),
    [
        (signal.SIGINT, "step", 1, 6),
        (signal.SIGTERM, "step", 1, 6),
        (signal.SIGINT, "step", 2, 4),
        (signal.SIGTERM, "test", 1, 20),
    ],
)
def test_signals_stop_cleanly(
    finished: Path, tmp_path: Path, number: int, when: str, times: int, goes_on_from: int
) -> None:
    path = tmp_path / "run"
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=rf"`metareg resume {path}` continues from step {goes_on_from}") as caught:
        metareg.train("maml", "cml", "sinusoid", out=path, observers=[Signalling(number, when, times)], **SMALL)
    assert caught.value.exit_code == 130
    assert signal.getsignal(number) is handler
    metareg.resume(path)
    assert _results(path) == _results(finished)


def test_a_signal_in_the_last_validation_stops_before_the_test(tmp_path: Path) -> None:
    path = tmp_path / "run"
    settings = SMALL | {"steps": 5, "eval_every": 10}
    with pytest.raises(Interrupted, match="continues from step 5"):
        metareg.train(out=path, observers=[Signalling(signal.SIGTERM, "validation")], **settings)
    assert not (path / "results.json").exists()
    assert metareg.resume(path).evaluation is not None


def test_a_launcher_repeats_the_signal_to_a_single_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Interrupted, match="continues from step 6"):
        metareg.train(
            "maml", "cml", "sinusoid", out=tmp_path / "run", observers=[Signalling(signal.SIGTERM, "step", 2)], **SMALL
        )


def test_outside_the_main_thread_runs_as_well(tmp_path: Path) -> None:
    runs: list[metareg.Run] = []
    settings = SMALL | {"steps": 2}
    thread = threading.Thread(target=lambda: runs.append(metareg.train(out=tmp_path / "run", **settings)))
    thread.start()
    thread.join()
    assert runs[0].evaluation is not None


def test_the_command_says_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "a run"
    command = [sys.executable, "-m", "metareg", "train", "--out", str(path), "--strategy", "serial"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stderr is not None
        while not _checkpoint(path, 0).is_file():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        message = process.stderr.read()
    assert process.returncode == 130
    assert f"`metareg resume '{path}'` continues from step" in message
    assert "Traceback" not in message


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.3, 0.45, 0.6, 0.75, 0.9])
def test_interrupts_while_the_command_starts(tmp_path: Path, share: float) -> None:
    command = [sys.executable, "-m", "metareg", "train", "--strategy", "serial", "--out"]

    def start(path: Path) -> subprocess.Popen[str]:
        return subprocess.Popen([*command, str(path)], stderr=subprocess.PIPE, text=True, env=environment())

    began = time.monotonic()
    with start(tmp_path / "first") as process:
        while not _checkpoint(tmp_path / "first", 0).is_file():
            time.sleep(0.01)
        duration = time.monotonic() - began
        process.kill()
    with start(tmp_path / "second") as process:
        time.sleep(share * duration)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in message


# ---------------------------------------------------------------------------------------------------------- divergence


class PoisonConfig(PluginConfig):
    """The training tasks with invalid targets."""

    tasks: list[int]


class Poison:
    """A task source in which some training tasks have infinite targets."""

    Config = PoisonConfig
    loss = "mse"
    metric = None
    default_model = "mlp"
    stackable = True
    recommended: Mapping[str, Any] = {}
    spec = metareg.TaskSpec((1,), (1,))

    def __init__(self, config: PoisonConfig) -> None:
        self.poisoned = set(config.tasks)

    @hookimpl
    def episodes(self, split: str, indices: list[int]) -> Episodes:
        x = torch.linspace(-1, 1, 6).reshape(1, 6, 1) + torch.tensor(list(indices)).reshape(-1, 1, 1) / 100
        y = x.sin()
        if split == "train":
            for row, index in enumerate(indices):
                if index in self.poisoned:
                    y[row] = torch.inf
        return Episodes(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])


def _poisoned(path: Path, tasks: list[int], **options: Any) -> metareg.Run:
    return metareg.train("maml", task=(Poison, {"tasks": tasks}), out=path, **SMALL | options)


def test_divergence_stops_with_a_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(DivergenceError, match=r"(?i)step 10.*not finite.*step-000000009"):
        _poisoned(path, [19])
    store = Checkpoints(path / "checkpoints", 3)
    assert store.list_steps()[-1] == 9
    metareg.train("maml", task=(Poison, {"tasks": [19]}), out=path, resume=True, **SMALL, on_nonfinite="skip")
    _poisoned(tmp_path / "skipping", [19], on_nonfinite="skip")
    for name in ("metrics.jsonl", "results.json"):
        assert (path / name).read_bytes() == (tmp_path / "skipping" / name).read_bytes()


@pytest.mark.parametrize(
    ("policy", "strategy"),
    [("skip", "serial"), ("rollback", "serial"), pytest.param("rollback", "compiled", marks=pytest.mark.slow)],
)
def test_going_on_after_divergence_is_repeatable(
    tmp_path: Path, policy: str, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Steps 10 and 15 (tasks 18 and 29) fail.
    options = {"on_nonfinite": policy, "strategy": strategy}
    run = _poisoned(tmp_path / "run", [18, 29], **options)
    assert run.learner.steps_done == 20
    assert "1 of at most 10" in caplog.text
    assert "2 of at most 10" in caplog.text
    steps = [(line["step"], line["split"]) for line in run.metrics()]
    assert len(steps) == len(set(steps))
    path = _stopped(tmp_path / "run", tmp_path / "stopped", 8)
    metareg.train("maml", task=(Poison, {"tasks": [18, 29]}), out=path, resume=True, **SMALL | options)
    assert _results(path) == _results(tmp_path / "run")


@pytest.mark.slow
def test_a_killed_run_of_many_steps_a_program_ends_as_one_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, asked, take_steps = SMALL | {"strategy": "compiled"}, [], MetaLearner.take_steps

    def record(learner: MetaLearner, batches: Batches) -> Any:
        asked.append(len(batches))
        return take_steps(learner, batches)

    monkeypatch.setattr(MetaLearner, "take_steps", record)
    code = f"""
import signal, metareg
class Killer:
    @metareg.hookimpl
    def on_step(self, step):
        if step == 9:
            signal.raise_signal(signal.SIGKILL)
metareg.train("maml", task="sinusoid", out={str(tmp_path / "killed")!r}, observers=[Killer()], **{options!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment()).returncode == -signal.SIGKILL
    assert _checkpoint(tmp_path / "killed", 8).exists()
    metareg.train("maml", task="sinusoid", out=tmp_path / "alone", **options)
    assert max(asked) > 1
    metareg.resume(tmp_path / "killed")
    assert _results(tmp_path / "killed") == _results(tmp_path / "alone")


def test_going_on_after_divergence_has_a_bound(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"(?i)step 6.* more than max_nonfinite = 2 times"):
        _poisoned(tmp_path / "skip", list(range(6, 40)), on_nonfinite="skip", max_nonfinite=2)
    # Step 4 fails, then step 1 twice: each retry takes the tasks after those of the last failed step.
    with pytest.raises(DivergenceError, match=r"(?i)step 1 .* more than max_nonfinite = 2 times"):
        _poisoned(tmp_path / "rollback", list(range(6, 400)), on_nonfinite="rollback", max_nonfinite=2)


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.run()
    training.learner.meta_parameters["weight"].fill_(torch.nan)
    with pytest.raises(DivergenceError, match="after step 7 the meta-parameter 'weight' is not finite"):
        training.manager.save()


# ------------------------------------------------------------------------------------------------------------- machine


def test_another_environment_is_named(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = stopped / "environment.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"torch": "1.0"}))
    with caplog.at_level(logging.WARNING):
        metareg.resume(stopped)
    assert "torch was 1.0" in caplog.text
    assert json.loads(path.read_text())["resumed"] == [{"step": 12, "changed": {"torch": before["torch"]}}]


def test_global_generators_go_on(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.run()
    training.manager.save()
    drawn = _draw()
    training.manager.restore()
    assert _draw() == drawn


def _draw() -> float:
    """Return a number in [0, 3) from the global generators of Python, NumPy and torch."""
    return random.random() + float(np.random.rand()) + torch.rand(()).item()


class _Drawing:
    """An augmenter that draws from the global generators in every hook."""

    def __init__(self, _config: PluginConfig) -> None:
        self.offset = _draw()

    @hookimpl
    def augment_inner_gradient(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: grad * (self.offset + _draw()) / 3 for name, grad in grads.items()}


class _Listener:
    """An observer that also draws, and may stop the run."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at

    @hookimpl
    def on_step(self, step: int) -> None:
        _draw()
        if step == self.stop_at:
            raise KeyboardInterrupt


def _drawn(out: Path, seed: int = 0, stop_at: int | None = None, **options: Any) -> dict[str, bytes]:
    """Train with an augmenter and an observer that draw from the global generators; return checkpoints and results."""
    options = {**SMALL, "observers": [_Listener(stop_at)], "seed": seed, **options}
    metareg.train("maml", [_Drawing], "sinusoid", out=out, **options)
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in (*out.glob("checkpoints/*.safetensors"), out / "metrics.jsonl", out / "results.json")
    }


def test_the_seed_fixes_what_plugins_draw_from_the_global_generators(tmp_path: Path) -> None:
    first = _drawn(tmp_path / "first")
    assert len(first) > 5
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    expected = [_draw() for _ in range(2)]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert _draw() == expected[0]
    assert _drawn(tmp_path / "again") == first
    assert _draw() == expected[1]  # the caller's generators continue as if nothing had been drawn

    with pytest.raises(Interrupted):
        _drawn(tmp_path / "stopped", stop_at=15)
    _draw()
    assert _drawn(tmp_path / "stopped", resume=True) == first
    assert _drawn(tmp_path / "other", seed=1)["results.json"] != first["results.json"]
