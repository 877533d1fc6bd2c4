"""The command line. Whatever is slow to import (torch, a plugin) is imported by the command that needs it."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from metareg._version import __version__
from metareg.errors import MetaregError, UnknownNameError, UsageError
from metareg.registry.plugins import DISABLE_VARIABLE, KINDS, Entry, find_entry, list_entries
from metareg.util.torchrun import is_follower, read_rank

__all__ = ["app", "run"]

app = typer.Typer(
    name="metareg",
    help="Gradient-based meta-learning: any algorithm, with any gradient augmenter, on any task.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What `train` takes by options of their own, which --set does not replace.
_OWN_FLAGS = {
    "algo": "--algo", "augment": "--augment", "task": "--task", "model": "--model", "observers": "--observe",
    "out": "--out", "config": "--config", "resume": "--resume",
}  # fmt: skip

TRACEBACK_VARIABLE = "METAREG_TRACEBACK"

# Errors and progress go to stderr, results to stdout: `metareg eval RUN --json | jq` works.
_errors = Console(stderr=True, highlight=False)
_output = Console(highlight=False)


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line.

    Returns:
        The exit code: 0 done, 2 wrong use, 1 anything else, 130 interrupted.
    """
    if not is_follower() or os.environ.get(TRACEBACK_VARIABLE):
        return _carried_out(arguments)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        code = _carried_out(arguments)
    if code:
        _let_the_first_speak()
    return code


