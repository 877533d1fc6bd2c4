"""Choosing settings: the configuration, the search space, and searches whose results do not depend on interruptions."""

from __future__ import annotations

import io
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from rich.console import Console

from comparisons import InThisProcess
from metareg import Field, PluginConfig, UnknownNameError, UsageError, hookimpl
from metareg.cli.progress import ComparisonProgress
from metareg.comparison.config import ComparisonConfig, Tuning
from metareg.comparison.plan import Arm, Plan, PlannedRun, check_plan
from metareg.comparison.pool import ERROR_FILE, Outcome
from metareg.comparison.results import read_results
from metareg.comparison.runner import Comparison, compare
from metareg.comparison.space import check_tuning, list_dimensions, split_assignments
from metareg.comparison.tuning import Tuner, create_tuners, propose
from metareg.contract.config import validate
from metareg.contract.search import Range
from metareg.runs.options import Selection, assemble
from metareg.util.files import write_json, write_text
from metareg.util.signals import StopRequest

# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.01,0.1", [0.01, 0.1]), ("a, 'b,c' ,d", ["a", "b,c", "d"]), ("true,false", [True, False]), ("null,3", [None, 3]),
        ("[40,40],[80]", [[40, 40], [80]]), ("it's,b", ["it's", "b"]), ("{a: 1},{a: 2}", [{"a": 1}, {"a": 2}]),
    ],
)  # fmt: skip
def test_sweeps(text: str, values: list[Any]) -> None:
    fixed, swept = split_assignments([f"key={text}"])
    assert (fixed, swept) == ({}, {"key": values})
    assert [type(value) for value in swept["key"]] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[0,1,5]", [0, 1, 5]), ("0.1", 0.1), ("'0.1,0.2'", "0.1,0.2"), ("{a: 1, b: 2}", {"a": 1, "b": 2}), ("", None),
        ("a[0]", "a[0]"), ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_what_is_one_value(text: str, value: Any) -> None:
    assert split_assignments([f"key={text}"]) == ({"key": value}, {})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1,2", "not valid YAML"), ("'a,b", "not valid YAML"), ("1,2,1", "contain 1 twice"),
    ],
)  # fmt: skip
def test_malformed_sweeps(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        split_assignments([f"key={text}"])


def test_an_option_given_twice_is_no_sweep() -> None:
    with pytest.raises(UsageError, match=r"twice.*a=VALUE,VALUE"):
        split_assignments(["a=1", "a=2"])
    with pytest.raises(UsageError, match="KEY=VALUE; got 'a'"):
        split_assignments(["a"])


def tuning(**values: Any) -> Tuning:
    return validate(Tuning, values, "tune")


def test_tuning_survives_being_written() -> None:
    space = {"a": [0.1, 1, 2, 4], "b": {"low": "1e-3", "high": 10, "log": True}, "c": None}
    written = tuning(trials=5, seeds=2, space=space)
    assert written.space == {"a": [0.1, 1, 2, 4], "b": Range(low=0.001, high=10.0, log=True), "c": None}
    assert written.seeds == [0, 1]
    assert tuning(**written.model_dump(mode="json")) == written


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "a grid needs values in 'space'"), ({"trials": 1}, "a number of 2 or more"), ({"trials": "all"}, "or grid"),
        ({"space": {"a": "geomspace(1,4,3)"}}, r"not 'geomspace\(1,4,3\)'"), ({"space": [1]}, "dictionary"),
        ({"trials": 3, "seeds": []}, "seeds"), ({"trials": 3, "seeds": [0, 0]}, "the seed '0' is listed twice"),
        ({"trials": 3, "over": ["a"]}, "no option of tune named 'over'"),
        ({"space": {"a": [1, 2]}, "options": {"a": 1}}, "'a' cannot be tuned because it has a fixed value"),
    ],
)  # fmt: skip
def test_bad_tuning(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        tuning(**values)


# ----------------------------------------------------------------------------------------------------- what is searched


def selection(algo: Any = "maml", augment: Any = None, task: str = "sinusoid", **options: Any) -> Selection:
    return assemble({"algo": algo, "augment": augment, "task": task}, options)


def searched(settings: Tuning, **chosen: Any) -> dict[str, str]:
    return dict(str(dimension).split(": ") for dimension in list_dimensions(settings, selection(**chosen)))


SEARCH = {"trials": 5}


@pytest.mark.parametrize(
    ("chosen", "space"),
    [
        ({}, {"inner_lr": "0.001 to 0.1, log"}),
        ({"inner_lr": 0.5}, {"inner_lr": "0.05 to 5, log"}),
        ({"task": "glyphs"}, {"inner_lr": "0.05 to 5, log"}),
        ({"algo": "metasgd"}, {"inner_lr": "0.001 to 0.1, log"}),
        ({"augment": "cml"}, {"inner_lr": "0.001 to 0.1, log", "cml.gamma": "0.005 to 10, log"}),
        (
            {"augment": "dropgrad,gradient-noise"},
            {
                "inner_lr": "0.001 to 0.1, log", "dropgrad.rate": "0 to 0.8", "dropgrad.kind": "bernoulli, gaussian",
                "gradient-noise.sigma": "0.01 to 1, log", "gradient-noise.where": "inner, outer",
            },
        ),
    ],
)  # fmt: skip
def test_what_the_shipped_plugins_have_searched(chosen: dict[str, Any], space: dict[str, str]) -> None:
    assert searched(tuning(**SEARCH), **chosen) == space


def test_keys_that_the_user_names() -> None:
    space = {
        "mlp.hidden": [[4], [5]],
        "outer_lr": None,
        "first_order": [False, True],
        "gradient-noise.sigma": {"factor": 2},
    }
    named = tuning(trials=5, space=space)
    expected = {"mlp.hidden": "[4], [5]", "outer_lr": "0.0001 to 0.01, log", "first_order": "false, true"}
    assert searched(named) == expected
    sigma = {"gradient-noise.sigma": "10 to 40, log"}
    assert searched(named, augment="gradient-noise", **{"gradient-noise.sigma": 20}) == expected | sigma
    both = tuning(space={"inner_lr": [1, 2], "maml.inner_lr": ["1e-3", 4]})
    assert searched(both) == {"maml.inner_lr": "0.001, 4.0"}
    assert searched(both, algo="metasgd") == {"inner_lr": "1.0, 2.0"}


class Many:
    """An augmenter whose options declare all kinds of search spaces."""

    name = "many"

    class Config(PluginConfig):
        span: float = Field(0.5, ge=-1, description="A range.", json_schema_extra={"search": {"low": -1, "high": 1}})
        count: int = Field(4, ge=1, description="Whole.", json_schema_extra={"search": {"low": 1, "high": 8}})
        maybe: int | None = Field(None, description="Whole.", json_schema_extra={"search": {"low": 2, "high": 3}})
        step: float = Field(0.2, gt=0, description="Around its default.", json_schema_extra={"search": {"factor": 4}})
        zero: float = Field(0.0, ge=0, description="Around nothing.", json_schema_extra={"search": {"factor": 4}})
        kind: Literal["a", "b"] = Field("a", description="A choice.", json_schema_extra={"search": ["a", "b"]})
        values: float = Field(1.0, description="Numbers.", json_schema_extra={"search": [1, 2, 4]})
        bounded: float = Field(0.5, ge=0, le=1, description="Bounds alone declare no search.")
        flag: bool = Field(False, description="A switch.")
        off: bool = Field(False, description="A switch.", json_schema_extra={"search": False})

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def augment_outer_gradient(self, grads: Any) -> Any:
        return grads


def test_what_is_searched_is_what_is_declared() -> None:
    expected = {
        "span": "-1 to 1", "count": "1 to 8", "maybe": "2 to 3", "step": "0.1 to 1.6, log", "kind": "a, b",
        "values": "1.0, 2.0, 4.0",
    }  # fmt: skip
    search = tuning(**SEARCH)
    found = searched(search, augment=[Many], step=0.4)
    assert {key.removeprefix("many."): text for key, text in found.items() if key != "inner_lr"} == expected
    whole = {each.key for each in list_dimensions(search, selection(augment=[Many])) if each.whole}
    assert whole == {"many.count", "many.maybe"}


def test_a_search_of_nothing_is_refused() -> None:
    class Silent:
        class Config(PluginConfig):
            rate: float = Field(0.1, description="Declares nothing.")

        def __init__(self, config: Config) -> None:
            self.config = config

        @hookimpl
        def inner_update(self, params: Any) -> Any:
            return params

    with pytest.raises(UsageError, match="nothing to search"):
        check_tuning(tuning(**SEARCH), {"silent": selection(algo=Silent)})


@pytest.fixture(scope="module")
def two_arms() -> dict[str, Selection]:
    return {"maml": selection(), "maml+cml": selection(augment="cml")}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"space": {"inner_rl": [1, 2]}}, "no option to choose named 'inner_rl'; did you mean 'inner_lr'"),
        ({"space": {"cml.gama": [1, 2]}}, "did you mean 'cml.gamma'"),
        ({"space": {"dropgrad.rate": [0.1, 0.2]}}, "no option to choose named 'dropgrad.rate'"),
        ({"trials": 4, "space": {"mlp.hiden": None}}, "did you mean 'mlp.hidden'"),
        ({"space": {"inner_lr": [-1, 2]}}, "maml: inner_lr = -1 cannot be used: it should be greater than 0"),
        ({"trials": 4, "space": {"cml.gamma": {"low": -1, "high": 2}}}, r"maml\+cml: cml.gamma = -1.0 cannot be used"),
        ({"trials": 4, "space": {"inner_steps": {"low": 1.5, "high": 3}}}, "inner_steps = 1.5 cannot be used"),
        ({"trials": 4, "space": {"mlp.hidden": {"low": 1, "high": 3}}}, "mlp.hidden = 1.0 cannot be used"),
        ({"trials": 4, "space": {"first_order": {"low": 0, "high": 1}}}, "'first_order' is not a number"),
        ({"trials": 4, "space": {"mlp.hidden": None}}, "'mlp.hidden' declares no search range.*json_schema_extra"),
        ({"trials": 4, "space": {"reset_optimizer_every": None}}, "declares no search range; give values"),
        ({"space": {"cml.gamma": None}}, "A grid needs values of 'cml.gamma', not the range 0.005 to 10, log"),
        ({"space": {"shots": [1, 5]}}, "'shots' cannot be tuned"),
        ({"space": {"task.shots": [1, 5]}}, "'task.shots' cannot be tuned"),
        ({"space": {"seed": [1, 5]}}, "'seed' cannot be tuned"),
        ({"space": {"test_inner_steps": [[1], [5]]}}, "cannot be tuned"),
        ({"space": {"algo.inner_lr": [1, 2], "maml.inner_lr": [1, 2]}}, "are the same option"),
        (
            {"space": {key: [k / 40 for k in range(1, 41)] for key in ("inner_lr", "outer_lr")}},
            "A grid of 1600 settings is larger than 1000",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen(values: dict[str, Any], sentence: str, two_arms: dict[str, Selection]) -> None:
    with pytest.raises(UsageError, match=sentence):
        check_tuning(tuning(**values), two_arms)


def test_an_option_of_two_plugins() -> None:
    class Rated(Many):
        name = "rated"

        class Config(PluginConfig):
            rate: float = Field(0.1, ge=0, le=1, description="Like dropgrad's.")

    with pytest.raises(UsageError, match=r"write it as PLUGIN\.rate"):
        list_dimensions(tuning(space={"rate": [0.1, 0.2]}), selection(augment=["dropgrad", Rated]))
    with pytest.raises(UsageError, match=r"'augment\.rate'.*PLUGIN\.rate"):
        list_dimensions(tuning(space={"augment.rate": [0.1, 0.2]}), selection(augment=["dropgrad", Rated]))


def test_options_of_plugins_of_one_name_are_searched_each_by_itself() -> None:
    class Twin(Many):
        name = "dropgrad"

    keys = searched(tuning(trials=2), algo=Twin, augment="dropgrad")
    assert "dropgrad.rate" not in keys
    assert "augment.rate" in keys


def test_unknown_names_carry_the_known_ones() -> None:
    with pytest.raises(UnknownNameError) as caught:
        check_tuning(tuning(space={"zzz": [1, 2]}), {"maml": selection(augment="cml")})
    assert {"inner_lr", "cml.gamma", "outer_lr", "mlp.hidden"} <= set(caught.value.known)


# -------------------------------------------------------------------------------------------------------------- choosing


def tuner(folder: Path, augment: str = "cml", **tune: Any) -> Tuner:
    options = {"steps": 7, "test_inner_steps": [0, 3]}
    values = {"augment": ["none", augment], "options": options, "seeds": 5, "tune": tune}
    plan = Plan(folder, validate(ComparisonConfig, values, "the comparison"))
    return Tuner(plan, plan.arms[-1])


def loss(run: PlannedRun) -> float:
    """Return a synthetic validation loss with its minimum at step size 0.05 and γ = 0.5."""
    gamma = run.options.get("cml.gamma", 0.05)
    return abs(math.log10(run.options.get("inner_lr", 0.01) / 0.05)) + abs(math.log10(gamma / 0.5)) + 0.01 * run.seed


def finish(run: PlannedRun, mean: float, *, split: str = "validation", higher_is_better: bool = False) -> None:
    """Write the files of a finished run."""
    steps = [{"inner_steps": 0, "mean": -100.0}, {"inner_steps": 3, "mean": mean}]
    content = {"metric": "made-up", "higher_is_better": higher_is_better, "split": split, "steps": steps}
    write_json(run.path / "results.json", content)


def carried_out(tuner: Tuner, score: Callable[[PlannedRun], float] = loss) -> dict[str, Any]:
    """Run a whole tuning, one run at a time, and return the content of chosen.json."""
    while jobs := tuner.next_runs():
        finish(jobs[0], score(jobs[0]))
    assert tuner.chosen is not None
    assert tuner.remaining == 0
    (file,) = tuner.folder.glob("chosen.json")
    return dict(json.loads(file.read_text()))


def test_a_search_finds_the_best_and_says_so(tmp_path: Path) -> None:
    chosen = carried_out(search := tuner(tmp_path, trials=20))

    assert len(chosen["trials"]) == 20
    assert chosen["trials"][0]["options"] == {}
    scores = [trial["score"] for trial in chosen["trials"]]
    assert chosen["options"] == chosen["trials"][scores.index(min(scores))]["options"] == search.chosen
    assert min(scores) < 0.5 < scores[0]
    assert (chosen["metric"], chosen["higher_is_better"], chosen["inner_steps"]) == ("made-up", False, 3)
    assert chosen["space"] == {"inner_lr": "0.001 to 0.1, log", "cml.gamma": "0.005 to 10, log"}


def test_a_search_is_better_than_chance(tmp_path: Path) -> None:
    search = list_dimensions(tuning(**SEARCH), selection(augment="cml"))

    def searched_for(rounds: int, seed: int, *, blind: bool) -> float:
        tried: list[tuple[dict[str, Any], float]] = []
        for number in range(rounds):
            options = propose(search, [] if blind or number < 5 else tried, 1000 * seed + number)
            tried.append((options, loss(PlannedRun(Arm("maml", "cml", ""), 0, tmp_path, {}, options))))
        return min(cost for _, cost in tried)

    found, drawn = ([searched_for(25, seed, blind=blind) for seed in range(8)] for blind in (False, True))
    assert statistics.mean(found) < 0.6 * statistics.mean(drawn)


@pytest.mark.parametrize(
    "settings", [{"trials": 10, "seeds": 2}, {"space": {"inner_lr": [0.01, 0.1], "cml.gamma": [1, 2]}}]
)
def test_a_tuning_that_is_killed_tries_what_one_left_alone_tries(tmp_path: Path, settings: dict[str, Any]) -> None:
    alone = carried_out(tuner(tmp_path / "alone", **settings))
    dice = random.Random(3)
    seen = set()
    for _ in range(1000):
        restarted = tuner(tmp_path / "killed", **settings)
        jobs = restarted.next_runs()
        seen.add(restarted.remaining)
        if restarted.chosen is not None:
            break
        for job in dice.sample(jobs, dice.randint(0, len(jobs))):
            finish(job, loss(job))
    assert len(seen) > 3
    assert json.loads((restarted.folder / "chosen.json").read_text()) == alone


def test_what_is_proposed_is_a_function_of_what_was_tried(tmp_path: Path) -> None:
    carried_out(tuner(tmp_path, trials=12))
    files = sorted(tmp_path.rglob("trial.json"))
    before = [file.read_text() for file in files]
    for file in [*files, *tmp_path.rglob("chosen.json")]:
        file.unlink()
    carried_out(tuner(tmp_path, trials=12))
    assert [file.read_text() for file in files] == before


def test_arms_begin_with_the_same_step_sizes(tmp_path: Path) -> None:
    with_cml, with_noise = (tuner(tmp_path, augment, trials=9).next_runs() for augment in ("cml", "gradient-noise"))
    assert [run.options.get("inner_lr") for run in with_cml] == [run.options.get("inner_lr") for run in with_noise]
    assert len({run.options.get("inner_lr") for run in with_cml}) == 5


def test_trials_are_on_validation_tasks_with_options_of_their_own(tmp_path: Path) -> None:
    grid = tuner(tmp_path, space={"cml.gamma": [1, 2]}, options={"steps": 3, "cml.width": 4})
    jobs = grid.next_runs()
    assert [run.seed for run in jobs] == [0, 0]
    expected = {"steps": 3, "test_inner_steps": [0, 3], "cml.width": 4, "cml.gamma": 1.0, "test_split": "validation"}
    assert jobs[0].options == expected
    assert [run.path.relative_to(grid.folder).as_posix() for run in jobs] == ["trial-0/seed-0", "trial-1/seed-0"]
    assert not any(run.is_final for run in jobs)


def test_the_mean_over_seeds_decides(tmp_path: Path) -> None:
    table = {(1.0, 0): 0.1, (1.0, 1): 0.9, (2.0, 0): 0.4, (2.0, 1): 0.4}
    grid = tuner(tmp_path, seeds=2, space={"cml.gamma": [1, 2]})
    assert carried_out(grid, lambda run: table[run.options["cml.gamma"], run.seed])["options"] == {"cml.gamma": 2.0}


def test_the_greatest_is_chosen_where_higher_is_better(tmp_path: Path) -> None:
    search = tuner(tmp_path, trials=20)
    while jobs := search.next_runs():
        finish(jobs[0], -loss(jobs[0]), higher_is_better=True)
    chosen = json.loads((search.folder / "chosen.json").read_text())
    scores = [trial["score"] for trial in chosen["trials"]]
    assert max(scores) > -0.5 > scores[0]
    assert chosen["options"] == chosen["trials"][scores.index(max(scores))]["options"]


def diverge(run: PlannedRun) -> None:
    write_text(run.path / ERROR_FILE, "DivergenceError: Training diverged at step 3.\n")


def test_trials_that_diverge_are_the_worst(tmp_path: Path) -> None:
    search = tuner(tmp_path, trials=20)
    while jobs := search.next_runs():
        for job in jobs:
            if job.options.get("inner_lr", 1) > 0.02:  # the defaults included
                diverge(job)
            else:
                finish(job, loss(job))
    chosen = json.loads((search.folder / "chosen.json").read_text())
    failed = [trial for trial in chosen["trials"] if trial["score"] is None]
    assert 1 < len(failed) < 15
    assert {trial["error"] for trial in failed} == {"Training diverged at step 3."}
    assert search.chosen["inner_lr"] <= 0.02
    late = [trial["options"]["inner_lr"] for trial in chosen["trials"][10:]]
    assert sum(value <= 0.02 for value in late) > len(late) / 2


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_the_worst(tmp_path: Path, score: float) -> None:
    grid = tuner(tmp_path, space={"cml.gamma": [1, 2]})
    chosen = carried_out(grid, lambda run: 5.0 if run.options["cml.gamma"] == 2 else score)
    assert chosen["options"] == {"cml.gamma": 2.0}


def test_defaults_where_every_trial_fails(tmp_path: Path) -> None:
    search = tuner(tmp_path, trials=8)
    while jobs := search.next_runs():
        diverge(jobs[0])
    assert search.chosen == {}


def test_a_run_that_broke_is_not_taken_for_a_bad_one(tmp_path: Path) -> None:
    grid = tuner(tmp_path, space={"cml.gamma": [1, 2]})
    broken, good = grid.next_runs()
    write_text(broken.path / ERROR_FILE, "MetaregError: The disk is full.\n")
    finish(good, 1.0)
    assert grid.next_runs() == [broken]
    assert grid.chosen is None
    assert (grid.runs, grid.remaining) == (2, 1)


def test_settings_that_cannot_be_together_are_the_worst(tmp_path: Path) -> None:
    plan_values = {"algo": "metasgd", "tune": {"space": {"inner_lr": [0.1, 0.5], "inner_lr_max": [0.2, 0.6]}}}
    plan = Plan(tmp_path, validate(ComparisonConfig, plan_values, "the comparison"))
    grid = Tuner(plan, plan.arms[0])
    chosen = carried_out(grid, lambda run: run.options["inner_lr_max"])
    assert chosen["options"] == {"inner_lr": 0.1, "inner_lr_max": 0.2}
    assert [trial["score"] is None for trial in chosen["trials"]] == [False, False, True, False]
    assert "must not be below" in chosen["trials"][2]["error"]


def test_the_same_settings_are_not_run_twice(tmp_path: Path) -> None:
    search = tuner(tmp_path, "dropgrad", trials=12, space={"dropgrad.kind": None})
    runs = []
    while jobs := search.next_runs():
        runs.append(jobs[0].options.get("dropgrad.kind", "bernoulli"))
        finish(jobs[0], float(len(runs)))
    assert sorted(runs) == ["bernoulli", "gaussian"]
    chosen = json.loads((search.folder / "chosen.json").read_text())
    assert len(chosen["trials"]) == 12
    assert {trial["score"] for trial in chosen["trials"]} == {1.0, 2.0}
    assert chosen["options"] == {}


def test_few_settings_are_all_tried(tmp_path: Path) -> None:
    search = tuner(tmp_path, trials=7, space={"cml.gamma": [1, 2, 3], "inner_lr": [0.1, 0.2]})
    tried = [tuple(trial["options"].values()) for trial in carried_out(search)["trials"]]
    assert sorted(tried[1:]) == [(gamma, lr) for gamma in (1.0, 2.0, 3.0) for lr in (0.1, 0.2)]


def test_nothing_to_choose_needs_no_trial(tmp_path: Path) -> None:
    plan_values = {"augment": ["none", "cml"], "tune": {"space": {"cml.gamma": [1, 2]}}}
    plan = Plan(tmp_path, validate(ComparisonConfig, plan_values, "the comparison"))
    alone = Tuner(plan, plan.arms[0])
    assert (alone.trials, alone.remaining, alone.next_runs(), alone.chosen) == (0, 0, [], {})


def test_a_grid_gives_every_arm_as_many_trials(tmp_path: Path) -> None:
    space = {"inner_lr": [0.01, 0.1], "cml.gamma": [0.1, 0.5, 1.0], "dropgrad.kind": ["bernoulli", "gaussian"]}
    values = {"augment": ["none", "cml", "dropgrad"], "options": {"steps": 7}, "tune": {"space": space}}
    plan = Plan(tmp_path, validate(ComparisonConfig, values, "the comparison"))
    tuners = create_tuners(plan)
    assert [each.trials for each in tuners.values()] == [6, 6, 6]
    none, _, dropgrad = tuners.values()
    tried = [trial["options"] for trial in carried_out(none)["trials"]]
    assert tried[:2] == [{"inner_lr": 0.01}, {"inner_lr": 0.1}]
    rates = [each["inner_lr"] for each in tried]
    assert len(set(rates)) == 6
    assert all(0.01 < rate < 0.1 for rate in rates[2:])
    others = [trial["options"] for trial in carried_out(dropgrad)["trials"]]
    assert [{**each, "inner_lr": 0} for each in others[:4]] == [
        {"inner_lr": 0, "dropgrad.kind": kind} for _ in range(2) for kind in ("bernoulli", "gaussian")
    ]
    assert [each["inner_lr"] for each in others[4:]] == rates[4:], (
        "a setting's number draws the same step size in each arm"
    )
    # When it continues, it tries the same settings, and the choice of a separate grid stays.
    assert create_tuners(plan)[plan.arms[0]].chosen == none.chosen
    file = none.folder / "chosen.json"
    content = json.loads(file.read_text())
    write_json(file, content | {"trials": content["trials"][:2]})
    assert create_tuners(plan)[plan.arms[0]].chosen == none.chosen
    write_json(file, content | {"trials": content["trials"][:3]})
    with pytest.raises(UsageError, match="chosen with another 'tune'"):
        create_tuners(plan)
    alone = {"augment": ["none", "cml"], "tune": {"space": {"cml.gamma": [0.1, 1.0]}}}
    without, _ = create_tuners(Plan(tmp_path / "b", validate(ComparisonConfig, alone, "the comparison"))).values()
    assert (without.trials, without.chosen, without.next_runs(), without.chosen) == (0, None, [], {})


def test_a_task_can_choose_in_a_way_of_its_own(tmp_path: Path) -> None:
    few = {"label": "few", "task": "sinusoid", "options": {"shots": 3}}
    alone = {"seeds": [4, 5], "space": {"inner_lr": [0.5, 0.7]}, "options": {"steps": 7}}
    values = {"tasks": ["sinusoid", {**few, "tune": alone}], "tune": {"space": {"inner_lr": [0.1, 0.2, 0.3]}}}
    plan = Plan(tmp_path, validate(ComparisonConfig, values, "the comparison"))
    common, own = (Tuner(plan, arm) for arm in plan.arms)
    assert (common.runs, own.runs) == (3, 4)
    assert {run.options["inner_lr"] for run in common.next_runs()} == {0.1, 0.2, 0.3}
    jobs = own.next_runs()
    assert {(run.seed, run.options["inner_lr"], run.options["steps"]) for run in jobs} == {
        (seed, rate, 7) for seed in (4, 5) for rate in (0.5, 0.7)
    }
    # Explicit options override both.
    other = Plan(tmp_path, plan.config.override(search=9, space={"outer_lr": None}))
    assert [(each.trials, [*each.space]) for each in map(other.get_tuning, other.arms) if each] == [
        (9, ["outer_lr"])
    ] * 2
    values["tasks"] = ["sinusoid", {**few, "tune": {"space": {"no_option": [1, 2]}}}]
    with pytest.raises(UnknownNameError, match="no_option"):
        check_plan(Plan(tmp_path, validate(ComparisonConfig, values, "the comparison")))


def test_only_tasks_that_say_so_are_tuned(tmp_path: Path) -> None:
    tuned = {"label": "few", "task": "sinusoid", "options": OPTIONS, "tune": {"space": {"inner_lr": [0.01, 0.02]}}}
    values = {"tasks": [{"task": "sinusoid", "options": OPTIONS}, tuned]}
    plan = Plan(tmp_path, validate(ComparisonConfig, values, "the comparison"))
    plan.write()
    launcher = InThisProcess()
    comparison = Comparison(plan, launcher)
    assert comparison.left == 4
    comparison.carry_out(StopRequest())
    assert (comparison.finished, comparison.left, comparison.broken) == (4, 0, {})
    assert [str(run) for run in launcher.submitted] == [
        "maml on few, trial-0, seed 0", "maml on few, trial-1, seed 0", "maml on sinusoid, seed 0", "maml on few, seed 0",
    ]  # fmt: skip
    assert [arm.chosen is not None for task in read_results(tmp_path).tasks for arm in task.arms] == [False, True]
    # Once it has begun, neither may be chosen differently: the runs would not match the table.
    other = {"space": {"inner_lr": [0.5, 0.6]}}
    for number, label in enumerate(("sinusoid", "few")):
        changed = [{**task, "tune": other} if place == number else task for place, task in enumerate(values["tasks"])]
        with pytest.raises(UsageError, match=rf"maml on {label}.*chosen differently"):
            compare(config={**values, "tasks": changed}, out=tmp_path)


def test_a_result_on_test_tasks_is_no_ground_for_a_choice(tmp_path: Path) -> None:
    grid = tuner(tmp_path, space={"cml.gamma": [1, 2]})
    for job in grid.next_runs():
        finish(job, 1.0, split="test")
    with pytest.raises(UsageError, match="not a result on validation tasks"):
        grid.next_runs()


def test_what_was_chosen_in_another_way_is_not_taken(tmp_path: Path) -> None:
    carried_out(tuner(tmp_path, space={"cml.gamma": [1, 2]}))
    assert tuner(tmp_path, space={"cml.gamma": [1, 2]}).chosen is not None
    with pytest.raises(UsageError, match="were chosen with another 'tune'"):
        tuner(tmp_path, space={"cml.gamma": [1, 2, 3]})
    for other in ({"trials": 2}, {"space": {"cml.gamma": [1, 2]}, "seeds": [1]}):
        with pytest.raises(UsageError, match="were chosen with another 'tune'"):
            tuner(tmp_path, **other)


def test_without_optuna_a_search_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    check_tuning(tuning(space={"inner_lr": [0.1, 0.2]}), {"maml": selection()})
    with pytest.raises(UsageError, match=r"pip install 'metareg\[search\]'"):
        check_tuning(tuning(trials=3), {"maml": selection()})


def test_optuna_stays_silent_and_keeps_its_own_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        carried_out(tuner(tmp_path, trials=7))
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


OPTIONS = {
    "steps": 5, "test_tasks": 4, "eval_tasks": 2, "test_inner_steps": [0, 1], "meta_batch": 2, "strategy": "serial",
}  # fmt: skip


class LastFirst:
    """A launcher with two runs at a time, of which the later one ends first."""

    capacity = 2

    def __init__(self, end: Callable[[PlannedRun], str | None]) -> None:
        self.end = end
        self.submitted: list[PlannedRun] = []
        self.under_way: list[PlannedRun] = []

    def submit(self, run: PlannedRun) -> None:
        self.submitted.append(run)
        self.under_way.append(run)

    def wait(self, _seconds: float) -> list[Outcome]:
        run = self.under_way.pop()
        return [Outcome(run, self.end(run))]

    def stop(self) -> None: ...

    def close(self) -> None: ...


def test_runs_are_counted_once_where_a_trial_ends_before_its_last_seed(tmp_path: Path) -> None:
    values = {"seeds": 4, "tune": {"space": {"inner_lr": [0.1, 0.2]}, "seeds": 3}}
    plan = Plan(tmp_path, validate(ComparisonConfig, values, "the comparison"))
    totals = []

    class Watch:
        def on_progress(self, comparison: Comparison) -> None: ...

        def on_run_end(self, comparison: Comparison, _outcome: Outcome) -> None:
            totals.append(comparison.finished + comparison.left + len(comparison.broken))

    def end(run: PlannedRun) -> str | None:
        if (run.is_final, run.path.parent.name, run.seed) == (False, "trial-1", 1):
            diverge(run)
            return "Training diverged."
        finish(run, 1.0)
        return None

    launcher = LastFirst(end)
    comparison = Comparison(plan, launcher)
    comparison.carry_out(StopRequest(), Watch())
    assert (comparison.finished, comparison.left, comparison.broken, {*totals}) == (10, 0, {}, {10})
    # The third seed of the diverged trial was waiting, and is no longer needed.
    assert len(launcher.submitted) == 9

    def break_down(run: PlannedRun) -> str | None:
        return "The disk is full." if run.seed == 2 else finish(run, 1.0)

    comparison = Comparison(Plan(tmp_path / "broken", plan.config), LastFirst(break_down))
    comparison.carry_out(StopRequest(), Watch())
    assert len(comparison.broken) == 2
    assert {*totals} == {10}


def test_a_whole_comparison_chooses_and_touches_the_test_tasks_once(tmp_path: Path) -> None:
    config = {
        "augment": ["cml"],
        "options": {**OPTIONS, "maml.inner_lr": 0.02},
        "tune": {"space": {"inner_lr": [0.001, 0.03, 1e30]}, "options": {"steps": 4}},
    }
    plan = Plan(tmp_path, validate(ComparisonConfig, config, "the comparison"))
    plan.write()
    launcher = InThisProcess()
    comparison = Comparison(plan, launcher)
    output = io.StringIO()
    with ComparisonProgress(Console(file=output)) as progress:
        comparison.carry_out(StopRequest(), progress)

    assert comparison.broken == {}
    assert "diverged maml+cml on sinusoid, trial-2, seed 0: Training diverged" in output.getvalue()
    assert read_results(tmp_path).gaps == ()
    assert "maml+cml on sinusoid: chosen by 3 trials: inner_lr = 0.0" in output.getvalue()
    assert (comparison.finished, comparison.left) == (4, 0)
    (arm,) = plan.arms
    chosen = json.loads((plan.get_tuning_folder(arm) / "chosen.json").read_text())
    tried = {trial["options"]["inner_lr"]: trial for trial in chosen["trials"]}
    assert tried[1e30]["error"].startswith("Training diverged")
    # The comparison's options name the option differently; the chosen value still overrides it.
    for value in (0.001, 0.03):
        score = Tuned(plan.make_trial(arm, chosen["trials"].index(tried[value]), 0, {}).path)
        assert (score.split, score.steps, score.inner_lr) == ("validation", 4, value)
        assert score.mean == tried[value]["score"]
    final = Tuned(tmp_path / "runs" / arm.folder / "seed-0")
    best = min((0.001, 0.03), key=lambda value: tried[value]["score"])
    assert (final.split, final.steps, final.inner_lr) == ("test", 5, best)
    assert [run.is_final for run in launcher.submitted] == [False, False, False, True]

    again = InThisProcess()
    comparison = Comparison(Plan.read(tmp_path), again)
    comparison.carry_out(StopRequest())
    assert (comparison.finished, comparison.left, again.submitted) == (4, 0, [])
    for change in ({"tune": {**config["tune"], "trials": 4}}, {"options": {**config["options"], "steps": 6}}):
        with pytest.raises(UsageError, match="cannot be continued with these changes"):
            compare(config={**config, **change}, out=tmp_path)
    assert Plan.read(tmp_path).config == plan.config


class Tuned:
    """The split, mean score and settings of a run."""

    def __init__(self, path: Path) -> None:
        results = json.loads((path / "results.json").read_text())
        self.split, self.mean = results["split"], results["steps"][-1]["mean"]
        config = yaml.safe_load((path / "config.yaml").read_text())
        self.steps, self.inner_lr = config["steps"], config["algo"]["config"]["inner_lr"]
