"""Discovery: installed plugins, names, clashes, and plugins that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import metareg
from metareg import PluginConfig, PluginError, UnknownNameError, UsageError
from metareg.registry.plugins import DISABLE_VARIABLE, KINDS, find_entry, list_entries, resolve

ROOT = Path(metareg.__file__).parents[1]
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution of a few lines: ``install("name", {"kind": {"plugin": "module:Class"}}, module="source")``."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def _install(name: str, points: dict[str, dict[str, str]], *, metadata: bool = True, **modules: str) -> Path:
        folder = tmp_path / f"{name.replace('-', '_')}-1.2.dist-info"
        folder.mkdir()
        lines = [
            line
            for kind, plugins in points.items()
            for line in (f"[metareg.{kind}]", *(f"{key} = {value}" for key, value in plugins.items()))
        ]
        (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
        if metadata:
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source)
            monkeypatch.delitem(sys.modules, module, raising=False)
        return folder

    return _install


def test_shipped_plugins_are_listed() -> None:
    found = {(entry.kind, entry.name) for entry in list_entries()}
    assert found >= {
        *(("algorithms", name) for name in ("maml", "anil", "boil", "metasgd")),
        *(("augmenters", name) for name in ("cml", "gradient-noise", "dropgrad")),
        *(("tasks", name) for name in ("sinusoid", "harmonic", "sinusoid-line")),
        ("models", "mlp"),
    }
    assert [entry.kind for entry in list_entries()] == sorted((entry.kind for entry in list_entries()), key=KINDS.index)
    assert {entry.distribution for entry in list_entries() if entry.name == "maml"} == {"metareg"}


def test_listing_imports_neither_torch_nor_a_plugin() -> None:
    code = (
        "import sys, json; import metareg; from metareg.registry.plugins import list_entries\n"
        "entries = list_entries(); modules = {entry.target.partition(':')[0] for entry in entries}\n"
        "print(json.dumps([len(entries), sorted(modules & set(sys.modules)),\n"
        "    [name for name in ('torch', 'numpy', 'pydantic', 'matplotlib') if name in sys.modules]]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.home())
    count, imported, heavy = json.loads(output.stdout)
    assert count > 10
    assert imported == heavy == []


def test_a_strangers_plugin_is_found_like_a_shipped_one(install: Install) -> None:
    install("strange-pkg", {"algorithms": {"strange": "strange_mod:Strange"}}, strange_mod="class Strange: pass")
    entry = find_entry("algorithms", "strange")
    assert (entry.distribution, entry.version, entry.qualified) == ("strange-pkg", "1.2", "strange-pkg:strange")
    assert "strange_mod" not in sys.modules
    assert resolve("algorithms", "strange").instance.__class__.__name__ == "Strange"


def test_name_clash_names_both_and_how_to_choose(install: Install) -> None:
    install("zeta", {"algorithms": {"maml": "zeta_mod:Mine"}}, zeta_mod="class Mine: pass")
    with pytest.raises(PluginError) as error:
        find_entry("algorithms", "maml")
    text = str(error.value)
    assert "used by metareg and zeta" in text
    assert "'metareg:maml' or 'zeta:maml'" in text
    assert find_entry("algorithms", "zeta:maml").distribution == "zeta"
    assert find_entry("algorithms", "metareg:maml").distribution == "metareg"
    assert find_entry("augmenters", "cml").name == "cml"
    assert [entry.distribution for entry in list_entries("algorithms") if entry.name == "maml"] == ["metareg", "zeta"]


def test_clash_is_solved_by_disabling_one(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("zeta", {"algorithms": {"maml": "zeta_mod:Mine"}}, zeta_mod="class Mine: pass")
    monkeypatch.setenv(DISABLE_VARIABLE, " zeta:maml ")
    assert find_entry("algorithms", "maml").distribution == "metareg"


def test_one_name_in_two_kinds_is_no_clash(install: Install) -> None:
    install("zeta", {"augmenters": {"maml": "zeta_mod:Mine"}}, zeta_mod="class Mine: pass")
    assert find_entry("algorithms", "maml").distribution == "metareg"
    assert find_entry("augmenters", "maml").distribution == "zeta"


def test_a_distribution_that_stands_twice_on_the_path_counts_once(install: Install, tmp_path: Path) -> None:
    install("some-pkg", {"models": {"net": "net_mod:Net"}}, net_mod="class Net: pass")
    folder = tmp_path / "Some.Pkg-1.1.dist-info"
    folder.mkdir()
    (folder / "entry_points.txt").write_text("[metareg.models]\nnet = net_mod:Old\n")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: Some.Pkg\nVersion: 1.1\n")
    assert find_entry("models", "net")


def test_distribution_without_metadata_breaks_nothing_else(install: Install) -> None:
    install("broken", {"algorithms": {"lost": "lost_mod:Lost"}}, metadata=False)
    assert find_entry("algorithms", "maml")
    assert "maml" in {entry.name for entry in list_entries("algorithms")}


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("algorithms", "mamml", "no algorithm named 'mamml'; did you mean 'maml'"),
        ("algorithms", "MAML", "did you mean 'maml'"),
        ("augmenters", "noise", "did you mean 'gradient-noise'"),
        ("tasks", "sinusoid-lin", "did you mean 'sinusoid-line' or 'sinusoid'"),
        ("models", "qqqqq", "no model named 'qqqqq'; there "),
        ("algorithms", "metareg:cml", "no algorithm named 'metareg:cml'"),
        ("algorithms", "", "no algorithm named ''"),
    ],
)
def test_unknown_names(kind: str, name: str, sentence: str) -> None:
    with pytest.raises(UnknownNameError, match=sentence) as error:
        find_entry(kind, name)
    assert "metareg plugins" in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("disabled", ["maml", "metareg:maml", "cml, maml"])
def test_disabled_plugins(disabled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE_VARIABLE, disabled)
    with pytest.raises(UsageError, match=f"'maml'.*disabled.*{DISABLE_VARIABLE}"):
        find_entry("algorithms", "maml")
    assert "maml" not in {entry.name for entry in list_entries()}
    assert find_entry("algorithms", "anil")


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise ValueError('bad day')", "ValueError: bad day"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import nosuchmodule", "ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("class BaseOnly(BaseException): pass\nraise BaseOnly", "BaseOnly"),
        ("x = (", "SyntaxError"),
        ("pass", "has no attribute 'Plugin'"),
        ("Plugin = 3", "is a int; the entry point must name a class"),
    ],
)
def test_broken_plugins_cost_only_who_selects_them(source: str, cause: str, install: Install) -> None:
    install("bad-pkg", {"augmenters": {"bad": "bad_mod:Plugin"}}, bad_mod=source)
    assert {"bad", "cml"} <= {entry.name for entry in list_entries("augmenters")}
    assert resolve("augmenters", "cml")
    with pytest.raises(PluginError) as error:
        resolve("augmenters", "bad")
    text = str(error.value)
    assert "augmenter 'bad' of bad-pkg 1.2 (bad_mod:Plugin)" in text
    assert cause in text


@pytest.mark.parametrize("target", ["", "a b", "mod:", "mod:a:b"])
def test_malformed_entry_points(target: str, install: Install) -> None:
    install("bad-pkg", {"augmenters": {"bad": target}})
    assert resolve("augmenters", "cml")
    with pytest.raises(UsageError):
        resolve("augmenters", "bad")


def test_interrupting_an_import_is_no_broken_plugin(install: Install) -> None:
    install("bad-pkg", {"augmenters": {"bad": "bad_mod:Plugin"}}, bad_mod="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        resolve("augmenters", "bad")


# ------------------------------------------------------------------------------------------------------------- building


def test_classes_and_objects_need_no_installation() -> None:
    class Mine:
        class Config(PluginConfig):
            rate: float = 0.5

        def __init__(self, config: Config) -> None:
            self.config = config

    plugin = resolve("augmenters", Mine, {"rate": 0.1})
    assert (plugin.name, plugin.config.rate, plugin.distribution) == ("mine", 0.1, None)
    ready = Mine(Mine.Config())
    assert resolve("augmenters", ready).instance is ready
    assert resolve("augmenters", plugin) is plugin
    with pytest.raises(UsageError, match=r"object.*rate"):
        resolve("augmenters", ready, {"rate": 0.1})
    with pytest.raises(UnknownNameError, match=r"'mine'.*'rat'.*'rate'"):
        resolve("augmenters", Mine, {"rat": 1})


def test_a_class_without_options() -> None:
    class Bare:
        pass

    assert isinstance(resolve("augmenters", Bare).instance, Bare)
    with pytest.raises(UnknownNameError, match="no option of augmenter 'bare' named 'x'"):
        resolve("augmenters", Bare, {"x": 1})


def test_a_constructor_that_fails() -> None:
    class Failing:
        def __init__(self, config: Any) -> None:
            raise RuntimeError(f"cannot work with {config!r}")

    with pytest.raises(PluginError, match=r"'failing'.*cannot work with"):
        resolve("augmenters", Failing)


def test_a_config_that_is_no_plugin_config() -> None:
    class Odd:
        class Config:
            rate = 1

    with pytest.raises(PluginError, match=r"'Odd'.*metareg\.PluginConfig"):
        resolve("augmenters", Odd, {"rate": 1})


# ------------------------------------------------------------------------------------------------------------- layering


@pytest.mark.parametrize("name", metareg.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    value = getattr(metareg, name)
    assert value is not None
    if isinstance(value, type) or callable(value):
        assert getattr(value, "__doc__", None), name
    assert name in dir(metareg)


def test_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        metareg.nosuch  # noqa: B018
