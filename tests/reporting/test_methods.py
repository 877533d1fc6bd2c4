"""Comparisons between algorithms and variants, the ranking, and the table for a paper."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from comparisons import SMALL, break_run, write_comparison
from metareg import UsageError, report
from metareg.comparison.archive import write_archive
from metareg.comparison.config import ComparisonConfig
from metareg.comparison.plan import Arm, Plan
from metareg.reporting import tables
from metareg.reporting.analysis import analyze_comparison
from metareg.reporting.paper import build_paper_table
from reports import Page, write_hostile_comparison

ALGORITHMS: dict[str, Any] = {
    "algo": ["maml", "anil", "boil", "metasgd"],
    "augment": ["none"],
    "tasks": ["sinusoid", {"task": "omniglot-small", "label": "omniglot-small, 5-way 1-shot"}],
    "seeds": "1000-1005",
    "options": {"steps": 100},
    "baseline": "all",
    "names": {"metasgd": "Meta-SGD", "bf16": "bfloat16"},
}
VARIANTS: dict[str, Any] = SMALL | {
    "augment": ["none", "cml"],
    "variants": {"fp32": {}, "bf16": {"precision": "bf16"}, "γ 1": {"cml.gamma": 1.0}},
}


def read_means(plan: Plan) -> dict[tuple[str, str], np.ndarray]:
    """Read each seed's mean after the last number of inner steps from the files, for each task and method."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in plan.list_runs():
        scores = json.loads((run.path / "results.json").read_text())["steps"][-1]["scores"]
        found.setdefault((run.arm.task, run.arm.name), []).append(sum(scores) / len(scores))
    return {key: np.array(values) for key, values in found.items()}


def correct_by_holm(p: list[float]) -> list[float]:
    """Apply Holm's step-down correction by its definition."""
    ordered = sorted(p)
    steps = [max(min(1.0, (len(p) - j) * ordered[j]) for j in range(i + 1)) for i in range(len(p))]
    return [steps[ordered.index(value)] for value in p]


def test_all_pairs_are_what_scipy_says(tmp_path: Path) -> None:
    plan = write_comparison(tmp_path, ALGORITHMS)
    means = read_means(plan)
    rows = list(csv.DictReader(io.StringIO(report(tmp_path, "pairs"))))
    assert len(rows) == 2 * 6
    shown = 0
    for label, higher in (("sinusoid", False), ("omniglot-small, 5-way 1-shot", True)):
        of_task = {(row["method"], row["minus"]): row for row in rows if row["task"] == label}
        assert {frozenset(pair) for pair in of_task} == {
            frozenset(p) for p in itertools.combinations(ALGORITHMS["algo"], 2)
        }
        tests = {pair: stats.ttest_rel(means[label, pair[0]], means[label, pair[1]]) for pair in of_task}
        corrected = correct_by_holm([test.pvalue for test in tests.values()])
        for (pair, test), p in zip(tests.items(), corrected, strict=True):
            row, interval = of_task[pair], test.confidence_interval(0.95)
            difference = means[label, pair[0]] - means[label, pair[1]]
            given = [float(row[key]) for key in ("difference", "low", "high", "p", "p_holm")]
            assert given == pytest.approx([difference.mean(), interval.low, interval.high, test.pvalue, p])
            assert int(row["in_favour"]) == np.sum((difference > 0) == higher)
            word = "no difference shown" if p >= 0.05 else "better" if (difference.mean() > 0) == higher else "worse"
            assert row["verdict"] == word
            shown += p < 0.05
    assert shown, "the test would hold for a report that shows nothing"
    found = analyze_comparison(tmp_path)
    for task in found.tasks:
        table = tables.build_ranking(found, task)
        assert table is not None
        order = sorted(
            ALGORITHMS["algo"], key=lambda name: means[task.label, name].mean(), reverse=task.higher_is_better
        )
        assert [row[1] for row in table.rows] == order
        for _, name, _, behind, better_than in table.rows:
            ends = [(r["method"], r["minus"]) if r["verdict"] == "better" else (r["minus"], r["method"]) for r in rows
                    if r["task"] == task.label and r["verdict"] in ("better", "worse")]  # fmt: skip
            assert sorted(filter(None, better_than.replace("–", "").split(", "))) == sorted(
                b for a, b in ends if a == name
            )
            assert int(behind) == sum(b == name for _, b in ends)


