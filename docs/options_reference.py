"""Writes options.md, the options of a run and of every shipped plugin, and what the tasks' pages take from them.

``--check`` says whether the pages are current. Between ``<!-- options PLUGIN -->`` and ``<!-- end -->``, a page of tasks
has the table of a plugin's options; ``<!-- options PLUGIN: NAME, NAME -->`` selects some.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from generated import HERE, format_table, update_pages

from metareg.cli.option_types import describe_type
from metareg.contract.config import PluginSpec
from metareg.contract.search import describe_search_space
from metareg.registry.plugins import KINDS, Entry, get_config_class, list_entries
from metareg.runs.config import RunConfig

_TABLE = re.compile(r"<!-- options ([\w-]+)(?:: ([\w, ]+))? -->.*?<!-- end -->", re.S)
_PAGES_OF_TASKS = ("tasks/images.md", "tasks/tables.md")

INTRODUCTION = """# Options

<!-- Written by docs/options_reference.py from the options' own descriptions. -->

You can set every option with `--set OPTION=VALUE`, in a file for `--config`, or as an argument of `metareg.train`; some
also have a flag. `OWNER.OPTION` says which plugin an option belongs to, such as `cml.gamma` or `algo.inner_lr`. For the
order of precedence, see [Which value counts](getting-started.md#which-value-counts). `metareg train --help` lists the
choices of a flag, and `metareg show NAME` prints the tables below for any plugin, including those that you installed
yourself.
"""


def options_page() -> str:
    """The page options.md."""
    parts = [INTRODUCTION, *_describe_run()]
    entries = [entry for entry in list_entries() if entry.distribution == "metareg"]
    for kind in KINDS:
        parts.append(f"## {kind.capitalize()}")
        parts += _describe_kind([entry for entry in entries if entry.kind == kind])
    return "\n\n".join(part.strip() for part in parts) + "\n"


def fill_page(name: str) -> str:
    """A page with its tables of options brought up to date."""
    text = (HERE / name).read_text(encoding="utf-8")
    return _TABLE.sub(lambda match: _fill_table(*match.groups()), text)


def _fill_table(plugin: str, chosen: str | None) -> str:
    (entry,) = (each for each in list_entries() if (each.distribution, each.name) == ("metareg", plugin))
    fields = get_config_class(entry.load()).model_fields
    names = fields if chosen is None else re.split(", *", chosen)
    head = f"<!-- options {plugin}{f': {chosen}' if chosen else ''} -->"
    return f"{head}\n\n{_describe_options(entry, {name: fields[name] for name in names})}\n\n<!-- end -->"


def _describe_run() -> Iterator[str]:
    flags, resumable = RunConfig.list_flags(), RunConfig.list_resumable()
    yield "## The run"
    yield "Options with a ✓ can be changed by `metareg resume`."
    rows = [["option", "default", "description", "allowed", "flag", "resume"]]
    for name, field in RunConfig.model_fields.items():
        flag = f"`{flags[name]}`" if name in flags else ""
        rows.append([*_describe_option(name, field), flag, "✓" if name in resumable else ""])
    yield format_table(rows)


def _describe_kind(entries: list[Entry]) -> Iterator[str]:
    """A section for each plugin; one whose options are those of a plugin before it refers to that one."""
    owners: dict[str, str] = {}
    for entry in entries:
        cls = entry.load()
        yield f"### {entry.name}"
        yield " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].replace("``", "`").split())
        options = _describe_options(entry, get_config_class(cls).model_fields)
        owner = owners.setdefault(options, entry.name)
        if not options:
            yield "It has no options."
        else:
            yield options if owner == entry.name else f"Its options are those of [{owner}](#{owner})."
        recommended = getattr(cls, "recommended", {})
        if recommended and isinstance(recommended, Mapping):
            yield _describe_recommendations(recommended)


def _describe_options(entry: Entry, fields: Mapping[str, Any]) -> str:
    """The table of a plugin's options; empty where it has none."""
    searched = entry.kind in ("algorithms", "augmenters")
    rows = [["option", "default", "description", "allowed", *(["a search tries"] if searched else [])]]
    for name, field in fields.items():
        space = [describe_search_space(entry.label, name, field) or ""] if searched else []
        rows.append([*_describe_option(name, field), *space])
    return format_table(rows) if fields else ""


def _describe_option(name: str, field: Any) -> list[str]:
    default = field.get_default(call_default_factory=True)
    if isinstance(default, PluginSpec):
        default = default.name
    default = str(default).lower() if isinstance(default, bool) else default
    text = "required" if field.is_required() else "" if default is None else f"`{default}`"
    return [f"`{name}`", text, field.description or "", describe_type(field)]


def _describe_recommendations(recommended: Mapping[str, Any]) -> str:
    """What a plugin recommends in a line for any algorithm, and one for each that it names."""
    named = {name: values for name, values in recommended.items() if isinstance(values, Mapping)}
    general = {key: value for key, value in recommended.items() if key not in named}
    lines = {"Recommends": general} | {
        f"With `{name}`" if general else f"Recommends for `{name}`": named[name] for name in named
    }
    written = {start: ", ".join(f"`{key}={value}`" for key, value in values.items()) for start, values in lines.items()}
    return "\n\n".join(f"{start}: {values}." for start, values in written.items() if values)


if __name__ == "__main__":
    sys.exit(update_pages({"options.md": options_page()} | {name: fill_page(name) for name in _PAGES_OF_TASKS}))