def _let_the_first_speak() -> None:
    """Stay for a second, or until SIGTERM: once one has failed, torchrun ends all, the one with the message too."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait(1)


def _carried_out(arguments: Sequence[str]) -> int:
    try:
        app(args=list(arguments))
    except SystemExit as exit:  # typer's way of ending, after printing its own errors
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except MetaregError as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        _errors.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        return error.exit_code
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        _errors.print(
            f"[bold red]Error:[/] {escape(f'{type(error).__name__}: {error}')}\nThis is a bug in metareg or in a plugin; "
            f"{TRACEBACK_VARIABLE}=1 shows where.",
            soft_wrap=True,
        )
        return 1
    return 0


# ----------------------------------------------------------------------------------------------------------- completion


def _names(kind: str) -> Any:
    return lambda incomplete: [entry.name for entry in list_entries(kind) if entry.name.startswith(incomplete)]


_RUN = Annotated[Path, typer.Argument(help="The run's folder.", metavar="RUN", show_default=False)]
_KIND = Annotated[str, typer.Argument(metavar="KIND", help="algorithms, augmenters, tasks, models or observers.")]
_NAME = Annotated[str, typer.Argument(metavar="NAME", help="The plugin's name.")]
_DEVICE = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU where there is one by default.")]
_DATA = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Where the task's data is (the variable METAREG_DATA).")
]
_ON_NONFINITE = Annotated[
    str | None,
    typer.Option(metavar="POLICY", help="At a loss or gradient that is not finite: stop, skip or rollback (stop)."),
]
_CHECKPOINT_EVERY = Annotated[
    int | None, typer.Option(metavar="STEPS", help="Steps between two checkpoints (one every 2 minutes).")
]
_NO_PLUGIN = Annotated[
    list[str] | None, typer.Option("--no-plugin", metavar="NAME", help="Leave an installed plugin out. Repeatable.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        _output.print(f"metareg {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """What every command has."""
    if read_rank().size > 1 and context.invoked_subcommand not in ("train", "resume"):
        raise UsageError(
            f"torchrun splits `metareg train` and `metareg resume`; `metareg {context.invoked_subcommand}` takes one "
            "process."
        )


# ------------------------------------------------------------------------------------------------------------- training


@app.command()
def train(
    algo: Annotated[
        str | None, typer.Option(metavar="NAME", help="Algorithm (maml).", autocompletion=_names("algorithms"))
    ] = None,
    augment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Gradient augmenter; repeatable, takes commas, chained in this order; 'none' for none.",
            autocompletion=_names("augmenters"),
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Task (sinusoid).", autocompletion=_names("tasks"))
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model (the task's own).", autocompletion=_names("models"))
    ] = None,
    ways: Annotated[int | None, typer.Option(help="Classes per task.")] = None,
    shots: Annotated[int | None, typer.Option(help="Support examples per class, or per regression task.")] = None,
    query: Annotated[int | None, typer.Option(help="Query examples per class, or per regression task.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    meta_batch: Annotated[int | None, typer.Option(metavar="TASKS", help="Tasks per training step.")] = None,
    inner_steps: Annotated[int | None, typer.Option(help="Adaptation steps in training.")] = None,
    first_order: Annotated[bool | None, typer.Option("--first-order", help="Inner gradients as constants.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes everything that is drawn at random (0).")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder (a new one in runs/).")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with any of these; options given here stand before it.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other option of the run or of its plugins. Repeatable."),
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="auto, serial, traced, vectorized or compiled (auto).")] = None,
    memory: Annotated[str | None, typer.Option(help="store or recompute (store).")] = None,
    bn_statistics: Annotated[str | None, typer.Option(help="BatchNorm on queries: transductive or support.")] = None,
    precision: Annotated[str | None, typer.Option(help="full, or bf16 to run the model in bfloat16 (full).")] = None,
    chunk: Annotated[int | None, typer.Option(metavar="TASKS", help="At most so many tasks at once.")] = None,
    device: _DEVICE = None,
    data: _DATA = None,
    observe: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Observer; repeatable, takes commas.", autocompletion=_names("observers")),
    ] = None,
    no_plugin: _NO_PLUGIN = None,
    on_nonfinite: _ON_NONFINITE = None,
    checkpoint_every: _CHECKPOINT_EVERY = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out where there is one, begin it where not.")
    ] = False,
) -> None:
    """Train, test and draw: [bold]metareg train --algo maml --augment cml[/].

    Every option has a default that suits the task. [bold]metareg show tasks NAME[/] and its like for algorithms,
    augmenters and models list what --set takes.
    """
    _leave_out(no_plugin)
    from metareg.cli.display import Progress, report
    from metareg.runs.options import parse_assignments
    from metareg.runs.training import train as train_run

    flags = {
        "steps": steps, "meta_batch": meta_batch, "inner_steps": inner_steps, "first_order": first_order, "seed": seed,
        "strategy": strategy, "memory": memory, "bn_statistics": bn_statistics, "precision": precision, "chunk": chunk,
        "device": device, "on_nonfinite": on_nonfinite, "checkpoint_every": checkpoint_every,
        "task.ways": ways, "task.shots": shots, "task.query": query, "task.data": None if data is None else str(data),
    }  # fmt: skip
    options = parse_assignments(assignments or [])
    for key in options.keys() & _OWN_FLAGS.keys():
        raise UsageError(f"--set cannot set '{key}'; it is what {_OWN_FLAGS[key]} is for.")
    options |= {key: value for key, value in flags.items() if value is not None}
    with Progress(_errors) as progress:
        result = train_run(
            algo, augment, task, model=model, out=out, config=config, observers=[progress, *(observe or [])],
            resume=resume, **options,
        )  # fmt: skip
    report(result, _output)


@app.command("resume")
def resume_run(
    path: _RUN,
    steps: Annotated[int | None, typer.Option(help="Train for more steps than were planned.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="An option that leaves the run's meaning as it is. Repeatable."
        ),
    ] = None,
    on_nonfinite: _ON_NONFINITE = None,
    checkpoint_every: _CHECKPOINT_EVERY = None,
    device: _DEVICE = None,
    no_plugin: _NO_PLUGIN = None,
) -> None:
    """Go on with a run that was stopped, from its newest good checkpoint.

    On the same machine it ends with the same weights, metrics and results, bit for bit, as if it had never stopped.
    """
    _leave_out(no_plugin)
    from metareg.cli.display import Progress, report
    from metareg.runs.options import parse_assignments
    from metareg.runs.training import resume

    flags = {
        "steps": steps, "device": device, "on_nonfinite": on_nonfinite, "checkpoint_every": checkpoint_every,
    }  # fmt: skip
    options = parse_assignments(assignments or []) | {key: value for key, value in flags.items() if value is not None}
    with Progress(_errors) as progress:
        result = resume(path, observers=[progress], **options)
    report(result, _output)


@app.command()
def export(
    path: _RUN,
    to: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="FILE.safetensors: the learner, for MetaLearner.load. FILE.pt2: its module as a torch.export program.",
        ),
    ],
    support: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Adapt the module of a .pt2 to these labelled examples first."),
    ] = None,
    inner_steps: Annotated[int | None, typer.Option(help="Adaptation steps (those of training).")] = None,
    no_plugin: _NO_PLUGIN = None,
) -> None:
    """Write a finished run's learner, or its module, as one file without anything of the augmenters."""
    _leave_out(no_plugin)
    from metareg.runs.exports import export as export_run
    from metareg.runs.run import Run

    with _errors.status("Exporting …"):
        export_run(Run.load(path, device="cpu"), to, support=support, inner_steps=inner_steps)
    _output.print(escape(str(to)), soft_wrap=True)