def test_pages_show_all_pairs_and_one_panel_for_all_algorithms(tmp_path: Path) -> None:
    write_comparison(tmp_path, ALGORITHMS, tasks=20)
    page, text = report(tmp_path, "html"), report(tmp_path)
    headings = [attributes.get("id") for tag, attributes in Page(page).found if tag == "section"]
    assert {"ranking", "inner-steps", "curves"} <= set(headings)
    assert page.count("<title>all algorithms on ") == 4, "inner steps and curves of two tasks"
    assert "<title>Methods on sinusoid, the best first, in mse</title>" in page
    assert "has the best mean" in text
    assert "over the 6 tested pairs of each task separately" in text
    assert "times maml" in text
    assert "against none" not in page.lower()


def test_algorithms_are_compared_with_one_of_them(tmp_path: Path) -> None:
    plan = write_comparison(tmp_path, ALGORITHMS | {"augment": ["none", "cml"], "baseline": ""}, tasks=20)
    means = read_means(plan)
    found = analyze_comparison(tmp_path, baseline="maml")
    assert [(pair.arm.name, pair.other.name) for pair in found.pairs[:4]] == [
        ("anil", "maml"), ("anil+cml", "maml+cml"), ("boil", "maml"), ("boil+cml", "maml+cml"),
    ]  # fmt: skip
    assert (len(found.pairs), found.family_size) == (12, 12)
    for pair in found.pairs:
        expected = stats.ttest_rel(means[pair.arm.task, pair.arm.name], means[pair.arm.task, pair.other.name])
        assert pair.difference.p == pytest.approx(expected.pvalue)
    assert [pair.corrected for pair in found.pairs] == pytest.approx(
        correct_by_holm([p.difference.p for p in found.pairs])
    )
    text = report(tmp_path, baseline="maml")
    assert "Algorithm minus maml after 10 steps" in text
    assert re.search(r"\*\*anil\*\*: Against maml: .* of 4 comparisons\.", text)
    assert "Augmenter minus none" in report(tmp_path), "that is what a comparison with augmenters is for"
    with pytest.raises(UsageError, match="baseline named 'mmal'; did you mean 'maml'"):
        report(tmp_path, baseline="mmal")


def test_every_arm_is_run_once_in_each_variant_that_changes_it(tmp_path: Path) -> None:
    plan = Plan(tmp_path, ComparisonConfig.model_validate(VARIANTS | {"algo": ["maml"]}))

    assert {arm.name: plan.options[arm] for arm in plan.arms} == {
        "maml (fp32)": {"steps": 100},
        "maml (bf16)": {"steps": 100, "precision": "bf16"},
        "maml+cml (fp32)": {"steps": 100},
        "maml+cml (bf16)": {"steps": 100, "precision": "bf16"},
        "maml+cml (γ 1)": {"steps": 100, "cml.gamma": 1.0},
    }
    assert len({arm.folder for arm in plan.arms}) == len(plan.arms)
    assert plan.find_arm(Arm("maml", "none", "sinusoid", "γ 1")) == Arm("maml", "none", "sinusoid", "fp32")
    gammas = Plan(tmp_path, ComparisonConfig.model_validate(SMALL | {
        "algo": ["maml"], "augment": ["none", "cml"], "variants": {"γ 0.1": {"cml.gamma": 0.1}, "γ 1": {"cml.gamma": 1.0}},
        "arms": [{"variant": "γ 1", "options": {"inner_lr": 0.5}}, {"options": {"inner_lr": 0.1}}],
    }))  # fmt: skip
    assert [arm.name for arm in gammas.arms] == ["maml", "maml+cml (γ 0.1)", "maml+cml (γ 1)"]
    assert [str(arm.folder) for arm in gammas.arms] == ["sinusoid/maml", "sinusoid/maml+cml@0-1", "sinusoid/maml+cml@1"]
    assert [gammas.options[arm]["inner_lr"] for arm in gammas.arms] == [0.1, 0.1, 0.5]


def test_arms_can_be_left_out(tmp_path: Path) -> None:
    left_out = [{"algo": "anil", "task": "sinusoid"}, {"algo": "maml", "augment": "cml"}]
    plan = write_comparison(tmp_path, ALGORITHMS | {"augment": ["none", "cml"], "leave_out": left_out}, tasks=7)
    names = [str(arm) for arm in plan.arms if arm.algorithm in ("maml", "anil")]
    label = ALGORITHMS["tasks"][1]["label"]
    assert names == ["maml on sinusoid", f"maml on {label}", f"anil on {label}", f"anil+cml on {label}"]
    found = analyze_comparison(tmp_path, baseline="maml")
    assert {pair.other.name for pair in found.pairs} == {"maml"}
    assert found.results.gaps == ()
    table = build_paper_table(found, "seeds")
    assert table.cells[table.methods.index("ANIL")][0].mean == "–"
    Page(report(tmp_path, "html"))
    with pytest.raises(UsageError, match="excludes every arm"):
        Plan(tmp_path, ComparisonConfig.model_validate({"algo": ["maml"], "leave_out": [{}]}))


