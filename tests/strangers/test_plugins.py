"""Plugins that fail when they are imported, described or built: the message names them, and others still work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import metareg
from metareg import MetaregError, PluginError, TaskSpec
from metareg.cli import app as cli
from metareg.cli.terminal import stdout
from metareg.registry import inspection
from metareg.registry.inspection import DatasetFacts, inspect_datasets, inspect_plugins
from metareg.registry.plugins import Entry, find_entry, list_entries, resolve

pytestmark = pytest.mark.strangers

Tried = Callable[..., None]

GOOD = 'class Plugin:\n    """Good."""\n'
DEADLY = {
    "exits": ("import os; os._exit(3)", "ends Python with exit code 3"),
    "succeeds": ("import os; os._exit(0)", "ends Python with exit code 0"),
    "crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ends Python by SIGSEGV"),
    "closes": ("import os; os.closerange(0, 64)", "ends Python"),
    "hangs": ("import time\nwhile True: time.sleep(1)", "does not respond within 10 seconds"),
}
RAISING = {
    "leaves": ("raise SystemExit(0)", "cannot be imported: SystemExit: 0"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "exhausts": ("raise MemoryError", "cannot be imported: MemoryError"),
    "speechless": (
        "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
        "cannot be imported: E: its message cannot be shown",
    ),
    "unlike": ("class Plugin:\n    Config = int", "has a Config that is not a metareg.PluginConfig"),
    "unprintable": (
        "from typing import Any\nfrom metareg import PluginConfig\n"
        "class Value:\n    def __repr__(self): raise ValueError('no')\n"
        "class Plugin:\n    class Config(PluginConfig):\n        value: Any = Value()",
        "cannot be described: ValueError: no",
    ),
    "titled": ("raise ValueError('\\x1b]0;OWNED\\x07')", "cannot be imported: ValueError: ␛]0;OWNED␇"),
}
PECULIAR = {
    "prints": "import os\nprint('{}')\nos.write(1, b'[]\\n')\n" + GOOD,
    "reads": "try: input()\nexcept EOFError: pass\n" + GOOD,
    "numbered": "class Plugin:\n    __doc__ = 7\n",
}


def _write(folder: Path, sources: Mapping[str, str]) -> list[Entry]:
    """Create an algorithm's entry point for each source, in a folder on the path."""
    for name, source in sources.items():
        (folder / f"strange_{name}.py").write_text(source)
    return [Entry("algorithms", name, "strange", "1.2", f"strange_{name}:Plugin") for name in sources]