@app.command()
def predict(
    path: _RUN,
    support: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Labelled examples: a CSV file, or a folder of images in one per class."),
    ],
    query: Annotated[Path, typer.Option(metavar="FILE", help="What to predict: a CSV file, or a folder of images.")],
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the CSV there, not to the output.")] = None,
    inner_steps: Annotated[int | None, typer.Option(help="Adaptation steps (those of training).")] = None,
    device: _DEVICE = None,
    no_plugin: _NO_PLUGIN = None,
) -> None:
    """Adapt a finished run's learner to your own examples, and predict others."""
    _leave_out(no_plugin)
    from metareg.runs.exports import predict as predict_with
    from metareg.runs.run import Run
    from metareg.util.files import write_text

    text = predict_with(Run.load(path, device=device), support, query, inner_steps=inner_steps)
    if to is None:
        print(text, end="")
    else:
        write_text(to, text)


@app.command("eval")
def evaluate(
    path: _RUN,
    tasks: Annotated[int, typer.Option(help="Test tasks.")] = 600,
    inner_steps: Annotated[str, typer.Option(help="Numbers of inner steps, with commas.")] = "0,1,5,10",
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Test on another task, with the run's ways, shots and sizes.",
            autocompletion=_names("tasks"),
        ),
    ] = None,
    data: _DATA = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the task. Repeatable.")
    ] = None,
    device: _DEVICE = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    no_plugin: _NO_PLUGIN = None,
) -> None:
    """Test a finished run anew: other tasks, other numbers of inner steps."""
    _leave_out(no_plugin)
    try:
        numbers = [int(part) for part in inner_steps.split(",")]
    except ValueError:
        raise UsageError(f"--inner-steps takes whole numbers with commas, as 1,5,10; got '{inner_steps}'.") from None
    from metareg.cli.display import evaluation_table
    from metareg.runs.options import parse_assignments
    from metareg.runs.run import Run

    options = parse_assignments(assignments or []) | ({} if data is None else {"data": str(data)})
    with _errors.status("Testing …"):
        evaluation = Run.load(path, device=device).evaluate(tasks, numbers, task, options)
    if as_json:
        print(json.dumps(evaluation.to_dict()))
    else:
        _output.print(evaluation_table(evaluation))


