"""The tables of the commands in 80 columns."""

from __future__ import annotations

import io
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from rich.console import Console, RenderableType

from metareg import PathText, PluginConfig, format_count
from metareg.cli.option_types import describe_type
from metareg.cli.tables import _create_short_table, _reflow, create_plugin_table
from metareg.reporting.tables import Table


def show(content: RenderableType) -> list[str]:
    """Return the lines of an output in a terminal of 80 columns."""
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(content)
    lines = console.export_text().splitlines()
    assert all(len(line) <= 80 for line in lines)
    return [line.rstrip() for line in lines]


def test_a_checked_plugin_takes_one_line_and_a_broken_one_says_why_in_full() -> None:
    reason = "The augmenter 'bad' cannot be imported: " + "ImportError of a very long name, " * 6
    rows = [
        {"kind": "algorithms", "name": "inner-momentum", "broken": None, "summary": "MAML whose inner loop " * 9},
        {"kind": "augmenters", "name": "bad", "broken": reason},
    ]
    lines = show(create_plugin_table(rows, checked=True))
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["algorithms", "inner-momentum", "yes"], ["augmenters", "bad", "no"],
    ]  # fmt: skip
    assert " ".join(" ".join(lines[3:]).split()) == reason.strip()


def test_the_closing_table_of_a_comparison_cuts_no_number() -> None:
    interval = "+0.60 (+0.20 to +1.00)"
    columns = ["algorithm", "augmenter", "accuracy in % (10 steps)", "minus none", "p (Holm)", "verdict"]
    rows = [
        ["unicorn-maml", "none", "95.32 ± 0.45", "", "", ""],
        ["unicorn-maml", "dropgrad+cml", "95.92 ± 0.45", interval, "0.0123", "not tested (one pair of seeds)"],
    ]
    text = "\n".join(show(_create_short_table(Table("images", columns, rows, "A note.", texts=(5,)), 80)))
    assert "…" not in text
    for whole in ("unicorn-maml", "dropgrad+cml", "95.92 ± 0.45", "+0.60", "(+0.20 to +1.00)", "0.0123", "(10 steps)"):
        assert whole in text
    assert interval in "\n".join(show(_create_short_table(Table("a", columns[-3:], [["x", interval, "b"]], ""), 80)))


def test_a_number_stands_before_its_noun_in_order() -> None:
    assert [format_count(number, "image") for number in (0, 1, 12_000)] == ["0 images", "1 image", "12,000 images"]
    assert format_count(1, "class", "classes") == "1 class"
    assert format_count(2, "class", "classes") == "2 classes"


def test_docstrings_fill_the_width_and_keep_their_lists() -> None:
    text = "One line\ngoes on.\n\n- an item\n  of two lines\n- another\n\nReference:\n    A paper,\n    2017."
    assert show(_reflow(text)) == [
        "One line goes on.", "", "- an item of two lines", "- another", "", "Reference:", "    A paper, 2017.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("annotation", "limits", "words"),
    [
        (int, {"ge": 1}, "whole number ≥ 1"),
        (int | None, {"ge": 0, "le": 4}, "whole number from 0 to 4, or unset"),
        (float, {"ge": 0, "lt": 1}, "number ≥ 0 and < 1"),
        (bool, {}, "true or false"),
        (Literal["head", "colearner"], {}, "head or colearner"),
        (Literal["a", "b", "c"] | None, {}, "a, b or c, or unset"),
        (list[float], {"min_length": 3, "max_length": 3}, "list of 3 numbers"),
        (list[int], {"min_length": 1}, "list of whole numbers, not empty"),
        (PathText | None, {}, "path, or unset"),
        (Annotated[str, "mark"], {}, "text"),
        (dict[Literal["train", "test"], list[int]], {}, "mapping from train or test to lists of whole numbers"),
    ],
)
def test_types_in_words(annotation: Any, limits: dict[str, Any], words: str) -> None:
    field = type("Config", (PluginConfig,), {"__annotations__": {"x": annotation}, "x": Field(None, **limits)})
    assert describe_type(field.model_fields["x"]) == words
