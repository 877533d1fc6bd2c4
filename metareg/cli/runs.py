"""``metareg train``, ``resume``, and the commands for finished runs: ``eval``, ``analyse``, ``predict``, ``export``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from metareg.cli.common import (
    BatchNormStatistics,
    Data,
    Device,
    InnerSteps,
    LearnerPath,
    NoPlugin,
    Query,
    RunFolder,
    Shots,
    Target,
    Ways,
    collect_given,
    combine,
    expand_path,
    path_option,
    plugin_option,
    set_option,
)
from metareg.cli.flags import takes_run_options
from metareg.cli.terminal import stderr, stdout, write_output
from metareg.errors import UsageError
from metareg.util.imports import pause_collector
from metareg.util.torchrun import read_rank

if TYPE_CHECKING:
    from metareg.contract.evaluation import Evaluation
    from metareg.learner.learner import MetaLearner
    from metareg.registry.plugins import Plugin
    from metareg.runs.run import Run

__all__ = ["analyse", "evaluate", "export", "predict", "resume", "train"]


@takes_run_options(lambda config: config.model_fields)
def train(
    ways: Ways = None,
    shots: Shots = None,
    query: Query = None,
    data: Data = None,
    target: Target = None,
    assignments: Annotated[
        list[str] | None, set_option("Any other option of the run or its plugins. Repeatable.")
    ] = None,
    config: Annotated[
        Path | None, path_option(metavar="FILE", help="YAML file with any of these options; flags override it.")
    ] = None,
    out: Annotated[
        Path | None, path_option(metavar="DIR", help="The run's folder (default: a new one in runs/).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out if there is one; otherwise start it.")
    ] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also evaluate simpler baselines; may take longer than training.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the complete configuration, for --config, and exit.")
    ] = False,
    _no_plugin: NoPlugin = None,
    **options: Any,
) -> None:
    """Train and test a learner, and plot results: [bold]metareg train --algo maml --augment cml[/].

    Defaults are in parentheses; tasks, algorithms and models can recommend
    others. [bold]metareg show NAME[/] lists these and the options for --set.
    """
    from metareg.runs.config import PLUGIN_FIELDS, RunConfig

    with pause_collector():
        from metareg.runs.training import configure
        from metareg.runs.training import train as carry_out

    if baselines and read_rank().size > 1:
        raise UsageError("Baselines run in one process; after training, use `metareg eval RUN --baselines`.")
    flags = RunConfig.list_flags()
    plugins = {name: flags[name] for name in PLUGIN_FIELDS}
    given = _parse_options(assignments, plugins | {"out": "--out", "config": "--config", "resume": "--resume"})
    of_task = collect_given(
        ways=ways, shots=shots, query=query, target=target, data=None if data is None else str(data)
    )
    options = combine(given, options | {f"task.{name}": value for name, value in of_task.items()})
    if print_config:
        write_output(configure(config, **options).to_yaml())
        return
    run = _show(partial(carry_out, out=out, config=config, resume=resume), options)
    if baselines:
        _show_baselines(run)


@takes_run_options(lambda config: config.list_resumable())
def resume(
    path: RunFolder,
    data: Data = None,
    assignments: Annotated[
        list[str] | None, set_option("An option that does not change the run's meaning. Repeatable.")
    ] = None,
    _no_plugin: NoPlugin = None,
    **options: Any,
) -> None:
    """Resume a stopped run from its newest valid checkpoint.

    On the same machine, its weights, metrics and results equal those of an
    uninterrupted run, bit for bit.
    """
    with pause_collector():
        from metareg.runs.training import resume as carry_out

    given = _parse_options(assignments, {"observers": "--observe"})
    moved = {} if data is None else {"task.data": str(data)}
    _show(partial(carry_out, path), combine(given, options | moved))


def _show(carry_out: Callable[..., Run], options: dict[str, Any]) -> Run:
    """Train, and show the progress and the results."""
    from metareg.cli.progress import Progress
    from metareg.cli.tables import print_results

    with Progress(stderr) as progress:
        run = carry_out(observers=[progress, *options.pop("observers", [])], **options)
    print_results(run, stdout)
    return run


def _show_baselines(run: Run) -> None:
    from metareg.cli.progress import show_messages
    from metareg.cli.tables import create_baseline_table

    with show_messages(stderr):
        found = run.evaluate_baselines()
    stdout.print(create_baseline_table(run, found))


def _parse_options(assignments: list[str] | None, flags: Mapping[str, str]) -> dict[str, Any]:
    """Parse ``--set``, and refuse options that have a flag of their own."""
    from metareg.runs.options import parse_assignments

    given = parse_assignments(assignments or [])
    for key in given.keys() & flags.keys():
        raise UsageError(f"--set cannot set '{key}'; use {flags[key]}.")
    return given


def _load_learner(path: Path, device: str | None, data: Path | None) -> tuple[MetaLearner, Plugin]:
    """Load the learner of a run or file, and the task that reads examples, with its data in `data`."""
    from metareg.runs import exports

    if path.is_file():
        return exports.load_learner(path, device, None if data is None else str(data))
    run = _load_run(path, device, data)
    return run.learner, run.source.plugin


def _load_run(path: Path, device: str | None, data: Path | None) -> Run:
    """Load a run, with its task's data in `data`."""
    from metareg.runs.run import Run

    run = Run.load(path, device=device)
    if data is not None:
        run.read_data_from(data)
    return run


