"""Reports: what is read from a comparison's folder, what each format says, and the page in a real browser."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from comparisons import DEMO, INNER_STEPS, write_comparison, write_run
from metareg import UsageError
from metareg.cli import app as cli
from metareg.comparison.config import ComparisonConfig
from metareg.comparison.plan import Plan
from metareg.comparison.results import format_command, read_results
from metareg.comparison.statistics import Estimate, Verdict, over_seeds
from metareg.reporting import FORMATS, report, tables
from metareg.reporting.analysis import analyze_comparison
from metareg.reporting.numbers import Scale, format_p_value
from metareg.runs.options import assemble

SMALL: dict[str, Any] = {
    "algo": ["maml", "anil"],
    "augment": ["none", "cml", "dropgrad+cml"],
    "tasks": ["sinusoid"],
    "seeds": [0, 1, 5],
    "options": {"steps": 100},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large comparison, complete; for tests that only read it."""
    folder = tmp_path_factory.mktemp("demo") / "comparison"
    write_comparison(folder)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Plan:
    """A comparison to break."""
    return write_comparison(tmp_path / "small", SMALL, tasks=7)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def metareg(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(arguments)
        return code, *capsys.readouterr()

    return run


# --------------------------------------------------------------------------------------------------------------- reading


def test_everything_is_read(demo: Path) -> None:
    found = read_results(demo)
    assert (found.finished, found.planned, found.gaps) == (120, 120, ())
    assert [task.metric for task in found.tasks] == ["mse", "accuracy"]
    sinusoid, omniglot = found.tasks
    assert (omniglot.higher_is_better, omniglot.bn_statistics) == (True, ("transductive",))
    arm = sinusoid.arms[1]
    assert arm.arm.name == "maml+cml"
    assert arm.seeds == (0, 1, 2, 3, 4)
    assert arm.scores.shape == (5, len(INNER_STEPS), 100)
    stored = json.loads((demo / "runs/sinusoid-10-shot/maml+cml/seed-3/results.json").read_text())
    assert arm.by_seed(5)[3].tolist() == stored["steps"][2]["scores"]
    lines = map(json.loads, (demo / "runs/sinusoid-10-shot/maml+cml/seed-3/metrics.jsonl").read_text().splitlines())
    validation = {line["step"]: line["mse"] for line in lines if line["split"] == "validation"}
    assert dict(zip(arm.curves[3].steps.tolist(), arm.curves[3].values.tolist(), strict=True)) == validation
    timing = (demo / "runs/sinusoid-10-shot/maml+cml/seed-3/timing.jsonl").read_text().splitlines()
    seconds = [1 / json.loads(line)["steps_per_second"] for line in timing]
    assert arm.seconds_per_step[3] == pytest.approx(np.median(seconds))
    assert arm.peak_bytes[3] == max(json.loads(line)["peak_bytes"] for line in timing)
    assert arm.chosen is not None
    assert (dict(arm.chosen.options), arm.chosen.trials) == ({"inner_lr": 0.03, "cml.gamma": 0.35}, 8)
    assert found.environment["torch"] == {"2.13.0": 120}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"steps": 50, "cml.gamma": 0.5, "inner_lr": 1e-05}, {}),
        ({"test_inner_steps": [0, 3], "eval_every": None, "first_order": True}, {"gradient-noise.sigma": 0.25}),
        ({"model": {"name": "mlp", "config": {"hidden": [8, 8]}}, "shots": 3}, {"cml.gamma": 0.125}),
        ({"model": "mlp", "device": "cpu"}, {"inner_lr": 0.3}),
    ],
)
def test_the_command_of_an_arm_trains_its_runs(
    options: dict[str, Any], chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {"algo": ["metasgd"], "augment": ["gradient-noise+cml"], "seeds": [7], "options": options}
    plan = Plan(tmp_path, ComparisonConfig.model_validate(config))
    (run,) = plan.list_runs({plan.arms[0]: chosen})
    given: list[Any] = []
    monkeypatch.setattr("metareg.runs.training.train", lambda **rest: given.append(rest))
    monkeypatch.setattr("metareg.cli.tables.print_results", lambda *_: None)

    assert cli.run(shlex.split(format_command(run).replace("SEED", "7"))[1:]) == 0

    fields = {"out", "config", "observers", "resume"}
    typed = assemble({}, {key: value for key, value in given[0].items() if key not in fields})
    assert typed.config == assemble(run.config, run.options).config


ERRORS = {
    "diverged": "DivergenceError: Training diverged at step 7.\n",
    "error": 'RuntimeError: {folder}/x is full\n\nTraceback (most recent call last):\n  File "/home/me/runs.py", line 3\n',
}


def break_run(path: Path, how: str) -> None:
    if how in ERRORS:
        (path / "results.json").unlink(missing_ok=True)
        (path / "error.txt").write_text(ERRORS[how].format(folder=path))
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


@pytest.mark.parametrize(
    ("how", "state", "reason"),
    [
        ("diverged", "diverged", "Training diverged at step 7."),
        ("error", "broken", "RuntimeError: runs/sinusoid/maml+cml/seed-1/x is full"),
        ("unfinished", "unfinished", "has begun"),
        ("gone", "not begun", "nothing of it"),
        ("split", "broken", "split 'validation'"),
        ("metric", "broken", "its metric is 'accuracy', where that of the runs before it is 'mse'"),
        ("unequal", "broken", "no lists of equal length"),
        ("{", "broken", "cannot be read as JSON"),
        ("[]", "broken", "not what metareg writes"),
        ('{"metric": "mse", "higher_is_better": false, "steps": []}', "broken", "not what metareg writes"),
        (
            '{"metric": "mse", "higher_is_better": false, "steps": [{"inner_steps": 1, "scores": ["x"]}]}',
            "broken",
            "not what",
        ),
    ],
)
def test_a_run_that_does_not_count_is_named(small: Plan, how: str, state: str, reason: str) -> None:
    path = small.folder / "runs/sinusoid/maml+cml/seed-1"
    break_run(path, how)

    found = read_results(small.folder)

    (gap,) = found.gaps
    assert (gap.run, gap.state, str(gap.path)) == (
        "maml+cml on sinusoid, seed 1",
        state,
        "runs/sinusoid/maml+cml/seed-1",
    )
    assert reason in gap.reason
    assert not re.search(f"{small.folder}|/home/me|Traceback", gap.reason)
    assert found.tasks[0].arms[1].seeds == (0, 5)
    for name in ("markdown", "html"):
        assert "maml+cml on sinusoid" in report(small.folder, name).replace("<wbr>", "").rpartition("Missing")[2]


def test_what_is_missing_for_one_reason_is_one_row(small: Plan) -> None:
    for seed, how in ((0, "gone"), (1, "diverged"), (5, "gone")):
        break_run(small.folder / f"runs/sinusoid/maml+cml/seed-{seed}", how)
    for name in ("metrics.jsonl", "timing.jsonl"):
        (small.folder / "runs/sinusoid/anil/seed-0" / name).write_text('"validation"\n')

    table = tables.build_gaps(analyze_comparison(small.folder))

    assert table is not None
    assert [list(row) for row in table.rows[:2]] == [
        ["maml+cml on sinusoid", "0, 5", "not begun", "there is nothing of it yet", "runs/sinusoid/maml+cml"],
        ["maml+cml on sinusoid", "1", "diverged", "Training diverged at step 7.", "runs/sinusoid/maml+cml/seed-1"],
    ]
    assert len(table.rows) == 4
    assert "4 runs missing, diverged, broken or damaged" in report(small.folder, "html")


def test_other_test_tasks_or_steps_within_an_arm_do_not_count(small: Plan) -> None:
    runs = {run.path.relative_to(small.folder).as_posix(): run for run in small.list_runs()}
    write_run(runs["runs/sinusoid/maml/seed-1"], tasks=8)
    write_run(runs["runs/sinusoid/anil/seed-5"], tasks=7, steps=(0, 1))
    reasons = [gap.reason for gap in read_results(small.folder).gaps]
    assert reasons == [
        "it has 8 test tasks, those before it 7",
        "it was tested after 0, 1 inner steps, those before it after 0, 1, 5, 10",
    ]


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "environment.json"])
def test_a_damaged_file_costs_only_what_is_in_it(small: Plan, name: str) -> None:
    (small.folder / "runs/sinusoid/maml/seed-1" / name).write_text('{"split": "validation"}\nnull\n')
    found = read_results(small.folder)
    assert found.finished == 18
    (gap,) = found.gaps
    assert gap.state == "damaged"
    assert name in gap.reason
    for format in FORMATS:
        assert report(small.folder, format)


