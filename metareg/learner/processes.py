"""Communication between the processes of a training: values, errors, sums and answers.

Each computes its share of every batch, and all take the same step (`metareg.learner.batch_split`).
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metareg.errors import DivergenceError, LostProcessError, MetaregError, UsageError, describe_error
from metareg.util.devices import find_device, move_tensors
from metareg.util.torch_internals import open_store
from metareg.util.torchrun import RankInfo, read_rank

__all__ = ["Processes", "join_processes"]

log = logging.getLogger("metareg")

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long the processes wait for one that does not answer. This limits what process 0 does alone: checkpoints,
observers, plots. The end of a process is detected immediately."""

_joins = itertools.count()


class Processes:
    """The processes of a training, and this process's rank.

    All of them call the same methods in the same order; an error in one becomes an error in all.

    Args:
        rank: this process's number; process 0 leads: only it writes files and calls observers.
        size: the number of processes.
        local_rank: this process's number on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.size = size
        self._local_rank = local_rank
        self._questions: dict[str, Callable[[], bool]] = {}
        self._answers: dict[str, bool] = {}

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return this process's share of `count` items; shares differ by at most one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def largest_share(self, count: int) -> int:
        """Return the size of the largest share of `count` items."""
        return -(-count // self.size)

    def check_batch(self, tasks: int) -> None:
        """Refuse a batch that would leave a process without a task.

        Raises:
            UsageError: there are fewer tasks than processes.
        """
        if tasks < self.size:
            raise UsageError(
                f"{self.size} processes cannot share a batch of {tasks}; start fewer processes, or use more tasks per "
                "step (--meta-batch)."
            )

    def device(self, name: str) -> torch.device:
        """Return the device `name` for this process; with several GPUs, each process of a machine gets its own.

        Raises:
            UsageError: there is no such device, or there are too few.
        """
        device = find_device(name)
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise UsageError(f"{self.size} processes cannot share the GPU '{name}'; --device cuda gives each its own.")
        gpus = torch.cuda.device_count()
        if self._local_rank >= gpus:
            raise UsageError(
                f"There is no GPU for process {self._local_rank} of this machine, which has {gpus}; start one process "
                "per GPU, or use --device cpu."
            )
        torch.cuda.set_device(self._local_rank)
        return torch.device("cuda", self._local_rank)

    def backend(self, device: torch.device) -> str | None:
        """Return the backend that sums gradients on a device: ``"gloo"`` or ``"nccl"``; None for a single process."""
        return None if self.size == 1 else _list_backends().get(device.type, _list_backends().get("cpu"))

    def each(self, produce: Callable[[], T]) -> T:
        """Return the result of `produce` in this process, once it has succeeded in all.

        Raises:
            Exception: this process's own error, or a copy of another's.
        """
        value, error = _try_call(produce, self.size)
        self._exchange(None, error)
        return value  # type: ignore[return-value]

    def gather(self, produce: Callable[[], T]) -> list[T]:
        """Return the results of `produce` in all processes, by rank: CPU tensors and anything that can be pickled.

        Raises:
            Exception: as `each`.
        """
        value, error = _try_call(produce, self.size)
        return self._exchange(value, error)

    def first(self, produce: Callable[[], T]) -> T:
        """Call `produce` only in process 0, and return its result in all processes; types as in `gather`.

        Raises:
            Exception: process 0's error, or a copy of it.
        """
        value, error = _try_call(produce, self.size) if self.leads else (None, None)
        if self.size == 1:
            return value  # type: ignore[return-value]
        message = [(value, _describe_error(error))]
        with _detect_lost_process():
            dist.broadcast_object_list(message, src=0)
        if error is not None:
            raise error
        value, failure = message[0]
        if failure is not None:
            kind, text = failure
            raise kind(text)
        return value  # type: ignore[return-value]

    def replicate(self, take: Callable[[], T], restore: Callable[[T], None]) -> None:
        """Call `take` in process 0, and `restore` with its result, a pytree sent through the CPU, in all others.

        Raises:
            Exception: as `each`.
        """
        if self.size > 1:
            value = self.first(lambda: move_tensors(take(), "cpu"))
            self.each(lambda: None if self.leads else restore(value))

    def _exchange(self, value: Any, error: Exception | None) -> list[Any]:
        if self.size == 1:
            return [value]
        outcomes: list[Any] = [None] * self.size
        with _detect_lost_process():
            dist.all_gather_object(outcomes, (value, _describe_error(error)))
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                kind, text = failure
                raise kind(f"Process {rank} of {self.size}: {text}")
        return [value for value, _ in outcomes]

    def ask(self, name: str, question: Callable[[], bool]) -> None:
        """Add a question to every sum; the answer is yes in all processes if it is yes in one."""
        self._questions[name] = question

    def answer(self, name: str) -> bool:
        """Return the answer to a question at the last sum; for a single process, the current answer."""
        return self._questions[name]() if self.size == 1 else self._answers.get(name, False)

    def sum(self, values: Tensor, failed: bool) -> tuple[Tensor, bool]:
        """Return the sum of all processes' `values` ``[numbers]``, bit-identical in all, and whether one has failed."""
        answers = [failed, *(question() for question in self._questions.values())]
        total = torch.cat([values, torch.tensor(answers, dtype=values.dtype, device=values.device)])
        if values.device.type not in _list_backends():
            total = total.cpu()
        with _detect_lost_process():
            dist.all_reduce(total)
        failed, *agreed = (total[-len(answers) :] > 0).tolist()
        self._answers = dict(zip(self._questions, agreed, strict=True))
        return total[: -len(answers)].to(values.device), failed


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, for a block; a single process if it started none.

    If the program already has a process group, it is used. Only process 0 logs.

    Raises:
        MetaregError: the processes cannot connect.

    Example:
        >>> with join_processes() as processes, learner.split_over(processes):  # in a script that torchrun starts
        ...     learner.fit(task_source, steps=1000)
    """
    here = read_rank()
    given = dist.is_available() and dist.is_initialized()
    if given:
        if "cpu" not in _list_backends():
            raise UsageError(
                f"The process group of this program supports only {' and '.join(_list_backends())} tensors; metareg "
                "also needs CPU tensors: init_process_group('cpu:gloo,cuda:nccl')."
            )
        rank = dist.get_rank()
        here = RankInfo(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))
    processes = Processes(here.rank, here.size, here.local_rank)
    if processes.size == 1:
        yield processes
        return
    if not given:
        _create_group(processes)
    silent_before, log.disabled = log.disabled, log.disabled or not processes.leads
    try:
        yield processes
    finally:
        log.disabled = silent_before
        if not given:
            dist.destroy_process_group()


def _create_group(processes: Processes) -> None:
    if not dist.is_available():
        raise UsageError("This build of torch does not support several processes; start one.")
    # Control messages are CPU tensors, so they always use gloo.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        # The store survives a restart by torchrun, so use new keys for each attempt.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, rank, size = open_store(f"metareg-{attempt}-{next(_joins)}", TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except ValueError as error:
        raise UsageError(f"The processes cannot find each other: {error}.") from error
    except RuntimeError as error:
        raise MetaregError(
            f"The {processes.size} processes did not find each other ({str(error).splitlines()[0]})."
        ) from error


def _list_backends() -> dict[str, str]:
    """Map device types to backends in the current process group."""
    pairs = (part.partition(":") for part in dist.get_backend_config().split(","))
    return {device: backend for device, _, backend in pairs}


def _try_call(produce: Callable[[], T], size: int) -> tuple[T | None, Exception | None]:
    """Return the value or the error of a call; raise the error if there is only one process."""
    try:
        return produce(), None
    except LostProcessError:  # the others cannot be reached
        raise
    except Exception as error:
        if size == 1:
            raise
        return None, error


def _describe_error(error: Exception | None) -> tuple[type[MetaregError], str] | None:
    """Describe an error, so that another process can raise one of the same kind."""
    if error is None:
        return None
    if not isinstance(error, MetaregError):
        return MetaregError, describe_error(error)
    kinds = (UsageError, DivergenceError, MetaregError)
    return next(kind for kind in kinds if isinstance(error, kind)), str(error)


@contextmanager
def _detect_lost_process() -> Iterator[None]:
    """Turn torch's error about a lost process into a metareg error."""
    try:
        yield
    except RuntimeError as error:
        silent = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        minutes = TIMEOUT.total_seconds() / 60
        what = f"has not answered for {minutes:g} minutes" if silent else "ended early"
        raise LostProcessError(f"Another process of this training {what}.") from error
