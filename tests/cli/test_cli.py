"""The command line: every command on tiny runs, and every kind of bad input."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pictures
import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file

from metareg.cli import app as cli
from metareg.cli.tables import describe_installation
from metareg.registry.plugins import DISABLE_VARIABLE
from metareg.runs.config import RunConfig

TINY = [
    "--steps", "3", "--set", "eval_tasks=2", "--set", "test_tasks=3", "--set", "test_inner_steps=[0, 1]",
    "--strategy", "serial",
]  # fmt: skip


class Outcome:
    """An exit code, and the output of each stream."""

    def __init__(self, code: int, output: str, errors: str) -> None:
        self.code, self.output, self.errors = code, output, errors


Command = Callable[..., Outcome]


@pytest.fixture
def metareg(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run commands in an empty folder; the output is not a terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(DISABLE_VARIABLE, "")
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = cli.run(arguments)
        captured = capsys.readouterr()
        for text in captured:
            assert "Traceback" not in text
            assert "\x1b" not in text
            assert "\r" not in text
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with plots."""
    path = tmp_path_factory.mktemp("runs") / "run"
    with pictures.drawn():
        assert cli.run(["train", "--augment", "cml", "--out", str(path), *TINY]) == 0
    return path


def test_help_says_what_the_defaults_are(metareg: Command) -> None:
    for command, default in (
        ("train", "The algorithm (maml)."),
        ("compare", "Tasks, separated by commas (sinusoid)."),
        ("eval", "METAREG_DATA"),
    ):
        assert default in " ".join(metareg(command, "--help").output.replace("│", " ").split())


def test_every_option_with_a_flag_has_it_in_train(metareg: Command) -> None:
    shown = " ".join(metareg("train", "--help").output.replace("│", " ").split())
    for name, field in RunConfig.model_fields.items():
        flag = RunConfig.list_flags().get(name)
        assert (f" {flag or '--' + name.replace('_', '-')} " in shown) == (flag is not None), name
        if flag is not None:
            assert (field.description or "").removesuffix(".") in shown
    for choice in ("serial", "traced", "vectorized", "compiled", "rollback", "recompute", "bf16"):
        assert choice in shown


def test_the_same_flags_mean_the_same_in_every_command(metareg: Command) -> None:
    """Flags for the size of tasks, the model and the device are the same in all commands."""
    shown = {
        command: metareg(command, "--help").output for command in ("train", "compare", "eval", "analyse", "predict")
    }
    for flag in ("--ways", "--shots", "--query", "--data", "--target"):
        assert all(f"{flag} " in shown[command] for command in ("train", "compare", "eval")), flag
    assert all("--device " in each for each in shown.values())
    assert not [
        line for each in shown.values() for line in each.splitlines() if re.search(r"--[\w-]+ +(-\w +)?<", line)
    ]
    own = {"algo", "augment", "task", "seed", "observers"}
    for name, flag in RunConfig.list_flags().items():
        assert name in own or f"{flag} " in shown["compare"], flag
    assert "write '--seeds'" in metareg("compare", "--seed", "3").errors


def test_baselines_are_for_a_runs_own_tasks(metareg: Command) -> None:
    for given in (("--ways", "3"), ("--task", "cub"), ("--set", "size=20"), ("--target", "y")):
        outcome = metareg("eval", "RUN", "--baselines", *given)
        assert outcome.code == 2
        assert "run's own test tasks" in outcome.errors


def test_resume_takes_what_may_change(metareg: Command) -> None:
    shown = metareg("resume", "--help").output
    assert all(flag in shown for flag in ("--steps", "--strategy", "--memory", "--chunk", "--device", "--on-nonfinite"))
    assert not any(flag in shown for flag in ("--seed", "--algo", "--inner-steps", "--first-order"))


# --------------------------------------------------------------------------------------------------------------- training


def test_train_writes_a_whole_run(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["steps"] == 3
    assert config["algo"] == {"name": "maml", "config": {"inner_lr": 0.01}}
    assert [each["name"] for each in config["augment"]] == ["cml"]
    results = json.loads((finished / "results.json").read_text())
    assert results["metric"] == "mse"
    assert results["higher_is_better"] is False
    assert [row["inner_steps"] for row in results["steps"]] == [0, 1]
    for row in results["steps"]:
        assert row["tasks"] == len(row["scores"]) == 3
        assert row["mean"] == pytest.approx(sum(row["scores"]) / 3)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} >= {"train", "validation"}
    assert "cml.colearner_metric" in next(line for line in lines if line["split"] == "train")
    environment = json.loads((finished / "environment.json").read_text())
    assert {"maml", "cml", "sinusoid"} <= {plugin["name"] for plugin in environment["plugins"]}
    for name in ("learning-curve", "inner-steps", "fits"):
        assert (finished / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "checkpoints" / "final.safetensors").is_file()
    assert not [path.name for path in finished.rglob("*") if path.name.endswith(".tmp")]


