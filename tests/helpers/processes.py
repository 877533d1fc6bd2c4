"""Runs commands in separate processes that tests kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

_NURSERY = """
import contextlib, json, os, sys, tempfile
import torch
torch.set_num_threads(1)
import metareg.cli.app, metareg.runs.plots
metareg.runs.plots.draw = lambda run: []
# A first run imports whatever torch and a task import when they are used.
for options in json.loads(sys.argv[1]):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        metareg.cli.app.run(["train", *options, f"--out={folder}/run"])
print(0, flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        os._exit(metareg.cli.app.run(job["arguments"]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts commands as real processes within milliseconds, by forking a process that has already imported metareg.

    Their runs draw no plots.

    Args:
        folder: the folder of their output, ``output.txt``.
        warm_up: options of trainings that import the modules which the commands need.
    """

    def __init__(self, folder: Path, warm_up: Iterable[Sequence[str]]) -> None:
        self.output = folder / "output.txt"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY, json.dumps([*warm_up])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )
        self._answer()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, arguments: Sequence[str]) -> int:
        """Start a command, and return its process id."""
        assert self._process.stdin is not None
        print(
            json.dumps({"arguments": list(arguments), "output": str(self.output)}), file=self._process.stdin, flush=True
        )
        return self._answer()

    def wait(self) -> int:
        """Return the exit code of the last command; negative if a signal ended it."""
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


class Command:
    """Starts commands like `metareg` itself, imports included; has the methods of `Nursery`."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output.txt"

    def start(self, arguments: Sequence[str]) -> int:
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "metareg", *arguments], stdout=output, stderr=output, env=environment()
            )
        return self._process.pid

    def wait(self) -> int:
        return self._process.wait()


def environment() -> dict[str, str]:
    """Return the environment of every process, with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def kill(process: int) -> None:
    """Send SIGKILL; do nothing if the process has ended but was not waited for."""
    os.kill(process, signal.SIGKILL)
