"""The page in a real browser: on a phone and a desktop, in dark mode, and in print."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from comparisons import SMALL, break_run, write_comparison
from metareg.reporting import report, tables
from metareg.reporting.analysis import analyze_comparison
from reports import HOSTILE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A typical page, and one with long names, gaps and a single seed."""
    folder = tmp_path_factory.mktemp("pages")
    config = SMALL | {
        "tasks": [{"task": "sinusoid", "label": f"{HOSTILE} {'averylongword' * 9}"}],
        "augment": ["none", "cml", *("+".join(["dropgrad"] * n) for n in range(1, 9))],
        "seeds": [0],
        "title": "averylongword" * 12,
        "notes": f"`{'code' * 60}`",
    }
    plan = write_comparison(folder / "odd", config, tasks=3)
    break_run(plan.list_runs()[3].path, "error")
    for name, source in (("demo", demo), ("odd", folder / "odd")):
        (folder / f"{name}.html").write_text(report(source, "html"), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in ("demo", "odd")}


@contextmanager
def opened(browser: Any, path: Path, width: int = 1280, **options: Any) -> Iterator[Any]:
    """Open a page in the browser; warnings and requests are errors."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert [each for each in trouble if each not in (path.as_uri(), "data:,")] == []


WIDTHS = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"


@pytest.mark.parametrize("name", ["demo", "odd"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_its_window(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    with opened(browser, pages[name], width) as page:
        needed, there = page.evaluate(WIDTHS)
        assert needed <= there <= width
        sizes = page.evaluate(
            "[...document.querySelectorAll('svg[role=img]')].map(e => {const b = e.getBoundingClientRect();"
            "return [b.width, b.height, b.left, b.right]})"
        )
        assert len(sizes) == {"demo": 22, "odd": 7}[name]
        for drawn_width, height, left, right in sizes:
            assert drawn_width > 200
            assert height > 100
            assert left >= 0
            assert right <= width
        # Letters are as large on a phone as on a desktop: drawings are not scaled down.
        heights = page.evaluate(
            "[...document.querySelectorAll('svg[role=img] text')].map(e => e.getBoundingClientRect().height)"
        )
        assert min(heights) > 12


OVERLAPS = """() => [...document.querySelectorAll('svg[role=img]')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
  const cut = texts.filter(([, b]) => b.left < frame.left - 1 || b.right > frame.right + 1 || b.bottom > frame.bottom + 1);
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top + 2 || b.bottom <= a.top + 2;
  const pairs = texts.flatMap(([s, a], i) => texts.slice(i + 1).filter(([, b]) => !apart(a, b)).map(([t]) => [s, t]));
  return [...cut.map(([s]) => [s]), ...pairs];
})"""


@pytest.mark.parametrize("name", ["demo", "odd"])
def test_labels_are_whole_and_do_not_overlap(browser: Any, pages: dict[str, Path], name: str) -> None:
    for width in (360, 1280):
        with opened(browser, pages[name], width) as page:
            assert page.evaluate(OVERLAPS) == []


def test_the_tables_hold_the_numbers(browser: Any, pages: dict[str, Path], demo: Path) -> None:
    found = analyze_comparison(demo)
    with opened(browser, pages["demo"]) as page:
        shown = page.evaluate(
            "Object.fromEntries(['differences', 'results', 'costs', 'settings', 'environment'].map(id => [id,"
            "[...document.querySelectorAll(`#${id} table`)].map(t => [...t.tBodies[0].rows].map(r =>"
            "[...r.cells].flatMap(c => c.tagName === 'TH' ? [...c.children].map(s => s.textContent) : [c.textContent])))]))"
        )
    expected = {
        "differences": [tables.build_differences(found, task) for task in found.tasks],
        "results": [tables.build_results(found, task) for task in found.tasks],
        "costs": [tables.build_costs(found, task) for task in found.tasks],
        "settings": [tables.build_settings(found, task) for task in found.tasks],
        "environment": [tables.build_environment(found)],
    }
    for name, wanted in expected.items():
        assert shown[name] == [[list(row) for row in table.rows] for table in wanted if table], name


def test_a_wide_table_scrolls_in_its_box(browser: Any, pages: dict[str, Path]) -> None:
    with opened(browser, pages["demo"], 360) as page:
        box = page.locator("#differences .scroll").first
        assert box.evaluate("e => e.scrollWidth > e.clientWidth")
        box.focus()
        page.keyboard.press("End")
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.querySelector('#differences .scroll').scrollLeft > 0")
        left = box.evaluate(
            "e => e.querySelector('tbody th').getBoundingClientRect().left - e.getBoundingClientRect().left"
        )
        assert left == pytest.approx(0, abs=1)


CONTRAST = """() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const page = getComputedStyle(document.body).backgroundColor;
  const texts = ['h1', '.facts', '.lead', '.note', 'a', 'td', 'svg text'].map(s => {
    const style = getComputedStyle(document.querySelector('main ' + s) || document.querySelector(s));
    return ratio(s === 'svg text' ? style.fill : style.color, page); });
  const chips = [...document.querySelectorAll('.chip')].map(getComputedStyle).map(s => ratio(s.color, s.backgroundColor));
  const marks = [...document.querySelectorAll('svg use')].map(e => ratio(getComputedStyle(e).fill, page));
  return {page, texts: Math.min(...texts), chips: Math.min(...chips), drawn: marks.filter(m => m > 1.01)};
}"""


@pytest.mark.parametrize("name", ["demo", "odd"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_legible(browser: Any, pages: dict[str, Path], scheme: str, name: str) -> None:
    with opened(browser, pages[name], color_scheme=scheme) as page:
        assert (page.locator(".chip.better").count() > 0) == (name == "demo")
        found = page.evaluate(CONTRAST)
    red = int(re.findall(r"\d+", found["page"])[0])
    assert (red > 240) == (scheme == "light")
    assert found["texts"] >= 4.5
    assert found["chips"] >= 4.5
    assert min(found["drawn"]) >= 3


@pytest.mark.parametrize("name", ["demo", "odd"])
def test_the_page_prints(browser: Any, pages: dict[str, Path], name: str) -> None:
    with opened(browser, pages[name], 718, color_scheme="dark") as page:  # A4 without margins
        page.emulate_media(media="print")
        needed, there = page.evaluate(WIDTHS)
        assert needed <= there
        assert page.evaluate(
            "[...document.querySelectorAll('table')].every(e => e.scrollWidth <= e.parentNode.clientWidth)"
        )
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator("nav").is_visible()
        printed = page.pdf(format="A4", prefer_css_page_size=True)
    assert printed.startswith(b"%PDF")
    assert len(printed) > 20_000
