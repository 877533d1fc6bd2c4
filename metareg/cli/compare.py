"""``metareg compare``, ``report`` and ``reproduce``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from metareg.cli.common import (
    Data,
    Device,
    NoPlugin,
    Query,
    Shots,
    Target,
    Ways,
    collect_given,
    combine,
    path_option,
    plugin_option,
    set_option,
)
from metareg.cli.flags import takes_run_options
from metareg.cli.terminal import stderr, stdout, write_output
from metareg.errors import UsageError

if TYPE_CHECKING:
    from metareg.comparison.runner import Comparison

__all__ = ["compare", "report", "reproduce"]

_OWN_FIELDS = {"algo", "augment", "task", "seed", "observers"}
"""Options of a run that a comparison takes as a list, or not at all."""
_Jobs = Annotated[int | None, typer.Option(metavar="N", help="Runs at a time (default: one per GPU or CPU core).")]


@takes_run_options(lambda config: config.model_fields.keys() - _OWN_FIELDS)
def compare(
    algo: Annotated[
        str | None, plugin_option("algorithms", metavar="NAMES", help="Algorithms, separated by commas (maml).")
    ] = None,
    augment: Annotated[
        str | None,
        plugin_option(
            "augmenters",
            metavar="NAMES",
            help="Augmenters, separated by commas; 'none' for none, 'dropgrad+cml' for a chain (none).",
        ),
    ] = None,
    task: Annotated[
        str | None, plugin_option("tasks", metavar="NAMES", help="Tasks, separated by commas (sinusoid).")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N", help="Number of seeds, from 0; or seeds such as 0,3 or 1000-1004 (1).")
    ] = None,
    ways: Ways = None,
    shots: Shots = None,
    query: Query = None,
    data: Data = None,
    target: Target = None,
    assignments: Annotated[
        list[str] | None,
        set_option(
            "An option of all runs, or of those with the plugin: cml.gamma=0.1. With several values (0.01,0.1), each arm "
            "chooses one on validation tasks. Repeatable."
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(metavar="N", help="Choose each arm's settings in N trials on validation tasks (Optuna)."),
    ] = None,
    search_over: Annotated[
        str | None,
        typer.Option(metavar="KEYS", help="Options to search (default: those of the algorithm and augmenters)."),
    ] = None,
    config: Annotated[
        Path | None,
        path_option(metavar="FILE", help="YAML file with the complete comparison; flags override it."),
    ] = None,
    out: Annotated[
        Path | None,
        path_option(metavar="DIR", help="The comparison's folder, new or to continue (default: in comparisons/)."),
    ] = None,
    archive: Annotated[
        Path | None,
        path_option(
            metavar="FILE.tar.xz",
            help="Raw results of a comparison (`metareg report DIR --archive FILE`); its finished runs count as done.",
        ),
    ] = None,
    jobs: _Jobs = None,
    launcher: Annotated[str, typer.Option(metavar="NAME", help="local, or ray for a Ray cluster.")] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="The Ray cluster, or 'auto' for this machine's (default: start one)."),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Also evaluate simpler baselines on each task; one training for each seed."),
    ] = False,
    _no_plugin: NoPlugin = None,
    **options: Any,
) -> None:
    """Compare algorithms and augmenters on tasks over seeds: [bold]metareg compare --augment none,cml --seeds 5[/].

    For a given seed, every arm gets the same initial weights, training tasks and
    test tasks. Repeat the command to continue: finished runs are kept, and failed
    runs are tried again. If --out holds a comparison, flags change it:
    [bold]--out DIR --seeds 10[/] adds seeds.
    """
    from metareg.cli.progress import ComparisonProgress
    from metareg.cli.tables import print_comparison
    from metareg.comparison.runner import compare as carry_out
    from metareg.comparison.space import split_assignments

    if search_over is not None and search is None:
        raise UsageError("--search-over names the options that --search N varies; add --search N.")
    given, space = split_assignments(assignments or [])
    for key in given.keys() & inspect.signature(carry_out).parameters.keys():
        raise UsageError(f"--set cannot set '{key}'; see `metareg compare --help` for its flag.")
    of_task = collect_given(ways=ways, shots=shots, query=query, target=target)
    options = combine(given, options | {f"task.{name}": value for name, value in of_task.items()})
    searched = dict.fromkeys(key.strip() for key in (search_over or "").split(",") if key.strip())
    with ComparisonProgress(stderr) as progress:
        comparison = carry_out(
            algo, augment, task, seeds=seeds, out=out, config=config, archive=archive, space={**searched, **space},
            search=search, jobs=jobs, launcher=launcher, ray_address=ray_address, data=data, observer=progress, **options,
        )  # fmt: skip
    print_comparison(comparison, stdout)
    if baselines:
        _show_baselines(comparison)
    if comparison.broken:
        raise typer.Exit(1)


def _show_baselines(comparison: Comparison) -> None:
    """Show simpler baselines on each task, with the configuration of its first arm's runs."""
    from metareg.cli.progress import show_messages
    from metareg.cli.tables import create_baseline_overview
    from metareg.runs.run import Run

    first: dict[str, str] = {}
    runs = [run for run in comparison.plan.list_runs() if run.finished and run.is_final]
    chosen = [run for run in runs if first.setdefault(run.arm.task, str(run.arm)) == str(run.arm)]
    with show_messages(stderr):
        found = [(run.arm.task, Run.load(run.path).evaluate_baselines()) for run in chosen]
    stdout.print(create_baseline_overview(found))