def test_settings_that_are_not_chosen_yet(tmp_path: Path) -> None:
    plan = write_comparison(tmp_path, SMALL | {"tune": {"trials": 4, "space": {"inner_lr": [0.1, 0.2]}}}, tasks=3)
    chosen = tmp_path / "tuning/sinusoid/maml+cml/chosen.json"
    chosen.unlink()
    trial = chosen.parent / "trial-2" / "seed-0"
    trial.mkdir(parents=True)
    (trial / "error.txt").write_text(f"MemoryError: {tmp_path}/x\n\nTraceback …")
    (tmp_path / "tuning/sinusoid/anil/chosen.json").write_text("{}")
    failed = tmp_path / "tuning/sinusoid/anil+cml/chosen.json"
    content = json.loads(failed.read_text())
    content["trials"][1]["score"] = None
    failed.write_text(json.dumps(content))
    for seed in plan.config.seeds:
        shutil.rmtree(tmp_path / f"runs/sinusoid/maml+cml/seed-{seed}")
    gaps = {gap.run: (gap.state, gap.reason) for gap in read_results(tmp_path).gaps}
    assert gaps["maml+cml on sinusoid, seed 5"] == ("not begun", "the arm's settings are not chosen yet")
    assert gaps["maml+cml on sinusoid, trial 2, seed 0"] == ("broken", "MemoryError: x")
    assert gaps["tuning of anil on sinusoid"][0] == "damaged"
    assert re.search(r"\| anil \| cml \| inner\\_lr = .*cml.gamma = 0.35 \| 8, 1 failed \|", report(tmp_path))


