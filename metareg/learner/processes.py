"""The processes of one training and what they tell each other: values, errors, sums and answers.

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
"""How long the processes wait for one that does not answer. It bounds what the first one does alone: writing a checkpoint,
observers, pictures. A process that ended is noticed at once."""

_joins = itertools.count()


class Processes:
    """The processes that work on a training together, and this one's place among them.

    All of them call the same methods in the same order; an error in one becomes an error in all.

    Args:
        rank: this process's number; number 0 leads: it alone writes files and tells observers.
        size: how many there are.
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
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things are this process's: as many as another's, or one more or less."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def largest_share(self, count: int) -> int:
        """How many of `count` things the process with most of them has."""
        return -(-count // self.size)

    def check_batch(self, tasks: int) -> None:
        """Refuse a batch that would leave a process without a task.

        Raises:
            UsageError: it has fewer tasks than there are processes.
        """
        if tasks < self.size:
            raise UsageError(
                f"{self.size} processes cannot share a batch of {tasks}; start fewer processes, or use more tasks per "
                "step (--meta-batch)."
            )

    def device(self, name: str) -> torch.device:
        """The device that `name` means in this process: of several GPUs, each process of a machine has its own.

        Raises:
            UsageError: there is no such device, or not one for each.
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
        """What adds up the gradients of a device: ``"gloo"`` or ``"nccl"``; None for a single process."""
        return None if self.size == 1 else _list_backends().get(device.type, _list_backends().get("cpu"))

    def each(self, produce: Callable[[], T]) -> T:
        """What `produce` returns in this process, once it has succeeded in all.

        Raises:
            Exception: this process's own, or what another one's says.
        """
        value, error = _try_call(produce, self.size)
        self._exchange(None, error)
        return value  # type: ignore[return-value]

    def gather(self, produce: Callable[[], T]) -> list[T]:
        """What `produce` returns in each process, by their numbers: CPU tensors, and whatever can be pickled.

        Raises:
            Exception: as `each`.
        """
        value, error = _try_call(produce, self.size)
        return self._exchange(value, error)

    def first(self, produce: Callable[[], T]) -> T:
        """What `produce` returns in process 0, the only one that calls it; in all of them, as in `gather`.

        Raises:
            Exception: process 0's own, or what it says.
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
        """Have every other process restore what process 0 takes, a pytree whose tensors travel on the CPU.

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
        """Have a question answered with every sum; the answer is yes in all processes where it is in one."""
        self._questions[name] = question

    def answer(self, name: str) -> bool:
        """The answer to a question that was asked, at the last sum; of a single process, as of now."""
        return self._questions[name]() if self.size == 1 else self._answers.get(name, False)

    def sum(self, values: Tensor, failed: bool) -> tuple[Tensor, bool]:
        """The sum of the processes' `values` ``[numbers]``, the same bits in all; and whether one has failed."""
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
        MetaregError: they cannot find each other.

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
    # Control messages go through gloo in any case: they are made on the CPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        # The store lives on when torchrun restarts its processes: no group may find the addresses of one before it.
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
    """What carries the tensors of each type of device, in the present group."""
    pairs = (part.partition(":") for part in dist.get_backend_config().split(","))
    return {device: backend for device, _, backend in pairs}


def _try_call(produce: Callable[[], T], size: int) -> tuple[T | None, Exception | None]:
    """The value or the error of a call; where nobody waits to hear of an error, it is raised."""
    try:
        return produce(), None
    except LostProcessError:  # they are beyond hearing
        raise
    except Exception as error:
        if size == 1:
            raise
        return None, error


def _describe_error(error: Exception | None) -> tuple[type[MetaregError], str] | None:
    """What another process can make an error of the same kind from."""
    if error is None:
        return None
    if not isinstance(error, MetaregError):
        return MetaregError, describe_error(error)
    kinds = (UsageError, DivergenceError, MetaregError)
    return next(kind for kind in kinds if isinstance(error, kind)), str(error)


@contextmanager
def _detect_lost_process() -> Iterator[None]:
    """Turn what torch raises where another process is gone into an error of metareg."""
    try:
        yield
    except RuntimeError as error:
        silent = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        minutes = TIMEOUT.total_seconds() / 60
        what = f"has not answered for {minutes:g} minutes" if silent else "ended early"
        raise LostProcessError(f"Another process of this training {what}.") from error
