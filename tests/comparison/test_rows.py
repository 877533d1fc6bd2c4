"""Rows of a comparison: each is a recipe with the settings that were chosen for it and the scores that it reached."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from comparisons import DEMO, InThisProcess, write_comparison
from metareg import UsageError, compare, report, reproduce
from metareg.cli import app as cli
from metareg.comparison.archive import write_archive
from metareg.comparison.config import slugify
from metareg.comparison.rows import find_row, list_rows
from metareg.util.intervals import compute_half_width

CONFIG: dict[str, Any] = {
    "algo": ["maml"],
    "augment": ["none", "cml"],
    "tasks": [{"task": "sinusoid", "label": "curves"}],
    "seeds": [3, 5],
    "options": {"steps": 3, "eval_tasks": 2, "test_tasks": 4, "test_inner_steps": [1, 2], "strategy": "serial"},
    "inner_steps": 1,
    "tune": {"trials": 2, "space": {"inner_lr": [0.01, 0.02]}},
}


def test_a_row_of_an_archive_is_reproduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metareg.comparison.runner.LocalPool", lambda *_: InThisProcess())
    compare(config=CONFIG, out=tmp_path / "one", jobs=1)
    archive = tmp_path / "one.tar.xz"
    write_archive(tmp_path / "one", archive)
    recipe = find_row(archive, "curves/maml+cml")
    chosen = json.loads((tmp_path / "one" / "tuning" / "curves" / "maml+cml" / "chosen.json").read_text())["options"]
    assert recipe.options.items() >= (CONFIG["options"] | chosen).items()
    assert (recipe.algo, recipe.augment, recipe.task, recipe.seeds) == ("maml", "cml", "sinusoid", [3, 5])
    found = [
        json.loads((tmp_path / "one" / "runs" / "curves" / "maml+cml" / f"seed-{seed}" / "results.json").read_text())
        for seed in (3, 5)
    ]
    means = [each["steps"][0]["mean"] for each in found]
    assert recipe.inner_steps == 1
    assert recipe.expected is not None
    assert recipe.expected.interval is not None
    assert recipe.expected.mean == pytest.approx(sum(means) / 2)
    assert recipe.expected.interval[1] - recipe.expected.mean == pytest.approx(compute_half_width(means))

    verdict = reproduce(archive, tmp_path / "again", row="curves/maml+cml", jobs=1)
    assert verdict.reached is True
    assert verdict.by_seed == dict(zip((3, 5), means, strict=True))
    assert cli.run(["reproduce", str(archive)]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("curves/maml ", "curves/maml+cml "))


def test_every_row_has_the_value_of_the_report(tmp_path: Path) -> None:
    write_comparison(tmp_path, DEMO, tasks=9)
    by_row: dict[str, list[float]] = {}
    for line in csv.DictReader(report(tmp_path, "csv").splitlines()):
        if line["inner_steps"] == "10":
            method = "+".join([line["algorithm"], *(name for name in [line["augmenter"]] if name != "none")])
            by_row.setdefault(f"{slugify(line['task'])}/{method}", []).append(float(line["mean"]))
    rows = list_rows(tmp_path)
    assert rows.keys() == by_row.keys()
    for name, recipe in rows.items():
        assert recipe.expected is not None
        assert recipe.expected.mean == pytest.approx(statistics.fmean(by_row[name]), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        ("demo", "sinusoid-10-shot/mml", "did you mean 'sinusoid-10-shot/maml'"),
        ("demo", None, "Name a row of the comparison with --row"),
        ("sinusoid-10-shot", "sinusoid-10-shot/maml", "--row names a row of a comparison's folder or archive"),
    ],
)
def test_what_is_no_row(
    name: str, row: str | None, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_comparison(tmp_path / "demo", DEMO, tasks=3)
    with pytest.raises(UsageError, match=sentence):
        reproduce(name, row=row)
