"""Writes hooks.md and the tables of plugins/index.md; ``--check`` says whether they are current."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any, ClassVar

from generated import HERE, format_table, update_pages

from metareg import Field, PluginConfig, hookimpl
from metareg.contract import attributes, hookspecs
from metareg.contract.hookspecs import HOOKS, Reduction
from metareg.testing import checks

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
    return format_table(rows)


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
    return format_table([rows[0], *([f"`{row[0]}`", *row[1:]] for row in rows[1:])]).replace("``", "`")


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
    return format_table(rows)


if __name__ == "__main__":
    sys.exit(update_pages({"hooks.md": hook_reference(), "plugins/index.md": index()}))
