"""`metareg report`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from metareg.cli import app as cli
from metareg.comparison.plan import Plan
from metareg.reporting import report

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def metareg(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(arguments)
        return code, *capsys.readouterr()

    return run


def test_the_command_prints_markdown(metareg: Command, small: Plan) -> None:
    code, output, errors = metareg("report", str(small.folder))
    assert (code, errors) == (0, "")
    assert output == report(small.folder, "markdown")
    assert metareg("report", str(small.folder), "--format", "md") == (0, output, "")


def test_a_report_needs_no_torch(small: Plan) -> None:
    code = "import sys; from metareg.cli.app import run; run(sys.argv[1:]); assert 'torch' not in sys.modules, 'torch'"
    command = [sys.executable, "-W", "error", "-c", code, "report", str(small.folder), "--format", "html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "begins"), [("a.tex", "% "), ("a.csv", "task,"), ("a.md", "# "), ("a", "# ")])
def test_the_file_names_the_format(metareg: Command, small: Plan, tmp_path: Path, name: str, begins: str) -> None:
    code, output, _ = metareg("report", str(small.folder), "--out", str(tmp_path / name))
    assert (code, output) == (0, f"{tmp_path / name}\n")
    assert (tmp_path / name).read_text().startswith(begins)


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["nosuch"], "no comparison at nosuch"),
        (["SMALL", "--format", "markdwon"], "did you mean 'markdown'?"),
        (["SMALL", "--inner-steps", "7"], "0, 1, 5, 10"),
        (["EMPTY"], "1 broken, 1 unfinished, 16 not begun"),
        ([], "Missing argument"),
    ],
)
def test_bad_reports_end_with_one_sentence(
    metareg: Command, small: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], fact: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    small.folder.rename("SMALL")
    empty = Plan(Path("EMPTY"), small.config)
    empty.write()
    for number, run in enumerate(empty.list_runs()[:2]):
        run.path.mkdir(parents=True)
        (run.path / ("config.yaml" if number else "error.txt")).write_text("x: 1")
    before = sorted(tmp_path.rglob("*"))
    code, output, errors = metareg("report", *arguments)
    assert (code, output) == (2, "")
    assert fact in " ".join(errors.split())
    assert sorted(tmp_path.rglob("*")) == before