def export(
    path: LearnerPath,
    to: Annotated[
        Path,
        path_option(
            metavar="FILE",
            help="FILE.safetensors: the learner, for MetaLearner.load. FILE.pt2, FILE.onnx: its module as a torch.export "
            "or ONNX program.",
        ),
    ],
    support: Annotated[
        Path | None, path_option(metavar="FILE", help="First adapt the module to these labelled examples.")
    ] = None,
    adaptive: Annotated[
        bool,
        typer.Option("--adaptive", help="Write a program that adapts: its inputs are support_x, support_y, query_x."),
    ] = False,
    data: Data = None,
    inner_steps: InnerSteps = None,
    bn_statistics: BatchNormStatistics = "support",
    _no_plugin: NoPlugin = None,
) -> None:
    """Export a finished run's learner, or its module, as one file, without anything that only training needs."""
    from metareg.cli.progress import show_messages
    from metareg.runs import exports

    with stderr.status("Exporting …"), show_messages(stderr):
        learner, task = _load_learner(path, "cpu", data)
        exports.export(
            learner, task, to, support=support, adaptive=adaptive, inner_steps=inner_steps, bn_statistics=bn_statistics
        )
    stdout.print(escape(str(to)), soft_wrap=True)


def analyse(
    paths: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN …", show_default=False)],
    tasks: Annotated[int, typer.Option(metavar="N", help="Tasks of each split.")] = 100,
    inner_steps: InnerSteps = None,
    data: Data = None,
    device: Device = None,
    _no_plugin: NoPlugin = None,
) -> None:
    """Show where a finished run's learner adapts: in which layers, and how much body and head contribute.

    Writes analysis.json and plots/analysis.png into each run's folder.
    """
    from metareg.cli.progress import show_messages
    from metareg.cli.tables import create_analysis_tables
    from metareg.runs.analysis import analyse as carry_out

    for path in map(expand_path, paths):
        assert path is not None
        with show_messages(stderr):
            found = carry_out(_load_run(path, device, data), tasks, inner_steps)
        stdout.print(escape(str(path)), soft_wrap=True)
        for table in create_analysis_tables(found):
            stdout.print(table)


