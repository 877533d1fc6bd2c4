"""Pages on plugins and on the installation, for the terminal."""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from metareg.cli.tables import create_table

if TYPE_CHECKING:
    from metareg.registry.plugins import Entry
    from metareg.testing import Check

__all__ = ["create_plugin_table", "describe_check", "describe_installation", "describe_plugin"]

_PADDING = (0, 2, 0, 0)


def describe_check(check: Check, problem: str | None) -> Text:
    """What one check of a plugin found."""
    if problem is None:
        return Text.assemble(("passed  ", "green"), (f"{check.name:<20}", "bold"), check.summary)
    return Text.assemble(("failed  ", "red"), (f"{check.name:<20}", "bold"), problem)


def create_plugin_table(rows: list[dict[str, Any]], checked: bool) -> RenderableType:
    """The installed plugins, one a row."""
    if not rows:
        return Text("No plugin is installed or enabled.")
    columns = ("kind", "name", "distribution", "version", *(("works", "what it is") if checked else ()))
    table = create_table(*columns)
    for row in rows:
        cells = [row["kind"], row["name"], row["distribution"], row["version"]]
        if checked:
            cells += ["no", row["broken"]] if row["broken"] else ["yes", row["summary"]]
        table.add_row(*map(escape, cells), style="red" if row["broken"] else None)
    return table


def describe_plugin(entry: Entry, cls: type) -> RenderableType:
    """All that there is to know of a plugin."""
    from metareg.contract.search import describe_search_space
    from metareg.registry.dispatch import list_hooks

    parts: list[RenderableType] = [
        Text.assemble((entry.name, "bold"), f"  {entry.distribution} {entry.version}, {entry.target}"),
        Padding(Text(inspect.cleandoc(cls.__doc__ or "It has no description.")), (1, 0, 1, 2)),
        Text.assemble(("hooks: ", "bold"), ", ".join(list_hooks(cls)) or "none"),
    ]
    fields = getattr(getattr(cls, "Config", None), "model_fields", {})
    if fields:
        searched = entry.kind in ("algorithms", "augmenters")
        columns = ("option", "default", "allowed", *(("a search tries",) if searched else ()), "what it is")
        table = create_table(*columns, padding=_PADDING)
        for name, field in fields.items():
            default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
            cells = [name, default, _format_type(field), field.description or ""]
            if searched:
                cells.insert(
                    3, describe_search_space(f"{entry.kind.removesuffix('s')} '{entry.name}'", name, field) or "nothing"
                )
            table.add_row(*map(escape, cells))
        parts += [Text(), table]
    recommended = getattr(cls, "recommended", {})
    if recommended and isinstance(recommended, Mapping):
        parts += [Text(), _create_recommendation_table(recommended)]
    return Group(*parts)


def _create_recommendation_table(recommended: Mapping[str, Any]) -> Table:
    """What a plugin recommends: options of the run, then those of each owner, then what is for one algorithm alone."""
    table = create_table("recommends", "value", "for", padding=_PADDING)
    alone = {name: value for name, value in recommended.items() if isinstance(value, Mapping)}
    general = {key: value for key, value in recommended.items() if key not in alone}
    for algorithm, options in (("", general), *alone.items()):
        for key in sorted(options, key=lambda key: key.rpartition(".")[0]):
            table.add_row(*map(escape, (key, str(options[key]), algorithm or "any algorithm")))
    return table


def describe_installation(rows: list[dict[str, Any]]) -> RenderableType:
    """The state of the installation."""
    import torch

    from metareg.engine.strategies import find_compiler
    from metareg.runs import environment

    machine = environment.describe_machine()
    compiler = find_compiler()
    facts = {
        "metareg": f"{machine['metareg']}, plugin contract {machine['contract']}",
        "python": f"{machine['python']} on {platform.system()} {machine['processor']}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads",
        "GPU": ", ".join(machine["gpus"]) or "none",
        "C++ compiler": compiler or "none: the strategy 'compiled' cannot be used on the CPU",
        **machine["libraries"],
    }
    table = create_table(show_header=False, padding=_PADDING)
    for name, value in facts.items():
        table.add_row(name, escape(str(value)))
    broken = sum(bool(row["broken"]) for row in rows)
    verdict = f"{broken} of {len(rows)} plugins do not work." if broken else f"All {len(rows)} plugins work."
    return Group(
        table, Text(), create_plugin_table(rows, checked=True), Text(), Text(verdict, "bold red" if broken else "green")
    )


def _format_type(field: Any) -> str:
    """The type and bounds of a configuration field, as a reader would write them."""
    kind = getattr(field.annotation, "__name__", str(field.annotation))
    if not isinstance(field.annotation, type):
        kind = str(field.annotation).replace("typing.", "").removeprefix("Literal")
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥", "max_length": "length ≤"}
    bounds = [
        f"{sign} {value}"
        for constraint in field.metadata
        for key, sign in signs.items()
        if (value := getattr(constraint, key, None)) is not None
    ]
    return " ".join([kind, *bounds])