def test_where_arms_adapt_is_the_mean_over_seeds(small: Plan) -> None:
    assert "Where adaptation happens" not in report(small.folder)
    numbers = np.random.default_rng(0).uniform(1, 2, (3, 8))
    for seed, (one, other, head, everything, body, alone, train, angle) in zip((0, 1, 5), numbers, strict=True):
        updates = [("a", "body", one), ("b", "body", other), ("c", "head", head)]
        content = {
            "inner_steps": 5,
            "layers": [{"layer": n, "part": p, "relative": [{"mean": 9.0}, {"mean": v}]} for n, p, v in updates],
            "adapting": {
                p: [{"mean": 9.0}, {"mean": v}] for p, v in (("all", everything), ("body", body), ("head", alone))
            },
            "train": [{"mean": 9.0}, {"mean": train}],
            "angles": [{"part": "head", "degrees": {"mean": 9.0}}, {"part": "body", "degrees": {"mean": angle}}],
        }
        (small.folder / f"runs/sinusoid/maml+cml/seed-{seed}/analysis.json").write_text(json.dumps(content))
    (small.folder / "runs/sinusoid/anil/seed-0/analysis.json").write_text('{"layers": [{}]}')
    found = analyze_comparison(small.folder)
    table = tables.build_adaptation(found, found.tasks[0])
    assert table is not None
    ((*names, body_moves, head_moves, everything, body, alone, train, angle),) = table.rows
    assert names == ["maml", "cml", "3"]
    expected = [numbers[:, :2].mean(1), *numbers[:, 2:].T]
    for cell, values in zip((body_moves, head_moves, everything, body, alone, train, angle), expected, strict=True):
        mean, half = map(float, cell.split(" ± "))
        assert mean == pytest.approx(values.mean(), abs=6e-3)
        assert half == pytest.approx(stats.sem(values) * stats.t.ppf(0.975, 2), abs=6e-3)
    (gap,) = found.results.gaps
    assert (gap.state, gap.what) == ("damaged", "anil on sinusoid")
    file = small.folder / "raw.tar.xz"
    write_archive(small.folder, file)
    assert report(file).split("\n", 1)[1] == report(small.folder).split("\n", 1)[1]


def test_variants_are_paired_by_seed(tmp_path: Path) -> None:
    plan = write_comparison(tmp_path, VARIANTS, tasks=20)
    means = read_means(plan)
    found = analyze_comparison(tmp_path, baseline="fp32")
    pairs = {(pair.arm.name, pair.other.name): pair for pair in found.pairs}
    assert list(pairs)[:3] == [
        ("maml (bf16)", "maml (fp32)"), ("maml+cml (bf16)", "maml+cml (fp32)"), ("maml+cml (γ 1)", "maml+cml (fp32)"),
    ]  # fmt: skip
    for (one, other), pair in pairs.items():
        differences = means["sinusoid", one] - means["sinusoid", other]
        assert pair.difference.by_seed == pytest.approx(differences)
        assert pair.difference.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    against_none = {(pair.arm.name, pair.other.name) for pair in analyze_comparison(tmp_path).pairs}
    assert {("maml+cml (bf16)", "maml (bf16)"), ("maml+cml (γ 1)", "maml (fp32)")} < against_none
    text = report(tmp_path)
    assert "| algorithm | augmenter, variant |" in text
    assert "| maml | cml, bf16 |" in text
    rows = list(csv.DictReader(io.StringIO(report(tmp_path, "csv"))))
    assert {row["variant"] for row in rows} == {"fp32", "bf16", "γ 1"}
    Page(report(tmp_path, "html"))
    alone = write_comparison(tmp_path / "alone", VARIANTS | {"augment": ["none"]}, tasks=20)
    assert analyze_comparison(alone.folder).baseline == "fp32"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"variants": {"a": {"inner_lr": 1}}, "tune": {"space": {"inner_lr": [1, 2]}}},
            "'inner_lr' is set by variants",
        ),
        ({"variants": {"γ 1": {}, "1": {}}}, "'γ 1' and '1' share the folder '1'"),
        ({"variants": {"a": {"seed": 1}}}, "'seed' is no option here"),
        ({"arms": [{"variant": "bf16", "options": {}}]}, "variant of this comparison named 'bf16'"),
        ({"baseline": "anil"}, "baseline named 'anil'"),
        ({"variants": {"maml": {}}, "baseline": "maml"}, r"ambiguous \(algorithm, variant\)"),
    ],
)
def test_bad_axes_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises((UsageError, ValueError), match=sentence):
        ComparisonConfig.model_validate({"algo": ["maml"]} | values)