@app.command()
def data(
    name: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="One task; all where none is named.", show_default=False)
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the task's data.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of the task's data, and count it.")] = False,
    where: _DATA = None,
    no_plugin: _NO_PLUGIN = None,
) -> None:
    """List the data that tasks read: where it is, or how to get it; download and verify it."""
    _leave_out(no_plugin)
    if name is None and (download or verify):
        raise UsageError("Name the task whose data is meant: metareg data TASK --download.")
    from metareg.cli.display import datasets_table
    from metareg.registry.datasets import find_dataset, list_datasets

    if name is None:
        _output.print(datasets_table(list_datasets(where)))
        return
    dataset = find_dataset(name, where)
    if download and not dataset.present:
        if dataset.download is None:
            raise UsageError(f"The data of the task '{name}' cannot be downloaded. {dataset.obtain}")
        dataset.download()
        dataset = find_dataset(name, where)
    _output.print(datasets_table([(name, dataset)]))
    if verify:
        with _errors.status("Reading …"):
            found = dataset.verify()
        _output.print(f"[green]complete[/]: {escape(found)}", soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------- comparisons


@app.command()
def compare(
    algo: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Algorithms, with commas (maml).", autocompletion=_names("algorithms")),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Augmenters, with commas; 'none' for none, 'dropgrad+cml' for a chain (none).",
            autocompletion=_names("augmenters"),
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Tasks, with commas (sinusoid).", autocompletion=_names("tasks"))
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N", help="How many seeds, from 0 on; or the seeds, with commas (1).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of each run.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of every run, or of those with the plugin: cml.gamma=0.1. Several values (0.01,0.1) are tried "
            "for each arm on validation tasks. Repeatable.",
        ),
    ] = None,
    search: Annotated[
        int | None,
        typer.Option(metavar="N", help="Choose each arm's settings by N trials on validation tasks (Optuna)."),
    ] = None,
    search_over: Annotated[
        str | None,
        typer.Option(metavar="KEYS", help="Which options to search (those of the algorithm and the augmenters)."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML with the whole comparison; options given here stand before it."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The comparison's folder (one in comparisons/); goes on with it.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", help="Runs at a time (as many as there are GPUs, or CPU cores).")
    ] = None,
    launcher: Annotated[str, typer.Option(help="local, or ray for a Ray cluster.")] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="The Ray cluster, or 'auto' for this machine's (one is started)."),
    ] = None,
    data: _DATA = None,
    no_plugin: _NO_PLUGIN = None,
) -> None:
    """Compare algorithms and augmenters on tasks over seeds: [bold]metareg compare --augment none,cml --seeds 5[/].

    The same seed gives every arm the same initial weights, training tasks and test tasks. Finished runs are kept: the same
    command again goes on where it stopped, and tries again what broke. What is given with an --out that holds a comparison
    changes that one: [bold]--out DIR --seeds 10[/] adds seeds.
    """
    _leave_out(no_plugin)
    if data is not None:
        os.environ["METAREG_DATA"] = str(data.absolute())
    from metareg.cli.display import ComparisonProgress, comparison_report
    from metareg.comparison.overrides import split_assignments
    from metareg.comparison.runner import compare as carry_out

    if search_over is not None and search is None:
        raise UsageError("--search-over names what --search N varies; give the number of trials too.")
    options, space = split_assignments(assignments or [])
    for key in options.keys() & inspect.signature(carry_out).parameters.keys():
        raise UsageError(f"--set cannot set '{key}'; `metareg compare --help` says how it is given.")
    options |= {} if steps is None else {"steps": steps}
    searched = [key.strip() for key in (search_over or "").split(",") if key.strip()]
    with ComparisonProgress(_errors) as progress:
        comparison = carry_out(
            algo, augment, task, seeds=seeds, out=out, config=config, space={**dict.fromkeys(searched), **space},
            search=search, jobs=jobs, launcher=launcher, ray_address=ray_address, watcher=progress, **options,
        )  # fmt: skip
    comparison_report(comparison, _output)
    if comparison.broken:
        raise typer.Exit(1)


@app.command("report")
def report_comparison(
    path: Annotated[
        Path, typer.Argument(help="The comparison's folder, finished or not.", metavar="DIR", show_default=False)
    ],
    format: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="markdown, html, latex or csv (what --out ends in; markdown)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write there (html: report.html in DIR; the others: to the output)."),
    ] = None,
    inner_steps: Annotated[
        int | None,
        typer.Option(metavar="K", help="Compare after K inner steps (the last number that was tested after)."),
    ] = None,
) -> None:
    """Show what a comparison gave: tables with intervals, and for each augmenter the paired difference to none."""
    from metareg.reporting import format_of, report, write

    if out is not None and out.is_dir():
        raise UsageError(f"--out takes a file; {out} is a folder.")
    chosen = format_of(out) if format is None else format
    if out is None and chosen != "html":
        _write_out(report(path, chosen, inner_steps=inner_steps))
    else:
        _output.print(escape(str(write(path, chosen, out, inner_steps=inner_steps))), soft_wrap=True)


@app.command("reproduce")
def reproduce_recipe(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe's name, or a YAML file of your own.", show_default=False),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N", help="How many seeds, from 0 on; or the seeds, with commas (the recipe's)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where its runs are kept (one in reproductions/); goes on with them."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", help="Runs at a time (as many as there are GPUs, or CPU cores).")
    ] = None,
    data: _DATA = None,
    device: _DEVICE = None,
    no_plugin: _NO_PLUGIN = None,
) -> None:
    """Carry out a recipe, and say whether the value that it is expected to reach was reached; without a name, list them.

    The exit code is 1 where the value was not reached.
    """
    _leave_out(no_plugin)
    from metareg.comparison.reproduction import find_recipe, recipes, reproduce

    if name is None:
        if any(given is not None for given in (seeds, out, jobs, data, device)):
            raise UsageError("Name a recipe; `metareg reproduce` lists them.")
        from metareg.cli.display import recipes_table

        _output.print(recipes_table(recipes()))
        return
    recipe = find_recipe(name)
    if data is not None:
        os.environ["METAREG_DATA"] = str(data.absolute())
    from metareg.cli.display import ComparisonProgress

    for text in filter(None, (recipe.summary, recipe.notes)):
        _errors.print(escape(text))
    with ComparisonProgress(_errors) as progress:
        verdict = reproduce(recipe, out, seeds=seeds, jobs=jobs, device=device, watcher=progress)
    _output.print(escape(str(verdict)), soft_wrap=True)
    if verdict.reached is False:
        raise typer.Exit(1)


