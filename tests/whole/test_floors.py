"""Imports between folders, and their picture in the documentation; import-linter checks the layers inside metareg/."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import metareg
from metareg.contract import hookspecs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def _imports(path: Path) -> set[tuple[str, str | None]]:
    """Return every import of a file as (module, name or None), including those in functions."""
    found: set[tuple[str, str | None]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent.name.startswith("metareg"), f"relative import in {path}"
            module = node.module or ""
            found |= {(module if node.level == 0 else f".{module}", alias.name) for alias in node.names}
    return found


def _files(*folders: str) -> list[Path]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return files


def test_the_core_imports_no_plugin_and_no_task() -> None:
    for file in _files("metareg"):
        assert not [module for module, _ in _imports(file) if module.startswith("metareg_")], file
        assert 'import_module(f"metareg_' not in file.read_text(encoding="utf-8")


def test_plugins_and_tasks_use_public_names_only() -> None:
    for file in _files("plugins", "tasks"):
        for module, name in _imports(file):
            if module == "metareg" or module.startswith("metareg."):
                assert module == "metareg", f"{file} imports from {module}"
                assert name is None or name in metareg.__all__, f"{file} imports {name}"


def test_tasks_import_no_plugin_and_plugins_no_task() -> None:
    tasks = {folder.name for folder in (ROOT / "tasks").iterdir()}
    plugins = {folder.name for folder in (ROOT / "plugins").iterdir()}
    for own, other in (("tasks", plugins), ("plugins", tasks)):
        for file in _files(own):
            assert not {module.partition(".")[0] for module, _ in _imports(file)} & other, file


@pytest.mark.parametrize(
    ("module", "home"), [("torchvision", "metareg_image"), ("timm", "metareg_image"), ("dgl", "metareg_graph")]
)
def test_heavy_libraries_stay_where_they_belong(module: str, home: str) -> None:
    for file in _files("metareg", "plugins", "tasks"):
        if home not in file.parts:
            assert module not in {name.partition(".")[0] for name, _ in _imports(file)}, file


def test_the_picture_of_the_floors_is_that_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    floors = [set(re.findall(r"[a-z]+", layer)) for each in contracts for layer in each.get("layers", ())]
    drawn: dict[int, set[str]] = {}
    for top, group in re.findall(r'<g transform="translate\(20 (\d+)\)">(.*?)</g>', _svg("floors"), re.S):
        drawn[int(top)] = set(re.findall(r'class="name"[^>]*>([a-z]+)<', group))
    assert [drawn[top] for top in sorted(drawn)] == [floor - {"version"} for floor in floors]


def test_the_way_of_an_episode_passes_every_stage() -> None:
    reported = {"figures", "on_run_start", "on_step", "on_evaluation", "on_run_end"}
    stages = {name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "metareg_spec")} - reported
    assert stages
    shown = set(re.findall(r"\w+", " ".join(re.findall(r'class="hook"[^>]*>([^<]+)<', _svg("episode")))))
    assert stages <= shown


def _svg(name: str) -> str:
    return (DOCS / f"{name}.svg").read_text(encoding="utf-8")


def test_the_facade_holds_no_part_of_its_own() -> None:
    """`MetaLearner` has at most 300 lines without docstrings and blank ones; what grows belongs into a module of its own."""
    source = (ROOT / "metareg" / "learner" / "learner.py").read_text(encoding="utf-8")
    (facade,) = (
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "MetaLearner"
    )
    texts = [node for node in ast.walk(facade) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    text_lines = {line for node in texts for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = source.splitlines()
    code = [line for line in range(facade.lineno, (facade.end_lineno or 0) + 1) if lines[line - 1].strip()]
    assert len(set(code) - text_lines) <= 300
