"""Writes hooks.md and the tables of plugins/index.md and algorithms.md; ``--check`` says whether they are current."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

from metareg import Field, PluginConfig, hookimpl
from metareg.contract import attributes, hookspecs
from metareg.contract.hookspecs import HOOKS, Reduction
from metareg.registry.costs import SETTING, describe_order, find_cost
from metareg.registry.plugins import Entry, list_entries
from metareg.testing import checks

HERE = Path(__file__).parent
_OF_ONE_PLUGIN = ("tasks and models",)
"""The parts of which a run has one plugin each."""


def hook_reference() -> str:
    """The page hooks.md."""
    module = inspect.cleandoc(hookspecs.__doc__ or "").partition("\n")[2].strip()
    parts = [
        "# Hook reference",
        "<!-- Written by docs/hook_reference.py from metareg/contract/hookspecs.py. -->",
        _markdown(module),
    ]
    part = ""
    for name, hook in HOOKS.items():
        if hook.part != part:
            part = hook.part
            parts.append(f"## {part[0].upper()}{part[1:]}")
        spec = getattr(hookspecs, name)
        arguments = [str(each).replace("'", "") for each in inspect.signature(spec).parameters.values()]
        returned = inspect.signature(spec).return_annotation
        one_line = f"{name}({', '.join(arguments)}) -> {returned}"
        wrapped = (
            one_line if len(one_line) <= 120 else f"{name}(\n    " + ",\n    ".join(arguments) + f",\n) -> {returned}"
        )
        parts += [f"### {name}", f"```python\n{wrapped}\n```", _markdown(inspect.getdoc(spec) or "")]
        if hook.part not in _OF_ONE_PLUGIN:
            parts += ["*Several plugins*", f"{hook.reduction.value[0].upper()}{hook.reduction.value[1:]}."]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """The page plugins/index.md with its tables brought up to date."""
    text = (HERE / "plugins" / "index.md").read_text(encoding="utf-8")
    for name, content in (("reductions", _reductions()), ("attributes", _attributes()), ("checks", _checks())):
        text = re.sub(
            rf"<!-- {name} -->.*?(?=\n\n[^|]|\Z)", lambda _, c=content, n=name: f"<!-- {n} -->\n\n{c}", text, flags=re.S
        )
    return re.sub(r"now (\d+ )?<!-- contract -->", f"now {hookspecs.CONTRACT_VERSION} <!-- contract -->", text)


def algorithms() -> str:
    """The page algorithms.md with its table brought up to date; the column of formulas is written by hand in the page."""
    text = (HERE / "algorithms.md").read_text(encoding="utf-8")
    formulas = dict(re.findall(r"^\| `([\w-]+)` \| (.*?) \|", text, flags=re.M))
    rows = [
        ["name", "inner update", "adapts", "state", "order", "time", "memory", "test time", "test memory", "source"]
    ]
    shipped = [entry for entry in list_entries("algorithms") if entry.distribution == "metareg"]
    for entry in sorted(shipped, key=lambda entry: [*formulas, entry.name].index(entry.name)):
        rows.append([f"`{entry.name}`", formulas.get(entry.name, ""), *_describe_algorithm(entry)])
    caption = (
        f"Time and memory are those of a training step, and of a test of 20 tasks, relative to MAML: {SETTING}. "
        "State is how many numbers the inner loop keeps for each adapted parameter."
    )
    content = f"<!-- family -->\n\n{_table(rows)}\n\n{caption}\n\n## "
    return re.sub(r"<!-- family -->.*?\n\n## ", lambda _: content, text, count=1, flags=re.S)


def _describe_algorithm(entry: Entry) -> list[str]:
    cls, cost = entry.load(), find_cost(entry)
    source = (inspect.getdoc(cls) or "").partition("Reference:")[2]
    citation = re.match(r".*?\b(?:19|20)\d\d\b(?:, arXiv [\d.]*\d)?", " ".join(source.split()))
    costs = [cost.time, cost.memory, cost.evaluation_time, cost.evaluation_memory] if cost else []
    adapts = getattr(cls, "adapts", "all").replace("*", "\\*")
    state = f"{cost.state:.3g}" if cost else ""
    figures = [f"{value:.2f}" for value in costs] or [""] * 4
    return [adapts, state, describe_order(cls), *figures, citation[0] if citation else ""]


def _markdown(docstring: str) -> str:
    """A docstring in Google's style as Markdown: argument lists become bullets."""
    text = docstring.replace("``", "`")
    lines: list[str] = []
    for block in re.split(r"\n(?=(?:Args|Returns|Raises)(?: and shapes .*)?:?\n)", text):
        head, _, rest = block.partition("\n")
        if head not in ("Args:", "Returns:", "Raises:"):
            lines.append(block.strip())
            continue
        lines.append(f"*{head.rstrip(':')}*")
        body = inspect.cleandoc(rest)
        if head == "Args:":
            entries = re.split(r"\n(?=\S)", body)
            items = [re.sub(r"\s*\n\s*", " ", entry) for entry in entries]
            lines.append("\n".join(re.sub(r"^(\w+): ", r"- `\1`: ", item) for item in items))
        else:
            lines.append(re.sub(r"\s*\n\s*", " ", body))
    return "\n\n".join(lines)


def _reductions() -> str:
    names = {reduction: [] for reduction in Reduction}
    for name, hook in HOOKS.items():
        if hook.part not in _OF_ONE_PLUGIN:
            names[hook.reduction].append(f"`{name}`")
    rows = [["hooks", "with several implementations"], *([", ".join(of), each.value] for each, of in names.items())]
    return _table(rows)


def _attributes() -> str:
    table = (attributes.__doc__ or "").split("\n\n")[-1].strip().splitlines()
    edges = [match.span() for match in re.finditer("=+", table[0])]
    rows: list[list[str]] = []
    for line in [line for line in table if not line.startswith("===")]:
        cells = [line[start : end if end < edges[-1][1] else None].strip() for start, end in edges]
        if line[:1].isspace() and cells[2]:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
        elif line[:1].isspace():
            rows[-1][1] += f", {cells[1]}"
        else:
            rows.append(cells)
    return _table([rows[0], *([f"`{row[0]}`", *row[1:]] for row in rows[1:])]).replace("``", "`")


class _Everything:
    """An algorithm or augmenter to which every check applies."""

    recommended: ClassVar[dict[str, Any]] = {"steps": 100}

    class Config(PluginConfig):
        rate: float = Field(1.0, description="A number.")

    @hookimpl
    def augment_outer_loss(self) -> None: ...


def _checks() -> str:
    rows = [["kinds", "check", "what it verifies"]]
    kinds: dict[tuple[str, str], list[str]] = {}
    for kind in ("algorithms", "augmenters", "tasks", "models", "observers"):
        for check in checks(kind, _Everything, compiled=True):
            kinds.setdefault((check.name, check.summary), []).append(kind)
    for (name, summary), of in kinds.items():
        rows.append(["all" if len(of) == 5 else ", ".join(of), f"`{name}`", summary])
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main(arguments: list[str]) -> int:
    """Write the pages; with ``--check`` only say which are not current."""
    stale = []
    pages = {"hooks.md": hook_reference(), "plugins/index.md": index(), "algorithms.md": algorithms()}
    for path, text in ((HERE / name, text) for name, text in pages.items()):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(text, encoding="utf-8")
    if stale and "--check" in arguments:
        print(f"{', '.join(stale)}: not current; run python docs/hook_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
