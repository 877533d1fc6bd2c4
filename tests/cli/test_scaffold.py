"""metareg new-plugin and metareg check-plugin."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from metareg import testing
from metareg.cli.app import run
from metareg.cli.scaffold import write_plugin
from metareg.registry.plugins import KINDS, list_entries

ROOT = Path(__file__).parents[2]


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package like pip: its module on the path, with the metadata of its pyproject.toml."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    named = f"Name: {project['name']}\nVersion: {project['version']}\n"
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\n{named}")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


@pytest.fixture
def without_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the slow checks, which the tests of the kit run with plugins like the templates."""
    for named in testing._OF_KIND.values():
        for name in ("strategies", "whole-steps", "determinism", "composition"):
            monkeypatch.delitem(named, name, raising=False)


def try_new_plugin(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Write a plugin, install it, train with it and check it."""
    monkeypatch.chdir(folder)
    assert run(["new-plugin", kind, "of-mine"]) == 0
    package = folder / "metareg-of-mine"
    assert yaml.safe_load((package / ".github" / "workflows" / "tests.yml").read_text("utf-8"))["jobs"]["tests"][
        "steps"
    ]
    project = tomllib.loads((package / "pyproject.toml").read_text("utf-8"))["project"]
    assert (package / project["license-files"][0]).read_text("utf-8").startswith(f"{project['license']} License")
    assert "/runs/" in (package / ".gitignore").read_text("utf-8").splitlines()
    installed(package, monkeypatch)
    assert ("metareg-of-mine", "0.1.0") in {(entry.distribution, entry.version) for entry in list_entries(kind)}

    flag = dict(zip(KINDS, ("--algo", "--augment", "--task", "--model", "--observe"), strict=True))[kind]
    assert run(["train", flag, "of-mine", "--steps", "4", "--set", "test_tasks=4", "--out", "run"]) == 0
    capsys.readouterr()
    assert run(["check-plugin", kind, "of-mine", "--no-compile"]) == 0
    printed = capsys.readouterr().out
    assert "passed  contract" in printed
    assert "failed" not in printed
    sys.modules.pop("metareg_of_mine", None)


@pytest.mark.usefixtures("without_trainings")
@pytest.mark.parametrize("kind", KINDS)
def test_new_plugin_is_listed_trains_and_passes_its_checks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try_new_plugin(kind, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_new_plugin_passes_the_checks_that_take_long(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try_new_plugin(kind, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_new_plugin_is_well_styled(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    folder = write_plugin(kind, "of-mine", tmp_path)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,I,B,UP", "--line-length", "120"]
    command.append(str(folder))
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new-plugin", "algorithm", "Sign MAML"], "lower-case letters"),
        (["new-plugin", "algorithms", "maml"], "taken by the algorithm of metareg"),
        # Its module would shadow the shipped one, and MAML could not be trained.
        (
            ["new-plugin", "augmenters", "maml"],
            "The module metareg_maml, which the name 'maml' needs, is already installed",
        ),
        (["new-plugin", "optimisers", "mine"], "no kind of plugin named 'optimisers'"),
        (["check-plugin", "algorithms", "mamml"], "did you mean 'maml'"),
        (["check-plugin", "augmenters", "dropgrad", "--set", "rat=0.5"], "did you mean 'rate'"),
    ],
)
def test_wrong_use_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--out", str(tmp_path)] if arguments[0] == "new-plugin" else []
    assert run([*arguments, *extra]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metareg-mine").mkdir()
    assert run(["new-plugin", "task", "mine", "--out", str(tmp_path)]) == 2
    assert list((tmp_path / "metareg-mine").iterdir()) == []


@pytest.mark.usefixtures("without_trainings")
def test_check_plugin_fails_with_what_is_wrong_and_how_to_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_plugin("algorithms", "halved", tmp_path)
    module = folder / "metareg_halved" / "__init__.py"
    halved = module.read_text(encoding="utf-8").replace("value - self", "value - 0.5 * self")
    module.write_text(halved, encoding="utf-8")
    installed(folder, monkeypatch)
    assert run(["check-plugin", "algorithms", "halved", "--no-compile"]) == 1
    printed = capsys.readouterr().out
    assert "failed  step-examples" in printed
    assert "To fix it: compare inner_update with the formula" in printed
    sys.modules.pop("metareg_halved", None)


EXAMPLE = ROOT / "examples" / "metareg-signmaml"


def test_example_package_trains_beside_cml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / EXAMPLE.name
    shutil.copytree(EXAMPLE, folder)
    installed(folder, monkeypatch)
    arguments = [
        "--algo", "signmaml", "--augment", "cml", "--inner-steps", "2", "--steps", "6", "--set", "test_tasks=4",
    ]  # fmt: skip
    assert run(["train", *arguments, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "results.json").is_file()
    sys.modules.pop("metareg_signmaml", None)


@pytest.mark.slow
def test_example_package_passes_its_own_tests(tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, str(EXAMPLE)], check=True, capture_output=True)
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", str(EXAMPLE / "tests")]
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
