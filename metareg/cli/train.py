"""``metareg train`` and ``metareg resume``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from metareg.cli.common import Data, NoPlugin, RunFolder, path_option, set_option, stderr, stdout
from metareg.cli.flags import takes_run_options
from metareg.errors import UsageError

__all__ = ["resume", "train"]


@takes_run_options(lambda config: config.model_fields)
def train(
    ways: Annotated[int | None, typer.Option(help="Classes per task.")] = None,
    shots: Annotated[int | None, typer.Option(help="Support examples per class, or per regression task.")] = None,
    query: Annotated[int | None, typer.Option(help="Query examples per class, or per regression task.")] = None,
    data: Data = None,
    assignments: Annotated[
        list[str] | None, set_option("Any other option of the run or of its plugins. Repeatable.")
    ] = None,
    config: Annotated[
        Path | None, path_option(metavar="FILE", help="YAML with any of these; options given here stand before it.")
    ] = None,
    out: Annotated[Path | None, path_option(metavar="DIR", help="The run's folder (a new one in runs/).")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out where there is one, begin it where not.")
    ] = False,
    _no_plugin: NoPlugin = None,
    **options: Any,
) -> None:
    """Train, test and draw: [bold]metareg train --algo maml --augment cml[/].

    Every option has a default that suits the task. [bold]metareg show tasks NAME[/] and its like for algorithms,
    augmenters and models list what --set takes.
    """
    from metareg.cli.progress import Progress
    from metareg.cli.tables import print_results
    from metareg.runs.config import PLUGIN_FIELDS, RunConfig
    from metareg.runs.training import train as train_run

    plugins = {name: RunConfig.list_flags()[name] for name in PLUGIN_FIELDS}
    given = _parse_options(assignments, plugins | {"out": "--out", "config": "--config", "resume": "--resume"})
    of_task = {"ways": ways, "shots": shots, "query": query, "data": None if data is None else str(data)}
    given |= {f"task.{name}": value for name, value in of_task.items() if value is not None}
    with Progress(stderr) as progress:
        observers = [progress, *options.pop("observers", [])]
        run = train_run(out=out, config=config, observers=observers, resume=resume, **(given | options))
    print_results(run, stdout)


@takes_run_options(lambda config: config.list_resumable())
def resume(
    path: RunFolder,
    assignments: Annotated[
        list[str] | None, set_option("An option that leaves the run's meaning as it is. Repeatable.")
    ] = None,
    _no_plugin: NoPlugin = None,
    **options: Any,
) -> None:
    """Go on with a run that was stopped, from its newest good checkpoint.

    On the same machine it ends with the same weights, metrics and results, bit for bit, as if it had never stopped.
    """
    from metareg.cli.progress import Progress
    from metareg.cli.tables import print_results
    from metareg.runs.training import resume as resume_run

    given = _parse_options(assignments, {"observers": "--observe"})
    with Progress(stderr) as progress:
        observers = [progress, *options.pop("observers", [])]
        run = resume_run(path, observers=observers, **(given | options))
    print_results(run, stdout)


def _parse_options(assignments: list[str] | None, flags: Mapping[str, str]) -> dict[str, Any]:
    """What ``--set`` gives.

    Raises:
        UsageError: it gives what a flag alone gives.
    """
    from metareg.runs.options import parse_assignments

    given = parse_assignments(assignments or [])
    for key in given.keys() & flags.keys():
        raise UsageError(f"--set cannot set '{key}'; it is what {flags[key]} is for.")
    return given