# ------------------------------------------------------------------------------------------------------------- statistics


def test_pairs_are_those_of_the_same_seed(small: Plan) -> None:
    break_run(small.folder / "runs/sinusoid/maml/seed-0", "error")
    found = analyze_comparison(small.folder)
    pair = found.pairs[0]
    none, cml = found.results.tasks[0].arms[:2]
    expected = [cml.by_seed(10)[seed].mean() - none.by_seed(10)[seed].mean() for seed in (1, 5)]
    assert (pair.algorithm, pair.augmenter, pair.planned, pair.difference.pairs) == ("maml", "cml", 3, 2)
    assert pair.difference.over_seeds.mean == pytest.approx(np.mean(expected))
    assert pair.difference.over_seeds.half == pytest.approx(over_seeds(expected).half)
    table = tables.build_differences(found, found.tasks[0])
    assert table is not None
    assert table.rows[0][5].endswith("of 2 (3 planned)")
    # What is not finished does not read as final.
    assert table.rows[0][8] == f"{pair.verdict.value} (2 of 3 seeds)"
    assert table.rows[2][8] == found.pairs[2].verdict.value
    page = report(small.folder, "html")
    assert page.count('<span class="by ends">2 of 3 seeds</span>') == 2
    assert "The comparison is not finished" in page
    assert "The scores are those after 1 inner step." in report(small.folder, inner_steps=1)
    break_run(small.folder / "runs/sinusoid/maml/seed-0", "diverged")
    assert "The comparison is not finished" not in report(small.folder, "html")


def test_a_task_that_was_not_tested_after_so_many_steps_keeps_its_own_number(tmp_path: Path) -> None:
    plan = write_comparison(tmp_path, SMALL | {"tasks": ["sinusoid", "harmonic"]}, tasks=7)
    for run in plan.list_runs():
        if run.arm.task == "harmonic":
            write_run(run, tasks=7, steps=(0, 5))

    found = analyze_comparison(tmp_path, 1)

    assert found.headline == {"sinusoid": 1, "harmonic": 5}
    assert {pair.difference.pairs for pair in found.pairs} == {3}
    assert (
        "The scores are those after 1 inner step on sinusoid; 5 inner steps on harmonic. There are no results after "
        "1 inner step on harmonic."
    ) in report(tmp_path, inner_steps=1)


def test_holm_covers_the_whole_table(demo: Path) -> None:
    found = analyze_comparison(demo)
    assert found.family_size == len(found.pairs) == 16
    smallest = min(found.pairs, key=lambda pair: pair.difference.p)
    assert smallest.corrected == pytest.approx(16 * smallest.difference.p)
    assert all(pair.corrected >= pair.difference.p for pair in found.pairs)
    assert {pair.verdict for pair in found.pairs} == {Verdict.BETTER, Verdict.WORSE, Verdict.NOT_SHOWN}


def test_the_number_of_inner_steps_can_be_chosen(demo: Path) -> None:
    first, last = (analyze_comparison(demo, number).pairs[0].difference.over_seeds.mean for number in (1, 10))
    assert first != last
    assert analyze_comparison(demo).pairs[0].difference.over_seeds.mean == last
    with pytest.raises(UsageError, match="No run was tested after 3 inner steps; there are results after 0, 1, 5, 10"):
        analyze_comparison(demo, 3)


@pytest.mark.parametrize("how", ["training", "score"])
@pytest.mark.parametrize("arm", ["anil", "anil+cml"])
def test_a_diverged_seed_is_shown_and_takes_the_verdict(small: Plan, arm: str, how: str) -> None:
    path = small.folder / f"runs/sinusoid/{arm}/seed-1"
    if how == "training":
        break_run(path, "diverged")
    else:
        content = json.loads((path / "results.json").read_text())
        content["steps"][-1]["scores"][2] = float("nan")
        (path / "results.json").write_text(json.dumps(content))

    found = analyze_comparison(small.folder)

    pair = next(each for each in found.pairs if (each.algorithm, each.augmenter) == ("anil", "cml"))
    assert (pair.verdict, pair.difference.pairs, len(pair.difference.by_seed)) == (Verdict.NOT_TESTED, 3, 2)
    assert re.fullmatch(r"\d of 2 \(1 diverged\)", tables.format_seeds_in_favour(pair))
    text = report(small.folder)
    assert re.search(rf"\| anil \| {'cml' if 'cml' in arm else 'none'} \| (2 of )?3 \|.*\(1 diverged\)", text)
    assert "the mean is that of the other seeds" in text
    assert "not tested (1 of 3 pairs diverged)" in text
    assert '<span class="by ends">1 of 3 pairs diverged</span>' in report(small.folder, "html")


