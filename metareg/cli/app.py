"""The command line: its commands and their exit codes.

Each command imports the slow modules (torch, pydantic, plugins) that it needs.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from metareg._version import __version__
from metareg.cli.compare import compare, report, reproduce
from metareg.cli.flags import Command, RunCommand
from metareg.cli.plugins import check_plugin, data, doctor, new_plugin, plugins, show
from metareg.cli.runs import analyse, evaluate, export, predict, resume, train
from metareg.cli.terminal import stderr, stdout
from metareg.errors import Interrupted, MetaregError, UsageError, describe_error
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
app.command(cls=RunCommand)(train)
app.command(cls=RunCommand)(resume)
app.command(cls=Command)(export)
app.command(cls=Command)(predict)
app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(analyse)
app.command(cls=Command)(data)
app.command(cls=RunCommand)(compare)
app.command(cls=Command)(report)
app.command(cls=Command)(reproduce)
app.command(cls=Command)(plugins)
app.command(cls=Command)(show)
app.command("new-plugin", cls=Command)(new_plugin)
app.command("check-plugin", cls=Command)(check_plugin)
app.command(cls=Command)(doctor)

TRACEBACK_VARIABLE = "METAREG_TRACEBACK"


def _show_version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"metareg {__version__}")
        raise typer.Exit


@app.callback()
def _check_rank(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Refuse to run under torchrun, except for training."""
    if read_rank().size > 1 and context.invoked_subcommand not in ("train", "resume"):
        raise UsageError(
            f"torchrun can run `metareg train` and `metareg resume`; run `metareg {context.invoked_subcommand}` in one "
            "process."
        )


def run(arguments: Sequence[str]) -> int:
    """Run a command line.

    Returns:
        The exit code: 0 for success, 2 for wrong use, 130 for an interruption, 1 for any other failure.
    """
    if not is_follower() or os.environ.get(TRACEBACK_VARIABLE):
        return _run_command(arguments)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        code = _run_command(arguments)
    if code:
        _wait_for_leader()
    return code


def _explain(error: OSError) -> MetaregError:
    """Turn an operating system's error about a file into a MetaregError, because it is not a bug."""
    wrong_use = error.errno == errno.ENAMETOOLONG
    return (UsageError if wrong_use else MetaregError)(f"{error.strerror}: {os.fsdecode(error.filename)}.")


def _wait_for_leader() -> None:
    """Wait a second, or until SIGTERM, so that the leader can print its error before torchrun stops all processes."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait(1)


def _run_command(arguments: Sequence[str]) -> int:
    stdout.file = sys.stdout
    try:
        code = app(args=list(arguments), standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as exit:  # raised by shell completion
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _print_error(error)
    return code if isinstance(code, int) else 0


def _print_error(error: Exception) -> int:
    """Print the error that ended a command, and return the exit code."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        error = _explain(error)
    sentence, hint = str(error) if isinstance(error, MetaregError) else describe_error(error), ""
    if isinstance(error, MetaregError):
        code = error.exit_code
    elif hasattr(error, "format_message"):  # typer's error about arguments
        sentence, code = error.format_message(), 2
        if not sentence:  # no arguments: typer has shown the help
            return code
        if (context := getattr(error, "ctx", None)) is not None:
            stderr.print(escape(context.get_usage()), soft_wrap=True)
    else:
        code, hint = 1, f"\nThis is a bug in metareg or in a plugin; {TRACEBACK_VARIABLE}=1 shows where."
    label = "" if isinstance(error, Interrupted) else "[bold red]Error:[/] "
    stderr.print(f"{label}{escape(sentence)}{hint}", soft_wrap=True)
    return code
