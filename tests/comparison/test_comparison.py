"""Comparisons: what is compared, pairing, retries, and the effect of kills, which is none."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import metareg
from comparisons import DEMO, write_comparison
from metareg.cli import app as cli
from metareg.cli.progress import ComparisonProgress
from metareg.cli.tables import print_comparison
from metareg.comparison.archive import unpack_archive
from metareg.comparison.config import ComparisonConfig
from metareg.comparison.plan import Arm, Plan, PlannedRun, check_plan
from metareg.comparison.pool import ERROR_FILE, LocalPool, Outcome, carry_out
from metareg.comparison.results import read_results
from metareg.comparison.runner import Comparison, compare
from metareg.comparison.space import list_dimensions
from metareg.contract.config import validate
from metareg.errors import Interrupted, MetaregError, UsageError
from metareg.runs.options import assemble
from metareg.runs.training import prepare_run
from metareg.util.files import write_text
from metareg.util.signals import StopRequest
from metareg.util.yaml_files import read_yaml
from samples import write_tables

COMPARISONS = Path(__file__).parents[2] / "benchmarks" / "comparisons"
TINY = {
    "steps": 30,
    "test_tasks": 4,
    "eval_tasks": 2,
    "test_inner_steps": [0, 1],
    "strategy": "vectorized",
    "meta_batch": 2,
}


def config_of(**values: Any) -> ComparisonConfig:
    return validate(ComparisonConfig, values, "the comparison")


def plan_of(folder: Path, **values: Any) -> Plan:
    return Plan(folder, config_of(**{"options": TINY, **values}))


# --------------------------------------------------------------------------------------------------------- configuration


def test_every_algorithm_meets_every_augmenter_on_every_task_for_every_seed(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, algo="maml,anil", augment=["none", "dropgrad+cml"], tasks=["sinusoid", {"task": "harmonic"}], seeds=3
    )

    runs = plan.list_runs()

    assert len({run.path for run in runs}) == len(runs) == 2 * 2 * 2 * 3
    assert {run.arm for run in runs} == {
        Arm(algorithm, augmenter, task)
        for algorithm in ("maml", "anil")
        for augmenter in ("none", "dropgrad+cml")
        for task in ("sinusoid", "harmonic")
    }
    chained = next(run for run in runs if run.arm.augmenter == "dropgrad+cml")
    assert chained.config["augment"] == ["dropgrad", "cml"]
    assert chained.path == tmp_path / "runs" / "sinusoid" / "maml+dropgrad+cml" / "seed-0"
    # Runs are ordered by seed, so that early results already form a table.
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_options_reach_the_arms_that_they_are_for(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        algo=["maml", "boil"],
        augment=["none", "cml"],
        tasks=["sinusoid", {"task": "sinusoid", "label": "5-shot", "options": {"shots": 5, "inner_lr": 0.02}}],
        options={"cml.gamma": 0.3, "inner_lr": 0.01},
        arms=[
            {"algo": "boil", "options": {"inner_lr": 0.5}},
            {"algo": "boil", "augment": "cml", "task": "5-shot", "options": {"inner_lr": 0.7}},
        ],
    )

    assert plan.options[Arm("maml", "none", "sinusoid")] == {"inner_lr": 0.01}
    assert plan.options[Arm("maml", "cml", "5-shot")] == {"inner_lr": 0.02, "shots": 5, "cml.gamma": 0.3}
    assert plan.options[Arm("boil", "none", "sinusoid")] == {"inner_lr": 0.5}
    assert plan.options[Arm("boil", "cml", "5-shot")]["inner_lr"] == 0.7


def test_of_two_names_of_an_option_the_later_rule_counts(tmp_path: Path) -> None:
    tasks = [{"task": "sinusoid", "options": {"maml.inner_lr": 0.02}}]
    rules = [
        {"augment": "cml", "options": {"inner_lr": 0.05, "augment.gamma": 0.3}},
        {"options": {"augment.gamma": 0.4}},
    ]
    plan = plan_of(tmp_path, augment="none, cml", tasks=tasks, options={"inner_lr": 0.01}, arms=rules)

    without, with_cml = (assemble(run.config, run.options) for run in plan.list_runs())

    assert without.algorithm.config.inner_lr == 0.02
    assert (with_cml.algorithm.config.inner_lr, with_cml.augmenters[0].config.gamma) == (0.05, 0.4)


def test_names_and_seeds_can_be_written_as_texts() -> None:
    config = config_of(algo="maml, anil", augment="none, dropgrad + cml", tasks="sinusoid, harmonic", seeds="0, 3")

    assert (config.algo, config.augment, config.seeds) == (["maml", "anil"], ["none", "dropgrad+cml"], [0, 3])
    assert [task.label for task in config.tasks] == ["sinusoid", "harmonic"]
    assert config_of(seeds="1000-1002,7").seeds == [1000, 1001, 1002, 7]
    for text in ("5-3", "3-", "-1", "0-9999", "a-b"):
        with pytest.raises(UsageError, match="seeds"):
            config_of(seeds=text)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"augment": "none,cml", "arms": [{"augment": "cml", "options": {"shots": 20}}]},
            r"maml\+cml on sinusoid would not see the tasks of maml on sinusoid: shots is 20, not 10\. .* under "
            r"'tasks'",
        ),
        ({"algo": "maml,metareg:maml"}, "maml on sinusoid and metareg:maml on sinusoid are the same"),
        ({"inner_steps": 3, "options": {"test_inner_steps": [1, 5]}}, r"3 inner steps .* after 1, 5 "),
    ],
)
def test_arms_that_do_not_make_a_paired_comparison(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        check_plan(plan_of(tmp_path, **values))


def test_a_model_can_have_its_tasks_prepared_in_its_own_way(tmp_path: Path) -> None:
    rules = [{"augment": "cml", "options": {"model": "sgc", "sgc.layers": 1}}]
    check_plan(plan_of(tmp_path, augment="none,cml", tasks="csbm", options={"model": "sgc"}, arms=rules))


def test_a_large_comparison_is_planned_at_once(tmp_path: Path) -> None:
    names = ["cml", "dropgrad", "gradient-noise"]
    chains = ["none", *names, *(f"{one}+{other}" for one in names for other in names if one != other)]
    tasks = [{"task": "sinusoid", "label": str(number)} for number in range(6)]
    options = {**TINY, "cml.gamma": 1, "dropgrad.rate": 0.1, "gradient-noise.sigma": 1}
    plan = plan_of(tmp_path, algo="maml,anil,boil", augment=chains, tasks=tasks, seeds=10, options=options)
    assert len(plan.arms) == 180

    began = time.process_time()
    comparison = Comparison(plan, Fake(lambda _run, _time: None))

    assert comparison.left == 1800
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"algo": ["maml", "maml"]}, "the algorithm 'maml' is listed twice"),
        ({"seeds": [1, 1]}, "the seed '1' is listed twice"),
        ({"tasks": ["sinusoid", "sinusoid"]}, "give each of its tasks its own label"),
        ({"arms": [{"algo": "mml", "options": {}}]}, "did you mean 'maml'"),
        ({"arms": [{"task": "sinusoids", "options": {}}]}, "did you mean 'sinusoid'"),
        ({"options": {"seed": 3}}, "use 'seeds'"),
        ({"seeds": 0}, "the number of seeds must be from 1 to 1000, not 0"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": [2**63]}, "seeds"),
        ({"seeds": "many"}, "a number of seeds .5., seeds separated by commas"),
        ({"augment": "none,"}, "a name is missing"),
        ({"augment": ["cml+"]}, "a name is missing"),
        ({"augment": ["none+cml"]}, "'none' cannot be part of a chain"),
        ({"tasks": "sinusoid,"}, "a name is missing"),
        (
            {"tasks": [{"task": "sinusoid", "label": label} for label in ("5-shot", "5 shot")]},
            "share the folder '5-shot'",
        ),
        ({"options": {"observers": ["jsonl"]}}, "the runs of a comparison have none"),
        ({"algos": ["maml"]}, "did you mean 'algo'"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        config_of(**values)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--algo", "mmal"], "maml"),
        (["--augment", "none,clm"], "cml"),
        (["--set", "inner_ls=1"], "inner_lr"),
        (["--set", "cml.gamma=1"], "cml"),
        (["--set", "inner_lr=-1"], "greater than 0"),
        (["--seeds", "many"], "a number of seeds (5)"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--launcher", "slurm"], "There is no launcher named 'slurm'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_use_writes_nothing(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    assert cli.run(["compare", *arguments, "--out", "c"]) == 2

    errors = capsys.readouterr().err
    assert sentence in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "c").exists()


def test_what_is_said_stands_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"algo": ["anil"], "seeds": 2, "options": {"steps": 7, "inner_lr": 0.1}}))

    monkeypatch.setattr("metareg.comparison.runner.LocalPool", lambda *_: Fake(lambda _run, _time: None))
    out = tmp_path / "c"
    config = compare("maml, boil", seeds="3,5", config=file, out=out, steps=9, inner_lr=0.2, threads=1).plan.config

    assert (config.algo, config.seeds) == (["maml", "boil"], [3, 5])
    assert config.options == {"steps": 9, "inner_lr": 0.2, "threads": 1}


def test_what_is_said_stands_before_whatever_the_file_says(tmp_path: Path) -> None:
    own = {"trials": 9, "space": {"inner_lr": [0.1, 0.2]}, "options": {"steps": 3, "test_tasks": 5}}
    content = {
        "augment": "none, cml",
        "tasks": ["harmonic", {"task": "sinusoid", "options": {"steps": 6, "maml.inner_lr": 0.3}, "tune": own}],
        "arms": [{"augment": "cml", "options": {"steps": 5, "inner_lr": 0.4}}],
        "tune": own,
    }
    options = {"inner_lr": 0.7, "threads": 1, "test_inner_steps": [0, 3], "steps": 9}

    config = config_of(**content).override(options=options, search=20)

    plan = Plan(tmp_path, config)
    for arm in plan.arms:
        assert plan.options[arm]["steps"] == plan.make_trial(arm, 0, 0, {}).options["steps"] == 9
        assert assemble({"algo": "maml"}, plan.options[arm]).algorithm.config.inner_lr == 0.7
        tuning = plan.get_tuning(arm)
        assert tuning is not None
        assert (tuning.trials, tuning.space, tuning.options) == (20, {"inner_lr": [0.1, 0.2]}, {"test_tasks": 5})
    assert config.options["threads"] == 1
    # The same options find their own rule again, and change nothing.
    assert config.override(options=options, search=20) == config


@pytest.mark.parametrize(
    "content",
    ["options: [1]", "options: abc", "tasks: 5", "tasks: [5]", "arms: 5", "arms: [5]", "tune: 5", "tune: {options: 5}"],
)
def test_a_malformed_file_beside_options_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"c\.yaml, (options|tasks|arms|tune)"):
        compare(config=tmp_path / "c.yaml", out=tmp_path / "c", steps=3, search=4)


def test_flags_alone_change_what_a_folder_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metareg.comparison.runner.LocalPool", lambda *_: Fake(lambda _run, _time: None))
    monkeypatch.setattr("metareg.cli.tables.print_comparison", lambda *_: None)
    folder = tmp_path / "c"
    options = [f"--set={key}={value}" for key, value in TINY.items()]

    def carried_out(*arguments: str) -> int:
        code = cli.run(["compare", *arguments, f"--out={folder}"])
        for run in Plan.read(folder).list_runs():
            write_text(run.path / "config.yaml", "")
        return code

    assert carried_out("--augment=none,cml", *options) == 0
    assert carried_out("--seeds=2") == carried_out("--augment=none,cml,dropgrad") == 0
    config = Plan.read(folder).config
    assert (config.augment, config.seeds, config.options["steps"]) == (["none", "cml", "dropgrad"], [0, 1], 30)
    assert carried_out("--augment=none,dropgrad") == 2
    assert "it has begun maml+cml on sinusoid, seed 0, which the new configuration omits" in " ".join(
        capsys.readouterr().err.split()
    )
    assert Plan.read(folder).config == config


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, augment=["none", "cml"], seeds=2, notes="Über *alles*.", arms=[{"augment": "cml", "options": {}}]
    )
    plan.write()

    assert Plan.read(tmp_path).config == plan.config
    assert Plan.read(tmp_path).list_runs() == plan.list_runs()


# --------------------------------------------------------------------------------------------------------------- pairing


def test_the_same_seed_gives_every_arm_the_same_weights_and_tasks(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, algo=["maml", "metasgd"], augment=["none", "cml", "gradient-noise"], seeds=2)
    weights: dict[int, list[dict[str, torch.Tensor]]] = {0: [], 1: []}
    tasks: dict[tuple[int, str], list[torch.Tensor]] = {}
    for run in plan.list_runs():
        learner, source = prepare_run(assemble(run.config, run.options))
        weights[run.seed].append(
            {name: value for name, value in learner.meta_parameters.items() if name[:4] in ("body", "head")}
        )
        for split in ("train", "test"):
            tasks.setdefault((run.seed, split), []).append(source.episodes(split, range(3), run.seed)[0].support_x)

    for first, *others in weights.values():
        assert len(first) == 6
        assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    for inputs in tasks.values():
        assert all(torch.equal(inputs[0], other) for other in inputs[1:])
    name = next(iter(weights[0][0]))
    assert not torch.equal(weights[0][0][name], weights[1][0][name])
    assert not torch.equal(tasks[0, "test"][0], tasks[1, "test"][0])


# ---------------------------------------------------------------------------------------------------------- what is run


class Fake:
    """A launcher whose runs end with given outcomes, one per poll."""

    capacity = 2

    def __init__(self, ends: Callable[[PlannedRun, int], str | None], again: bool = True) -> None:
        self.ends, self.again = ends, again
        self.submitted: list[PlannedRun] = []
        self._under_way: list[PlannedRun] = []
        self.stopped = False

    def submit(self, run: PlannedRun) -> None:
        self.submitted.append(run)
        self._under_way.append(run)
        assert len(self._under_way) <= self.capacity

    def wait(self, seconds: float) -> list[Outcome]:  # noqa: ARG002
        if not self._under_way:
            return []
        run = self._under_way.pop(0)
        error = self.ends(run, self.submitted.count(run))
        if error is None:
            run.path.mkdir(parents=True)
            (run.path / "results.json").write_text("{}")
        return [Outcome(run, error, self.again and error is not None)]

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        pass


def test_what_dies_is_tried_again_and_what_stays_broken_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, augment=["none", "cml"], seeds=3)
    once, always = plan.list_runs()[1], plan.list_runs()[4]
    launcher = Fake(lambda run, time: "it died" if run == always or (run == once and time == 1) else None)
    comparison = Comparison(plan, launcher)
    assert comparison.left == 6

    shown = io.StringIO()
    comparison.carry_out(StopRequest(), ComparisonProgress(Console(file=shown, width=200)))

    assert list(comparison.broken) == [always.path]
    lines = shown.getvalue().splitlines()
    assert sum(line.startswith("failed") for line in lines) == 2
    assert f"broken {always}: it died" in lines
    assert launcher.submitted.count(always) == launcher.submitted.count(once) == 2
    assert (comparison.finished, comparison.left) == (5, 0)

    again = Fake(lambda run, time: None)
    comparison = Comparison(plan, again)
    comparison.carry_out(StopRequest())
    assert again.submitted == [always]
    assert (comparison.finished, comparison.broken) == (6, {})


def test_what_repeats_itself_is_not_tried_again(tmp_path: Path) -> None:
    launcher = Fake(lambda run, time: "it diverges", again=False)
    comparison = Comparison(plan_of(tmp_path, seeds=2), launcher)

    comparison.carry_out(StopRequest())

    assert len(launcher.submitted) == len(comparison.broken) == 2


def test_a_stop_reaches_the_runs(tmp_path: Path) -> None:
    stop = StopRequest()

    def ends(run: PlannedRun, _time: int) -> None:
        stop.asked = run.seed == 1

    launcher = Fake(ends)
    with pytest.raises(Interrupted, match=r"metareg compare --out .* continues"):
        Comparison(plan_of(tmp_path, seeds=5), launcher).carry_out(stop)
    assert launcher.stopped
    assert len(launcher.submitted) <= 3


def test_the_time_left_is_that_of_similar_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, tasks=["sinusoid", "harmonic"], seeds=3)
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def ends(run: PlannedRun, _time: int) -> None:
        nonlocal now
        now += 10.0 if run.arm.task == "sinusoid" else 30.0

    launcher = Fake(ends)
    launcher.capacity = 1
    seen = []

    class Watch:
        def on_progress(self, comparison: Comparison) -> None:
            pass

        def on_run_end(self, comparison: Comparison, _outcome: Outcome) -> None:
            seen.append(comparison.seconds_left)

    Comparison(plan, launcher).carry_out(StopRequest(), Watch())
    assert seen == [50.0, 80.0, 70.0, 40.0, 30.0, 0.0]


def test_another_comparison_does_not_take_over_what_was_run(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "c", seeds=1)
    plan.write()
    (plan.list_runs()[0].path).mkdir(parents=True)
    (plan.list_runs()[0].path / "config.yaml").write_text("")

    with pytest.raises(UsageError, match=r"inner_lr of maml on sinusoid, seed 0.*0\.5"):
        compare(config=config_of(options={**TINY, "inner_lr": 0.5}), out=tmp_path / "c")
    with pytest.raises(UsageError, match=r"maml on sinusoid, seed 0"):
        compare(seeds=[1], out=tmp_path / "c")
    assert Plan.read(tmp_path / "c").config == plan.config
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="contains no comparison"):
        compare("maml", out=tmp_path / "other")
    with pytest.raises(UsageError, match="say what to compare"):
        compare(out=tmp_path / "nothing")


@pytest.mark.parametrize("file", sorted(COMPARISONS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_shipped_comparisons_are_whole(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "comparisons/tables" in file.read_text():
        assert cli.run(["data", "table-folder", "--example", "comparisons/tables"]) == 0
    plan = Plan(tmp_path, validate(ComparisonConfig, read_yaml(file), str(file)))
    for arm in plan.arms:
        run = plan.make_run(arm, plan.config.seeds[0], Path("runs"), {})
        assemble(run.config, run.options)
        tuning = plan.get_tuning(arm)
        if tuning:
            trial = plan.make_trial(arm, 0, plan.get_tuning_seeds(arm)[0], {})
            assert list_dimensions(tuning, assemble(trial.config, trial.options)), f"{arm} has nothing to choose"
            fresh = not set(plan.get_tuning_seeds(arm)) & set(plan.config.seeds)
            assert fresh or not plan.config.plan, "a plan's seeds had no part in choosing settings"


def test_a_plan_is_fixed_once_a_run_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparison, "carry_out", lambda *_: None)
    for text in ("Five seeds.", "Eight seeds."):  # no run has begun yet
        compare(config=config_of(plan=text), out=tmp_path)
    begun = Plan.read(tmp_path).list_runs()[0].path
    begun.mkdir(parents=True)
    (begun / "config.yaml").write_text("")
    with pytest.raises(UsageError, match="plan was written before its first run"):
        compare(config=config_of(plan="Until it is significant."), out=tmp_path)
    assert compare(config=config_of(plan="Eight seeds.\n", notes="More."), out=tmp_path).plan.config.notes == "More."


def test_what_another_process_adds_meanwhile_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_of(tmp_path).write()
    extended = plan_of(tmp_path, augment="none,cml")

    def extend(_plan: Plan) -> None:
        extended.write()
        write_text(extended.list_runs()[1].path / "config.yaml", "")

    monkeypatch.setattr("metareg.comparison.runner.check_plan", extend)
    with pytest.raises(UsageError, match=r"maml\+cml on sinusoid, seed 0"):
        compare(out=tmp_path)
    assert Plan.read(tmp_path).config == extended.config


def test_python_says_what_the_command_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metareg.comparison.runner.LocalPool", lambda *_: Fake(lambda _run, _time: "no", again=False))
    monkeypatch.setattr("metareg.cli.tables.print_comparison", lambda *_: None)

    space = {"inner_lr": [0.01, 0.1], "outer_lr": None}
    comparison = metareg.compare("maml", ["none", "cml"], "sinusoid", seeds=2, space=space, search=3, steps=9)

    assert comparison.path == Path("comparisons/sinusoid")
    assert repr(comparison).startswith("<Comparison at comparisons/sinusoid: 2 arms × 2 seeds; runs: 0 finished, ")
    searched = ["--set=inner_lr=0.01,0.1", "--search=3", "--search-over=outer_lr"]
    assert cli.run(["compare", "--augment=none,cml", "--seeds=2", "--steps=9", *searched, "--out=flags"]) == 1
    said, flags = Plan.read("comparisons/sinusoid").config, Plan.read("flags").config
    assert said == flags.model_copy(update={"algo": ["maml"]})
    with pytest.raises(UsageError, match="'out'"):
        metareg.compare(config={"tasks": ["harmonic"]})


@pytest.mark.parametrize("key", ["out", "jobs", "seeds", "search"])
def test_what_has_a_flag_is_not_set(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", f"--set={key}=1", f"--out={tmp_path / 'c'}"]) == 2
    assert f"--set cannot set '{key}'" in capsys.readouterr().err


def test_values_are_those_that_a_file_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Fake(lambda _run, _time: None)
    monkeypatch.setattr("metareg.comparison.runner.LocalPool", lambda *_: launcher)

    compare(out=tmp_path / "c", **TINY, device=Path("cpu"))

    assert launcher.submitted[0].options["device"] == "cpu"
    with pytest.raises(UsageError, match="values must be writable to a file"):
        compare(out=tmp_path / "d", device=object())
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("options", [{"steps": 5000}, {}])  # the comparison's, or the task's
def test_a_run_that_was_trained_for_longer_does_not_count(options: dict[str, Any], tmp_path: Path) -> None:
    plan = write_comparison(tmp_path, {**DEMO, "tune": None, "options": options})
    run = plan.list_runs()[3]
    write_text(run.path / "config.yaml", "algo:\n  config:\n    steps: 5000\ninner_steps: 1\nsteps: 9000\n")

    (gap,) = read_results(tmp_path).gaps

    assert (gap.what, gap.seed, gap.state) == (str(run.arm), str(run.seed), "broken")
    assert gap.reason == "it was trained for 9000 steps instead of the comparison's 5000"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "."], "--out takes a file; . is a folder."),
        (
            ["--out", "x.pdf"],
            "No format's files end in .pdf; use .md, .html, .tex, .csv, .scores.csv, .pairs.csv, or choose the format "
            "with --format.",
        ),
        (["--format", ""], "There is no format of reports named ''"),
    ],
)
def test_a_report_that_cannot_be_is_not_written(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_comparison(tmp_path / "c", {"seeds": 2})

    assert cli.run(["report", "c", *arguments]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("encoding", "output", "sentence"),
    [
        (
            "latin-1",
            os.devnull,
            "Error: The output's encoding, latin-1, cannot represent '\\u2013'; use --out FILE, which is written in "
            "UTF-8.",
        ),
        ("utf-8", "/dev/full", "Error: The output cannot be written: No space left on device."),
    ],
)
def test_an_output_that_cannot_take_a_report(encoding: str, output: str, sentence: str, tmp_path: Path) -> None:
    if not Path(output).exists():
        pytest.skip(f"there is no {output}")
    write_comparison(tmp_path, {"title": "0–1", "seeds": 2})
    with Path(output).open("w") as file:
        command = [sys.executable, "-m", "metareg", "report", str(tmp_path)]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        ended = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, env=environment, check=False, text=True)
    assert (ended.returncode, ended.stderr.strip()) == (1, sentence)


def test_the_end_shows_the_answer_and_what_is_missing(tmp_path: Path) -> None:
    plan = write_comparison(tmp_path / "c", {**DEMO, "tune": None})
    lost = plan.list_runs()[5]
    (lost.path / "results.json").unlink()
    comparison = Comparison(plan, Fake(lambda _run, _time: "the disk is full", again=False))
    comparison.carry_out(StopRequest())
    shown = io.StringIO()

    print_comparison(comparison, Console(file=shown, width=120))

    text = shown.getvalue()
    assert "sinusoid, 10-shot" in text
    assert "omniglot-small, 5-way 1-shot" in text
    assert text.count("better") >= 2
    assert f"broken      {lost}: the disk is full" in text
    assert (tmp_path / "c" / "report.html").is_file()


# ------------------------------------------------------------------------------------------------------------- processes


def test_what_goes_wrong_in_a_run_is_kept_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = plan_of(tmp_path, options={**TINY, "inner_lr": 1e30, "steps": 3}).list_runs()[0]

    diverged = carry_out(run)

    assert diverged.error is not None
    assert not diverged.again
    assert (run.path / ERROR_FILE).read_text().startswith("DivergenceError: Training diverged at step")

    monkeypatch.setattr("metareg.runs.training.train", lambda **_: 1 / 0)
    crashed = carry_out(run)
    assert crashed.again
    assert "Traceback" in (run.path / ERROR_FILE).read_text()

    def full(**_: Any) -> None:
        raise MetaregError("The disk is full.")

    monkeypatch.setattr("metareg.runs.training.train", full)
    assert carry_out(run) == Outcome(run, "The disk is full.", again=True)
    monkeypatch.setattr("metareg.runs.training.train", lambda **_: None)
    assert carry_out(run) == Outcome(run)
    assert not (run.path / ERROR_FILE).exists()


def outcomes(pool: LocalPool, count: int) -> list[Outcome]:
    found: list[Outcome] = []
    deadline = time.monotonic() + 60
    while len(found) < count and time.monotonic() < deadline:
        found += pool.wait(0.2)
    return found


LEAVES_CHILDREN = """
import os, time
for leave_session in (False, True):
    if os.fork() == 0:
        if leave_session:
            os.setsid()
        time.sleep(30)
        os._exit(0)