def test_where_every_pair_diverged_nothing_is_drawn_or_corrected(small: Plan) -> None:
    for run in small.list_runs():
        if run.arm.augmenter == "cml" or (run.arm.algorithm == "anil" and run.arm.augmenters):
            break_run(run.path, "diverged")
        elif run.arm.augmenters and run.seed:
            break_run(run.path, "gone")

    page = report(small.folder, "html")

    text = "".join(Tags(page).text)
    assert "No pair could be tested (3 of 3 pairs diverged, one pair of seeds)" in text
    assert "no pair of this report could be tested" in text
    assert "9 diverged" in text
    assert page.count(">3 of 3 pairs diverged</text>") == 3
    for run in small.list_runs():
        if run.arm.augmenters and run.finished:
            break_run(run.path, "diverged")
    assert "Paired differences on" not in report(small.folder, "html")


def test_one_seed_has_no_interval_over_seeds(tmp_path: Path) -> None:
    write_comparison(tmp_path, SMALL | {"seeds": [3]}, tasks=50)
    found = analyze_comparison(tmp_path)
    over_tasks = found.pairs[0].scale.format_interval(found.pairs[0].difference.over_tasks)
    assert tables.build_overview(found, found.tasks[0]).rows[1][3] == over_tasks
    page = report(tmp_path, "html")
    assert f"({over_tasks} over test tasks, one seed)" in page
    assert "(–" not in page
    text = report(tmp_path)
    assert "nothing here says what another seed would give" in text
    assert "not tested (one pair of seeds)" in text
    assert "better" not in text.partition("## Results")[0].replace("better and worse", "")


def test_without_a_baseline_there_is_no_difference(tmp_path: Path) -> None:
    write_comparison(tmp_path, SMALL | {"augment": ["cml", "dropgrad"]}, tasks=5)
    text = report(tmp_path)
    assert "there is no difference to show" in text
    assert "Paired differences" not in text
    for format in FORMATS:
        assert report(tmp_path, format)


# ----------------------------------------------------------------------------------------------------------- text formats


@pytest.mark.parametrize(
    ("mean", "half", "accuracy", "mse"),
    [
        (0.8126, 0.0123, "81.3 ± 1.2", "0.813 ± 0.012"),
        (0.10712, 0.0133, "10.7 ± 1.3", "0.107 ± 0.013"),
        (2.8366, 0.2181, "283.7 ± 21.8", "2.84 ± 0.22"),
        (0.10712, 0.0004, "10.71 ± 0.04", "0.1071 ± 0.0004"),
        (1.2203, 0.0031, "122.0 ± 0.3", "1.220 ± 0.003"),
        (0.9996, 0.0, "100.0 ± 0.0", "1.00 ± 0.00"),
        (1e-5, 2e-5, "0.001 ± 0.002", "1.00e−05 ± 2.00e−05"),
        (5.0, 2e-6, "500.000 ± 0.000", "5.00 ± 2.00e−06"),
        (float("nan"), float("nan"), "–", "–"),
        (0.5, float("nan"), "50.0", "0.500"),
    ],
)
def test_numbers(mean: float, half: float, accuracy: str, mse: str) -> None:
    found = Estimate(mean, half, 5)
    assert Scale("accuracy", True).format_estimate(found) == accuracy
    assert Scale("mse", False).format_estimate(found) == mse


def test_signed_numbers() -> None:
    found = over_seeds([-0.0213, -0.0301, -0.0125])
    assert Scale("mse", False).format_difference(found) == "−0.0213"
    assert Scale("mse", False).format_interval(found) == "−0.0432 to +0.0006"
    assert Scale("accuracy", True).format_difference(over_seeds([0.012, 0.012])) == "+1.2"
    assert Scale("accuracy", True).format_difference(over_seeds([0.0, 0.0])) == "0.0"
    assert Scale("accuracy", True).format_difference(Estimate(0.012, 0.012 - 1e-18, 5)) == "+1.2"


@pytest.mark.parametrize(
    ("low", "high", "accuracy", "mse"),
    [
        (0.0003, 0.0123, "+0.03 to +1.23", "+0.0003 to +0.0123"),
        (-0.0123, -0.00001, "−1.230 to −0.001", "−0.01230 to −0.00001"),
        (0.00021, 0.00036, "+0.02 to +0.04", "+0.000210 to +0.000360"),
        (-0.3, 0.0006, "−30.0 to +0.1", "−0.300 to +0.001"),
    ],
)
def test_rounding_does_not_hide_the_sign(low: float, high: float, accuracy: str, mse: str) -> None:
    found = Estimate((low + high) / 2, (high - low) / 2, 5)
    assert Scale("accuracy", True).format_interval(found) == accuracy
    assert Scale("mse", False).format_interval(found) == mse


