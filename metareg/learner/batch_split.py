"""Batches in several processes: each computes its share, and all take the same step.

Every process has the parameters, the optimiser and the stream of tasks. They exchange one sum per gradient, or the
gradients of all tasks if a plugin combines them. A task is a function of its number, so each process draws either the
whole batch and keeps its share, or only its share. Noise is drawn by the task's number in the batch. The result
therefore equals that of one process up to rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from metareg.contract.episodes import Batch, Episodes, read_episodes
from metareg.engine.engine import Gradient
from metareg.errors import MetaregError
from metareg.learner.processes import Processes

__all__ = ["BatchSplit", "Share", "check_same_bits", "hash_tensors", "read_stacks", "select_tasks"]


@dataclass(frozen=True)
class Share:
    """This process's tasks of a batch, if it drew only these."""

    stack: Episodes
    of: int
    """The number of tasks of all processes."""


def read_stacks(batch: Batch | Share) -> list[Episodes]:
    """Return this process's tasks of a batch, in the form of `read_episodes`."""
    return [batch.stack] if isinstance(batch, Share) else read_episodes(batch)


class BatchSplit:
    """Computes meta-gradients of whole batches from the shares of all processes."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._log_names: tuple[str, ...] = ()
        self._zeros: Tensor | None = None
        """The addend of a process without a share to the first sum; unknown before the first gradient."""

    def gradient(
        self,
        meta: Mapping[str, Tensor],
        batches: Sequence[Episodes],
        compute: Callable[[Sequence[Episodes], int], Gradient],
        of: int | None = None,
    ) -> Gradient:
        """Compute the mean meta-gradient of all tasks, or that of each, with the same bits in every process.

        Args:
            meta: every meta-parameter.
            batches: all tasks of the batch, the same in every process, or this process's share.
            compute: computes the meta-gradient of some tasks, given the number of the first in the batch.
            of: the number of tasks of the batch, if `batches` is a share.

        Raises:
            UsageError: there are fewer tasks than processes.
            LostProcessError: a process no longer answers.
        """
        if self.processes.size == 1:
            return compute(batches, 0)
        tasks = sum(len(batch) for batch in batches) if of is None else of
        self.processes.check_batch(tasks)
        share = self.processes.share(tasks)
        mine = select_tasks(batches, share) if of is None else batches
        own = self._compute_share(lambda: compute(mine, share.start))
        weight, dtype = len(share) / tasks, own.loss.dtype
        grads, logs = [own.grads[name] for name in meta], [own.logs[name] for name in self._log_names]
        if own.loss.dim() == 0:
            *sums, loss = self._sum([*logs, *grads, own.loss], dtype, weight)
        else:
            # This sum comes first and has a fixed size, so that a failed process can take part whatever the batch's
            # size.
            sums = self._sum(logs, dtype, weight)
            *rows, loss = self._sum([_place(value, share, tasks) for value in [*grads, own.loss]], dtype)
            sums += rows
        means = dict(zip(self._log_names, sums, strict=False))
        gradient = Gradient(dict(zip(meta, sums[len(means) :], strict=True)), loss, means)
        return gradient if loss.dim() else gradient.with_grads(gradient.grads)

    def _compute_share(self, compute: Callable[[], Gradient]) -> Gradient:
        """Compute the gradient of this process's tasks; raise an error of any process in all of them."""
        if self._zeros is None:
            own = self.processes.each(compute)
            self._log_names = tuple(name for name in own.logs if name != "grad_norm")
            return own
        try:
            return compute()
        except Exception as error:
            self.fail(error)

    def _sum(self, values: Sequence[Tensor], dtype: torch.dtype, weight: float = 1.0) -> list[Tensor]:
        """Return weighted sums over the processes; raise an error in all of them if one has failed."""
        flat = torch.cat([value.reshape(-1).to(dtype) for value in values])
        if self._zeros is None:
            self._zeros = torch.zeros_like(flat)
        total, failed = self.processes.sum(flat * weight, failed=False)
        if failed:
            self.processes.each(lambda: None)
        parts = total.split([value.numel() for value in values])
        return [part.view_as(value) for part, value in zip(parts, values, strict=True)]

    def fail(self, error: Exception) -> NoReturn:
        """Raise an error here, and in the other processes, which wait for this one's share of a batch."""

        def raise_error() -> NoReturn:
            raise error

        if self._zeros is not None and self.processes.size > 1:
            self.processes.sum(self._zeros, failed=True)
        self.processes.each(raise_error)
        raise error


def _place(values: Tensor, share: range, tasks: int) -> Tensor:
    """Place the values of some tasks at their positions among all tasks, with zeros elsewhere."""
    placed = values.new_zeros(tasks, *values.shape[1:])
    placed[share.start : share.stop] = values
    return placed


def select_tasks(batches: Sequence[Episodes], which: range) -> list[Episodes]:
    """Select consecutive tasks, numbered through the stacks."""
    chosen, first = [], 0
    for batch in batches:
        start, stop = max(which.start - first, 0), min(which.stop - first, len(batch))
        if start < stop:
            chosen.append(batch if stop - start == len(batch) else batch[start:stop])
        first += len(batch)
    return chosen


def check_same_bits(processes: Processes, tensors: Mapping[str, Tensor], training_step: int) -> None:
    """Check that all processes have the same meta-parameters.

    Raises:
        MetaregError: they differ.
    """
    if processes.size > 1 and len(set(processes.gather(lambda: hash_tensors(tensors)))) > 1:
        raise MetaregError(
            f"After step {training_step}, the processes have different meta-parameters: their machines or versions "
            "differ, or a plugin draws its own random numbers."
        )


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of every bit of some tensors."""
    whole = hashlib.sha256()
    for value in tensors.values():
        whole.update(value.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return whole.hexdigest()
