"""Untrusted names, keys and messages do not control a terminal, a report or a spreadsheet."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import metareg
from comparisons import SMALL, write_comparison
from metareg import UsageError, read_name_lists
from metareg.cli import app as cli
from metareg.cli.terminal import Terminal
from metareg.printable import format_csv, show_controls
from metareg.reporting import FORMATS
from metareg.runs.options import parse_assignments
from metareg.util.yaml_files import parse_yaml

pytestmark = pytest.mark.strangers

Tried = Callable[..., None]

TITLE = "\x1b]0;OWNED\x07"
"""An escape sequence that sets the title of a terminal's window."""
HOSTILE = f"a{TITLE}\x9b31mb\r\x08\x7f\u202ec"
_DRAWING = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[\d*[AK]|\r")
"""Colours and cursor control: the only sequences that the consoles send."""


def _list_controls(text: str) -> set[str]:
    return {sign for sign in text if unicodedata.category(sign) == "Cc" or sign in "\u202e\u2066"} - {"\n", "\t"}


def _environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}


def _run_in_terminal(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """Run a command in its own terminal; return the exit code and the terminal's input."""
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals")
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "metareg", *arguments],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd=cwd,
        env=_environment() | environment,
    )
    os.close(its)
    received = b""
    try:
        while block := os.read(ours, 1 << 16):
            received += block
    except OSError:  # Linux reports a closed other side this way
        pass
    os.close(ours)
    return process.wait(), received.decode()


@given(text=st.text(st.characters(codec=None)))
def test_what_is_printed_has_no_controls_and_else_all_its_signs(text: str, tried: Tried) -> None:
    shown = show_controls(text)
    assert not _list_controls(shown)
    assert len(shown) == len(text)
    shown.encode()
    assert all(new == old for new, old in zip(shown, text, strict=True) if old.isprintable() or old in "\n\t")
    assert show_controls(shown) == shown
    tried("terminals")


@given(text=st.text(st.characters(codec="utf-8"), max_size=20))
def test_a_console_draws_texts_as_they_are_shown(text: str, tried: Tried) -> None:
    written = io.StringIO()
    Terminal(file=written, width=200, force_terminal=True).print("[bold]x[/]", text, markup=False)
    assert not _list_controls(_DRAWING.sub("", written.getvalue()))
    tried("terminals")


@pytest.mark.parametrize("arguments", [["reproduce", "./key.yaml"], ["show", "algorithms", HOSTILE, "more"]])
def test_a_terminal_does_not_obey_what_a_stranger_wrote(arguments: Sequence[str], tmp_path: Path, tried: Tried) -> None:
    (tmp_path / "key.yaml").write_text('"\\e]0;OWNED\\a": 1\n')
    code, received = _run_in_terminal(*arguments, cwd=tmp_path)
    assert code == 2
    assert not _list_controls(_DRAWING.sub("", received.replace("\r\n", "\n")))
    assert "OWNED" in received or "show" in arguments
    tried("terminals")


def test_a_terminal_obeys_the_display_of_a_training(tmp_path: Path) -> None:
    code, received = _run_in_terminal("train", "--steps", "20", "--set", "test_tasks=5", cwd=tmp_path)
    assert code == 0
    assert "training" in received
    assert "\N{SYMBOL FOR ESCAPE}" not in received
    assert not _list_controls(_DRAWING.sub("", received.replace("\r\n", "\n")))


@pytest.mark.parametrize(
    ("environment", "allowed"), [({}, "[0-9;]*"), ({"NO_COLOR": "1"}, "[0123]"), ({"TERM": "dumb"}, None)]
)
def test_no_color_means_no_colours_and_a_dumb_terminal_gets_no_codes(
    environment: dict[str, str], allowed: str | None, tmp_path: Path
) -> None:
    code, received = _run_in_terminal("doctorr", "--help", cwd=tmp_path, **environment)
    assert code == 2
    help_code, help_text = _run_in_terminal("show", "--help", cwd=tmp_path, **environment)
    assert help_code == 0
    codes = re.findall(r"\x1b\[?([^a-zA-Z]*)[a-zA-Z]", received + help_text)
    assert bool(codes) == (allowed is not None)
    assert all(re.fullmatch(f"({allowed})(;({allowed}))*", each) for each in codes)


