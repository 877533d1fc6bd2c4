"""Jobs in processes of their own, so many at once, each with a time limit; their rows as they come.

A GPU that one job has put out of order (an illegal access poisons a process's context for good) is whole for the next, a job
that hangs is ended, and one that breaks leaves a row that says so.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from metareg import MetaregError, UsageError

__all__ = ["Job", "Row", "describe_problem", "preload", "run_jobs"]

Row = dict[str, Any]

_LAST_SECONDS = 10.0
"""How long a process may take to end after its last row."""
_MOST_COMPILERS = 4
"""Processes that compile for a job; they are there while others are timed."""
_LONGEST_TRACE = 1500
"""Characters of a traceback that are kept: its end."""

# Its processes have loaded already what `preload` names, and have no CUDA context.
_PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Job:
    """A function that yields rows, to be called in a process of its own."""

    key: Mapping[str, Any]
    """What each of its rows says beside its own values."""
    function: Callable[..., Iterable[Mapping[str, Any]]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 120.0
    """After which it is ended."""


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    end: float
    """When it is ended, by `time.monotonic`."""
    done: bool = False


def preload(*modules: str) -> None:
    """Have modules loaded once for all jobs; to be called before the first."""
    _PROCESSES.set_forkserver_preload(list(modules))


def run_jobs(jobs: Iterable[Job], at_once: int, until: float, log: Path) -> Iterator[Row]:
    """The rows of some jobs; one that breaks, takes too long or was not begun has a row with `status` and `reason`.

    Args:
        jobs: are begun in this order.
        at_once: processes.
        until: by `time.monotonic`; what runs then is ended, and no further job is begun.
        log: takes what the processes print.
    """
    waiting, running = list(jobs), dict[Connection, _Running]()
    try:
        while True:
            while waiting and len(running) < at_once and time.monotonic() < until:
                connection, started = _start(waiting.pop(0), at_once, until, log)
                running[connection] = started
            if not running:
                break
            next_end = min(each.end for each in running.values())
            for connection in wait(list(running), timeout=max(0.0, next_end - time.monotonic())):
                assert isinstance(connection, Connection)
                yield from _receive(connection, running)
            for connection, each in list(running.items()):
                if time.monotonic() >= each.end:
                    _end(running.pop(connection).process)
                    if not each.done:
                        yield {**each.job.key, "status": "failed", "reason": "it was ended: its time was over"}
    finally:
        for each in running.values():
            _end(each.process)
    yield from ({**job.key, "status": "not run", "reason": "no time was left"} for job in waiting)


def describe_problem(error: Exception) -> Row:
    """What a row says of an error: ``refused`` where metareg says that it cannot be, else ``failed``."""
    if isinstance(error, UsageError):
        return {"status": "refused", "reason": str(error)}
    sentence = str(error) if isinstance(error, MetaregError) else f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))[-_LONGEST_TRACE:]
    return {"status": "failed", "reason": sentence[:500], "traceback": trace}


def _start(job: Job, at_once: int, until: float, log: Path) -> tuple[Connection, _Running]:
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    compilers = min(_MOST_COMPILERS, max(1, (os.cpu_count() or 1) // at_once))
    process = _PROCESSES.Process(target=_work, args=(sender, job.function, dict(job.arguments), compilers, log))
    process.start()
    sender.close()
    return receiver, _Running(job, process, min(until, time.monotonic() + job.seconds))


def _receive(connection: Connection, running: dict[Connection, _Running]) -> Iterator[Row]:
    """The next row of a process, or what there is to say of its end."""
    each = running[connection]
    try:
        row = connection.recv()
    except Exception:  # the process has ended, perhaps in the middle of a row
        del running[connection]
        each.process.join(_LAST_SECONDS)
        if not each.done:
            reason = f"its process ended with the exit code {each.process.exitcode}"
            yield {**each.job.key, "status": "failed", "reason": reason}
        return
    if row is None:
        each.done, each.end = True, min(each.end, time.monotonic() + _LAST_SECONDS)
    else:
        yield {**each.job.key, **row}


def _end(process: BaseProcess) -> None:
    """End a process and those that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join(_LAST_SECONDS)


def _work(
    sender: Connection, function: Callable[..., Any], arguments: dict[str, Any], compilers: int, log: Path
) -> None:
    """What a process does."""
    os.setsid()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(compilers)
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        for row in function(**arguments):
            sender.send(row)
    except Exception as error:
        sender.send(describe_problem(error))
    sender.send(None)
    sender.close()
