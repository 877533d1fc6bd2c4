"""Progress of trainings and comparisons: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from metareg.cli.terminal import LogHandler
from metareg.learner.display import TerminalDisplay, format_speed
from metareg.printable import format_count

if TYPE_CHECKING:
    from metareg.comparison.pool import Outcome
    from metareg.comparison.runner import Comparison

__all__ = ["ComparisonProgress", "Progress", "show_messages"]


class Progress(TerminalDisplay):
    """The display of a training, including what metareg logs."""

    def __enter__(self) -> Progress:
        self._handler = _add_handler(self._console)
        logging.getLogger("metareg").setLevel(logging.INFO)
        super().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        logging.getLogger("metareg").removeHandler(self._handler)


class ComparisonProgress:
    """Shows a comparison's progress: a live table of running and remaining runs, with an estimated end.

    Prints a line for each finished run if the console is not a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> ComparisonProgress:
        self._handler = _add_handler(self._console)
        logging.getLogger("metareg.tuning").setLevel(logging.INFO)  # shows the search spaces and the chosen settings
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        logging.getLogger("metareg").removeHandler(self._handler)

    def on_progress(self, comparison: Comparison) -> None:
        """Update the live table."""
        if self._console.is_terminal:
            self._live.update(self._create_table(comparison), refresh=True)

    def on_run_end(self, comparison: Comparison, outcome: Outcome) -> None:
        """Print how a run ended."""
        done, left = comparison.finished, comparison.left
        if outcome.error is not None:
            how = "[yellow]failed[/]" if outcome.again else "[yellow]diverged[/]"
            if outcome.run.path in comparison.broken:
                how = "[red]broken[/]"
            self._console.print(f"{how} {escape(f'{outcome.run}: {outcome.error}')}", soft_wrap=True)
        elif not self._console.is_terminal:
            line = f"finished {outcome.run} ({done} of {done + left}{_format_time_left(comparison)})"
            self._console.print(escape(line), soft_wrap=True)

    def _create_table(self, comparison: Comparison) -> RenderableType:
        from metareg.comparison.runner import read_progress

        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("running", "seed", "step", "steps/s", "since"):
            table.add_column(column, justify="left" if column == "running" else "right")
        for run, began in comparison.running.values():
            step, speed = read_progress(run)
            chosen_by = "" if run.is_final else f" ({run.path.parent.name})"
            table.add_row(
                escape(f"{run.arm}{chosen_by}"), str(run.seed), str(step) if step else "…",
                format_speed(speed) if speed else "", _format_duration(time.monotonic() - began),
            )  # fmt: skip
        done, left, broken = comparison.finished, comparison.left, len(comparison.broken)
        words = Text.assemble(
            (f"{done} of {format_count(done + left + broken, 'run')}", "bold"),
            (f", {broken} broken" if broken else "", "red"),
            _format_time_left(comparison),
        )
        head = Table.grid(padding=(0, 1))
        head.add_row(ProgressBar(total=done + left + broken, completed=done, width=24), words)
        return Group(head, table)


@contextmanager
def show_messages(console: Console) -> Iterator[None]:
    """Show what metareg logs on a console while the block runs."""
    log = logging.getLogger("metareg")
    handler = _add_handler(console)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _add_handler(console: Console) -> logging.Handler:
    """Add a handler that shows what metareg logs on a console."""
    handler = LogHandler(console)
    logging.getLogger("metareg").addHandler(handler)
    return handler


def _format_time_left(comparison: Comparison) -> str:
    seconds = comparison.seconds_left
    if not seconds:
        return ""
    end = datetime.now() + timedelta(seconds=seconds)
    return f", about {_format_duration(seconds)} left, until {end:%H:%M}"


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
