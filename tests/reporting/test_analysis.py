"""What a report compares, and when it gives no verdict."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from comparisons import SMALL, break_run, write_comparison, write_run
from metareg import UsageError
from metareg.comparison.plan import Plan
from metareg.comparison.statistics import Verdict, over_seeds
from metareg.reporting import FORMATS, report, tables
from metareg.reporting.analysis import analyze_comparison, list_findings
from reports import Page


def test_pairs_are_those_of_the_same_seed(small: Plan) -> None:
    break_run(small.folder / "runs/sinusoid/maml/seed-0", "error")
    found = analyze_comparison(small.folder)
    pair = found.pairs[0]
    none, cml = found.results.tasks[0].arms[:2]
    expected = [cml.by_seed(10)[seed].mean() - none.by_seed(10)[seed].mean() for seed in (1, 5)]
    assert (pair.arm.name, pair.planned, pair.difference.pairs) == ("maml+cml", 3, 2)
    assert pair.difference.over_seeds.mean == pytest.approx(np.mean(expected))
    assert pair.difference.over_seeds.half == pytest.approx(over_seeds(expected).half)
    table = tables.build_differences(found, found.tasks[0])
    assert table is not None
    assert table.rows[0][5].endswith("of 2 (3 planned)")
    # An unfinished result does not read as final.
    assert "2 of 3 seeds" in table.rows[0][8]
    assert table.rows[2][8] == found.pairs[2].verdict.value
    assert "not finished" in report(small.folder)
    assert "after 1 inner step." in report(small.folder, inner_steps=1)
    break_run(small.folder / "runs/sinusoid/maml/seed-0", "diverged")
    assert "not finished" not in report(small.folder)


def test_a_task_that_was_not_tested_after_so_many_steps_keeps_its_own_number(tmp_path: Path) -> None:
    plan = write_comparison(tmp_path, SMALL | {"tasks": ["sinusoid", "harmonic"]}, tasks=7)
    for run in plan.list_runs():
        if run.arm.task == "harmonic":
            write_run(run, tasks=7, steps=(0, 5))

    found = analyze_comparison(tmp_path, 1)

    assert found.headline == {"sinusoid": 1, "harmonic": 5}
    assert {pair.difference.pairs for pair in found.pairs} == {3}
    text = report(tmp_path, inner_steps=1)
    assert "1 inner step on sinusoid" in text
    assert "5 inner steps on harmonic" in text


def test_a_comparison_says_after_how_many_inner_steps_it_compares(tmp_path: Path) -> None:
    write_comparison(tmp_path, {"augment": ["none", "cml"], "seeds": [0, 1], "inner_steps": 1}, tasks=7)
    assert analyze_comparison(tmp_path).headline == {"sinusoid": 1}
    assert analyze_comparison(tmp_path, 5).headline == {"sinusoid": 5}


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
    with pytest.raises(UsageError, match=r"after 3 inner steps.* 0, 1, 5, 10"):
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

    pair = next(each for each in found.pairs if each.arm.name == "anil+cml")
    assert (pair.verdict, pair.difference.pairs, len(pair.difference.by_seed)) == (Verdict.NOT_TESTED, 3, 2)
    assert re.fullmatch(r"\d of 2 \(1 diverged\)", tables.format_seeds_in_favour(pair))
    text = report(small.folder)
    assert re.search(rf"\| anil \| {'cml' if 'cml' in arm else 'none'} \| (2 of )?3 \|.*\(1 diverged\)", text)
    assert "not tested (1 of 3 pairs diverged)" in text


def test_where_every_pair_diverged_nothing_is_drawn_or_corrected(small: Plan) -> None:
    for run in small.list_runs():
        if run.arm.augmenter == "cml" or (run.arm.algorithm == "anil" and run.arm.augmenters):
            break_run(run.path, "diverged")
        elif run.arm.augmenters and run.seed:
            break_run(run.path, "gone")

    page = report(small.folder, "html")

    text = "".join(Page(page).text)
    assert "No pair could be tested (3 of 3 pairs diverged, one pair of seeds)" in text
    assert "no pair of this report could be tested" in text
    assert "9 diverged" in text
    assert page.count(">3 of 3 pairs diverged</text>") == 3
    for run in small.list_runs():
        if run.arm.augmenters and run.finished:
            break_run(run.path, "diverged")
    assert "Paired differences on" not in report(small.folder, "html")


def test_a_single_verdict_comes_with_its_difference(tmp_path: Path) -> None:
    write_comparison(tmp_path, SMALL | {"algo": ["maml"], "augment": ["none", "cml"]}, tasks=50)
    found = analyze_comparison(tmp_path)
    (pair,), (finding,) = found.pairs, list_findings(found)
    estimate = pair.difference.over_seeds
    mean, interval = pair.scale.format_difference(estimate), pair.scale.format_interval(estimate)
    assert finding.sentence.startswith("Against none on sinusoid: ")
    assert finding.sentence.endswith(f" with maml ({mean}, 95 % interval {interval}).")
    assert finding.lines == []


def test_one_seed_has_no_interval_over_seeds(tmp_path: Path) -> None:
    write_comparison(tmp_path, SMALL | {"seeds": [3]}, tasks=50)
    found = analyze_comparison(tmp_path)
    over_tasks = found.pairs[0].scale.format_interval(found.pairs[0].difference.over_tasks)
    assert tables.build_overview(found, found.tasks[0]).rows[1][3] == over_tasks
    page = report(tmp_path, "html")
    assert f"({over_tasks} over test tasks, one seed)" in page
    assert "(–" not in page
    text = report(tmp_path)
    assert "not tested (one pair of seeds)" in text
    assert "better" not in text.partition("## Results")[0].replace("better and worse", "")


def test_without_a_baseline_there_is_no_difference(tmp_path: Path) -> None:
    write_comparison(tmp_path, SMALL | {"augment": ["cml", "dropgrad"]}, tasks=5)
    text = report(tmp_path)
    assert "there is no difference to test" in text
    assert "Paired differences" not in text
    for format in FORMATS:
        assert report(tmp_path, format)
