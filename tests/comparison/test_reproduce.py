"""Recipes: the shipped ones are valid, and a verdict compares the result with the expected value."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from comparisons import InThisProcess
from downloads import cut_off
from metareg import MetaregError, UsageError
from metareg.cli import app as cli
from metareg.cli.terminal import stdout
from metareg.comparison.config import ComparisonConfig
from metareg.comparison.plan import Arm, Plan, PlannedRun
from metareg.comparison.pool import Outcome
from metareg.comparison.recipe import Recipe, list_recipes
from metareg.comparison.reproduction import find_recipe, judge, reproduce
from metareg.contract.config import validate
from metareg.contract.evaluation import Evaluation
from metareg.errors import Interrupted
from metareg.runs.options import assemble
from metareg.util.files import write_json

SHIPPED = {recipe.name: recipe for recipe in list_recipes()}

TINY: dict[str, Any] = {
    "summary": "Three steps on sine curves",
    "algo": "maml",
    "augment": "cml",
    "task": "sinusoid",
    "options": {"steps": 3, "eval_tasks": 2, "test_tasks": 4, "test_inner_steps": [0, 1], "strategy": "serial"},
    "seeds": [0, 1],
    "metric": "mse",
    "inner_steps": 1,
    "expected": {"mean": 4.0, "interval": [1.0, 50.0], "over": "2 seeds", "source": "a test"},
    "minutes": 0.1,
    "hardware": "any",
}


def recipe(**changes: Any) -> Recipe:
    return validate(Recipe, {**TINY, "name": "tiny", **changes}, "the recipe")


def runs_of(recipe: Recipe, folder: Path) -> list[PlannedRun]:
    return Plan(folder, validate(ComparisonConfig, recipe.to_comparison(), "the comparison")).list_runs()


# ------------------------------------------------------------------------------------------------------ shipped recipes


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_can_be_put_together(name: str, tmp_path: Path) -> None:
    shipped = SHIPPED[name]
    if shipped.task == "cora":
        pytest.importorskip("dgl", reason="DGL is not installed")
    runs = runs_of(shipped, tmp_path)
    assert [run.seed for run in runs] == shipped.seeds
    selection = assemble(runs[0].config, runs[0].options)
    assert shipped.inner_steps in selection.config.test_inner_steps
    assert selection.config.test_split == "test"
    task = selection.task.instance
    assert shipped.metric == (task.metric or {"cross_entropy": "accuracy"}.get(task.loss, task.loss))
    given = {key.rpartition(".")[2]: value for key, value in shipped.options.items()}
    for key in ("ways", "shots"):
        if key in given and shipped.task != "sinusoid":
            assert f"{given[key]}-{key.removesuffix('s')}" in name
    reads = getattr(task, "dataset", None)
    assert (shipped.data is not None) == (reads is not None and reads.location is not None)


@pytest.mark.parametrize("name", [name for name in SHIPPED if SHIPPED[name].data is not None])
def test_missing_data_is_one_sentence_and_nothing_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if SHIPPED[name].task == "cora":
        pytest.importorskip("dgl", reason="DGL is not installed")
    monkeypatch.setenv("METAREG_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("METAREG_CACHE", str(tmp_path / "cache"))
    cut_off(monkeypatch)
    with pytest.raises(MetaregError, match=f"The data of the task '{SHIPPED[name].task}' is not in"):
        reproduce(SHIPPED[name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_no_figure_is_known_the_recipe_says_why() -> None:
    for changes in ({"expected": None}, {"unknown": "nobody measured it"}):
        with pytest.raises(UsageError, match="'unknown' must say why there is no value"):
            recipe(**changes)


def test_an_interval_holds_its_mean() -> None:
    with pytest.raises(UsageError, match=r"\[1.0, 2.0\] does not contain the mean 3.0"):
        recipe(expected={**TINY["expected"], "mean": 3.0, "interval": [1.0, 2.0]})


# ------------------------------------------------------------------------------------------------------------- verdicts


def finished(
    folder: Path, scores: list[list[float]], metric: str = "accuracy", higher: bool = True
) -> list[PlannedRun]:
    """Write runs that ended with these scores after one inner step, a list for each seed."""
    runs = []
    for seed, listed in enumerate(scores):
        run = PlannedRun(Arm("maml", "none", "task"), seed, folder / str(seed), {}, {})
        columns = torch.tensor([[0.0] * len(listed), listed], dtype=torch.float64).T
        write_json(run.path / "results.json", Evaluation(metric, higher, (0, 1), columns, "none").to_dict())
        runs.append(run)
    return runs


def judged(low: float, high: float, metric: str = "accuracy") -> Recipe:
    expected = {
        "mean": (low + high) / 2,
        "interval": [low, high],
        "over": "600 test tasks",
        "source": "Somebody, 2020.",
    }
    return recipe(metric=metric, expected=expected)


@pytest.mark.parametrize(
    ("higher", "low", "high", "reached"),
    [
        (True, 0.5, 0.7, True),
        (True, 0.4, 0.45, True),  # better than expected
        (True, 0.5001, 0.7, False),
        (False, 0.3, 0.5, True),
        (False, 0.6, 0.8, True),
        (False, 0.3, 0.4999, False),
    ],
)
def test_reached_is_as_good_as_the_worse_end(
    higher: bool, low: float, high: float, reached: bool, tmp_path: Path
) -> None:
    runs = finished(tmp_path, [[0.2, 0.6], [0.5, 0.7]], higher=higher)  # 0.4 and 0.6
    verdict = judge(judged(low, high), runs)
    assert verdict.reached is reached
    assert verdict.mean == pytest.approx(0.5)
    assert verdict.by_seed == pytest.approx({0: 0.4, 1: 0.6})
    # Student's t with one degree of freedom, 12.706, times the standard error 0.1
    assert verdict.interval == pytest.approx((0.5 - 1.2706, 0.5 + 1.2706), abs=1e-4)
    assert verdict.over == "2 seeds"


@pytest.mark.parametrize(
    ("higher", "expected", "reached"),
    [(True, 0.6, True), (True, 0.9, False), (False, 0.3, True), (False, 0.1, False)],
)
def test_a_value_without_an_interval_is_reached_within_that_of_the_runs(
    higher: bool, expected: float, reached: bool, tmp_path: Path
) -> None:
    value = {"mean": expected, "interval": None, "over": None, "source": "Somebody, 2020."}
    runs = finished(tmp_path, [[0.4, 0.5, 0.6]], higher=higher)  # 0.5 ± 0.2484
    verdict = judge(recipe(metric="accuracy", expected=value), runs)
    assert verdict.reached is reached
    assert f"{100 * expected:.2f} %, without an interval" in str(verdict)
    diverged = judge(recipe(metric="accuracy", expected=value), finished(tmp_path, [[math.nan, 0.5]], higher=higher))
    assert diverged.reached is False


def test_the_interval_of_one_seed_is_over_its_tasks(tmp_path: Path) -> None:
    verdict = judge(judged(0.5, 0.7), finished(tmp_path, [[0.4, 0.6, 0.8]]))
    half = 4.302653 * 0.2 / math.sqrt(3)
    assert verdict.interval == pytest.approx((0.6 - half, 0.6 + half))
    assert verdict.over == "3 test tasks"


def test_a_seed_without_a_score_reaches_nothing(tmp_path: Path) -> None:
    for higher in (True, False):
        runs = finished(tmp_path / str(higher), [[0.6, 0.6], [math.nan, 0.6]], higher=higher)
        assert judge(judged(0.5, 0.7), runs).reached is False


def test_nothing_expected_is_no_verdict(tmp_path: Path) -> None:
    verdict = judge(
        recipe(metric="accuracy", expected=None, unknown="Nobody measured it."), finished(tmp_path, [[0.5, 0.5]])
    )
    assert verdict.reached is None
    assert verdict.to_dict()["expected"] is None
    assert str(verdict) == (
        "Nothing to compare with: accuracy after 1 inner step is 50.00 % (50.00 to 50.00 % over 2 test tasks). Nobody "
        "measured it."
    )


def test_the_sentence_says_the_numbers(tmp_path: Path) -> None:
    sentence = str(judge(judged(0.45, 0.55), finished(tmp_path, [[0.5, 0.5]])))
    assert sentence == (
        "Reached: accuracy after 1 inner step is 50.00 % (50.00 to 50.00 % over 2 test tasks); at least 45.00 % was "
        "expected, for 50.00 % (45.00 to 55.00 % over 600 test tasks) was reached before: Somebody, 2020."
    )
    runs = finished(tmp_path / "mse", [[0.5, 0.5]], "mse", higher=False)
    assert "Not reached: mse after 1 inner step is 0.5 (0.5 to 0.5 over 2 test tasks); at most 0.4 was expected" in str(
        judge(judged(0.2, 0.4, "mse"), runs)
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metric": "accuracy", "expected": None, "unknown": "new"}, "judges accuracy, but its runs are tested by mse"),
        ({"inner_steps": 7}, r"after 7 inner steps, but its runs are tested after 0, 1 \(test_inner_steps\)"),
    ],
)
def test_what_could_not_be_judged_is_not_run(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        reproduce(recipe(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_of_one_recipe(tmp_path: Path) -> None:
    write_json(tmp_path / "reproduction.json", {"recipe": "another"})
    with pytest.raises(UsageError, match="contains results of the recipe 'another'"):
        reproduce(recipe(), tmp_path)


def test_accuracies_are_no_percentages() -> None:
    expected = {"mean": 48.7, "interval": [46.8, 50.5], "over": None, "source": "Somebody, 2020."}
    for changes in ({}, {"interval": None}):
        with pytest.raises(UsageError, match=r"from 0 to 1; 48.7 is above 1"):
            recipe(metric="accuracy", expected={**expected, **changes})


def test_what_an_interval_is_over_may_be_unknown(tmp_path: Path) -> None:
    known = judged(0.45, 0.55)
    assert known.expected is not None
    unknown = known.model_copy(update={"expected": known.expected.model_copy(update={"over": None})})
    sentence = str(judge(unknown, finished(tmp_path, [[0.5, 0.5]])))
    assert "for 50.00 % (45.00 to 55.00 %) was reached before" in sentence


# -------------------------------------------------------------------------------------------------------------- command


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return the exit code and the output to stdout and stderr, each on one line."""
    capsys.readouterr()
    code = cli.run(["reproduce", *arguments])
    return code, *(" ".join(text.split()) for text in capsys.readouterr())


