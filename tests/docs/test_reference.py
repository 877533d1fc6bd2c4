"""Generated pages are current, and the Python reference has every public name."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import metareg
import metareg.testing

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["hook_reference.py", "options_reference.py", "plugin_reference.py"])
def test_generated_pages_are_current(script: str) -> None:
    command = [sys.executable, str(ROOT / "docs" / script), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_hook_is_in_the_reference() -> None:
    import pluggy

    from metareg.contract import hookspecs

    manager = pluggy.PluginManager("metareg")
    manager.add_hookspecs(hookspecs)
    text = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    hooks = [name for name in vars(manager.hook) if not name.startswith("_")]
    assert hooks
    assert [name for name in hooks if f"### {name}\n" not in text] == []


def test_every_public_name_is_in_the_python_reference_once() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: ([\w.]+)$", text, flags=re.M) + ["metareg.Field"] * text.count("\n### Field\n")
    public = [f"metareg.{name}" for name in metareg.__all__]
    assert sorted(found) == sorted(public + [f"metareg.testing.{name}" for name in metareg.testing.__all__])


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"[\w./-]+\.md", navigation)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if listed.count(page) != 1] == []


def test_no_generated_page_is_large() -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if files.returncode:
        pytest.skip("there is no checkout of git here")
    large = [
        name for name in files.stdout.split("\0") if name.endswith(".html") and (ROOT / name).stat().st_size > 100_000
    ]
    assert large == []


def test_version_citation_and_changelog_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d\S*) - (\d{4}-\d\d-\d\d)$", changelog, flags=re.M)
    assert newest is not None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], str(citation["date-released"])) == newest.groups()
    assert metareg.__version__ == newest[1]


def test_workflows_name_sessions_and_extras_that_exist() -> None:
    sessions = re.findall(r"^@nox\.session.*?^def (\w+)", (ROOT / "noxfile.py").read_text("utf-8"), flags=re.M | re.S)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named: dict[str, set[str]] = {"sessions": set(), "extras": set()}
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"]
        for job in jobs.values():
            assert job.get("needs") in (None, *jobs)
            matrix = job.get("strategy", {}).get("matrix", {}).get("include", [])
            commands = "\n".join(step.get("run", "") for step in job["steps"])
            named["sessions"] |= {each["session"] for each in matrix} | set(re.findall(r"nox -s (\w+)", commands))
            named["extras"] |= {name for group in re.findall(r"\.\[([\w,]+)\]", commands) for name in group.split(",")}
    assert named["sessions"]
    assert named["sessions"] <= set(sessions)
    assert named["extras"] <= set(extras)