# -------------------------------------------------------------------------------------------------------------- plugins


@app.command()
def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Import each, and say which do not work.")] = False,
) -> None:
    """List the installed plugins. Without --check nothing of them is imported."""
    rows = [_described(entry, check) for entry in list_entries()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from metareg.cli.display import plugins_table

    _output.print(plugins_table(rows, check))


@app.command()
def show(
    kind: _KIND,
    name: _NAME,
) -> None:
    """Show what a plugin does, its hooks, and its options with their bounds and defaults."""
    entry = find_entry(_kind(kind), name)
    from metareg.cli.display import plugin_page

    _output.print(plugin_page(entry, entry.load()))


@app.command("new-plugin")
def new_plugin(
    kind: _KIND,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What users will type, as sign-maml.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to make the package's folder.")] = Path(),
) -> None:
    """Write a package with a working plugin of your own, its tests and its README."""
    from metareg.cli.scaffold import new_plugin as write

    plural = _kind(kind)
    folder = write(plural, name, out)
    _output.print(
        f"{escape(str(folder))} is a package that works as it is:\n"
        f"  pip install -e '{escape(str(folder))}'\n"
        f"  metareg check-plugin {plural} {name}",
        soft_wrap=True,
    )


@app.command("check-plugin")
def check_plugin(
    kind: _KIND,
    name: _NAME,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the plugin to check it with. Repeatable."),
    ] = None,
    compile: Annotated[bool, typer.Option(help="Compare with torch.compile too, which takes 10 to 20 seconds.")] = True,
) -> None:
    """Check an installed plugin against the contract: the conformance kit of metareg.testing."""
    from metareg.cli.display import check_line
    from metareg.runs.options import parse_assignments
    from metareg.testing import checks

    config = parse_assignments(assignments or [])
    failures = 0
    for check in checks(_kind(kind), name, config, compiled=compile):
        with _errors.status(f"{check.name}: {check.summary}"):
            problem = check.problem()
        failures += problem is not None
        _output.print(check_line(check, problem), soft_wrap=True)
    if failures:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Check the installation: versions, devices, compiler, and every plugin."""
    from metareg.cli.display import doctor_page

    rows = [_described(entry, check=True) for entry in list_entries()]
    _output.print(doctor_page(rows))
    if any(row["broken"] for row in rows):
        raise typer.Exit(1)


def _write_out(text: str) -> None:
    """Write a text to the output.

    Raises:
        MetaregError: it cannot take it: a full disk, a reader that has gone, an encoding without one of the signs.
    """
    try:
        print(text, end="", flush=True)
    except UnicodeEncodeError as error:
        sign = error.object[error.start]
        raise MetaregError(
            f"The output's encoding, {error.encoding}, has no '{sign}'; --out FILE writes UTF-8."
        ) from error
    except OSError as error:
        # What is left would be tried again at the end of the process, and say more than this sentence.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise MetaregError(f"The output cannot be written: {error.strerror}.") from error


def _kind(given: str) -> str:
    """The kind of plugin that a user means, in the singular or the plural."""
    matches = [each for each in KINDS if given and each.startswith(given.rstrip("s"))]
    if len(matches) != 1:
        raise UnknownNameError("kind of plugin", given, KINDS)
    return matches[0]


def _described(entry: Entry, check: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kind": entry.kind,
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "broken": None,
    }
    if check:
        try:
            cls = entry.load()
        except MetaregError as error:
            return row | {"broken": str(error)}
        fields = getattr(getattr(cls, "Config", None), "model_fields", {})
        row |= {"summary": (cls.__doc__ or "").strip().partition("\n")[0], "config": sorted(fields)}
    return row


def _leave_out(names: list[str] | None) -> None:
    """Disable plugins in this process and in those that it starts."""
    list_datasets = [os.environ.get(DISABLE_VARIABLE, ""), *(names or [])]
    os.environ[DISABLE_VARIABLE] = ",".join(filter(None, list_datasets))