def test_no_command_prints_what_a_terminal_would_obey(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tried: Tried
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "value.yaml").write_text('algo: "\\e]0;OWNED\\a"\n')
    folder = Path(HOSTILE.replace("/", ""))
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: {")
    for arguments in (
        ["train", "--config", "value.yaml"], ["train", f"--{HOSTILE}"], ["train", "--set", f"{HOSTILE}=1"],
        ["report", folder.name], ["resume", folder.name], ["eval", folder.name, HOSTILE], ["data", HOSTILE],
        ["show", "algorithms", HOSTILE], ["plugins", HOSTILE], ["reproduce", HOSTILE],
    ):  # fmt: skip
        assert cli.run(arguments) == 2
        printed = "".join(capsys.readouterr())
        assert "OWNED" in printed
        assert not _list_controls(printed), arguments
        tried("terminals")


def test_errors_and_logs_of_the_library_steer_nothing_either(caplog: pytest.LogCaptureFixture, tried: Tried) -> None:
    with pytest.raises(UsageError) as raised:
        metareg.train(algo=HOSTILE)
    assert not _list_controls(str(raised.value))
    cli.run(["--version"])  # whatever the command configures
    for name in ("metareg", "metareg.tuning"):
        logging.getLogger(name).warning("%s is unknown", HOSTILE)
    assert caplog.messages
    assert not _list_controls("".join(caplog.messages))
    tried("terminals", 2)


@pytest.mark.parametrize("format", FORMATS)
def test_reports_hold_no_controls_and_no_formulas(format: str, tmp_path: Path, tried: Tried) -> None:
    label = f"=HYPERLINK({HOSTILE})"
    config = SMALL | {"tasks": [{"task": "sinusoid", "label": label}], "title": HOSTILE, "notes": f"see {HOSTILE}"}
    write_comparison(tmp_path, config, tasks=5)
    text = metareg.report(tmp_path, format)
    assert not _list_controls(text)
    assert "OWNED" in text
    if format == "csv":
        rows = list(csv.reader(io.StringIO(text)))
        assert {row[0] for row in rows[1:]} == {f"'{show_controls(label)}"}
    tried("reports")


@given(cell=st.text(max_size=12) | st.from_regex(r"\A[-+]?\d{1,3}([.,]\d{0,3})?\Z"))
def test_no_cell_is_a_formula_and_numbers_stay(cell: str, tried: Tried) -> None:
    (found,) = next(csv.reader(io.StringIO(format_csv([[cell]]), newline="")), [""])
    if re.fullmatch(r"[-+]?\d+([.,]\d*)?", cell):
        assert found == cell
    assert not found.lstrip().startswith(("=", "@"))
    assert found in (show_controls(cell), f"'{show_controls(cell)}")
    tried("reports")


def test_cells_that_begin_like_a_formula(tried: Tried) -> None:
    rows = [["=1+1", "-cmd", "+x", "@SUM(A1)", "\t=1", "-1.5", "+1", "-1e-3", "1,5", "-nan", "a=b", ""], [-2, 0.5]]
    first, second = csv.reader(io.StringIO(format_csv(rows)))
    assert first == ["'=1+1", "'-cmd", "'+x", "'@SUM(A1)", "'\t=1", *rows[0][5:]]
    assert second == ["-2", "0.5"]
    tried("reports", len(rows[0]))


# ---------------------------------------------------------------------------------------------------------- said twice


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "a: {b: 1, b: 2}", "- {x: 1, 'x': 1}", "{1: a, '1': b}"])
def test_a_key_that_stands_twice_is_refused(text: str, tried: Tried) -> None:
    with pytest.raises(ValueError, match=r"line \d, column \d+: the key '\w' occurs twice"):
        parse_yaml(text)
    tried("configurations")


@pytest.mark.parametrize("name", ["split.yaml", "split.json"])
def test_a_split_file_that_says_something_twice_is_refused(name: str, tmp_path: Path, tried: Tried) -> None:
    (tmp_path / name).write_text('{"train": ["a"], "test": ["b"], "train": ["c"]}')
    with pytest.raises(UsageError, match="'train' occurs twice"):
        read_name_lists(tmp_path / name)
    tried("configurations")


def test_an_assignment_that_is_made_twice_is_refused() -> None:
    assert parse_assignments(["a=1", "b.a=2"]) == {"a": 1, "b.a": 2}
    with pytest.raises(UsageError, match="--set sets 'steps' twice"):
        parse_assignments(["steps=1", "steps =2"])


# -------------------------------------------------------------------------------------------------------- ends of output


def _run_to(output: int, *arguments: str, cwd: Path, errors: int = subprocess.PIPE) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "metareg", *arguments], stdout=output, stderr=errors, cwd=cwd, env=_environment(), text=True,
        check=False,
    )  # fmt: skip
    return ended.returncode, ended.stderr or ""


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["plugins", "--json"]], ids=" ".join)
def test_an_output_that_ends_is_one_sentence(arguments: Sequence[str], tmp_path: Path, tried: Tried) -> None:
    ours, its = os.pipe()
    os.close(ours)
    assert _run_to(its, *arguments, cwd=tmp_path) == (1, "Error: The output cannot be written: Broken pipe.\n")
    os.close(its)
    if Path("/dev/full").exists():
        full = os.open("/dev/full", os.O_WRONLY)
        sentence = "Error: The output cannot be written: No space left on device.\n"
        assert _run_to(full, *arguments, cwd=tmp_path) == (1, sentence)
        os.close(full)
    tried("terminals", 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_what_is_under_way_goes_on_where_nobody_hears_of_it(tried: Tried) -> None:
    code = (
        "from metareg.cli.terminal import guard_streams, stderr, stdout; import sys\n"
        "guard_streams(); stderr.print('lost'); print('lost', file=sys.stderr); stdout.print('done')"
    )
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            check=False,
            env=_environment(),
        )
    assert (ended.returncode, ended.stdout) == (0, "done\n")
    tried("terminals")


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX closes the streams")
def test_closed_streams_are_not_taken_by_files(tmp_path: Path, tried: Tried) -> None:
    command = 'exec >&- 2>&- <&-; exec "$0" -m metareg new-plugin algorithms sign-maml'
    ended = subprocess.run(["sh", "-c", command, sys.executable], cwd=tmp_path, env=_environment(), check=False)
    assert ended.returncode == 0
    assert "sign-maml" in (tmp_path / "metareg-sign-maml" / "pyproject.toml").read_text()
    assert not any("pip install" in path.read_text()[:20] for path in tmp_path.rglob("*.toml"))
    tried("terminals")