def test_the_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdout, "_width", 80)
    tasks = {each.task for each in SHIPPED.values()}
    code, output, _ = command(capsys)
    assert code == 0
    listed = []
    for task in tasks:
        recipes = [each for each in SHIPPED.values() if each.task == task]
        assert f"{task} {len(recipes)} {recipes[0].algo}" in output
        code, output_of_task, _ = command(capsys, "--task", task)
        assert code == 0
        listed += [word for word in output_of_task.split() if word in SHIPPED]
    assert sorted(listed) == sorted(SHIPPED)
    assert (
        "maml-miniimagenet-5-way-1-shot 48.70 % (46.86 to 50.54 %) 2.8 days"
        in command(capsys, "--task", "miniimagenet")[1]
    )
    fc100 = command(capsys, "--task", "fc100")[1]
    assert fc100.count("a GPU") == sum(each.gpu for each in SHIPPED.values() if each.task == "fc100")
    assert "need CIFAR-100 (161 MB)." in fc100


def test_a_recipe_from_beginning_to_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metareg.comparison.runner.LocalPool", lambda *_: InThisProcess())
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    arguments = ("tiny.yaml", "--out", "out", "--jobs", "1")
    code, output, _ = command(capsys, *arguments)
    assert code == 0
    written = json.loads(Path("out/reproduction.json").read_text())
    assert written["reached"] is True
    assert written["sentence"] in output
    found = {
        path.parent.name: json.loads(path.read_text())["steps"][1]["mean"]
        for path in Path("out").glob("runs/sinusoid/maml+cml/*/results.json")
    }
    assert written["found"]["by_seed"] == {name.removeprefix("seed-"): mean for name, mean in found.items()}
    assert sorted(found) == ["seed-0", "seed-1"]
    # Finished runs are kept if the expected value changes.
    stamps = {path: path.stat().st_mtime_ns for path in Path("out").rglob("results.json")}
    unreachable = {**TINY["expected"], "mean": 1e-9, "interval": [0.0, 1e-8]}
    Path("tiny.yaml").write_text(yaml.safe_dump({**TINY, "expected": unreachable}))
    code, output, _ = command(capsys, *arguments)
    assert code == 1
    assert "Not reached" in output
    assert json.loads(Path("out/reproduction.json").read_text())["reached"] is False
    assert stamps == {path: path.stat().st_mtime_ns for path in Path("out").rglob("results.json")}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sinusoid-5-shots"], "There is no recipe named 'sinusoid-5-shots'; did you mean 'sinusoid-5-shot'"),
        (["./tiny"], "your own recipe is a file NAME.yaml"),
        (["nosuch.yaml"], "There is no configuration file nosuch.yaml"),
        (["bad.yaml"], "did you mean 'summary'"),
        (["sinusoid-5-shot", "--seeds", "x"], "a number of seeds (5)"),
        (["sinusoid-5-shot", "--device", "toaster"], "no device 'toaster'"),
        (["--out", "out"], "Name a recipe"),
        (["--task", "omniglt"], "There is no task with recipes named 'omniglt'; did you mean 'omniglot'"),
        (["sinusoid-5-shot", "--task", "sinusoid"], "--task lists recipes"),
    ],
)
def test_bad_use(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(yaml.safe_dump({**TINY, "sumary": "misspelt"}))
    code, _, errors = command(capsys, *arguments)
    assert code == 2
    assert sentence in errors
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_run_that_cannot_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, _ = runs_of(recipe(), tmp_path)
    ended = SimpleNamespace(broken={broken.path: Outcome(broken, "The disk is full.")})
    monkeypatch.setattr("metareg.comparison.runner.compare", lambda *_, **__: ended)
    sentence = (
        "1 of the runs of the recipe 'tiny' could not be finished. maml+cml on sinusoid, seed 0: The disk is full."
    )
    with pytest.raises(MetaregError, match=re.escape(sentence)):
        reproduce(recipe(), tmp_path)
    assert not (tmp_path / "reproduction.json").exists()


def test_a_stopped_recipe_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted("Stopped. `metareg compare --out …` continues the comparison.")

    monkeypatch.setattr("metareg.comparison.runner.compare", stopped)
    with pytest.raises(Interrupted, match="Repeat the command to continue the recipe in"):
        reproduce(recipe(), tmp_path)


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from metareg.cli.app import run\n"
        "assert run(['reproduce']) == 0\n"
        "assert not {'torch', 'numpy', 'scipy'} & sys.modules.keys(), sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_names_are_those_of_the_files() -> None:
    assert find_recipe("sinusoid-5-shot").name == "sinusoid-5-shot"
