"""Inspection of plugins in a separate process.

A plugin's module can end the process that imports it, or hang. In a separate process, only that plugin fails.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metareg.errors import MetaregError, PluginError, describe_error
from metareg.registry.plugins import Entry, get_config_class, resolve

if TYPE_CHECKING:
    from metareg.contract.tasks import Dataset

__all__ = ["DatasetFacts", "inspect_datasets", "inspect_plugins", "read_dataset"]

_SECONDS = 120.0
"""Time limit for importing and inspecting one plugin, long enough to import torch from a slow disk."""


@dataclass(frozen=True)
class DatasetFacts:
    """What ``metareg data`` shows of a dataset."""

    location: str | None
    present: bool
    obtain: str
    downloadable: bool

    @classmethod
    def of(cls, dataset: Dataset) -> DatasetFacts:
        """Create the facts from a task's dataset."""
        location = None if dataset.location is None else str(dataset.location)
        return cls(location, bool(dataset.present), str(dataset.obtain), dataset.download is not None)


def inspect_plugins(entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """Import plugins, and yield for each ``{"summary": …, "config": [option, …]}`` or ``{"broken": why}``."""
    return _inspect(entries, "class", None)


def inspect_datasets(entries: Sequence[Entry], where: Path | None) -> Iterator[DatasetFacts | str | None]:
    """Build tasks, and yield for each the facts of its data, an error message, or None if it reads no data.

    Args:
        entries: tasks.
        where: the folder to look in, for a task with an option `data`.
    """
    for answer in _inspect(entries, "dataset", None if where is None else str(where)):
        found = answer.get("dataset")
        yield answer.get("broken") or (found and DatasetFacts(**found))


def read_dataset(entry: Entry, where: str | Path | None) -> Dataset | None:
    """Return a task's dataset, read in this process; arguments as for `inspect_datasets`."""
    options = getattr(getattr(entry.load(), "Config", None), "model_fields", {})
    given = {"data": str(where)} if where is not None and "data" in options else {}
    dataset: Dataset | None = getattr(resolve("tasks", entry.qualified, given).instance, "dataset", None)
    return dataset


def _inspect(entries: Sequence[Entry], subject: str, where: str | None) -> Iterator[dict[str, Any]]:
    child: _Child | None = None
    try:
        for entry in entries:
            question = {"entry": asdict(entry), "subject": subject, "where": where}
            fresh, child = child is None, child or _Child()
            answer = child.ask(question)
            if answer is None and not fresh and not child.late:  # an earlier plugin can have caused the end
                child.end()
                child = _Child()
                answer = child.ask(question)
            if answer is None:
                yield {"broken": f"The {entry.label} {child.end()}."}
                child = None
            else:
                yield answer
    finally:
        if child is not None:
            child.end()


class _Child:
    """A process that answers questions about plugins, one after the other."""

    def __init__(self) -> None:
        # The child has the same import path, and its output is discarded. In its own session, its children can be
        # killed with it.
        path = [folder or str(Path.cwd()) for folder in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "metareg.registry.inspection"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.late = False
        """Whether an answer timed out."""

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """Return the answer; None if the process ended or timed out."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self._receive(_SECONDS)

    def end(self) -> str:
        """End the process if it still runs, and describe how it ended."""
        code = None if self.late else self._wait()
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):  # already gone
                os.killpg(self._process.pid, signal.SIGKILL)
        else:  # Windows has no process groups
            self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        if code is None:
            return f"does not respond within {_SECONDS:g} seconds"
        return f"ends Python by {signal.Signals(-code).name}" if code < 0 else f"ends Python with exit code {code}"

    def _wait(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(0.5)
        return None

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        try:
            answer = json.loads(self._lines.get(timeout=seconds))
        except queue.Empty:
            self.late = True
            return None
        except ValueError:  # end of the stream
            return None
        return answer if isinstance(answer, dict) else None

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._lines.put(line)
        self._lines.put(b"")


def _answer(entry: dict[str, str], subject: str, where: str | None) -> dict[str, Any]:
    """Answer a question about one plugin."""
    plugin = Entry(**entry)
    try:
        if subject == "dataset":
            dataset = read_dataset(plugin, where)
            return {"dataset": None if dataset is None else asdict(DatasetFacts.of(dataset))}
        return _describe_class(plugin)
    # A plugin's module can raise anything, including SystemExit and KeyboardInterrupt.
    except BaseException as error:
        return {
            "broken": str(error) if isinstance(error, MetaregError) else f"The {plugin.label}: {describe_error(error)}"
        }


def _describe_class(entry: Entry) -> dict[str, Any]:
    cls = entry.load()
    try:
        fields = get_config_class(cls).model_fields
        for field in fields.values():
            str(field.get_default(call_default_factory=True))
        return {"summary": str(cls.__doc__ or "").strip().partition("\n")[0], "config": sorted(fields)}
    except (Exception, SystemExit) as error:
        if isinstance(error, MetaregError):
            raise
        raise PluginError(f"The {entry.label} cannot be described: {describe_error(error)}") from error


def _main() -> None:
    """Answer the questions on standard input; plugins' own input and output are kept apart from them."""
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    for question in questions:
        print(json.dumps(_answer(**json.loads(question))), file=answers, flush=True)


if __name__ == "__main__":
    _main()