def test_p_values_are_cut_not_rounded() -> None:
    assert [format_p_value(p) for p in (0.04999, 0.05, 0.0009, float("nan"))] == ["0.049", "0.050", "< 0.001", "–"]


def test_csv_is_tidy(demo: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(report(demo, "csv"))))
    assert len(rows) == 120 * len(INNER_STEPS)
    row = next(
        row for row in rows
        if (row["task"], row["algorithm"], row["augmenter"], row["seed"], row["inner_steps"])
        == ("omniglot-small, 5-way 1-shot", "boil", "cml", "2", "5")
    )  # fmt: skip
    stored = json.loads((demo / "runs/omniglot-small-5-way-1-shot/boil+cml/seed-2/results.json").read_text())["steps"][
        2
    ]
    assert float(row["mean"]) == pytest.approx(stored["mean"])
    assert float(row["ci95"]) == pytest.approx(stored["ci95"])
    assert (row["metric"], row["higher_is_better"], row["tasks"]) == ("accuracy", "true", "100")


HOSTILE = 'a|b_c & <b>50%</b> "γ" $x$ #1 {~^\\} *y* `z` &lt; [é] ΩΒο≤≈ ą日'


def hostile(folder: Path) -> Path:
    """A comparison whose label is anything but a plain name."""
    config = SMALL | {"tasks": [{"task": "sinusoid", "label": HOSTILE}], "title": HOSTILE, "notes": "<b>no</b> **yes**"}
    write_comparison(folder, config, tasks=5)
    return folder


def test_markdown_shows_labels_as_they_are(tmp_path: Path) -> None:
    text = report(hostile(tmp_path), "markdown")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    cells = [token.content for token in tokens if token.type == "inline"]
    assert "<b>no</b> **yes**" in text
    labels = [token.children or [] for token in tokens if token.type == "inline" and "a\\|b" in token.content]
    assert len(labels) > 4
    for children in labels:
        assert {child.type for child in children} == {"text"}
        assert HOSTILE in children[0].content
    assert cells.count("cml") == cells.count("dropgrad+cml")


@pytest.mark.parametrize("format", ["markdown", "latex", "html"])
def test_every_table_says_what_its_numbers_mean(demo: Path, format: str) -> None:
    found = analyze_comparison(demo)
    text = report(demo, format)
    plain = html.unescape(text) if format == "html" else re.sub(r"\\ensuremath\{\\pm\}", "±", text)
    plain = plain.replace("\\<", "<").replace(r"\ensuremath{<}", "<").replace(r"\%", "%")
    for task in found.tasks:
        assert "±" in tables.build_results(found, task).note
        for table in (
            tables.build_results(found, task),
            tables.build_differences(found, task),
            tables.build_costs(task),
        ):
            assert table is not None
            assert table.note in plain
            assert table.key in plain


