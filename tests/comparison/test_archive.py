"""The raw results of a comparison in one file."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from comparisons import SMALL, break_run, write_comparison
from metareg import UsageError, compare, report
from metareg.cli import app as cli
from metareg.comparison.archive import unpack_archive, write_archive
from metareg.comparison.config import ComparisonConfig
from metareg.comparison.plan import Plan
from metareg.comparison.runner import Comparison
from metareg.util.files import format_json

TUNED = SMALL | {"tune": {"space": {"inner_lr": [0.01, 0.03, 0.1]}}}


def make_float32(path: Path) -> None:
    """Draw scores like those of runs: float32 losses."""
    content = json.loads(path.read_text())
    for step in content["steps"]:
        step["scores"] = np.float32(step["scores"]).astype(float).tolist()
    path.write_text(format_json(content))


def test_a_report_of_the_file_is_the_report_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_comparison(tmp_path / "page", TUNED, tasks=7)
    runs = [run.path for run in plan.list_runs()]
    for path in runs[:9]:
        make_float32(path / "results.json")
    for path, how in zip(runs[9:], ["diverged", "error", "unfinished", "gone", "{}", "unequal"], strict=False):
        break_run(path, how)
    trial = plan.make_trial(plan.arms[0], 0, 0, {}).path
    trial.mkdir(parents=True)
    (trial / "error.txt").write_text("RuntimeError: no space")
    (runs[0] / "checkpoints").mkdir()
    (runs[0] / "checkpoints" / "final.safetensors").write_bytes(b"weights")
    file = tmp_path / "published" / "page.tar.xz"
    file.parent.mkdir()

    code = cli.run(["report", str(plan.folder), "--archive", str(file), "--out", str(tmp_path / "page.md")])

    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == report(plan.folder) == report(file)
    assert report(file, "html") == report(plan.folder, "html")
    before = file.read_bytes()
    write_archive(plan.folder, file)
    assert file.read_bytes() == before, "equal results give equal bytes"
    with tarfile.open(file) as archive:
        names = archive.getnames()
        texts = b"".join(content.read() for name in names if (content := archive.extractfile(name)))
    assert not [name for name in names if "checkpoints" in name or "plots" in name]
    assert str(tmp_path).encode() not in texts
    assert b"Traceback" not in texts
    with unpack_archive(file) as folder:
        place = (runs[0] / "results.json").relative_to(plan.folder)
        assert (folder / place).read_bytes() == (runs[0] / "results.json").read_bytes()
    rows = list(csv.DictReader(io.StringIO(report(file, "scores"))))
    stored = json.loads((runs[0] / "results.json").read_text())["steps"]
    scores = [
        float(row["score"])
        for row in rows
        if (row["algorithm"], row["augmenter"], row["seed"]) == ("maml", "none", "0")
    ]
    assert scores == [score for step in stored for score in step["scores"]]
    assert [row["test_task"] for row in rows[:7]] == [str(number) for number in range(7)]


@pytest.mark.parametrize("what", ["text", "empty", "other", "above", "cut"])
def test_another_file_is_refused(what: str, tmp_path: Path) -> None:
    file = tmp_path / "results.tar.xz"
    if what == "cut":
        write_archive(write_comparison(tmp_path / "c", SMALL, tasks=7).folder, file)
        file.write_bytes(file.read_bytes()[:-200])
    else:
        file.write_text("not an archive")
    if what not in ("text", "cut"):
        name = {"empty": "comparison.yaml", "other": "notes.txt", "above": "runs/../../seed-0/config.yaml"}[what]
        with tarfile.open(file, "w:xz") as archive:
            if what != "empty":
                archive.addfile(tarfile.TarInfo(name))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UsageError, match=r"results\.tar\.xz (cannot be read as results|is not an archive) of a comparison"
    ):
        report(file)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_comparison_goes_on_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_comparison(tmp_path / "one", SMALL, tasks=7)
    runs = [run.path.relative_to(plan.folder) for run in plan.list_runs()]
    break_run(plan.folder / runs[0], "unfinished")
    break_run(plan.folder / runs[1], "diverged")
    file = tmp_path / "one.tar.xz"
    write_archive(plan.folder, file)
    monkeypatch.setattr(Comparison, "carry_out", lambda *_: None)

    first = compare(archive=file, out=tmp_path / "two", seeds=[0, 1, 5, 7])

    assert first.plan.config.seeds == [0, 1, 5, 7]
    assert (first.finished, first.left) == (16, 2 + 6)
    # A machine that has begun its own runs keeps them; only missing ones are added.
    own = tmp_path / "two" / runs[0]
    own.mkdir(parents=True)
    (own / "config.yaml").write_text("steps: 100\n")
    write_comparison(plan.folder, SMALL, tasks=7)
    write_archive(plan.folder, file)
    assert compare(archive=file, out=tmp_path / "two").finished == 17
    assert not (own / "results.json").exists()
    with pytest.raises(
        UsageError, match=r"comparison of one cannot be continued with these changes: steps of maml on sinusoid, seed"
    ):
        compare(archive=file, out=tmp_path / "three", steps=7)
    with pytest.raises(UsageError, match="which the new configuration omits"):
        compare("maml", archive=file, out=tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_chosen_settings_come_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(tmp_path / "one", ComparisonConfig.model_validate(TUNED | {"augment": ["none"]}))
    plan.write()
    chosen, tuned = (
        {"options": {"inner_lr": value}, "space": {"inner_lr": "0.01, 0.03, 0.1"}} for value in (0.1, 0.03)
    )
    folder = plan.get_tuning_folder(plan.arms[0])
    failed = {"options": {}, "score": None, "seeds": [0], "error": f"It diverged; see {folder / 'trial-2'}."}
    trials = [*[{"options": {}, "score": 0.1, "seeds": [0], "error": None}] * 2, failed]
    folder.mkdir(parents=True)
    (folder / "chosen.json").write_text(json.dumps(chosen | {"trials": trials}))
    for number, settled in ((0, True), (1, False)):  # trials of an arm whose settings are not chosen yet
        options = {"inner_lr": (0.01, 0.03)[number]}
        run = plan.make_trial(plan.arms[1], number, 0, options)
        run.path.mkdir(parents=True)
        (run.path.parent / "trial.json").write_text(json.dumps({"options": options, "error": None}))
        (run.path / "config.yaml").write_text("steps: 100\n")
        if settled:
            (run.path / "error.txt").write_text("DivergenceError: Training diverged at step 7.\n")
    file = tmp_path / "one.tar.xz"
    write_archive(plan.folder, file)
    with tarfile.open(file) as archive:
        contents = [archive.extractfile(member) for member in archive.getmembers()]
        assert not any(str(tmp_path).encode() in content.read() for content in contents if content)
    monkeypatch.setattr(Comparison, "carry_out", lambda *_: None)

    comparison = compare(archive=file, out=tmp_path / "two")

    assert comparison.finished == 3 + 1, "the chosen arm's three trials, and the one that diverged"
    moved = Plan.read(tmp_path / "two")
    assert not moved.make_trial(moved.arms[1], 1, 0, {}).path.exists(), "its checkpoint is elsewhere"
    (moved.get_tuning_folder(moved.arms[0]) / "chosen.json").write_text(json.dumps(tuned | {"trials": trials}))
    with pytest.raises(UsageError, match="chose other settings"):
        compare(archive=file, out=tmp_path / "two")
