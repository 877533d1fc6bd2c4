"""Untrusted folders of runs and comparisons: continuing them writes nothing elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pictures
import pytest
import yaml

import metareg
from metareg import MetaregError, Run, UsageError, hookimpl
from metareg.runs import environment
from metareg.runs.run import read_config, read_planned_steps
from metareg.util.files import LinesFile, replace_file

pytestmark = pytest.mark.strangers

_SMALL: dict[str, Any] = {
    "task": "sinusoid", "steps": 4, "log_every": 1, "eval_every": 2, "eval_tasks": 2, "test_tasks": 4,
    "test_inner_steps": [0, 1], "strategy": "serial", "checkpoint_every": 2,
}  # fmt: skip

Tried = Callable[..., None]


class _Stop:
    """Interrupts a run after its third step."""

    @hookimpl
    def on_step(self, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("strangers") / "run"
    with pytest.raises(metareg.Interrupted):
        metareg.train(out=path, observers=[_Stop()], **_SMALL)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return metareg.train(out=tmp_path_factory.mktemp("strangers") / "finished", **_SMALL).path


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """Return a copy of the stopped run."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------- nothing written elsewhere


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "timing.jsonl", "config.yaml", "environment.json", ".lock", ".owner.json", "plots",
             "checkpoints", "checkpoints/step-000000002.safetensors", "checkpoints/final.safetensors", "events.jsonl",
             "tensorboard", "results.json", "deeper/below"]
)  # fmt: skip
def test_links_out_of_a_run_are_refused(name: str, run: Path, tmp_path: Path, tried: Tried) -> None:
    own = tmp_path / "own"
    place = run / name
    if place.is_dir() or name in ("plots", "tensorboard"):
        shutil.copytree(place, own) if place.is_dir() else own.mkdir()
        (own / "mine.txt").write_text("mine")
        shutil.rmtree(place, ignore_errors=True)
    else:
        own.mkdir()
        place.parent.mkdir(exist_ok=True)
        shutil.copy(place, own / "file") if place.is_file() else (own / "file").write_text("mine")
        place.unlink(missing_ok=True)
        own = own / "file"
    place.symlink_to(own)
    before = _snapshot(tmp_path / "own")
    with pytest.raises(UsageError, match=f"{Path(name).name} is a link out"):
        metareg.resume(run, steps=6)
    assert _snapshot(tmp_path / "own") == before
    tried("containers")


def test_a_link_within_the_run_is_nobodys_harm(run: Path) -> None:
    (run / "wandb").mkdir()
    (run / "wandb/latest").symlink_to("../plots")
    assert metareg.resume(run).evaluation is not None


def test_another_name_of_the_same_file_keeps_what_it_has(run: Path, tmp_path: Path, tried: Tried) -> None:
    for name in ("metrics.jsonl", "timing.jsonl"):
        os.link(run / name, tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "timing.jsonl")}
    metareg.resume(run)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    tried("containers", 2)


def test_a_file_is_not_written_aside_through_a_link(tmp_path: Path, tried: Tried) -> None:
    own = tmp_path / "own"
    own.write_text("mine")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(own)
    with replace_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert (own.read_text(), (tmp_path / "file").read_text()) == ("mine", "new")
    tried("containers")