def test_latex_is_balanced_and_escaped(tmp_path: Path) -> None:
    text = report(hostile(tmp_path), "latex")
    bare = re.sub(r"\\[\\{}$&#%_]", "", text)
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"(?<!^)[%#$~^_]", re.sub(r"^%.*$|\{%$", "", bare, flags=re.MULTILINE))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}}") == 3
    for tabular in re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in tabular[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(tabular[0])}
    for sign in (r"\ensuremath{\gamma}", r"\ensuremath{\Omega}Bo\ensuremath{\le}\ensuremath{\approx} [U+0105][U+65E5]"):
        assert sign in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_latex_compiles(tmp_path: Path) -> None:
    preamble = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
    text = report(hostile(tmp_path), "latex")
    (tmp_path / "a.tex").write_text(f"{preamble}\n{text}\\end{{document}}\n", encoding="utf-8")
    done = subprocess.run(["pdflatex", "-halt-on-error", "a.tex"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert b"Missing character" not in done.stdout


def test_latex_differences_are_few_columns_and_explained_once(demo: Path) -> None:
    text = report(demo, "latex")
    assert text.count("algorithm & augmenter & difference & 95 \\% & in favour & p (Holm) & in words") == 2
    assert text.count("Pairs are those of the same seed") == 1
    assert text.count(r"\ref{tab:differences-1}") == text.count(r"\ref{tab:costs-1}") == 1
    assert r"\caption[{Results: sinusoid, 10-shot}]{Results: sinusoid, 10-shot." in text


# --------------------------------------------------------------------------------------------------------- the HTML page


class Tags(HTMLParser):
    """The elements of a page; fails where one is not closed."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "wbr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.found if name in attributes]


def test_the_page_needs_nothing_beside_itself(demo: Path) -> None:
    page = report(demo, "html")
    tags = Tags(page)
    assert not {tag for tag, _ in tags.found} & {"script", "img", "iframe", "object", "embed"}
    assert tags.attributes("src") == []
    links = {link for link in tags.attributes("href") if not link.startswith("#")}
    assert links == {"data:,", "https://arxiv.org/abs/2406.00001"}
    assert set(re.findall(r"url\((.)", page)) == {"#"}
    assert "@import" not in page
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    ids = tags.attributes("id")
    assert len(ids) == len(set(ids))
    regions = [attributes["aria-label"] for _, attributes in tags.found if attributes.get("role") == "region"]
    assert len(regions) == len(set(regions)) == 2 + 5 * 2
    assert {link[1:] for link in tags.attributes("href") if link.startswith("#")} <= set(ids)


def test_the_page_has_everything(demo: Path) -> None:
    page = report(demo, "html")
    tags = Tags(page)
    drawings = re.findall('<svg [^>]*role="img".*?</svg>', page, re.DOTALL)
    assert len(drawings) == 2 + 8 + 8 + 4  # differences, inner steps, learning curves, costs
    assert all(re.search("<title>.+</title><desc>.+</desc>", each) for each in drawings)
    assert len({re.search("<title>.+?</title>", each)[0] for each in drawings}) == len(drawings)
    # Every colour is one of the page's, which has others in the dark.
    assert not re.search("#[0-9a-f]{6}", "".join(drawings))
    assert sum(tag == "caption" for tag, _ in tags.found) == sum(tag == "table" for tag, _ in tags.found)
    assert all(attributes.get("scope") for tag, attributes in tags.found if tag == "th")
    text = "".join(tags.text)
    for words in (
        "sinusoid, 10-shot mse, lower is better",
        "omniglot-small, 5-way 1-shot accuracy, higher is better",
        "cml.gamma = 0.35",
        "metareg train --algo maml --augment cml --task sinusoid",
        "2.13.0",
        "vectorized",
    ):
        assert words in text
    assert '<section id="missing"' not in page


def drawn(page: str, section: str) -> list[str]:
    """The drawings of a section."""
    content = page.partition(f'<section id="{section}"')[2].partition("</section>")[0]
    return re.findall('<svg [^>]*role="img".*?</svg>', content, re.DOTALL)


def test_an_interval_that_goes_on_beyond_its_axis_has_an_arrow(small: Plan) -> None:
    path = small.folder / "runs/sinusoid/maml+cml/seed-0"
    content = json.loads((path / "results.json").read_text())
    for step in content["steps"]:
        step["scores"] = [30 * score for score in step["scores"]]
    (path / "results.json").write_text(json.dumps(content))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"mse": 30 * line["mse"]} for line in lines]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    page = report(small.folder, "html")

    maml, anil = drawn(page, "inner-steps")
    assert len(re.findall("<use ", maml)) > len(re.findall("<use ", anil))
    for section in ("inner-steps", "curves"):
        assert all("log scale</text>" in panel for panel in drawn(page, section))


def test_what_is_tested_or_validated_once_is_no_line(small: Plan) -> None:
    for run in small.list_runs():
        write_run(run, tasks=7, steps=(1,))
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
        (run.path / "metrics.jsonl").write_text(next(line for line in lines if "validation" in line))
    page = report(small.folder, "html")
    assert not re.search('id="(inner-steps|curves)"', page)


def test_many_augmenters_can_be_told_apart(tmp_path: Path) -> None:
    names = ["none", *("+".join(["gradient-noise"] * n + ["cml"] * m) for n in range(1, 7) for m in range(6))]
    write_comparison(tmp_path, SMALL | {"augment": names, "seeds": [0]}, tasks=3)
    page = report(tmp_path, "html")
    keys = re.findall('<li class="key"><svg.*?</svg>', page.partition('id="inner-steps"')[2].partition("</section>")[0])
    shapes = [re.sub(r"[mp][0-9a-f]{10}", "", key) for key in keys]
    assert len(shapes) == len(set(shapes)) == 37
    # They stand below each other, where there is room for them.
    assert '<tr><th scope="col">augmenter</th><th scope="col">maml</th><th scope="col">anil</th></tr>' in page
    rows = re.findall(r">(gradient-noi[^<]*)</text>", drawn(page, "differences")[0])
    assert len(set(rows[6:10])) == 4  # chains that begin alike


def test_every_figure_says_what_its_intervals_are_over(tmp_path: Path) -> None:
    write_comparison(tmp_path, SMALL | {"tasks": ["sinusoid", "harmonic"]}, tasks=7)
    for path in tmp_path.glob("runs/harmonic/*/seed-[15]"):
        shutil.rmtree(path)
    text = report(tmp_path, "html").partition('<section id="inner-steps"')[2]
    assert "<h3>sinusoid (± over seeds)</h3>" in text
    assert "<h3>harmonic (± over test tasks, one seed)</h3>" in text


def test_memory_is_the_least_and_times_are_paired(small: Plan) -> None:
    for number, (arm, speeds) in enumerate((("maml", (100, 50, 200)), ("maml+cml", (80, 50, 100)))):
        for seed, speed in zip((0, 1, 5), speeds, strict=True):
            line = {"steps_per_second": speed, "peak_bytes": (400 + 100 * number + 10 * seed) * 2**20}
            (small.folder / f"runs/sinusoid/{arm}/seed-{seed}/timing.jsonl").write_text(json.dumps(line))

    rows = tables.build_costs(analyze_comparison(small.folder).results.tasks[0]).rows

    assert list(rows[0][2:]) == ["11.7", "5.00 to 20.0", "1.00", "400"]
    assert list(rows[1][2:]) == ["14.2", "10.0 to 20.0", "1.00 to 2.00", "500"]
    assert "maml+cml 500" in drawn(report(small.folder, "html"), "costs")[1]


def test_labels_and_notes_cannot_add_markup(tmp_path: Path) -> None:
    page = report(hostile(tmp_path), "html")
    tags = Tags(page)
    assert not [tag for tag, attributes in tags.found if tag == "b" and not attributes.get("class")]
    assert "".join(tags.text).count(HOSTILE) > 5
    assert "<strong>yes</strong>" in page
    assert "&lt;b&gt;no&lt;/b&gt;" in page


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        ("![x](https://example.com/x.png)", "<a"),
        ("[x](javascript:alert(1))", "[x](javascript:alert(1))"),
        ("# no heading", "<p># no heading</p>"),
        ("`a<b`", "<code>a&lt;b</code>"),
    ],
)
def test_notes_are_little_markdown(tmp_path: Path, notes: str, expected: str) -> None:
    write_comparison(tmp_path, SMALL | {"notes": notes, "seeds": [0]}, tasks=3)
    page = report(tmp_path, "html")
    Tags(page)
    assert expected in page
    assert "<img" not in page


def test_large_comparisons_are_read_quickly(tmp_path: Path) -> None:
    config = DEMO | {"seeds": 14, "augment": ["none", "cml", "dropgrad"]}
    plan = write_comparison(tmp_path, config, tasks=600)
    assert len(plan.list_runs()) > 320
    start = time.process_time()
    assert report(tmp_path, "html")
    assert time.process_time() - start < 3


# ------------------------------------------------------------------------------------------------------- in a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page like those that users get, and one with long names, gaps and a single seed."""
    folder = tmp_path_factory.mktemp("pages")
    config = SMALL | {
        "tasks": [{"task": "sinusoid", "label": f"{HOSTILE} {'averylongword' * 9}"}],
        "augment": ["none", "cml", *("+".join(["dropgrad"] * n) for n in range(1, 9))],
        "seeds": [0],
        "title": "averylongword" * 12,
        "notes": f"`{'code' * 60}`",
    }
    plan = write_comparison(folder / "odd", config, tasks=3)
    break_run(plan.list_runs()[3].path, "error")
    for name, source in (("demo", demo), ("odd", folder / "odd")):
        (folder / f"{name}.html").write_text(report(source, "html"), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in ("demo", "odd")}


@contextmanager
def opened(browser: Any, path: Path, width: int = 1280, **options: Any) -> Iterator[Any]:
    """A page in the browser, which may neither complain nor ask for anything."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert [each for each in trouble if each not in (path.as_uri(), "data:,")] == []


WIDTHS = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"


@pytest.mark.parametrize("name", ["demo", "odd"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_its_window(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    with opened(browser, pages[name], width) as page:
        needed, there = page.evaluate(WIDTHS)
        assert needed <= there <= width
        sizes = page.evaluate(
            "[...document.querySelectorAll('svg[role=img]')].map(e => {const b = e.getBoundingClientRect();"
            "return [b.width, b.height, b.left, b.right]})"
        )
        assert len(sizes) == {"demo": 22, "odd": 7}[name]
        for drawn_width, height, left, right in sizes:
            assert drawn_width > 200
            assert height > 100
            assert left >= 0
            assert right <= width
        # Letters on a phone are as large as on a desk: drawings are not shrunk.
        heights = page.evaluate(
            "[...document.querySelectorAll('svg[role=img] text')].map(e => e.getBoundingClientRect().height)"
        )
        assert min(heights) > 12


def test_the_tables_hold_the_numbers(browser: Any, pages: dict[str, Path], demo: Path) -> None:
    found = analyze_comparison(demo)
    with opened(browser, pages["demo"]) as page:
        shown = page.evaluate(
            "Object.fromEntries(['differences', 'results', 'costs', 'settings', 'environment'].map(id => [id,"
            "[...document.querySelectorAll(`#${id} table`)].map(t => [...t.tBodies[0].rows].map(r =>"
            "[...r.cells].flatMap(c => c.tagName === 'TH' ? [...c.children].map(s => s.textContent) : [c.textContent])))]))"
        )
    expected = {
        "differences": [tables.build_differences(found, task) for task in found.tasks],
        "results": [tables.build_results(found, task) for task in found.tasks],
        "costs": [tables.build_costs(task) for task in found.tasks],
        "settings": [tables.build_settings(task) for task in found.tasks],
        "environment": [tables.build_environment(found)],
    }
    for name, wanted in expected.items():
        assert shown[name] == [[list(row) for row in table.rows] for table in wanted if table], name


def test_a_wide_table_scrolls_in_its_box(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["demo"], 360) as page:
        box = page.locator("#differences .scroll").first
        assert box.evaluate("e => e.scrollWidth > e.clientWidth")
        box.focus()
        page.keyboard.press("End")
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.querySelector('#differences .scroll').scrollLeft > 0")
        left = box.evaluate(
            "e => e.querySelector('tbody th').getBoundingClientRect().left - e.getBoundingClientRect().left"
        )
        assert left == pytest.approx(0, abs=1)


CONTRAST = """() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const page = getComputedStyle(document.body).backgroundColor;
  const texts = ['h1', '.facts', '.lead', '.note', 'a', 'td', 'svg text'].map(s => {
    const style = getComputedStyle(document.querySelector('main ' + s) || document.querySelector(s));
    return ratio(s === 'svg text' ? style.fill : style.color, page); });
  const chips = [...document.querySelectorAll('.chip')].map(getComputedStyle).map(s => ratio(s.color, s.backgroundColor));
  const marks = [...document.querySelectorAll('svg use')].map(e => ratio(getComputedStyle(e).fill, page));
  return {page, texts: Math.min(...texts), chips: Math.min(...chips), drawn: marks.filter(m => m > 1.01)};
}"""


@pytest.mark.parametrize("name", ["demo", "odd"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_legible(browser: Any, pages: dict[str, Path], scheme: str, name: str) -> None:
    with opened(browser, pages[name], color_scheme=scheme) as page:
        assert (page.locator(".chip.better").count() > 0) == (name == "demo")
        found = page.evaluate(CONTRAST)
    red = int(re.findall(r"\d+", found["page"])[0])
    assert (red > 240) == (scheme == "light")
    assert found["texts"] >= 4.5
    assert found["chips"] >= 4.5
    assert min(found["drawn"]) >= 3


@pytest.mark.parametrize("name", ["demo", "odd"])
def test_the_page_prints(browser: Any, pages: dict[str, Path], name: str) -> None:
    with opened(browser, pages[name], 718, color_scheme="dark") as page:  # A4 without its margins
        page.emulate_media(media="print")
        needed, there = page.evaluate(WIDTHS)
        assert needed <= there
        assert page.evaluate(
            "[...document.querySelectorAll('table')].every(e => e.scrollWidth <= e.parentNode.clientWidth)"
        )
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator("nav").is_visible()
        printed = page.pdf(format="A4", prefer_css_page_size=True)
    assert printed.startswith(b"%PDF")
    assert len(printed) > 20_000


# ------------------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_markdown(metareg: Command, small: Plan) -> None:
    code, output, errors = metareg("report", str(small.folder))
    assert (code, errors) == (0, "")
    assert output == report(small.folder, "markdown")


def test_a_report_needs_no_torch(small: Plan) -> None:
    code = "import sys; from metareg.cli.app import run; run(sys.argv[1:]); assert 'torch' not in sys.modules, 'torch'"
    command = [sys.executable, "-W", "error", "-c", code, "report", str(small.folder), "--format", "html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "begins"), [("a.tex", "% "), ("a.csv", "task,"), ("a.md", "# "), ("a", "# ")])
def test_the_file_names_the_format(metareg: Command, small: Plan, tmp_path: Path, name: str, begins: str) -> None:
    code, output, _ = metareg("report", str(small.folder), "--out", str(tmp_path / name))
    assert (code, output) == (0, f"{tmp_path / name}\n")
    assert (tmp_path / name).read_text().startswith(begins)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nosuch"], "There is no comparison at nosuch: it has no comparison.yaml."),
        (["SMALL", "--format", "markdwon"], "There is no format of reports named 'markdwon'; did you mean 'markdown'?"),
        (
            ["SMALL", "--inner-steps", "7"],
            "No run was tested after 7 inner steps; there are results after 0, 1, 5, 10.",
        ),
        (
            ["EMPTY"],
            "No run of the comparison at EMPTY has finished (1 broken, 1 unfinished, 16 not begun); a report needs",
        ),
        ([], "Missing argument"),
    ],
)
def test_bad_reports_end_with_one_sentence(
    metareg: Command, small: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    small.folder.rename("SMALL")
    empty = Plan(Path("EMPTY"), small.config)
    empty.write()
    for number, run in enumerate(empty.list_runs()[:2]):
        run.path.mkdir(parents=True)
        (run.path / ("config.yaml" if number else "error.txt")).write_text("x: 1")
    before = sorted(tmp_path.rglob("*"))
    code, output, errors = metareg("report", *arguments)
    assert (code, output) == (2, "")
    assert sentence in " ".join(errors.split())
    assert sorted(tmp_path.rglob("*")) == before
