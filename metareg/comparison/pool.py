"""Worker processes on this machine, which execute the runs of a comparison."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from metareg.comparison.plan import Arm, PlannedRun
from metareg.errors import DivergenceError, Interrupted, MetaregError, UsageError, describe_error
from metareg.util.files import read_text, write_text
from metareg.util.imports import own_collector, pause_collector
from metareg.util.malloc import keep_freed_memory

__all__ = [
    "ERROR_FILE",
    "Launcher",
    "LocalPool",
    "Outcome",
    "carry_out",
    "count_cpu_cores",
    "cut_traceback",
    "read_divergence",
    "read_failure",
]

ERROR_FILE = "error.txt"
_GRACE_SECONDS = 20.0
_SECONDS_TO_CLOSE = 5.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: PlannedRun
    error: str | None = None
    """The error; None if the run finished."""
    again: bool = False
    """Whether to try again: not after wrong use or divergence, which would repeat."""


class Launcher(Protocol):
    """Executes runs, several at a time."""

    @property
    def capacity(self) -> int:
        """The number of runs that it accepts at a time."""

    def submit(self, run: PlannedRun) -> None:
        """Start a run, or resume it if its folder contains a part of it."""

    def wait(self, seconds: float) -> list[Outcome]:
        """Return the runs that ended since the last call, as soon as there is one or after some seconds."""

    def stop(self) -> None:
        """Ask every active run to write a checkpoint and stop, and wait until they have."""

    def close(self) -> None:
        """Kill whatever still runs; a second call does nothing."""


def carry_out(run: PlannedRun) -> Outcome:
    """Execute a run in this process; write an error to error.txt in its folder."""
    from metareg.runs.training import train

    report = run.path / ERROR_FILE
    try:
        # Removed first, because a run can only start in an empty folder.
        report.unlink(missing_ok=True)
        train(config=run.config, out=run.path, resume=True, **run.options)
    except Interrupted:
        raise
    except Exception as error:
        text = describe_error(error)
        known = isinstance(error, MetaregError)
        with suppress(MetaregError, OSError):
            run.path.mkdir(parents=True, exist_ok=True)
            write_text(report, text + "\n" if known else f"{text}\n\n{traceback.format_exc()}")
        return Outcome(run, str(error) if known else text, again=not isinstance(error, UsageError | DivergenceError))
    return Outcome(run)


def read_failure(path: Path) -> tuple[str, str] | None:
    """Read from error.txt how a run failed, ``"diverged"`` or ``"broken"``, and why; None if it did not fail."""
    try:
        text = read_text(path / ERROR_FILE, errors="replace")
    except OSError:
        return None
    kind, _, problem = text.partition(": ")
    if kind == DivergenceError.__name__:
        return "diverged", problem.strip()
    return "broken", cut_traceback(text).strip() or f"{ERROR_FILE} is empty"


def cut_traceback(text: str) -> str:
    """Remove the traceback of an unknown error from error.txt's text, because it contains paths of the machine."""
    return text.partition("\n\nTraceback")[0]


def read_divergence(path: Path) -> str | None:
    """Return why the run in a folder diverged; None if it did not."""
    state, problem = read_failure(path) or ("", "")
    return problem if state == "diverged" else None


def count_cpu_cores() -> int:
    """Count the CPU cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class LocalPool:
    """A pool of processes on this machine. If a process dies, it is replaced and its run reported as broken.

    Args:
        jobs: number of processes.
        threads: CPU threads of each.
        log: the file for their output.
        gpus: GPUs, named as in CUDA_VISIBLE_DEVICES, one for each process; if empty, all processes see all devices.
    """

    def __init__(self, jobs: int, threads: int, log: Path, gpus: Sequence[str] = ()) -> None:
        self.capacity = jobs
        self._threads = threads
        self._log = log
        self._gpus = gpus
        self._workers: list[_Worker] = []
        self._outcomes: queue.Queue[Outcome] = queue.Queue()

    def submit(self, run: PlannedRun) -> None:
        """Give a run to an idle or new process."""
        self._remove_dead_workers()
        worker = next((each for each in self._workers if each.run is None), None)
        if worker is None:
            taken = Counter(each.gpu for each in self._workers)
            gpu = min(self._gpus, key=taken.__getitem__, default=None)
            worker = _Worker(self._threads, self._log, self._outcomes, gpu)
            self._workers.append(worker)
        worker.start(run)

    def wait(self, seconds: float) -> list[Outcome]:
        self._remove_dead_workers()
        outcomes: list[Outcome] = []
        with suppress(queue.Empty):
            while True:
                outcomes.append(self._outcomes.get(timeout=seconds) if not outcomes else self._outcomes.get_nowait())
        return outcomes

    def stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()  # a training stops after its step
        deadline = time.monotonic() + _GRACE_SECONDS
        for worker in self._workers:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _remove_dead_workers(self) -> None:
        """Remove dead processes, and kill their child processes."""
        for worker in [each for each in self._workers if each.process.poll() is not None]:
            worker.kill()
            self._workers.remove(worker)


class _Worker:
    """A process, and the thread that reads its answers."""

    def __init__(self, threads: int, log: Path, outcomes: queue.Queue[Outcome], gpu: str | None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MPLBACKEND": "agg"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with log.open("ab") as file:
            # In its own session, so that Ctrl-C reaches only the comparison, which then asks the runs to stop. With -P,
            # so that a user's queue.py in the working directory does not shadow Python's.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "metareg.comparison.pool"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=environment, start_new_session=True,
            )  # fmt: skip
        self.run: PlannedRun | None = None
        self.gpu = gpu
        self._log = log
        self._lock = threading.Lock()
        self._outcomes = outcomes
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def start(self, run: PlannedRun) -> None:
        self.run = run
        assert self.process.stdin is not None
        content = asdict(run) | {"path": str(run.path)}
        try:
            self.process.stdin.write((json.dumps(content) + "\n").encode())
            self.process.stdin.flush()
        except (OSError, ValueError):  # the process has died, so the pipe is broken or closed
            self._report_death()

    def kill(self) -> None:
        """Kill it and its child processes, which would otherwise keep its output open."""
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):  # already gone
                os.killpg(self.process.pid, signal.SIGKILL)
        else:  # Windows has no process groups
            self.process.kill()
        self._listener.join(_SECONDS_TO_CLOSE)
        self._report_death()  # a child in its own session can still keep the output open

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as answers:
            for line in answers:
                self._report(**json.loads(line))
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        self._report_death()

    def _report_death(self) -> None:
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        self._report(f"The process of the run {how}; its output is in {self._log}.", again=True)

    def _report(self, error: str | None, again: bool) -> None:
        with self._lock:
            run, self.run = self.run, None
        if run is not None:
            self._outcomes.put(Outcome(run, error, again))


def _serve(answers: Any) -> None:
    """Execute a run for every input line, and print its outcome as an output line."""
    runs: queue.Queue[PlannedRun] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            content = json.loads(line)
            runs.put(PlannedRun(**{**content, "arm": Arm(**content["arm"]), "path": Path(content["path"])}))
        # The comparison has ended or was killed; the active run can be resumed.
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        outcome = carry_out(runs.get())
        answers.write(json.dumps({"error": outcome.error, "again": outcome.again}) + "\n")
        answers.flush()


def _main() -> int:
    keep_freed_memory()
    own_collector()
    with pause_collector():
        import metareg.runs.training  # noqa: F401
    # Prints of plugins go to the log, so that they do not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _serve(answers)
    except (Interrupted, KeyboardInterrupt):
        return Interrupted.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
