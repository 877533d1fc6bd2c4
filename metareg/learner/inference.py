"""What a learner does beside training, without augmenters: adapt to one task, score many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metareg.contract.episodes import Episodes
from metareg.engine.objective import TaskFunctions
from metareg.errors import UsageError
from metareg.learner.batch_runner import BatchRunner
from metareg.learner.batch_split import select_tasks
from metareg.learner.meta_parameters import MetaParameters
from metareg.registry.sources import TaskSource
from metareg.util.torch_internals import tree_map

__all__ = ["adapt_model", "score_tasks", "sort_inner_steps"]

_BLOCK = 100
"""Tasks that are drawn at once, and vectorized at once unless `chunk` says fewer."""


def adapt_model(functions: TaskFunctions, meta: MetaParameters, x: Any, y: Tensor, steps: int) -> nn.Module:
    """An ordinary module that is adapted to one task, as `MetaLearner.adapt` says, by functions without augmenters."""
    if steps < 0:
        raise UsageError(f"The number of inner steps cannot be negative; got {steps}.")
    x, y = tree_map(lambda leaf: leaf[None], (x, y))
    episodes = meta.match(Episodes(x, y, x, y))  # nobody looks at the query set
    meta.prepare(episodes)
    task = tree_map(lambda leaf: leaf[0], episodes.parts)
    plain = meta.select_plain()
    with torch.no_grad():
        adapted = functions.adapt(functions.prepare(plain, task), steps)
    return functions.model.adapted_module({**plain, **adapted}, task[0] if functions.support_statistics else None)


def sort_inner_steps(inner_steps: Sequence[int], tasks: int) -> tuple[int, ...]:
    """The numbers of inner steps of an evaluation, each once.

    Raises:
        UsageError: there is none, or a negative one, or fewer than two tasks.
    """
    wanted = tuple(sorted(set(inner_steps)))
    if tasks < 2 or not wanted or wanted[0] < 0:
        raise UsageError(
            f"An evaluation needs at least 2 tasks and numbers of inner steps of 0 or more; got {tasks} tasks and "
            f"inner steps {list(inner_steps)}."
        )
    return wanted


def score_tasks(
    runner: BatchRunner,
    meta: MetaParameters,
    source: TaskSource,
    split: str,
    tasks: int,
    seed: int,
    inner_steps: tuple[int, ...],
) -> Tensor:
    """The metric of the first tasks of a split ``[tasks, len(inner_steps)]``, in their order, the same in all processes.

    Args:
        runner: computes the scores of this process's share.
        meta: the meta-parameters.
        source: where the tasks come from.
        split: which of its splits.
        tasks: how many.
        seed: fixes the tasks.
        inner_steps: ascending.
    """
    processes = runner.split.processes

    def score_block(indices: range) -> tuple[list[int], list[Tensor]]:
        """Where in `indices` each task stands, and the scores of this process's share of them."""
        stacks, positions = source.placed_episodes(split, indices, seed)
        meta.prepare(stacks[0])  # also where none of the tasks are this process's
        share = select_tasks(stacks, processes.share(len(indices)))
        plain = meta.select_plain()
        return positions, [runner.compute_scores(plain, stack, inner_steps, source.stackable) for stack in share]

    blocks = [range(start, min(start + _BLOCK, tasks)) for start in range(0, tasks, _BLOCK)]
    shares = processes.gather(lambda: [score_block(indices) for indices in blocks])
    ordered = []
    for parts in zip(*shares, strict=True):  # of one block, from each process
        positions = torch.tensor(parts[0][0])
        ordered.append(torch.cat([row for _, rows in parts for row in rows])[positions.argsort()])
    return torch.cat(ordered)