def _name_observer(run: Path, name: str, config: dict[str, Any]) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["observers"] = [{"name": name, "config": config}]
    (run / "config.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("through", "inner"),
    [
        ("resume", False),
        pytest.param("resume", True, marks=pytest.mark.slow),
        pytest.param("train", False, marks=pytest.mark.slow),
    ],
)
def test_observers_of_a_file_write_nowhere_else(
    through: str, inner: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    monkeypatch.chdir(tmp_path)
    own = run / "events" if inner else tmp_path / "own.txt"
    own.write_text("mine\n")
    _name_observer(run, "jsonl", {"file": str(own)})

    def go_on(**options: Any) -> Run:
        return (
            metareg.resume(run, **options)
            if through == "resume"
            else metareg.train(config=run / "config.yaml", **options)
        )

    if not (inner and through == "resume"):
        with pytest.raises(UsageError, match=r"outside the run's folder.*--observe jsonl --set jsonl\.file="):
            go_on()
        assert own.read_text() == "mine\n"
        go_on(**{"jsonl.file": str(own)})
    else:
        go_on()
    assert own.read_text().count("\n") > 1
    tried("configurations")


@pytest.mark.parametrize("folder", ["../../other", "/tmp/other"])
def test_tensorboard_stays_inside(folder: str, run: Path, tried: Tried) -> None:
    _name_observer(run, "tensorboard", {"folder": folder})
    with pytest.raises(UsageError, match="a folder inside the run's"):
        metareg.resume(run)
    tried("configurations")


def test_the_jsonl_of_a_run_follows_no_link(run: Path, tried: Tried) -> None:
    (run / "events.jsonl").symlink_to("config.yaml")
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(MetaregError, match=r"events\.jsonl"):
        metareg.resume(run, observers=["jsonl"])
    assert yaml.safe_load((run / "config.yaml").read_bytes()).keys() == yaml.safe_load(before).keys()
    tried("containers")


def test_links_out_of_a_comparison_are_refused(tmp_path: Path, tried: Tried) -> None:
    folder, own = tmp_path / "comparison", tmp_path / "own.txt"
    folder.mkdir()
    own.write_text("mine")
    (folder / "comparison.yaml").write_text("algo: maml\ntasks: sinusoid\nseeds: 1\noptions: {steps: 1}\n")
    (folder / "workers.log").symlink_to(own)
    with pytest.raises(UsageError, match=r"workers\.log is a link"):
        metareg.compare(out=folder)
    assert own.read_text() == "mine"
    tried("containers")


# ---------------------------------------------------------------------------------------------------------- a bad file


_DEEP = "[" * 100_000
_BAD = ["", "[]", "{}", "null", '"text"', "7", _DEEP, "9" * 4000, '{"steps": 1e999}', "\xff\x00", '{"a": ', "[[[]]]",
        '{"steps": [{"inner_steps": 1e999, "scores": [1]}], "metric": "mse", "higher_is_better": 0}',
        f'{{"steps": [{{"inner_steps": {"9" * 4000}, "scores": [1]}}], "metric": "mse", "higher_is_better": 0}}',
        '{"resumed": [7]}', '{"plugins": [[]]}', '{"libraries": [1]}', '{"first_task": {"a": 1}}',
        '{"steps": [{"inner_steps": 0, "scores": [[1, 2]]}], "metric": "mse", "higher_is_better": 0, "norm": 1}',
        '{"steps": [{"inner_steps": 0, "scores": ["9e9999"]}], "metric": [], "higher_is_better": 0}',
        '{"step": 1e999, "split": "validation", "mse": 1}', '{"step": 2, "split": "validation"}']  # fmt: skip
_FILES = ("results.json", "environment.json", "metrics.jsonl", "timing.jsonl", "config.yaml", "baselines.json")


def test_a_bad_file_of_a_run_is_one_sentence(finished: Path, tmp_path: Path, tried: Tried) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    run = Run.load(path)
    readers: dict[str, tuple[Callable[[], object], ...]] = {
        "results.json": (lambda: Run.load(path), lambda: read_planned_steps(path, run.config)),
        "environment.json": (
            lambda: environment.refuse_other_data(run), lambda: environment.write(run, "serial", "as asked for", 4),
        ),
        "metrics.jsonl": (run.metrics,),
        "baselines.json": (run.evaluate_baselines,),
        "config.yaml": (lambda: read_config(path),),
    }  # fmt: skip
    for name, functions in readers.items():
        good = (path / name).read_bytes() if (path / name).is_file() else None
        for content in _BAD:
            for read in functions:
                (path / name).write_text(content, encoding="latin-1")
                with suppress(UsageError):
                    read()
                tried("reports")
        (path / name).unlink() if good is None else (path / name).write_bytes(good)


def test_a_run_goes_on_beside_bad_lines(stopped: Path, tmp_path: Path, tried: Tried) -> None:
    """The readable lines of a changed metrics.jsonl are kept."""
    for number, content in enumerate(_BAD):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes((stopped / "metrics.jsonl").read_bytes() + content.encode("latin-1") + b"\n")
        LinesFile(path).cut({"bytes": 9, "sha256": "0"}, step=3)
        assert path.read_bytes().startswith((stopped / "metrics.jsonl").read_bytes())
        tried("reports")


def test_a_line_without_a_key_costs_a_picture(
    stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, tried: Tried
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([json.dumps({"step": 2}), *lines]) + "\n")
    with pictures.drawn():
        done = metareg.resume(run)
    assert (run / "results.json").is_file()
    assert "Could not draw plots (learning-curve): KeyError: 'split'" in caplog.text
    assert "inner-steps" in [path.stem for path in done.plots]
    tried("reports")


def test_a_bad_run_never_stops_the_report_of_others(tmp_path: Path, finished: Path, tried: Tried) -> None:
    folder = tmp_path / "comparison"
    folder.mkdir()
    options = {key: value for key, value in _SMALL.items() if key != "task"}
    content = {"algo": "maml", "tasks": "sinusoid", "seeds": 2, "options": options}
    (folder / "comparison.yaml").write_text(yaml.safe_dump(content))
    for seed in (0, 1):
        run = Path(shutil.copytree(finished, folder / f"runs/sinusoid/maml/seed-{seed}"))
    whole = metareg.report(folder)
    assert "seed-1" not in whole
    formats = ("markdown", "latex", "csv")
    for name in _FILES[:-1]:
        good = (run / name).read_bytes()
        for number, content in enumerate(_BAD):
            (run / name).write_text(content, encoding="latin-1")
            assert metareg.report(folder, format=formats[number % 3])
            tried("reports")
        (run / name).write_bytes(good)
    assert metareg.report(folder) == whole
