"""The way out: all that a command prints passes through here, and can do nothing there but be read."""

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
    """A console that shows the control characters of texts; only its own colours and cursor movements are obeyed."""

    @property
    def file(self) -> IO[str]:
        """Where it draws: not through the guards of the standard streams, nor what a live display puts around them."""
        file = super().file
        while (behind := getattr(file, "rich_proxied_file", None)) is not None:
            file = behind
        return file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render_str(self, text: str, **options: Any) -> Text:
        """A text as rich lays it out: with the signs that are shown, so that columns keep their width."""
        return super().render_str(show_controls(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """All that is printed, in the end."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=show_controls(segment.text))


# Errors and progress go to stderr, results to stdout: `metareg eval RUN --json | jq` works.
stderr = Terminal(stderr=True, highlight=False)
stdout = Terminal(highlight=False)


class LogHandler(logging.Handler):
    """Shows what is logged on a console, a line each."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record."""
        try:
            self._console.print(escape(self.format(record)), soft_wrap=True)
        except Exception:
            self.handleError(record)


class _Stream(io.TextIOWrapper):
    """A standard stream whose end is no reason for a traceback.

    Where standard output cannot be written (its disk is full, its reader has gone), that is a MetaregError; where standard
    error cannot, there is nobody to tell, and what it is about goes on.
    """

    def __init__(self, stream: io.TextIOWrapper, *, is_output: bool) -> None:
        # Text is kept in the bytes' buffer alone, which both streams of a descriptor share: it stays in its order.
        super().__init__(
            stream.buffer, stream.encoding, "replace" if is_output else stream.errors, write_through=True,
            line_buffering=stream.line_buffering,
        )  # fmt: skip
        self._is_output = is_output
        self._origin = stream  # with its end it would close the bytes' buffer

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
        # What is left would be tried again at the end of the process, and say more than this sentence.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if self._is_output:
            raise MetaregError(f"The output cannot be written: {error.strerror}.") from error
        return count


class _GuardedStream(_Stream):
    """A standard stream for everything but the consoles: warnings, tracebacks, what a plugin or a library prints."""

    def __init__(self, stream: io.TextIOWrapper, *, is_output: bool) -> None:
        super().__init__(stream, is_output=is_output)
        self.rich_proxied_file = _Stream(stream, is_output=is_output)
        """Where the consoles of rich draw, which ask for it by this name."""

    def write(self, text: str) -> int:
        return super().write(show_controls(text))


def guard_streams() -> None:
    """Let nothing reach the terminal by the standard streams of this process but text, and colours of the consoles."""
    for descriptor in range(3):
        _occupy(descriptor)
    sys.stdout = _guard(sys.stdout, 1)
    sys.stderr = _guard(sys.stderr, 2)


def _occupy(descriptor: int) -> None:
    """Keep a standard stream that is closed from becoming the first file that is opened, which prints would damage."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)


def _guard(stream: TextIO | None, descriptor: int) -> TextIO:
    """A standard stream, which is None where it is closed."""
    if stream is None:
        stream = os.fdopen(descriptor, "w", closefd=False)
    return _GuardedStream(stream, is_output=descriptor == 1) if isinstance(stream, io.TextIOWrapper) else stream


def write_output(text: str, flag: str = "--out") -> None:
    """Write a text to the output, whose encoding may lack one of the signs.

    Args:
        text: what has to be there sign for sign, but for control characters, which are shown.
        flag: the option that writes it to a file instead.
    """
    file, shown = stdout.file, show_controls(text)
    try:
        shown.encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError as error:
        sign = error.object[error.start]
        problem = f"The output's encoding, {error.encoding}, has no '{sign}'"
        raise MetaregError(f"{problem}; {flag} FILE writes UTF-8.") from error
    file.write(shown)
    file.flush()