def test_train_prints_plain_lines(metareg: Command, tmp_path: Path) -> None:
    with pictures.drawn():
        outcome = metareg("train", *TINY, "--strategy", "auto", "--out", "here")
    assert outcome.code == 0
    assert "inner-steps.png" in outcome.output
    assert "mse" in outcome.output
    assert (tmp_path / "here" / "results.json").is_file()


def test_a_run_again_from_its_configuration(metareg: Command, finished: Path, tmp_path: Path) -> None:
    assert metareg("train", "--config", str(finished / "config.yaml"), "--out", "again").code == 0
    first, again = (json.loads((path / "results.json").read_text()) for path in (finished, tmp_path / "again"))
    assert first == again
    assert (finished / "config.yaml").read_text() == (tmp_path / "again" / "config.yaml").read_text()
    weights = [(path / "checkpoints" / "final.safetensors").read_bytes() for path in (finished, tmp_path / "again")]
    assert weights[0] == weights[1]


def test_the_configuration_is_printed_as_a_run_would_store_it(metareg: Command, finished: Path, tmp_path: Path) -> None:
    printed = metareg("train", "--augment", "cml", *TINY, "--print-config")
    assert (printed.code, printed.output) == (0, (finished / "config.yaml").read_text())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.yaml").write_text(printed.output)
    assert metareg("train", "--config", "config.yaml", "--print-config").output == printed.output


