"""Shared by tests of reports: a parser of pages, and a comparison with names that are hard to show."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from comparisons import SMALL, write_comparison

HOSTILE = 'a|b_c & <b>50%</b> "γ" $x$ #1 {~^\\} *y* `z` &lt; [é] ΩΒο≤≈ ą日'


def write_hostile_comparison(folder: Path) -> Path:
    """Write a comparison whose label contains special characters of all formats."""
    config = SMALL | {"tasks": [{"task": "sinusoid", "label": HOSTILE}], "title": HOSTILE, "notes": "<b>no</b> **yes**"}
    write_comparison(folder, config, tasks=5)
    return folder


class Page(HTMLParser):
    """Parses a page; fails if an element is not closed."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "wbr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.found if name in attributes]


def find_figures(page: str, section: str) -> list[str]:
    """Return the drawings in a section of a page."""
    content = page.partition(f'<section id="{section}"')[2].partition("</section>")[0]
    return re.findall('<svg [^>]*role="img".*?</svg>', content, re.DOTALL)
