"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from metareg.cli.terminal import stderr
from metareg.errors import UnknownNameError
from metareg.registry.plugins import DISABLE_VARIABLE, get_name, list_entries, list_names

__all__ = [
    "BatchNormStatistics",
    "Data",
    "Device",
    "InnerSteps",
    "LearnerPath",
    "NoPlugin",
    "Query",
    "RunFolder",
    "Shots",
    "Target",
    "Ways",
    "collect_given",
    "combine",
    "complete_names",
    "expand_path",
    "path_option",
    "plugin_option",
    "set_option",
]


def complete_names(kind: str) -> Callable[[str], list[str]]:
    """Return a shell completion function for names of plugins of a kind."""
    return lambda incomplete: [entry.name for entry in list_entries(kind) if entry.name.startswith(incomplete)]


def _disable_plugins(names: list[str] | None) -> list[str] | None:
    """Disable plugins in this process and its child processes; refuse names that no plugin has."""
    for name in names or []:
        if get_name(name) not in (known := list_names()):
            raise UnknownNameError("plugin", name, known, "`metareg plugins` lists the installed plugins.")
    disabled = [os.environ.get(DISABLE_VARIABLE, ""), *(names or [])]
    os.environ[DISABLE_VARIABLE] = ",".join(filter(None, disabled))
    return names


def expand_path(path: Path | None) -> Path | None:
    """Replace ``~`` with the home folder."""
    return None if path is None else Path(os.path.expanduser(path))  # noqa: PTH111 (pathlib's expanduser can raise)


def path_option(*flags: str, metavar: str, help: str) -> Any:
    """Create an option for a path, which may start with ``~``."""
    return typer.Option(*flags, metavar=metavar, help=help, callback=expand_path)


def plugin_option(kind: str, *, metavar: str, help: str) -> Any:
    """Create an option for names of plugins of a kind, with shell completion."""
    return typer.Option(metavar=metavar, help=help, autocompletion=complete_names(kind))


def set_option(help: str) -> Any:
    """Create the option ``--set KEY=VALUE``."""
    return typer.Option("--set", metavar="KEY=VALUE", help=help)


RunFolder = Annotated[
    Path, typer.Argument(help="The run's folder.", metavar="RUN", show_default=False, callback=expand_path)
]
LearnerPath = Annotated[
    Path,
    typer.Argument(
        help="The run's folder, or the learner's file.", metavar="RUN", show_default=False, callback=expand_path
    ),
]
Data = Annotated[
    Path | None,
    path_option("--data", metavar="DIR", help="Folder of the task's data (default: the variable METAREG_DATA)."),
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1; by default, a GPU if there is one.")
]
Ways = Annotated[int | None, typer.Option(metavar="N", help="Classes per task.")]
Shots = Annotated[int | None, typer.Option(metavar="N", help="Support examples per class, or per regression task.")]
Query = Annotated[int | None, typer.Option(metavar="N", help="Query examples per class, or per regression task.")]
Target = Annotated[str | None, typer.Option(metavar="COLUMN", help="The column to predict, for tasks on tables.")]
BatchNormStatistics = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="support: BatchNorm uses the support set's statistics, and predictions are independent of each other; "
        "transductive: it uses those of the current batch.",
    ),
]
InnerSteps = Annotated[int | None, typer.Option(metavar="N", help="Inner steps (default: as in training).")]
NoPlugin = Annotated[
    list[str] | None,
    typer.Option(
        "--no-plugin", metavar="NAME", help="Disable an installed plugin. Repeatable.", callback=_disable_plugins
    ),
]


def collect_given(**options: Any) -> dict[str, Any]:
    """Return the options that the user gave."""
    return {name: value for name, value in options.items() if value is not None}


def combine(assigned: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Combine the options of ``--set`` with those of flags, which win; a line says so where both set one."""
    for key in sorted(assigned.keys() & flags.keys()):
        line = f"The flag sets '{key}' to {flags[key]}; --set {key}={assigned[key]} is not used."
        stderr.print(escape(line), soft_wrap=True)
    return {**assigned, **flags}