"""


def test_a_process_that_dies_is_reported_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files in the working directory must not affect a run; a child that outlives its process keeps its output open.
    (tmp_path / "queue.py").write_text("raise SystemExit('a file of the user')")
    write_text(tmp_path / "path" / "sitecustomize.py", LEAVES_CHILDREN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setattr("metareg.comparison.pool._SECONDS_TO_CLOSE", 1.0)
    long = plan_of(tmp_path, options={**TINY, "steps": 1_000_000}).list_runs()[0]
    pool = LocalPool(1, 1, tmp_path / "workers.log")
    try:
        pool.submit(long)
        (worker,) = pool._workers
        worker.process.kill()
        sentence = f"The process of the run was ended by SIGKILL; its output is in {tmp_path / 'workers.log'}."
        assert outcomes(pool, 1) == [Outcome(long, sentence, again=True)]
        short = plan_of(tmp_path, tasks=["harmonic"], options={**TINY, "steps": 2}).list_runs()[0]
        pool.submit(short)
        assert outcomes(pool, 1) == [Outcome(short)]
        assert short.finished
    finally:
        began = time.monotonic()
        pool.close()
    assert time.monotonic() - began < 20


def record_pools(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[str]]]:
    """Record the processes, threads and GPUs that comparisons request from pools; nothing is trained."""
    pools: list[tuple[int, int, list[str]]] = []

    def make_pool(jobs: int, threads: int, _log: Path, gpus: list[str]) -> Fake:
        pools.append((jobs, threads, gpus))
        return Fake(lambda _run, _time: "no", again=False)

    monkeypatch.setattr("metareg.comparison.runner.LocalPool", make_pool)
    return pools


def test_there_is_a_process_for_each_gpu_or_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = record_pools(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {1, 4, 6}, raising=False)

    compare(out=tmp_path / "gpu", threads=1)
    compare(out=tmp_path / "cpu", threads=1, device="cpu")

    assert pools == [(2, 1, ["3", "5"]), (3, 1, [])]


def test_processes_share_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Worker:
        process, run = SimpleNamespace(poll=lambda: None), None

        def __init__(self, _threads: int, _log: Path, _outcomes: Any, gpu: str | None) -> None:
            self.gpu = gpu
            given.append(gpu)

        def start(self, run: Any) -> None:
            self.run = run

    monkeypatch.setattr("metareg.comparison.pool._Worker", Worker)
    pool = LocalPool(3, 1, tmp_path / "workers.log", ["3", "5"])
    for run in plan_of(tmp_path, seeds=3).list_runs():
        pool.submit(run)
    assert given == ["3", "5", "3"]


@pytest.mark.parametrize(
    ("values", "jobs", "threads", "capacity"),
    [
        ({"seeds": 16}, None, 1, 16), ({"seeds": 1}, None, 16, 1), ({"seeds": 3}, None, 5, 3), ({"seeds": 3}, 2, 8, 2),
        ({"seeds": 1, "options": {"threads": 4}}, None, 4, 4),
        ({"seeds": 1, "tune": {"space": {"inner_lr": [0.1, 0.2]}}}, None, 1, 16),
    ],
)  # fmt: skip
def test_few_runs_leave_the_cores_to_their_threads(
    values: dict[str, Any],
    jobs: int | None,
    threads: int,
    capacity: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(16)), raising=False)
    pools = record_pools(monkeypatch)

    comparison = compare(config=values, out=tmp_path / "new", jobs=jobs)

    assert pools == [(capacity, threads, [])]
    assert comparison.plan.config.options == values.get("options", {})


def test_a_comparison_continues_where_there_are_other_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = record_pools(monkeypatch)
    values = {"seeds": 1, "options": {**TINY, "threads": 8}}  # as earlier versions stored the threads of their machine
    run = compare(config=values, out=tmp_path / "new").plan.list_runs()[0]
    run.path.mkdir(parents=True)
    (run.path / "config.yaml").touch()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(2)), raising=False)

    compare(config={**values, "options": TINY}, out=tmp_path / "new")

    assert [threads for _, threads, _ in pools] == [8, 2]


def test_a_comparison_takes_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="A comparison must be started as one process"):
        compare("maml", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_all_runs_have_the_same_time_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metareg.comparison.pool._GRACE_SECONDS", 1.0)
    pool = LocalPool(3, 1, tmp_path / "workers.log")
    stuck = SimpleNamespace(process=SimpleNamespace(terminate=lambda: None, wait=time.sleep))
    monkeypatch.setattr(pool, "_workers", [stuck] * 3)

    began = time.monotonic()
    pool.stop()

    assert 1.0 <= time.monotonic() - began < 2.5


KILLED = {**TINY, "steps": 120, "log_every": 10, "checkpoint_every": 25, "threads": 1, "strategy": "serial"}


def begin(folder: Path) -> subprocess.Popen[bytes]:
    """Start the comparison in a separate process, and wait until its runs have progressed."""
    before = sum(path.stat().st_size for path in folder.rglob("timing.jsonl"))
    options = [f"--set={key}={value}" for key, value in KILLED.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "metareg", "compare", "--augment=none,cml", "--jobs=1", *options, f"--out={folder}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while sum(path.stat().st_size for path in folder.rglob("timing.jsonl")) <= before:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    return process


def found(folder: Path) -> dict[str, Any]:
    """Return the results of a comparison."""
    return {
        str(path.relative_to(folder)): json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
        for name in ("results.json", "metrics.jsonl")
        for path in (folder / "runs").rglob(name)
    }


def test_a_comparison_that_is_killed_and_run_again_ends_the_same(tmp_path: Path) -> None:
    config = config_of(augment=["none", "cml"], options=KILLED)
    for run in Plan(tmp_path / "whole", config).list_runs():
        assert carry_out(run).error is None
    expected = found(tmp_path / "whole")
    assert len(expected) == 4

    killed = tmp_path / "killed"
    process = begin(killed)
    process.kill()
    process.wait()
    assert len(found(killed)) < 4
    process = begin(killed)
    process.send_signal(signal.SIGINT)
    assert process.wait() == Interrupted.exit_code
    assert found(killed) != expected

    assert compare(out=killed, jobs=2).broken == {}
    assert found(killed) == expected


# ----------------------------------------------------------------------------------------------------- the tasks' data


def test_data_is_that_of_each_task_that_reads_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables, folder, archive = write_tables(tmp_path / "sensors"), tmp_path / "compared", tmp_path / "all.tar.xz"

    def command(name: str, *arguments: object) -> tuple[int, str]:
        code = cli.run([name, *map(str, arguments)])
        return code, capsys.readouterr().err

    size = ["--shots", 3, "--query", 3, "--steps", 2, "--jobs", 1, "--strategy", "serial"]
    short = [part for each in ("meta_batch=2", "eval_tasks=2", "test_tasks=2") for part in ("--set", each)]
    task = ["--task", "sinusoid,table-folder", "--set", "table-folder.target=y"]
    code, errors = command("compare", *task, "--data", tables, *size, *short, "--out", folder)
    assert code == 0, errors
    stored = Plan.read(folder)
    assert [each.options for each in stored.config.tasks] == [{}, {"task.data": str(tables)}]
    assert [metareg.Run.load(run.path).config.task.config.get("data") for run in stored.list_runs()] == [
        None,
        str(tables),
    ]

    moved = tables.rename(tmp_path / "moved")
    code, errors = command("compare", "--out", folder, "--data", write_tables(tmp_path / "other", 3.0), "--seeds", 2)
    assert code == 2
    assert "its first train task is different" in errors
    assert Plan.read(folder).config == stored.config
    code, errors = command("compare", "--out", folder, "--data", moved, "--seeds", 2, "--jobs", 1)
    assert code == 0, errors
    assert all(run.finished for run in Plan.read(folder).list_runs())

    assert command("report", folder, "--archive", archive, "--out", tmp_path / "page.md")[0] == 0
    with unpack_archive(archive) as unpacked:
        for file in unpacked.rglob("*"):
            assert not file.is_file() or str(tmp_path) not in file.read_text(), file
    again = tmp_path / "again"
    code, errors = command("compare", "--archive", archive, "--out", again, "--jobs", 1)
    assert code == 2
    assert "moved" in errors
    code, errors = command("compare", "--archive", archive, "--out", again, "--data", moved, "--seeds", 3, "--jobs", 1)
    assert code == 0, errors
    row = ["--row", "table-folder/maml", "--seeds", 1, "--jobs", 1, "--data", moved]
    code, errors = command("reproduce", archive, *row, "--out", tmp_path / "row")
    assert code == 0, errors

    code, errors = command("compare", "--task", "sinusoid", "--data", moved, "--out", tmp_path / "none")
    assert code == 2
    assert "none of these reads any: sinusoid" in errors
    assert not (tmp_path / "none").exists()