def report(
    path: Annotated[
        Path,
        typer.Argument(
            help="The comparison's folder, finished or not, or the file with its raw results (--archive).",
            metavar="DIR",
            show_default=False,
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="markdown (md), html, latex (tex), or as CSV: csv (means), pairs, scores (all). Default: by the suffix of "
            "--out, or markdown.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        path_option(
            metavar="FILE", help="File to write (default: report.html in DIR for html, otherwise standard output)."
        ),
    ] = None,
    inner_steps: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Compare after K inner steps (default: as configured, or the largest tested number)."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compare with this augmenter, algorithm or variant, or 'all' pairs (default: as configured, or none).",
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="page, or paper: one table of methods and tasks, the best in bold (latex, markdown)."
        ),
    ] = "page",
    over: Annotated[
        str, typer.Option(metavar="NAME", help="For paper: intervals over seeds, or over test tasks.")
    ] = "seeds",
    archive: Annotated[
        Path | None,
        path_option(
            metavar="FILE.tar.xz",
            help="First write the raw results to this file: every score, setting, time and version. You can report from "
            "that file alone, and continue with `metareg compare --archive FILE`.",
        ),
    ] = None,
) -> None:
    """Report a comparison: tables with intervals, and paired differences to a baseline."""
    from metareg.comparison.archive import ARCHIVE_SUFFIX, write_archive
    from metareg.reporting import find_format, infer_format, write_report
    from metareg.reporting import report as format_report

    if out is not None and out.is_dir():
        raise UsageError(f"--out takes a file; {out} is a folder.")
    if archive is not None and not archive.name.endswith(ARCHIVE_SUFFIX):
        raise UsageError(f"--archive takes a file that ends in {ARCHIVE_SUFFIX}; got {archive}.")
    if archive is not None and path.is_file():
        raise UsageError(f"--archive takes the raw results of a comparison's folder; {path} is a file.")
    chosen = infer_format(out) if format is None else find_format(format)
    if archive is not None:
        write_archive(path, archive)
        stderr.print(escape(f"The raw results are in {archive}."), soft_wrap=True)
    settings: dict[str, Any] = {"inner_steps": inner_steps, "baseline": baseline, "layout": layout, "over": over}
    if out is None and chosen != "html":
        write_output(format_report(path, chosen, **settings))
    else:
        written = write_report(path, chosen, out, **settings)
        stdout.print(escape(str(written)), soft_wrap=True)


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="A recipe's name, your own YAML file, or a comparison's folder or archive.",
            show_default=False,
        ),
    ] = None,
    row: Annotated[
        str | None, typer.Option(metavar="NAME", help="The row of the comparison; without it, its rows are listed.")
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="List the recipes on this task.")] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Number of seeds, from 0; or seeds separated by commas (default: the recipe's)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        path_option(metavar="DIR", help="Folder of its runs, new or to continue (default: in reproductions/)."),
    ] = None,
    jobs: _Jobs = None,
    data: Data = None,
    device: Device = None,
    _no_plugin: NoPlugin = None,
) -> None:
    """Run a recipe, and say whether it reaches its expected value; without a name, list the recipes.

    The exit code is 1 if the value was not reached.
    """
    from metareg.comparison.recipe import list_recipes
    from metareg.comparison.reproduction import find_recipe
    from metareg.comparison.reproduction import reproduce as carry_out

    if name is None:
        if any(given is not None for given in (row, seeds, out, jobs, data, device)):
            raise UsageError("Name a recipe; run `metareg reproduce` to list them.")
        from metareg.cli.tables import create_recipe_overview, create_recipe_table

        stdout.print((create_recipe_table if task else create_recipe_overview)(list_recipes(task)))
        return
    if task is not None:
        raise UsageError(f"--task lists recipes; leave it out to run the recipe '{name}', which has its own task.")
    from metareg.comparison.rows import has_rows, list_rows  # imports NumPy, which the list of recipes does not need

    if row is None and has_rows(name):
        from metareg.cli.tables import create_row_table

        stdout.print(create_row_table(list_rows(name)))
        return
    recipe = find_recipe(name, row)
    from metareg.cli.progress import ComparisonProgress

    for text in filter(None, (recipe.summary, recipe.notes)):
        stderr.print(escape(text))
    with ComparisonProgress(stderr) as progress:
        verdict = carry_out(recipe, out, seeds=seeds, jobs=jobs, device=device, data=data, observer=progress)
    stdout.print(escape(str(verdict)), soft_wrap=True)
    if verdict.reached is False:
        raise typer.Exit(1)