@pytest.mark.parametrize("over", ["seeds", "tasks"])
def test_a_paper_has_methods_and_tasks_with_the_best_in_bold(over: str, tmp_path: Path) -> None:
    plan = write_comparison(tmp_path, ALGORITHMS | {"augment": ["none", "cml"]})
    break_run(plan.folder / "runs/sinusoid/boil+cml/seed-1000", "gone")
    for seed in range(1000, 1006):
        break_run(plan.folder / f"runs/sinusoid/metasgd+cml/seed-{seed}", "gone")
    table = build_paper_table(analyze_comparison(tmp_path), over)  # type: ignore[arg-type]
    assert table.methods == [
        "MAML",
        "MAML + CML",
        "ANIL",
        "ANIL + CML",
        "BOIL",
        "BOIL + CML",
        "Meta-SGD",
        "Meta-SGD + CML",
    ]
    assert table.metrics == ["mse ↓", "accuracy in % ↑"]
    names = [f"{name}{augment}" for name in ALGORITHMS["algo"] for augment in ("", "+cml")]
    for column, (label, factor, best) in enumerate((("sinusoid", 1, min), ("omniglot-small, 5-way 1-shot", 100, max))):
        folder = {"sinusoid": "sinusoid"}.get(label, "omniglot-small-5-way-1-shot")
        means = {}
        for row, name in enumerate(names):
            files = sorted((tmp_path / "runs" / folder / name).glob("seed-*/results.json"))
            cell = table.cells[row][column]
            if not files:
                assert cell.mean == "–"
                continue
            scores = np.array([json.loads(file.read_text())["steps"][-1]["scores"] for file in files])
            n, tasks = scores.shape
            means[name] = factor * scores.mean()
            if over == "seeds":
                half = stats.sem(scores.mean(axis=1)) * stats.t.ppf(0.975, n - 1)
            else:  # Welch and Satterthwaite
                variances = scores.var(axis=1, ddof=1) / tasks
                degrees = variances.sum() ** 2 / (variances**2 / (tasks - 1)).sum()
                half = np.sqrt(variances.sum()) / n * stats.t.ppf(0.975, degrees)
            assert float(cell.mean) == pytest.approx(means[name], abs=0.0501 if factor == 100 else 0.00051)
            assert float(cell.half) == pytest.approx(factor * half, abs=0.0501 if factor == 100 else 0.00051)
        winner = best(means, key=lambda name: means[name])
        bold = [name for row, name in enumerate(names) if table.cells[row][column].best]
        assert winner in bold
        assert all(
            table.cells[names.index(name)][column].mean == table.cells[names.index(winner)][column].mean
            for name in bold
        )
    assert "5 to 6 seeds" in table.caption
    text = report(tmp_path, layout="paper", over=over)
    assert text.count("**") == 2 * sum(cell.best for row in table.cells for cell in row)


def test_a_paper_names_variants_and_refuses_what_it_is_not(tmp_path: Path) -> None:
    write_comparison(tmp_path, VARIANTS | {"names": {"bf16": "bfloat16"}}, tasks=7)
    text = report(tmp_path, "latex", layout="paper")
    assert "MAML + CML (bfloat16) &" in text
    assert r"\textbf{" in text
    for wrong, sentence in (
        ({"layout": "papr"}, "did you mean 'paper'"),
        ({"layout": "paper", "format": "html"}, "not in html"),
    ):
        with pytest.raises(UsageError, match=sentence):
            report(tmp_path, **wrong)
    with pytest.raises(UsageError, match="for the layout 'paper'"):
        report(tmp_path, over="tasks")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_the_table_of_a_paper_compiles(tmp_path: Path) -> None:
    write_comparison(tmp_path / "all", ALGORITHMS, tasks=7)
    bodies = [report(tmp_path / "all", "latex", layout="paper"), report(tmp_path / "all", "latex")]
    bodies.append(report(write_hostile_comparison(tmp_path / "hostile"), "latex", layout="paper"))
    for number, body in enumerate(bodies):
        preamble = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
        (tmp_path / f"{number}.tex").write_text(f"{preamble}\n{body}\\end{{document}}\n", encoding="utf-8")
        command = ["pdflatex", "-halt-on-error", f"{number}.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout
        assert b"Missing character" not in done.stdout
