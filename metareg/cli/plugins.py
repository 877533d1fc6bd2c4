"""``metareg plugins``, ``show``, ``new-plugin``, ``check-plugin``, ``doctor`` and ``data``."""

from __future__ import annotations

import json
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from metareg.cli.common import Data, NoPlugin, path_option, set_option
from metareg.cli.terminal import stderr, stdout, write_output
from metareg.errors import PluginError, UnknownNameError, UsageError, describe_error
from metareg.registry.inspection import DatasetFacts, inspect_datasets, inspect_plugins, read_dataset
from metareg.registry.plugins import KINDS, find_entry, list_entries

__all__ = ["check_plugin", "data", "doctor", "new_plugin", "plugins", "show"]

_Kind = Annotated[str, typer.Argument(metavar="KIND", help="algorithms, augmenters, tasks, models or observers.")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="The plugin's name.")]


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Import each plugin, and say which ones do not work.")] = False,
) -> None:
    """List the installed plugins. Without --check, none of them is imported."""
    rows = _describe_entries(check=check)
    if as_json:
        write_output(json.dumps(rows, indent=2) + "\n")
        return
    from metareg.cli.tables import create_plugin_table

    stdout.print(create_plugin_table(rows, check))


def show(
    names: Annotated[
        list[str],
        typer.Argument(metavar="[KIND] NAME", help="The plugin; with its kind first if several share the name."),
    ],
) -> None:
    """Show what a plugin does, its hooks, and its options with their bounds and defaults."""
    if len(names) > 2:
        raise UsageError(f"`metareg show` takes a name, or a kind and a name; got {' '.join(names)}.")
    *kinds, name = names
    entry = find_entry(_parse_kind(kinds[0]) if kinds else _find_kind(name), name)
    from metareg.cli.tables import describe_plugin

    cls = entry.load()
    try:
        description = describe_plugin(entry, cls)
    except (Exception, SystemExit) as error:
        raise PluginError(f"The {entry.label} cannot be described: {describe_error(error)}") from error
    stdout.print(description)


def new_plugin(
    kind: _Kind,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name that users will type, such as sign-maml.")],
    out: Annotated[Path, path_option(metavar="DIR", help="Folder in which to create the package.")] = Path(),
) -> None:
    """Create a package with a working plugin, its tests and its README."""
    from metareg.cli.scaffold import write_plugin

    plural = _parse_kind(kind)
    folder = write_plugin(plural, name, out)
    stdout.print(
        f"{escape(str(folder))} is a working package:\n"
        f"  pip install -e '{escape(str(folder))}'\n"
        f"  metareg check-plugin {plural} {name}",
        soft_wrap=True,
    )


def check_plugin(
    kind: _Kind,
    name: _Name,
    assignments: Annotated[list[str] | None, set_option("An option of the plugin for the check. Repeatable.")] = None,
    compile: Annotated[
        bool, typer.Option(help="Also compare with torch.compile, which takes 10 to 20 seconds.")
    ] = True,
) -> None:
    """Check an installed plugin with the conformance kit of metareg.testing."""
    from metareg.cli.tables import describe_check
    from metareg.runs.options import parse_assignments
    from metareg.testing import checks

    config = parse_assignments(assignments or [])
    failures = 0
    for check in checks(_parse_kind(kind), name, config, compiled=compile):
        with stderr.status(f"{check.name}: {check.summary}"):
            problem = check.problem()
        failures += problem is not None
        stdout.print(describe_check(check, problem), soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def doctor() -> None:
    """Check the installation: versions, devices, compiler, and every plugin."""
    from metareg.cli.tables import describe_installation

    rows = _describe_entries(check=True)
    stdout.print(describe_installation(rows))
    if any(row["broken"] for row in rows):
        raise typer.Exit(1)


def data(
    name: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="The task (default: all).", show_default=False)
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Download the task's data.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read and count all of the task's data.")] = False,
    example: Annotated[
        Path | None, path_option("--example", metavar="DIR", help="Write generated example data to a new folder.")
    ] = None,
    where: Data = None,
    _no_plugin: NoPlugin = None,
) -> None:
    """List the data that tasks read, and where it is or how to get it; download and verify it."""
    from metareg.cli.tables import create_dataset_table

    if name is None:
        if download or verify or example:
            raise UsageError("Name the task: metareg data TASK --download.")
        stdout.print(create_dataset_table(_list_datasets(where)))
        return
    entry = find_entry("tasks", name)
    dataset = read_dataset(entry, where)
    if example is not None:
        if dataset is None or dataset.write_example is None:
            raise UsageError(f"The task '{name}' has no example data; table-folder has.")
        stdout.print(escape(dataset.write_example(example)), soft_wrap=True)
        return
    if dataset is not None and download and not dataset.present:
        if dataset.download is None:
            raise UsageError(f"The data of the task '{name}' cannot be downloaded. {dataset.obtain}")
        dataset.download()
        dataset = read_dataset(entry, where)
    if dataset is None:
        raise UsageError(f"The task '{name}' reads no data.")
    stdout.print(create_dataset_table([(name, DatasetFacts.of(dataset))]))
    if verify:
        with stderr.status("Reading …"):
            found = dataset.verify()
        stdout.print(f"[green]complete[/]: {escape(found)}", soft_wrap=True)


def _list_datasets(where: Path | None) -> list[tuple[str, DatasetFacts | str]]:
    """List the installed tasks that read data, with facts about the data, or an error message."""
    entries = list_entries("tasks")
    found = zip(entries, inspect_datasets(entries, where), strict=True)
    return [(entry.name, dataset) for entry, dataset in found if dataset is not None]


def _parse_kind(given: str) -> str:
    """Parse a kind of plugin, in the singular or the plural."""
    matches = [each for each in KINDS if given and each.startswith(given.rstrip("s"))]
    if len(matches) != 1:
        raise UnknownNameError("kind of plugin", given, KINDS)
    return matches[0]


def _find_kind(name: str) -> str:
    """Return the kind of the plugin with this name.

    Raises:
        UsageError: no plugin has the name, or plugins of several kinds have it.
    """
    entries = list_entries()
    kinds = [kind for kind in KINDS if any(e.kind == kind and name in (e.name, e.qualified) for e in entries)]
    if not kinds:
        hint = f"Use `metareg show {name} NAME`." if name in KINDS else "`metareg plugins` lists the installed plugins."
        raise UnknownNameError("plugin", name, {entry.name for entry in entries}, hint)
    if len(kinds) > 1:
        commands = " or ".join(f"`metareg show {kind} {name}`" for kind in kinds)
        raise UsageError(f"Plugins of {len(kinds)} kinds are named '{name}': {commands}.")
    return kinds[0]


def _describe_entries(*, check: bool) -> list[dict[str, Any]]:
    """Describe the installed plugins; if `check`, import each one."""
    entries = list_entries()
    facts = inspect_plugins(entries) if check else repeat({})
    names = ("kind", "name", "distribution", "version")
    return [
        {name: getattr(entry, name) for name in names} | {"broken": None} | found
        for entry, found in zip(entries, facts, strict=False)
    ]