def _install(folder: Path, distribution: str, kind: str, targets: Mapping[str, str]) -> None:
    """Write the metadata of a distribution with plugins of a kind."""
    info = folder / f"{distribution}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    points = "\n".join(f"{name} = {target}" for name, target in targets.items())
    (info / "entry_points.txt").write_text(f"[metareg.{kind}]\n{points}\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_plugins_that_misbehave_cost_themselves_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    monkeypatch.setattr(inspection, "_SECONDS", 10.0)
    bad = {**DEADLY, **RAISING}
    sources = {"first": GOOD, **{name: source for name, (source, _) in bad.items()}, **PECULIAR, "last": GOOD}
    found = dict(zip(sources, inspect_plugins(_write(folder, sources)), strict=True))
    for name, (_, sentence) in bad.items():
        assert sentence in found[name]["broken"], name
        assert "\x1b" not in found[name]["broken"]
    for name in ("first", *PECULIAR, "last"):
        assert found[name] == {"summary": "7" if name == "numbered" else "Good.", "config": []}, name
    tried("plugins", len(sources))


def test_what_one_plugin_leaves_behind_is_not_blamed_on_the_next(folder: Path, tried: Tried) -> None:
    mine = (
        "import os, sys\nclass Finder:\n    def find_spec(self, name, *_):\n"
        "        if name == 'strange_next': os._exit(4)\nsys.meta_path.insert(0, Finder())\n"
    )
    entries = _write(folder, {"mine": mine + GOOD, "next": GOOD})
    assert [answer.get("broken") for answer in inspect_plugins(entries)] == [None, None]
    tried("plugins")


def test_tables_of_plugins_and_data_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    monkeypatch.setattr(stdout, "_width", 250)
    monkeypatch.setattr(cli, "TRACEBACK_VARIABLE", "NO_SUCH_VARIABLE")
    bad = "print('junk')\nimport os\nos._exit(0)\n"
    (folder / "strange_bad.py").write_text(bad)
    (folder / "strange_good.py").write_text(
        "from pathlib import Path\nfrom metareg import Dataset\nclass Plugin:\n"
        "    dataset = Dataset(Path('there'), False, 'Ask.', None, str)\n    def episodes(self, split, indices): ...\n"
    )
    _install(folder, "strange", "tasks", {
        "a-bad": "strange_bad:Plugin", "b-good": "strange_good:Plugin", "c-none": "strange_none:Plugin"
    })  # fmt: skip
    (folder / "strange_none.py").write_text(GOOD)
    entries = [find_entry("tasks", name) for name in ("a-bad", "b-good", "c-none")]
    ended, facts, none = inspect_datasets(entries, None)
    assert ended == "The task 'a-bad' of strange 1.2 (strange_bad:Plugin) ends Python with exit code 0."
    assert facts == DatasetFacts("there", False, "Ask.", False)
    assert none is None
    monkeypatch.setattr("metareg.cli.plugins.list_entries", lambda *_: entries)
    assert cli.run(["plugins", "--check", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [bool(row["broken"]) for row in rows] == [True, False, False]
    assert cli.run(["data"]) == 0
    assert "ends Python with exit code 0" in capsys.readouterr().out
    assert cli.run(["doctor"]) == 1
    assert "1 of 3 plugins cannot be used." in capsys.readouterr().out
    tried("plugins", 3)


def test_what_a_plugin_prints_is_no_result(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    (folder / "strange_loud.py").write_text(
        "print('imported')\nfrom metareg import hookimpl\nclass Plugin:\n    @hookimpl\n"
        "    def augment_inner_gradient(self, grads):\n        print('called')\n        return grads\n"
    )
    _install(folder, "strange", "augmenters", {"loud": "strange_loud:Plugin"})
    monkeypatch.chdir(folder)
    sizes = ["--steps", "1", *(f"--set={name}=2" for name in ("eval_tasks", "test_tasks", "meta_batch"))]
    assert cli.run(["train", "--augment", "loud", "--strategy", "serial", "--out", "run", *sizes]) == 0
    sys.modules.pop("strange_loud")
    capsys.readouterr()
    assert cli.run(["eval", "run", "--tasks", "2", "--inner-steps", "1", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["metric"] == "mse"
    assert "imported" in printed.err
    tried("plugins")


def test_a_plugin_that_leaves_in_its_hooks_ends_no_command_as_done(tried: Tried) -> None:
    class Leaving:
        def __init__(self, _config: object) -> None:
            sys.exit(0)

    class LeavingLater:
        @metareg.hookimpl
        def augment_inner_gradient(self) -> object:
            sys.exit(0)

    with pytest.raises(PluginError, match="cannot be built: SystemExit: 0"):
        resolve("augmenters", Leaving)
    learner = metareg.MetaLearner("mlp", augment=[LeavingLater], loss="mse", spec=TaskSpec((1,), (1,)))
    ones = torch.ones(2, 3, 1)
    with pytest.raises(MetaregError, match="failed in its hook augment_inner_gradient: SystemExit: 0"):
        learner.meta_gradient(metareg.Episodes(ones, ones, ones, ones))
    tried("plugins", 2)


# ------------------------------------------------------------------------------------------------------------ namesakes


def test_another_distribution_that_calls_itself_metareg(
    folder: Path, caplog: pytest.LogCaptureFixture, tried: Tried
) -> None:
    (folder / "strange_maml.py").write_text(GOOD)
    _install(folder, "Metareg", "algorithms", {"maml": "strange_maml:Plugin", "mine": "strange_maml:Plugin"})
    assert find_entry("algorithms", "maml").target == "metareg_maml:MAML"
    assert len(list_entries("algorithms")) > 20
    assert "mine" not in {entry.name for entry in list_entries()}
    assert f"distribution named metareg, in {folder}" in caplog.text
    tried("plugins")


def test_listing_says_so_once(folder: Path, tried: Tried) -> None:
    _install(folder, "metareg", "algorithms", {"maml": "strange_maml:Plugin"})
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    listed = subprocess.run(
        [sys.executable, "-m", "metareg", "plugins", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert {row["version"] for row in json.loads(listed.stdout) if row["name"] == "maml"} == {metareg.__version__}
    assert listed.stderr.count("distribution named metareg") == 1
    tried("plugins")
