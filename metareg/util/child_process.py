"""Parsers that a damaged file can crash, run in child processes with limits on time and memory."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from metareg.errors import MetaregError, UsageError
from metareg.util.arrays import open_arrays
from metareg.util.files import refuse_special_file

__all__ = ["parse_in_child"]

_LEAST_BYTES, _MOST_TIMES = 1 << 30, 20
_LEAST_SECONDS, _BYTES_A_SECOND = 60, 1 << 20
_SECONDS_TO_START = 300
"""Extra wall-clock time beyond the CPU time limit, because a busy machine imports libraries slowly."""


def parse_in_child(
    parser: Callable[[Path], Mapping[str, np.ndarray]], paths: Sequence[Path], what: str
) -> list[dict[str, np.ndarray]]:
    """Parse files in a child process, because each may crash the parser, fill the memory or never finish.

    Args:
        parser: a function of an importable module that returns arrays by name. The module imports large packages
            itself, so that they do not count as the file's memory.
        paths: the files; one process reads all of them.
        what: what to read them as, for messages, such as ``"a graph"``.

    Returns:
        The arrays of each file.

    Raises:
        UsageError: the parser refused a file, crashed or took too long; the message names the file.
    """
    for path in paths:
        try:
            refuse_special_file(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be read as {what}: {error.strerror}.") from error
    most = max((path.stat().st_size for path in paths if path.is_file()), default=0)
    seconds = _LEAST_SECONDS + sum(path.stat().st_size for path in paths if path.is_file()) // _BYTES_A_SECOND
    with tempfile.TemporaryDirectory(prefix="metareg-") as folder:
        limits = (max(_LEAST_BYTES, _MOST_TIMES * most), seconds)
        arguments = [parser.__module__, parser.__qualname__, what, folder, *map(str, limits), *map(str, paths)]
        # With -P, so that modules in the working directory do not shadow Python's.
        command = [sys.executable, "-P", "-m", __name__, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        try:
            ended = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=_SECONDS_TO_START + 2 * seconds, check=False,
            )  # fmt: skip
            how = _explain(ended.returncode)
        except subprocess.TimeoutExpired:
            how = "did not finish"
        return [_take(Path(folder, str(number)), path, what, how) for number, path in enumerate(paths)]


def _take(result: Path, path: Path, what: str, how: str) -> dict[str, np.ndarray]:
    refused = result.with_suffix(".txt")
    if refused.is_file():
        raise UsageError(refused.read_text(encoding="utf-8"))
    if not result.with_suffix(".npz").is_file():
        raise UsageError(f"{path} cannot be read as {what}: its reader {how}; the file is damaged or of another type.")
    with open_arrays(result.with_suffix(".npz"), what) as arrays:
        return {name: arrays[name] for name in arrays}


def _explain(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _limit(memory: int, seconds: int) -> None:
    """Limit this process to a number of additional bytes and of CPU seconds."""
    try:
        import resource
    except ImportError:  # Windows has no such limits; the parent's time limit remains
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").is_file() else None
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _main(module: str, name: str, what: str, folder: str, memory: str, seconds: str, *paths: str) -> None:
    parser = getattr(importlib.import_module(module), name)
    _limit(int(memory), int(seconds))
    for number, path in enumerate(paths):
        result = Path(folder, str(number))
        try:
            arrays = parser(Path(path))
            # Written under another name first, because a limit can end the process while it writes.
            np.savez(result.with_suffix(".part.npz"), **arrays)
            result.with_suffix(".part.npz").rename(result.with_suffix(".npz"))
        except MetaregError as error:
            result.with_suffix(".txt").write_text(str(error), encoding="utf-8", errors="replace")
        except Exception as error:  # libraries raise many kinds of errors for damaged files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
            text = f"{path} cannot be read as {what}: {reason}."
            result.with_suffix(".txt").write_text(text, encoding="utf-8", errors="replace")


if __name__ == "__main__":
    _main(*sys.argv[1:])
