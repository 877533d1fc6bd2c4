"""``metareg eval``, ``predict`` and ``export``: what a finished run is good for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from metareg.cli.common import (
    Data,
    Device,
    InnerSteps,
    NoPlugin,
    RunFolder,
    complete_names,
    path_option,
    set_option,
    stderr,
    stdout,
)
from metareg.errors import UsageError

__all__ = ["evaluate", "export", "predict"]


def export(
    path: RunFolder,
    to: Annotated[
        Path,
        path_option(
            metavar="FILE",
            help="FILE.safetensors: the learner, for MetaLearner.load. FILE.pt2: its module as a torch.export program.",
        ),
    ],
    support: Annotated[
        Path | None, path_option(metavar="FILE", help="Adapt the module of a .pt2 to these labelled examples first.")
    ] = None,
    inner_steps: InnerSteps = None,
    _no_plugin: NoPlugin = None,
) -> None:
    """Write a finished run's learner, or its module, as one file without anything of the augmenters."""
    from metareg.runs.run import Run

    with stderr.status("Exporting …"):
        Run.load(path, device="cpu").export(to, support=support, inner_steps=inner_steps)
    stdout.print(escape(str(to)), soft_wrap=True)


def predict(
    path: RunFolder,
    support: Annotated[
        Path, path_option(metavar="FILE", help="Labelled examples: a CSV file, or a folder of images in one per class.")
    ],
    query: Annotated[Path, path_option(metavar="FILE", help="What to predict: a CSV file, or a folder of images.")],
    to: Annotated[Path | None, path_option(metavar="FILE", help="Write the CSV there, not to the output.")] = None,
    inner_steps: InnerSteps = None,
    device: Device = None,
    _no_plugin: NoPlugin = None,
) -> None:
    """Adapt a finished run's learner to your own examples, and predict others."""
    from metareg.runs.run import Run
    from metareg.util.files import write_text

    text = Run.load(path, device=device).predict(support, query, inner_steps=inner_steps)
    if to is None:
        print(text, end="")
    else:
        write_text(to, text)


def evaluate(
    path: RunFolder,
    tasks: Annotated[int, typer.Option(help="Test tasks.")] = 600,
    inner_steps: Annotated[str, typer.Option(help="Numbers of inner steps, with commas.")] = "0,1,5,10",
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Test on another task, with the run's ways, shots and sizes.",
            autocompletion=complete_names("tasks"),
        ),
    ] = None,
    data: Data = None,
    assignments: Annotated[list[str] | None, set_option("An option of the task. Repeatable.")] = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    _no_plugin: NoPlugin = None,
) -> None:
    """Test a finished run anew: other tasks, other numbers of inner steps."""
    try:
        numbers = [int(part) for part in inner_steps.split(",")]
    except ValueError:
        raise UsageError(f"--inner-steps takes whole numbers with commas, as 1,5,10; got '{inner_steps}'.") from None
    from metareg.cli.tables import create_evaluation_table
    from metareg.runs.options import parse_assignments
    from metareg.runs.run import Run

    options = parse_assignments(assignments or []) | ({} if data is None else {"data": str(data)})
    with stderr.status("Testing …"):
        evaluation = Run.load(path, device=device).evaluate(tasks, numbers, task, options)
    if as_json:
        print(json.dumps(evaluation.to_dict()))
    else:
        stdout.print(create_evaluation_table(evaluation))
