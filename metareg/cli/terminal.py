"""Consoles and streams that make control characters in all printed text visible and harmless."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterable
from typing import IO, Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from metareg.errors import MetaregError
from metareg.printable import show_controls

__all__ = ["LogHandler", "Terminal", "guard_streams", "stderr", "stdout", "write_output"]


class Terminal(Console):
    """A console that prints control characters in text visibly; only rich's own control codes reach the terminal."""

    @property
    def file(self) -> IO[str]:
        """The stream below the guards of `guard_streams` and the proxies of a live display."""
        file = super().file
        while (behind := getattr(file, "rich_proxied_file", None)) is not None:
            file = behind
        return file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render_str(self, text: str, **options: Any) -> Text:
        """Parse markup after replacing control characters, so that rich measures the width that is printed."""
        return super().render_str(show_controls(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render with control characters replaced; everything printed passes through here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=show_controls(segment.text))


# Errors and progress go to stderr, results to stdout: `metareg eval RUN --json | jq` works.
stderr = Terminal(stderr=True, highlight=False)
stdout = Terminal(highlight=False)


class LogHandler(logging.Handler):
    """Prints each log record on a console, one per line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            self._console.print(escape(self.format(record)), soft_wrap=True)
        except Exception:
            self.handleError(record)


class _Stream(io.TextIOWrapper):
    """A standard stream that survives write errors without a traceback.

    If standard output cannot be written (the disk is full, the reader has closed the pipe), a MetaregError is raised.
    If standard error cannot be written, the error is ignored and the command continues.
    """

    def __init__(self, stream: io.TextIOWrapper, *, is_output: bool) -> None:
        # Write through to the byte buffer, which both streams of a descriptor share, so that the order is kept.
        super().__init__(
            stream.buffer, stream.encoding, "replace" if is_output else stream.errors, write_through=True,
            line_buffering=stream.line_buffering,
        )  # fmt: skip
        self._is_output = is_output
        self._origin = stream  # if garbage-collected, it would close the byte buffer

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            return self._give_up(error, len(text))

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error, 0)

    def _give_up(self, error: OSError, count: int) -> int:
        # Python would flush the rest at exit and print a second error.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if self._is_output:
            raise MetaregError(f"The output cannot be written: {error.strerror}.") from error
        return count


class _GuardedStream(_Stream):
    """A standard stream for all output except the consoles': warnings, tracebacks, prints of plugins and libraries."""

    def __init__(self, stream: io.TextIOWrapper, *, is_output: bool) -> None:
        super().__init__(stream, is_output=is_output)
        self.rich_proxied_file = _Stream(stream, is_output=is_output)
        """The stream that rich's consoles write to; rich looks for this name."""

    def write(self, text: str) -> int:
        return super().write(show_controls(text))


def guard_streams() -> None:
    """Wrap the standard streams so that only text and the consoles' own control codes reach the terminal."""
    for descriptor in range(3):
        _occupy(descriptor)
    sys.stdout = _guard(sys.stdout, 1)
    sys.stderr = _guard(sys.stderr, 2)


def _occupy(descriptor: int) -> None:
    """Open the null device if a standard stream is closed; otherwise the next opened file would receive the output."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)


def _guard(stream: TextIO | None, descriptor: int) -> TextIO:
    """Wrap a standard stream, which is None if it is closed."""
    if stream is None:
        stream = os.fdopen(descriptor, "w", closefd=False)
    return _GuardedStream(stream, is_output=descriptor == 1) if isinstance(stream, io.TextIOWrapper) else stream


def write_output(text: str, flag: str = "--out") -> None:
    """Write a text to standard output exactly, except for control characters.

    Args:
        text: the text; control characters are replaced by visible ones.
        flag: the option that writes to a file instead, named in the error if the output's encoding lacks a character.
    """
    file, shown = stdout.file, show_controls(text)
    try:
        shown.encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError as error:
        sign = error.object[error.start]
        problem = f"The output's encoding, {error.encoding}, cannot represent '{sign}'"
        raise MetaregError(f"{problem}; use {flag} FILE, which is written in UTF-8.") from error
    file.write(shown)
    file.flush()