def test_options_stand_before_the_file(metareg: Command, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("steps: 50\nseed: 3\nalgo: anil\n")
    assert (
        metareg("train", "--config", "c.yaml", "--algo", "boil", *TINY, "--set", "inner_lr=0.2", "--out", "r").code == 0
    )
    config = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert (config["steps"], config["seed"], config["algo"]) == (3, 3, {"name": "boil", "config": {"inner_lr": 0.2}})


def test_a_flag_stands_before_set(metareg: Command, tmp_path: Path) -> None:
    outcome = metareg("train", *TINY, "--set", "steps=9", "--set", "seed=4", "--seed", "5", "--out", "r")
    assert outcome.code == 0
    for option in ("steps=9", "seed=4"):
        assert f"--set {option} is not used" in outcome.errors
    config = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert (config["steps"], config["seed"]) == (3, 5)


def test_paths_begin_with_the_home_folder(metareg: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "c.yaml").write_text("steps: 2\n")
    assert metareg("train", "--config=~/c.yaml", "--out=~/r", *TINY[2:]).code == 0
    assert (tmp_path / "home" / "r" / "results.json").is_file()
    assert metareg("export", "~/r", "--to=~/learner.safetensors").code == 0
    assert (tmp_path / "home" / "learner.safetensors").is_file()
    assert not (tmp_path / "~").exists()


def test_runs_without_a_name_get_new_folders(metareg: Command, tmp_path: Path) -> None:
    assert metareg("train", *TINY).code == metareg("train", *TINY).code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


BAD = [
    (["--algo", "mamll"], "no algorithm named 'mamll'; did you mean 'maml'"),
    (["--augment", "cml,dropgrda"], "no augmenter named 'dropgrda'; did you mean 'dropgrad'"),
    (["--task", "sinusiod"], "no task named 'sinusiod'; did you mean 'sinusoid'"),
    (["--model", "mpl"], "no model named 'mpl'; did you mean 'mlp'"),
    (["--observe", "tensorbord"], "no observer named 'tensorbord'"),
    (["--steps", "0"], "steps = 0 cannot be used"),
    (["--steps", "-5"], "steps = -5 cannot be used"),
    (["--steps", "many"], "Invalid value for '--steps'"),
    (["--steps", "1.5"], "Invalid value for '--steps'"),
    (["--set", "algo=maml"], "--set cannot set 'algo'; use --algo"),
    (["--set", "out=there"], "--set cannot set 'out'"),
    (["--meta-batch", "0"], "meta_batch = 0 cannot be used"),
    (["--inner-steps", "0"], "inner_steps = 0 cannot be used"),
    (["--shots", "0"], "shots = 0 cannot be used"),
    (["--ways", "5"], "no option of task 'sinusoid' named 'ways'"),
    (["--seed", "-1"], "seed = -1 cannot be used"),
    (["--chunk", "0"], "chunk = 0 cannot be used"),
    (["--strategy", "fast"], "strategy = 'fast' cannot be used"),
    (["--strategy", "compild"], "did you mean 'compiled'?"),
    (["--norm", "support"], "'--norm' has been renamed: it is '--bn-statistics' now"),
    (["--norm=support"], "it is '--bn-statistics' now"),
    (["--log-every", "5"], "no option named '--log-every' in this command; write '--set log_every=VALUE'"),
    (["--observers", "tensorboard"], "write '--observe'"),
    (["--memory", "none"], "memory = 'none' cannot be used"),
    (["--bn-statistics", "batch"], "bn_statistics = 'batch' cannot be used"),
    (["--device", "cuda:99"], "no device 'cuda:99' here"),
    (["--device", "toaster"], "no device 'toaster' here; there is cpu"),
    (["--set", "inner_lr=-1"], "inner_lr = -1 cannot be used"),
    (["--set", "inner_lr=nan"], "inner_lr = nan cannot be used"),
    (["--set", "inner_lr=fast"], "inner_lr = 'fast' cannot be used"),
    (["--set", "inner_lrr=1"], "did you mean 'inner_lr'"),
    (["--set", "inner_lr"], "--set takes KEY=VALUE; got 'inner_lr'"),
    (["--set", "cml.gamma=1"], "no plugin of this run named 'cml'"),
    (["--config", "nosuch.yaml"], "There is no configuration file nosuch.yaml"),
    (["--config", "malformed.yaml"], "malformed at line 1"),
    (["--config", "list.yaml"], "must contain 'key: value' lines; it is a list"),
    (["--config", "."], "cannot be read"),
    (["--out", "full"], "full already exists and is not empty"),
    (["--out", "list.yaml"], "list.yaml already exists"),
    (["--nosuch"], "No such option"),
    (["surplus"], "surplus"),
    (["--no-plugin", "maml"], "'maml' is installed but disabled"),
    (["--no-plugin", "dropgrda"], "no plugin named 'dropgrda'; did you mean 'dropgrad'"),
    (["--set", "inner_lr=yes"], "inner_lr = True cannot be used: it should be a number"),
    (["--set", "meta_batch=on"], "meta_batch = True cannot be used: it should be a number"),
    (["--set", "hidden=[40, true]"], "it should be a number"),
    (["--augment", "none,cml"], "'none' stands for no plugin"),
    (["--set", "hidden=[0]"], "widths must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_ends_with_one_sentence_and_nothing_written(
    arguments: list[str], sentence: str, metareg: Command, tmp_path: Path
) -> None:
    (tmp_path / "malformed.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    outcome = metareg("train", *arguments)
    assert outcome.code == 2
    assert outcome.output == ""
    assert sentence in " ".join(outcome.errors.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_out_below_a_file(metareg: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    outcome = metareg("train", *TINY, "--out", "file/run")
    assert outcome.code in (1, 2)
    assert "Error:" in outcome.errors
    assert (tmp_path / "file").read_text() == "kept"


def test_nan_in_training_names_the_step_and_keeps_the_last_good_state(metareg: Command, tmp_path: Path) -> None:
    outcome = metareg(
        "train", *TINY, "--steps", "40", "--set", "inner_lr=1e12", "--set", "outer_lr=1e12", "--out", "run"
    )
    assert outcome.code == 1
    text = " ".join(outcome.errors.split())
    assert "Training diverged at step" in text
    kept = list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    assert kept
    assert any(f"run/checkpoints/{path.name}" in text for path in kept)
    tensors = load_file(kept[0])
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
    assert not (tmp_path / "run" / "results.json").exists()


# ------------------------------------------------------------------------------------------------------------- evaluation


def test_eval(metareg: Command, finished: Path) -> None:
    outcome = metareg("eval", str(finished), "--tasks", "4", "--inner-steps", "2,0")
    assert outcome.code == 0
    assert "mse" in outcome.output
    as_json = json.loads(
        metareg("eval", str(finished), "--tasks", "3", "--inner-steps", "0,1", "--json", "--scores").output
    )
    stored = json.loads((finished / "results.json").read_text())
    for ours, theirs in zip(as_json["steps"], stored["steps"], strict=True):
        assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-6)
    other = json.loads(metareg("eval", str(finished), "--tasks", "3", "--task", "harmonic", "--json").output)
    assert other["steps"][0]["mean"] != as_json["steps"][0]["mean"]
    assert other["steps"][0].keys() == {"inner_steps", "mean", "ci95", "tasks"}
    fewer = json.loads(metareg("eval", str(finished), "--tasks", "3", "--shots", "2", "--json").output)
    assert fewer["steps"][-1]["mean"] != as_json["steps"][-1]["mean"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nosuch"], "There is no run at nosuch"),
        ([], "Missing argument"),
        (
            ["RUN", "--inner-steps", "1,x"],
            "--inner-steps takes whole numbers separated by commas, such as 1,5,10; got '1,x'",
        ),
        (["RUN", "--inner-steps", "-1"], "non-negative"),
        (["RUN", "--tasks", "1"], "at least 2 tasks"),
        (["RUN", "--task", "sinusiod"], "did you mean 'sinusoid'"),
        (["RUN", "--device", "toaster"], "no device 'toaster'"),
        (["RUN", "--ways", "5"], "no option of task 'sinusoid' named 'ways'"),
        (["RUN", "--scores"], "--scores goes with --json"),
    ],
)
def test_bad_evaluations(arguments: list[str], sentence: str, metareg: Command, finished: Path) -> None:
    outcome = metareg("eval", *(str(finished) if each == "RUN" else each for each in arguments))
    assert outcome.code == 2
    assert sentence in " ".join(outcome.errors.split())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "steps: [1"),
        ("config.yaml", "nosuch: 1"),
        ("config.yaml", ""),
        ("results.json", "{"),
        ("results.json", "{}"),
        ("results.json", "[]"),
        ("checkpoints/final.safetensors", "no weights"),
        ("checkpoints/final.safetensors", None),
    ],
)
def test_damaged_runs(name: str, content: str | None, metareg: Command, finished: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    outcome = metareg("eval", "run", "--tasks", "2")
    assert outcome.code == 2
    assert outcome.errors.startswith("Error:")


# ---------------------------------------------------------------------------------------------------------------- plugins


def test_plugins(metareg: Command) -> None:
    outcome = metareg("plugins")
    assert outcome.code == 0
    for name in ("maml", "cml", "sinusoid", "mlp"):
        assert name in outcome.output
    rows = json.loads(metareg("plugins", "--json").output)
    assert all(set(row) == {"kind", "name", "distribution", "version", "broken"} for row in rows)
    assert all(row["broken"] is None for row in rows)


def test_plugins_check_marks_broken_ones(metareg: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "bad_pkg-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-pkg\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[metareg.augmenters]\nbad = bad_module_of_this_test:Plugin\n")
    (tmp_path / "bad_module_of_this_test.py").write_text("raise SystemExit('no')")
    outcome = metareg("plugins", "--check", "--json")
    rows = {row["name"]: row for row in json.loads(outcome.output)}
    assert "SystemExit: no" in rows["bad"]["broken"]
    assert rows["maml"]["broken"] is None
    assert "inner_lr" in rows["maml"]["config"]
    assert rows["maml"]["summary"]
    assert metareg("train", "--augment", "bad").code == 2


@pytest.mark.parametrize(
    ("kind", "name"), [("algorithms", "metasgd"), ("augmenter", "cml"), ("tasks", "sinusoid"), ("model", "mlp")]
)
def test_show(kind: str, name: str, metareg: Command) -> None:
    outcome = metareg("show", kind, name)
    assert outcome.code == 0
    expected = {"metasgd": "inner_lr_max", "cml": "gamma", "sinusoid": "shots", "mlp": "hidden"}[name]
    assert expected in outcome.output
    assert ("relative to MAML" in outcome.output) == (kind == "algorithms")
    assert metareg("show", name).output == outcome.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["algorithm", "mmal"], "did you mean 'maml'"),
        (["nosuch", "maml"], "kind of plugin"),
        (["", "maml"], "kind of plugin"),
        (["mmal"], "There is no plugin named 'mmal'; did you mean 'maml'"),
        (["tasks"], "`metareg show tasks NAME`"),
        (["metacurvature"], "`metareg show algorithms metacurvature` or `metareg show augmenters metacurvature`"),
        ([], "Missing argument"),
    ],
)
def test_bad_show(arguments: list[str], sentence: str, metareg: Command) -> None:
    outcome = metareg("show", *arguments)
    assert outcome.code == 2
    assert sentence in " ".join(outcome.errors.split())


