"""The page is complete and self-contained, and names or notes cannot break it."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from comparisons import DEMO, SMALL, write_comparison, write_run
from metareg.comparison.plan import Plan
from metareg.reporting import report
from metareg.util.plotting import COLOURS
from reports import HOSTILE, Page, find_figures, write_hostile_comparison


def test_the_page_needs_nothing_beside_itself(demo_page: str) -> None:
    tags = Page(demo_page)
    assert not {tag for tag, _ in tags.found} & {"script", "img", "iframe", "object", "embed"}
    assert tags.attributes("src") == []
    links = {link for link in tags.attributes("href") if not link.startswith("#")}
    assert links == {"data:,", "https://arxiv.org/abs/2406.00001"}
    assert set(re.findall(r"url\((.)", demo_page)) == {"#"}
    assert "@import" not in demo_page
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    ids = tags.attributes("id")
    assert len(ids) == len(set(ids))
    regions = [attributes["aria-label"] for _, attributes in tags.found if attributes.get("role") == "region"]
    assert len(regions) == len(set(regions)) == 2 + 5 * 2
    assert {link[1:] for link in tags.attributes("href") if link.startswith("#")} <= set(ids)


def test_the_page_has_everything(demo_page: str) -> None:
    tags = Page(demo_page)
    drawings = re.findall('<svg [^>]*role="img".*?</svg>', demo_page, re.DOTALL)
    assert len(drawings) == 2 + 8 + 8 + 4  # differences, inner steps, learning curves, costs
    assert all(re.search("<title>.+</title><desc>.+</desc>", each) for each in drawings)
    assert len({re.search("<title>.+?</title>", each)[0] for each in drawings}) == len(drawings)
    # Every colour is a variable of the page, which differs in dark mode.
    assert not re.search("#[0-9a-f]{6}", "".join(drawings))
    assert sum(tag == "caption" for tag, _ in tags.found) == sum(tag == "table" for tag, _ in tags.found)
    assert all(attributes.get("scope") for tag, attributes in tags.found if tag == "th")
    text = "".join(tags.text)
    for words in (
        "sinusoid, 10-shot mse, lower is better",
        "omniglot-small, 5-way 1-shot accuracy, higher is better",
        "cml.gamma = 0.35",
        "metareg train --algo maml --augment cml --task sinusoid",
        "2.13.0",
        "vectorized",
    ):
        assert words in text
    assert '<section id="missing"' not in demo_page


def test_an_arm_has_the_same_colour_everywhere(small: Plan) -> None:
    page = report(small.folder, "html")
    names = ["none", "cml", "dropgrad+cml"]
    keys = re.findall(r'class="key">.*?var\(--(s\d)\).*?</svg> ([^<]*)<', page, re.DOTALL)
    assert keys == [(f"s{number}", name) for _ in range(2) for number, name in enumerate(names)]
    for section, count in (("inner-steps", 3), ("curves", 3), ("costs", 3), ("differences", 2)):
        for figure in find_figures(page, section):
            colours = list(dict.fromkeys(re.findall(r"var\(--(s\d)\)", figure)))
            assert colours == [f"s{number}" for number in range(3)][-count:], section


def test_the_style_sheet_has_the_colours_of_plots(demo_page: str) -> None:
    light = demo_page.partition("@media")[0]
    assert dict(re.findall(r"--(s\d): (#\w+)", light)) == {
        f"s{number}": colour for number, colour in enumerate(COLOURS)
    }


def test_equal_results_give_equal_bytes(small: Plan) -> None:
    assert report(small.folder, "html") == report(small.folder, "html")


def test_an_interval_that_goes_on_beyond_its_axis_has_an_arrow(small: Plan) -> None:
    path = small.folder / "runs/sinusoid/maml+cml/seed-0"
    content = json.loads((path / "results.json").read_text())
    for step in content["steps"]:
        step["scores"] = [30 * score for score in step["scores"]]
    (path / "results.json").write_text(json.dumps(content))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"mse": 30 * line["mse"]} for line in lines]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    page = report(small.folder, "html")

    maml, anil = find_figures(page, "inner-steps")
    assert len(re.findall("<use ", maml)) > len(re.findall("<use ", anil))
    for section in ("inner-steps", "curves"):
        assert all("log scale</text>" in panel for panel in find_figures(page, section))


def test_what_is_tested_or_validated_once_is_no_line(small: Plan) -> None:
    for run in small.list_runs():
        write_run(run, tasks=7, steps=(1,))
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
        (run.path / "metrics.jsonl").write_text(next(line for line in lines if "validation" in line))
    page = report(small.folder, "html")
    assert not re.search('id="(inner-steps|curves)"', page)


def test_many_augmenters_can_be_told_apart(tmp_path: Path) -> None:
    names = ["none", *("+".join(["gradient-noise"] * n + ["cml"] * m) for n in range(1, 7) for m in range(6))]
    write_comparison(tmp_path, SMALL | {"augment": names, "seeds": [0]}, tasks=3)
    page = report(tmp_path, "html")
    keys = re.findall('<li class="key"><svg.*?</svg>', page.partition('id="inner-steps"')[2].partition("</section>")[0])
    shapes = [re.sub(r"[mp][0-9a-f]{10}", "", key) for key in keys]
    assert len(shapes) == len(set(shapes)) == 37
    # They are below each other if there is room.
    assert '<tr><th scope="col">augmenter</th><th scope="col">maml</th><th scope="col">anil</th></tr>' in page
    rows = re.findall(r">(gradient-noi[^<]*)</text>", find_figures(page, "differences")[0])
    assert len(set(rows[6:10])) == 4  # chains that begin alike


def test_every_figure_says_what_its_intervals_are_over(tmp_path: Path) -> None:
    write_comparison(tmp_path, SMALL | {"tasks": ["sinusoid", "harmonic"]}, tasks=7)
    for path in tmp_path.glob("runs/harmonic/*/seed-[15]"):
        shutil.rmtree(path)
    text = report(tmp_path, "html").partition('<section id="inner-steps"')[2]
    assert "<h3>sinusoid (± over seeds)</h3>" in text
    assert "<h3>harmonic (± over test tasks, one seed)</h3>" in text


def test_labels_and_notes_cannot_add_markup(tmp_path: Path) -> None:
    page = report(write_hostile_comparison(tmp_path), "html")
    tags = Page(page)
    assert not [tag for tag, attributes in tags.found if tag == "b" and not attributes.get("class")]
    assert "".join(tags.text).count(HOSTILE) > 5
    assert "<strong>yes</strong>" in page
    assert "&lt;b&gt;no&lt;/b&gt;" in page


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        ("![x](https://example.com/x.png)", "<a"),
        ("[x](javascript:alert(1))", "[x](javascript:alert(1))"),
        ("# no heading", "<p># no heading</p>"),
        ("`a<b`", "<code>a&lt;b</code>"),
    ],
)
def test_notes_are_little_markdown(tmp_path: Path, notes: str, expected: str) -> None:
    write_comparison(tmp_path, SMALL | {"notes": notes, "seeds": [0]}, tasks=3)
    page = report(tmp_path, "html")
    Page(page)
    assert expected in page
    assert "<img" not in page


def test_the_page_leads_with_the_answer_and_says_each_verdict_once(small: Plan) -> None:
    page = report(small.folder, "html")
    sections = re.findall(r'<section id="([a-z-]+)"', page)
    assert sections[0] == "summary"
    summary = page.partition('<section id="summary"')[2].partition("</section>")[0]
    shown = len(re.findall(r'class="chip', summary))
    assert shown > 1
    words = re.sub(r"<table.*?</table>", "", summary, flags=re.DOTALL)
    assert "chip" not in words
    assert not re.search(r"<li>", words)
    assert summary.index("<table") < summary.index("have finished")


def test_the_plan_is_shown_below_the_answer(tmp_path: Path) -> None:
    write_comparison(tmp_path, SMALL | {"plan": "If *better*: `it helps`. <b>", "notes": "It did."}, tasks=7)
    page, text = report(tmp_path, "html"), report(tmp_path)
    assert "If <em>better</em>: <code>it helps</code>. &lt;b&gt;" in page
    assert page.index('id="summary"') < page.index('id="plan"') < page.index('id="results"')
    sections = ["## Summary", "## Notes\n\nIt did.", "## Results", "## Paired differences", "## Plan\n\nIf *better*"]
    assert sections == sorted(sections, key=text.index)
    assert text.partition("\n\n")[2].startswith("## Summary")


def test_large_comparisons_are_read_quickly(tmp_path: Path) -> None:
    config = DEMO | {"seeds": 14, "augment": ["none", "cml", "dropgrad"]}
    plan = write_comparison(tmp_path, config, tasks=600)
    assert len(plan.list_runs()) > 320
    start = time.process_time()
    assert report(tmp_path, "html")
    assert time.process_time() - start < 6