def predict(
    path: LearnerPath,
    support: Annotated[
        Path | None,
        path_option(
            metavar="FILE", help="Labelled examples: a table, or a folder with one folder of images per class."
        ),
    ] = None,
    query: Annotated[
        Path | None, path_option(metavar="FILE", help="Examples to predict: a table, or a folder of images.")
    ] = None,
    sites: Annotated[
        Path | None,
        path_option(
            metavar="DIR", help="Instead of these: a folder with one folder per site, each with support and query."
        ),
    ] = None,
    data: Data = None,
    to: Annotated[Path | None, path_option(metavar="FILE", help="Write the CSV to this file.")] = None,
    inner_steps: InnerSteps = None,
    bn_statistics: BatchNormStatistics = "support",
    device: Device = None,
    _no_plugin: NoPlugin = None,
) -> None:
    """Adapt a finished run's learner to your examples, and predict others."""
    if (sites is None) == (support is None or query is None) or (sites is not None and (support or query)):
        raise UsageError(
            "Give the labelled examples with --support and the examples to predict with --query, or give only --sites."
        )
    from metareg.cli.progress import show_messages
    from metareg.runs import exports
    from metareg.util.files import write_text

    with show_messages(stderr):
        learner = _load_learner(path, device, data)
        if sites is not None:
            text = exports.predict_sites(*learner, sites, inner_steps, bn_statistics)
        else:
            assert support is not None
            assert query is not None
            text = exports.predict(*learner, support, query, inner_steps, bn_statistics)
    if to is None:
        write_output(text, "--to")
    else:
        write_text(to, text)


def evaluate(
    path: RunFolder,
    tasks: Annotated[int, typer.Option(metavar="N", help="Test tasks.")] = 600,
    inner_steps: Annotated[str, typer.Option(metavar="N,N,…", help="Numbers of inner steps.")] = "0,1,5,10",
    task: Annotated[
        str | None,
        plugin_option("tasks", metavar="NAME", help="Test on another task, with the run's ways, shots and sizes."),
    ] = None,
    ways: Ways = None,
    shots: Shots = None,
    query: Query = None,
    data: Data = None,
    target: Target = None,
    assignments: Annotated[list[str] | None, set_option("An option of the task. Repeatable.")] = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print means and intervals as JSON.")] = False,
    with_scores: Annotated[bool, typer.Option("--scores", help="With --json, every task's score too.")] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Instead, evaluate simpler baselines on the run's own test tasks.")
    ] = False,
    _no_plugin: NoPlugin = None,
) -> None:
    """Test a finished run again: on other tasks, or after other numbers of inner steps."""
    if with_scores and not as_json:
        raise UsageError("--scores goes with --json; the table shows means.")
    if baselines:
        if task is not None or assignments or any(given is not None for given in (ways, shots, query, target)):
            raise UsageError("--baselines are for the run's own test tasks; leave out the options of other tasks.")
        _show_baselines(_load_run(path, device, data))
        return
    try:
        numbers = [int(part) for part in inner_steps.split(",")]
    except ValueError:
        raise UsageError(
            f"--inner-steps takes whole numbers separated by commas, such as 1,5,10; got '{inner_steps}'."
        ) from None
    from metareg.cli.tables import create_evaluation_table
    from metareg.runs.options import parse_assignments
    from metareg.runs.run import Run

    given = collect_given(ways=ways, shots=shots, query=query, target=target, data=None if data is None else str(data))
    options = combine(parse_assignments(assignments or []), given)
    with stderr.status("Testing …"):
        run = Run.load(path, device=device)
        evaluation, one_by_one = run.evaluate_one_by_one(tasks, numbers, task, options)
    if as_json:
        write_output(json.dumps(_collect_results(evaluation, one_by_one, with_scores)) + "\n")
    else:
        stdout.print(create_evaluation_table(evaluation, one_by_one=one_by_one))


def _collect_results(evaluation: Evaluation, one_by_one: Evaluation | None, with_scores: bool) -> dict[str, Any]:
    """Return a test's results in the format of results.json; include every task's score if `with_scores`."""
    content = evaluation.to_dict()
    if not with_scores:
        content["steps"] = [{key: each[key] for key in each if key != "scores"} for each in content["steps"]]
    return content if one_by_one is None else content | {"one_by_one": _collect_results(one_by_one, None, with_scores)}