def test_doctor(metareg: Command) -> None:
    outcome = metareg("doctor")
    assert outcome.code in (0, 1)
    assert "torch" in outcome.output


def test_doctor_names_the_extras_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    two = "dgl==0; python_version < '4' and extra == 'two'"
    requirements = ["torch>=2.8", "nox; extra == 'dev'", "numpy; extra == 'one'", two]
    installed = importlib.metadata.version

    def find_version(name: str) -> str:
        if name == "dgl":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requirements)
    monkeypatch.setattr(importlib.metadata, "version", find_version)
    shown = io.StringIO()
    Console(width=80, file=shown).print(describe_installation([]))
    (line,) = [line for line in shown.getvalue().splitlines() if line.startswith("extras")]
    assert line.split()[1:] == ["not", "installed:", "two", "(pip", "install", "'metareg[NAME]')"]


def test_help_and_version(metareg: Command) -> None:
    assert metareg("--help").code == 0
    assert "metareg" in metareg("--version").output
    assert metareg("nosuch").code == 2
    for command in ("train", "eval", "plugins", "show", "doctor"):
        outcome = metareg(command, "--help")
        assert outcome.code == 0
        assert "Usage" in outcome.output


def test_start_up_imports_no_torch() -> None:
    code = (
        "import sys; from metareg.cli.app import run\n"
        "assert run(['--help']) == 0 and run(['plugins', '--json']) == 0 and run(['train', '--help']) == 0\n"
        "heavy = [name for name in ('torch', 'numpy', 'matplotlib') if name in sys.modules]\n"
        "plugins = [name for name in sys.modules if name.startswith('metareg_')]\n"
        "assert not heavy and not plugins, (heavy, plugins)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path.home())
    assert result.returncode == 0, result.stderr


def test_a_mistake_of_a_plugin_is_one_sentence_too(metareg: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("[bold]by nothing[/]")

    monkeypatch.setattr("metareg.runs.training.train", fail)
    outcome = metareg("train")
    assert outcome.code == 1
    assert "ZeroDivisionError: [bold]by nothing[/]" in outcome.errors
    assert "METAREG_TRACEBACK=1" in outcome.errors
    monkeypatch.setenv("METAREG_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run(["train"])


def test_observers_by_name(metareg: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "watch_pkg-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: watch-pkg\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[metareg.observers]\nwatch = watch_module_of_this_test:Watch\n")
    (tmp_path / "watch_module_of_this_test.py").write_text(
        "from metareg import hookimpl\n"
        "class Watch:\n"
        "    @hookimpl\n"
        "    def on_run_end(self, run):\n"
        "        (run.path / 'watched').write_text('to the end')\n"
    )
    assert metareg("train", *TINY, "--observe", "watch", "--out", "run").code == 0
    assert (tmp_path / "run" / "watched").read_text() == "to the end"
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [each["name"] for each in config["observers"]] == ["watch"]

    assert metareg("train", *TINY, "--out", "other").code == 0
    assert metareg("resume", "other", "--steps", "4", "--observe", "watch").code == 0
    assert (tmp_path / "other" / "watched").read_text() == "to the end"
    assert metareg("resume", "other", "--set", "observers=[watch]").code == 2


# ------------------------------------------------------------------------------------------------- the surroundings


def test_an_encoding_that_lacks_a_sign_shows_another() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "metareg", "show", "tasks", "sinusoid"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "?5, 5]" in shown  # from −5 to 5


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--out", "{long}"],
        ["train", "--config", "{long}"],
        ["train", "--task", "image-folder", "--data", "{long}"],
        ["train", "--task", "graph-folder", "--data", "{long}"],
        ["eval", "{long}"],
        ["resume", "{long}"],
        ["report", "{long}"],
        ["compare", "--out", "{long}"],
        ["new-plugin", "algorithms", "{long}"],
    ],
    ids=" ".join,
)
def test_a_name_that_is_too_long_is_one_sentence(metareg: Command, arguments: list[str]) -> None:
    outcome = metareg(*(argument.replace("{long}", 300 * "x") for argument in arguments))
    assert outcome.code == 2
    assert outcome.errors.strip().startswith("Error:")
    assert "too long" in outcome.errors
    assert "bug" not in outcome.errors
    assert not list(Path().iterdir())


def test_paths_that_no_configuration_can_hold(metareg: Command) -> None:
    outcome = metareg("train", "--task", "image-folder", "--data", os.fsdecode(b"caf\xe9"))
    assert outcome.code == 2
    assert "UTF-8" in outcome.errors
