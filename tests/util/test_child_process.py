"""Parsers in a separate process: their results, and no other effects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import parsers
from metareg import UsageError, parse_in_child
from metareg.util import child_process

pytestmark = pytest.mark.strangers


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(parsers.__file__).parent))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 3)
    return [tmp_path / "a", tmp_path / "b"]


def test_arrays_come_back(paths: list[Path]) -> None:
    found = parse_in_child(parsers.read, paths, "letters")
    assert [each["bytes"].tolist() for each in found] == [[97] * 3, [98] * 3]
    assert [each["name"].tolist() for each in found] == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("parser", "sentence"),
    [
        ("refuse", "a is not for me."),
        ("stumble", "a cannot be read as letters: 4711."),
        ("crash", "a cannot be read as letters: its reader was ended by SIGSEGV"),
        ("abort", "its reader was ended by SIGABRT"),
        ("leave", "its reader ended with code 0"),
        ("hang", "its reader was ended by SIG"),
        ("fill", "a cannot be read as letters"),
    ],
)
def test_whatever_a_parser_does_is_one_sentence(
    parser: str, sentence: str, paths: list[Path], monkeypatch: pytest.MonkeyPatch, tried: Callable[..., None]
) -> None:
    monkeypatch.setattr(child_process, "_LEAST_SECONDS", 1)
    with pytest.raises(UsageError) as caught:
        parse_in_child(getattr(parsers, parser), paths, "letters")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    tried("archives")
