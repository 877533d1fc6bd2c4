"""Writes what algorithms.md and augmenters.md take from the plugins; ``--check`` says whether the pages are current.

A page has a pair of comments for each shipped plugin, ``<!-- plugin maml -->`` and ``<!-- end -->``, between which its
docstring is written. What the page adds stands after them.
"""

from __future__ import annotations

import inspect
import re
import sys

from generated import HERE, format_table, update_pages

from metareg.registry.costs import SETTING, describe_order, find_cost
from metareg.registry.plugins import Entry, get_config_class, list_entries

_PLUGIN = re.compile(r"<!-- plugin ([\w-]+) -->.*?<!-- end -->", re.S)
_FAMILY = re.compile(r"<!-- family -->.*?<!-- end -->", re.S)


def write_page(kind: str) -> str:
    """Return a page with its plugins' descriptions, and the table of algorithms, brought up to date."""
    shipped = {entry.name: entry for entry in list_entries(kind) if entry.distribution == "metareg"}
    text = (HERE / f"{kind}.md").read_text(encoding="utf-8")
    described = _PLUGIN.findall(text)
    if sorted(described) != sorted(shipped):
        different = ", ".join(sorted(shipped.keys() ^ {*described}) or described)
        sys.exit(f"{kind}.md must have the comments of each shipped plugin once, and of no other; see {different}")
    text = _PLUGIN.sub(
        lambda match: f"<!-- plugin {match[1]} -->\n\n{_describe(shipped[match[1]])}\n\n<!-- end -->", text
    )
    table = _tabulate_costs([shipped[name] for name in described])
    return _FAMILY.sub(lambda _: f"<!-- family -->\n\n{table}\n\n<!-- end -->", text)


def _describe(entry: Entry) -> str:
    """Return a plugin's docstring in Markdown, with its reference and a link to its options."""
    cls = entry.load()
    text, _, reference = (inspect.getdoc(cls) or "").partition("\nReference:\n")
    # Code stays as it is: what is between backticks, and equations, which are indented.
    parts = re.split(r"(``?.+?``?|(?m:^    .*$))", text.strip())
    parts[::2] = [re.sub(r"([*<])", r"\\\1", part) for part in parts[::2]]
    paragraphs = ["".join(parts).replace("``", "`")]
    if reference:
        paragraphs.append(f"*Reference*: {' '.join(reference.split())}".replace("``", "`"))
    options = get_config_class(cls).model_fields
    paragraphs.append(f"[Options](options.md#{entry.name})" if options else "No options.")
    return "\n\n".join(paragraphs)


def _tabulate_costs(algorithms: list[Entry]) -> str:
    rows = [["name", "what it is", "adapts", "state", "order", "time", "memory", "test time", "test memory"]]
    for entry in algorithms:
        cls, cost = entry.load(), find_cost(entry)
        summary = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].replace("``", "`").split())
        adapts = getattr(cls, "adapts", "all").replace("*", "\\*")
        order = describe_order(cls).replace(", or first with first_order", " or first")
        figures = [cost.time, cost.memory, cost.evaluation_time, cost.evaluation_memory] if cost else []
        rows.append([
            f"[`{entry.name}`](#{entry.name})", summary, adapts, f"{cost.state:.3g}" if cost else "",
            order, *([f"{figure:.2f}" for figure in figures] or [""] * 4),
        ])  # fmt: skip
    caption = (
        f"Time and memory are those of a training step, and of a test of 20 tasks, relative to MAML: {SETTING}. "
        "State is how many numbers the inner loop keeps for each adapted parameter."
    )
    return f"{format_table(rows)}\n\n{caption}"


if __name__ == "__main__":
    sys.exit(update_pages({f"{kind}.md": write_page(kind) for kind in ("algorithms", "augmenters")}))
