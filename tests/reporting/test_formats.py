"""The tables of a report, and the formats that show them as text."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from comparisons import INNER_STEPS, SMALL, break_run, write_comparison
from metareg.comparison.plan import Plan
from metareg.reporting import report, tables
from metareg.reporting.analysis import analyze_comparison
from reports import HOSTILE, write_hostile_comparison


def test_what_is_missing_for_one_reason_is_one_row(small: Plan) -> None:
    for seed, how in ((0, "gone"), (1, "diverged"), (5, "gone")):
        break_run(small.folder / f"runs/sinusoid/maml+cml/seed-{seed}", how)
    for name in ("metrics.jsonl", "timing.jsonl"):
        (small.folder / "runs/sinusoid/anil/seed-0" / name).write_text('"validation"\n')

    table = tables.build_gaps(analyze_comparison(small.folder))

    assert table is not None
    assert [[*row[:3], row[4]] for row in table.rows[:2]] == [
        ["maml+cml on sinusoid", "0, 5", "not begun", "runs/sinusoid/maml+cml"],
        ["maml+cml on sinusoid", "1", "diverged", "runs/sinusoid/maml+cml/seed-1"],
    ]
    assert len(table.rows) == 4
    for format in ("markdown", "html"):
        missing = report(small.folder, format).replace("<wbr>", "").rpartition("Missing and broken")[2]
        assert missing.count("maml+cml on sinusoid") == 2


@pytest.mark.parametrize(("axis", "shared"), [("algo", "maml"), ("augment", "none"), ("augment", "cml")])
def test_tables_omit_a_column_with_one_value(tmp_path: Path, axis: str, shared: str) -> None:
    plan = write_comparison(tmp_path, SMALL | {axis: [shared]}, tasks=7)
    found = analyze_comparison(plan.folder)
    constant = "algorithm" if axis == "algo" else "augmenter"
    other = {"algorithm": "augmenter", "augmenter": "algorithm"}[constant]
    columns = [table.columns for each in tables.build_all(found).values() for table in each]
    assert len(columns) >= 3
    assert [each[0] for each in columns if each[0] not in (other, "method", "rank")] == []
    overview = tables.build_overview(found, found.tasks[0])
    assert constant not in overview.columns
    assert overview.is_text(0)
    assert not overview.is_text(1)
    if axis == "algo":
        assert [row[0] for row in overview.rows] == SMALL["augment"]
        assert "The algorithm is maml." in overview.note
    for text in (report(plan.folder), report(plan.folder, "html"), report(plan.folder, "latex")):
        assert not re.search(rf"(\| |<span>|^){constant}( \||</span>| &)", text, re.MULTILINE)
    assert next(csv.DictReader(io.StringIO(report(plan.folder, "csv"))))[constant] == shared


def test_memory_is_the_least_and_times_are_paired(small: Plan) -> None:
    for number, (arm, speeds) in enumerate((("maml", (100, 50, 200)), ("maml+cml", (80, 50, 100)))):
        for seed, speed in zip((0, 1, 5), speeds, strict=True):
            line = {"steps_per_second": speed, "peak_bytes": (400 + 100 * number + 10 * seed) * 2**20}
            (small.folder / f"runs/sinusoid/{arm}/seed-{seed}/timing.jsonl").write_text(json.dumps(line))

    found = analyze_comparison(small.folder)
    rows = tables.build_costs(found, found.tasks[0]).rows

    assert list(rows[0][2:]) == ["11.7", "5.00 to 20.0", "1.00", "400"]
    assert list(rows[1][2:]) == ["14.2", "10.0 to 20.0", "1.00 to 2.00", "500"]


@pytest.mark.parametrize("format", ["markdown", "latex", "html"])
def test_every_table_says_what_its_numbers_mean(demo: Path, format: str) -> None:
    found = analyze_comparison(demo)
    text = report(demo, format)
    plain = html.unescape(text) if format == "html" else re.sub(r"\\ensuremath\{\\pm\}", "±", text)
    plain = plain.replace("\\<", "<").replace(r"\ensuremath{<}", "<").replace(r"\%", "%")
    for task in found.tasks:
        assert "±" in tables.build_results(found, task).note
        for table in (
            tables.build_results(found, task),
            tables.build_differences(found, task),
            tables.build_costs(found, task),
        ):
            assert table is not None
            assert table.note in plain
            assert table.key in plain


def test_markdown_tabulates_the_curves_that_a_page_draws(demo: Path) -> None:
    found, text = analyze_comparison(demo), report(demo, "markdown")
    for task in found.tasks:
        table = tables.build_validations(found, task)
        assert table is not None
        assert all(f"| {' | '.join(row)} |" in text for row in table.rows)


def test_csv_is_tidy(demo: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(report(demo, "csv"))))
    assert len(rows) == 120 * len(INNER_STEPS)
    row = next(
        row for row in rows
        if (row["task"], row["algorithm"], row["augmenter"], row["seed"], row["inner_steps"])
        == ("omniglot-small, 5-way 1-shot", "boil", "cml", "2", "5")
    )  # fmt: skip
    stored = json.loads((demo / "runs/omniglot-small-5-way-1-shot/boil+cml/seed-2/results.json").read_text())["steps"][
        2
    ]
    assert float(row["mean"]) == pytest.approx(stored["mean"])
    assert float(row["ci95"]) == pytest.approx(stored["ci95"])
    assert (row["metric"], row["higher_is_better"], row["tasks"]) == ("accuracy", "true", "100")


def test_markdown_shows_labels_as_they_are(tmp_path: Path) -> None:
    text = report(write_hostile_comparison(tmp_path), "markdown")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    cells = [token.content for token in tokens if token.type == "inline"]
    assert "<b>no</b> **yes**" in text
    labels = [token.children or [] for token in tokens if token.type == "inline" and "a\\|b" in token.content]
    assert len(labels) > 4
    for children in labels:
        assert {child.type for child in children} == {"text"}
        assert HOSTILE in children[0].content
    assert cells.count("cml") == cells.count("dropgrad+cml")


def test_latex_is_balanced_and_escaped(tmp_path: Path) -> None:
    text = report(write_hostile_comparison(tmp_path), "latex")
    bare = re.sub(r"\\[\\{}$&#%_]", "", text)
    assert bare.count("{") == bare.count("}")
    assert not re.search(r"(?<!^)[%#$~^_]", re.sub(r"^%.*$|\{%$", "", bare, flags=re.MULTILINE))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}}") == 3
    for tabular in re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in tabular[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(tabular[0])}
    for sign in (r"\ensuremath{\gamma}", r"\ensuremath{\Omega}Bo\ensuremath{\le}\ensuremath{\approx} [U+0105][U+65E5]"):
        assert sign in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_latex_compiles(tmp_path: Path) -> None:
    preamble = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
    text = report(write_hostile_comparison(tmp_path), "latex")
    (tmp_path / "a.tex").write_text(f"{preamble}\n{text}\\end{{document}}\n", encoding="utf-8")
    done = subprocess.run(["pdflatex", "-halt-on-error", "a.tex"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert b"Missing character" not in done.stdout


def test_latex_differences_are_few_columns_and_explained_once(demo: Path) -> None:
    text = report(demo, "latex")
    headings = re.findall(r"^algorithm & augmenter & difference.*$", text, re.MULTILINE)
    assert [heading.count("&") + 1 for heading in headings] == [7, 7]
    assert text.count("Runs are paired by seed") == 1
    assert sorted(re.findall(r"\\ref\{tab:(.*?)\}", text)) == ["costs-1", "differences-1"]
    assert r"\caption[{Results: sinusoid, 10-shot}]" in text
