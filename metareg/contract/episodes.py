"""Batches of tasks: support and query examples, stacked along a leading task dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metareg.errors import UsageError
from metareg.printable import format_count
from metareg.util.layout import settle_layout
from metareg.util.torch_internals import map_tree, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["Batch", "Episodes", "convert_arrays", "read_episodes"]

_PARTS = ("support_x", "support_y", "query_x", "query_y")


@dataclass(frozen=True, eq=False, repr=False)
class Episodes:
    """A stack of tasks of equal sizes, each with its support and query set.

    Args:
        support_x: inputs ``[tasks, support, …]``; a tensor, or a pytree of tensors with these leading dimensions (a
            graph task's may be ``[tasks, …]``). NumPy arrays and pandas frames are accepted as tensors, here and below.
        support_y: targets ``[tasks, support]`` (class numbers, which become int64) or ``[tasks, support, outputs]``
            (numbers, or probabilities of the classes).
        query_x: inputs ``[tasks, query, …]``.
        query_y: targets ``[tasks, query]`` or ``[tasks, query, outputs]``.

    Raises:
        UsageError: the parts' shapes do not match.
    """

    support_x: Any
    support_y: Tensor
    query_x: Any
    query_y: Tensor
    positions: tuple[int, ...] | None = field(default=None, init=False, repr=False)
    """The tasks' positions in the request to the source; None if unknown."""

    def __post_init__(self) -> None:
        tasks: int | None = None
        for name in _PARTS:
            if not isinstance(getattr(self, name), Tensor):
                object.__setattr__(self, name, convert_arrays(getattr(self, name), f"Episodes: {name}"))
            leaves = tree_leaves(getattr(self, name))
            if not leaves:
                raise UsageError(f"Episodes: {name} contains no tensor.")
            for leaf in leaves:
                if leaf.dim() == 0:
                    raise UsageError(f"Episodes: {name} must have a leading task dimension; it is a scalar.")
                tasks = leaf.shape[0] if tasks is None else tasks
                if leaf.shape[0] != tasks:
                    raise UsageError(
                        f"Episodes: {name} holds {format_count(leaf.shape[0], 'task')} where support_x holds {tasks}; "
                        "every part has the shape [tasks, examples, …]."
                    )
        if not tasks:
            raise UsageError("Episodes: there must be at least one task.")
        for name in ("support_y", "query_y"):
            y = getattr(self, name)
            if not isinstance(y, Tensor):
                raise UsageError(f"Episodes: {name} must be a tensor, not {type(y).__name__}.")
            if y.dim() < 2 or y.shape[1] == 0:
                raise UsageError(
                    f"Episodes: {name} has the shape {tuple(y.shape)}; it must be [tasks, examples, …] with at least "
                    "one example per task."
                )
            if y.dtype != torch.int64 and not y.is_floating_point() and not y.is_complex():
                object.__setattr__(self, name, y.long())
        for part in ("support", "query"):
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            if isinstance(x, Tensor) and x.shape[1:2] != y.shape[1:2]:
                raise UsageError(
                    f"Episodes: {part}_x has the shape {tuple(x.shape)} and {part}_y {tuple(y.shape)}; their second "
                    "dimension, the number of examples, must be the same."
                )

    @classmethod
    def group(cls, tasks: Sequence[tuple[Any, Tensor, Any, Tensor]]) -> list[Episodes]:
        """Stack tasks of any sizes: one `Episodes` per set of shapes, in the order of first appearance.

        Args:
            tasks: ``(support_x, support_y, query_x, query_y)`` of each task, without the task dimension.

        Returns:
            The stacks, each with the positions of its tasks in `tasks`.
        """
        tasks = [convert_arrays(tuple(task), "A task") for task in tasks]
        groups: dict[Any, list[int]] = {}
        for position, task in enumerate(tasks):
            leaves, structure = tree_flatten(tuple(task))
            groups.setdefault((tuple(leaf.shape for leaf in leaves), str(structure)), []).append(position)
        return [
            cls(*stack_trees([tuple(tasks[position]) for position in members])).placed(members)
            for members in groups.values()
        ]

    @property
    def parts(self) -> tuple[Any, Tensor, Any, Tensor]:
        """``(support_x, support_y, query_x, query_y)``."""
        return self.support_x, self.support_y, self.query_x, self.query_y

    def __len__(self) -> int:
        return self.support_y.shape[0]

    def __repr__(self) -> str:
        support, query = (
            f"{_describe_inputs(x)} → {_describe_tensor(y)}"
            for x, y in ((self.support_x, self.support_y), (self.query_x, self.query_y))
        )
        return f"<Episodes: {format_count(len(self), 'task')}; support {support}, query {query}>"

    def __getitem__(self, which: slice) -> Episodes:
        """Return a slice of the tasks."""
        some = self._map(lambda leaf: leaf[which])
        return some if self.positions is None else some.placed(self.positions[which])

    def unstack(self, number: int) -> tuple[Any, Tensor, Any, Tensor]:
        """Return task `number`, from 0, as ``(support_x, support_y, query_x, query_y)`` without the task dimension."""
        return tree_map(lambda leaf: leaf[number], self.parts)

    def placed(self, positions: Sequence[int]) -> Episodes:
        """Mark the tasks with their positions in a request to a source.

        A source that returns several stacks uses this to tell which tasks they contain; `group` does it too.

        Args:
            positions: one number for each task, counted from 0.

        Raises:
            UsageError: the number of positions differs from the number of tasks.
        """
        if len(positions) != len(self):
            raise UsageError(
                f"Episodes: got {format_count(len(positions), 'position')} for {format_count(len(self), 'task')}."
            )
        return _create_unchecked(self.parts, tuple(positions))

    def chunks(self, size: int | None) -> Iterator[Episodes]:
        """Yield the tasks in order, at most `size` at a time, or all at once if it is None."""
        if size is None or size >= len(self):
            yield self
            return
        leaves, structure = tree_flatten(self.parts)
        for number, parts in enumerate(zip(*(leaf.split(size) for leaf in leaves), strict=True)):
            positions = self.positions and self.positions[number * size : (number + 1) * size]
            yield _create_unchecked(tree_unflatten(parts, structure), positions)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Episodes:
        """Move the tasks to a device, with floating-point tensors as `dtype` if it is given."""

        def move(leaf: Tensor) -> Tensor:
            return leaf.to(device, dtype if dtype is not None and leaf.is_floating_point() else None)

        return self._map(move)

    def contiguous(self) -> Episodes:
        """Return the tasks in contiguous memory; keep channels-last tensors, which suit convolutions and pooling."""
        return self._map(settle_layout)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Episodes:
        """Apply a function to every tensor; it must keep the parts' shapes consistent."""
        return _create_unchecked(
            [function(part) if type(part) is Tensor else tree_map(function, part) for part in self.parts],
            self.positions,
        )


def _create_unchecked(parts: Sequence[Any], positions: tuple[int, ...] | None) -> Episodes:
    """Create Episodes without checks from parts whose shapes are known to match."""
    episodes = object.__new__(Episodes)
    support_x, support_y, query_x, query_y = parts
    episodes.__dict__.update(
        support_x=support_x, support_y=support_y, query_x=query_x, query_y=query_y, positions=positions
    )
    return episodes


def _describe_inputs(x: Any) -> str:
    return _describe_tensor(x) if isinstance(x, Tensor) else format_count(len(tree_leaves(x)), "tensor")


def _describe_tensor(leaf: Tensor) -> str:
    """Describe the shape and type of one task's tensor: ``[10, 1] float32``."""
    return f"{list(leaf.shape[1:])} {str(leaf.dtype).removeprefix('torch.')}"


Batch = Episodes | Sequence[Any] | Mapping[str, Any]
"""The types that `read_episodes` accepts."""


def read_episodes(batch: Batch) -> list[Episodes]:
    """Convert a batch of tasks to a list of stacks.

    Args:
        batch: Episodes, a sequence of them, the four parts of one (tensors, arrays or frames ``[tasks, examples, …]``, as a
            DataLoader stacks them), or a mapping with these under their names.

    Raises:
        UsageError: `batch` is something else.
    """
    if isinstance(batch, Episodes):
        return [batch]
    if isinstance(batch, Mapping) and batch.keys() == set(_PARTS):
        return [Episodes(**batch)]
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        if all(isinstance(each, Episodes) for each in batch):
            return list(batch)
        if len(batch) == len(_PARTS) and not any(isinstance(each, Episodes) for each in batch):
            return [Episodes(*batch)]
    what = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, Sequence | Mapping) else "")
    raise UsageError(
        f"A batch of tasks is Episodes, a list of them, or support_x, support_y, query_x and query_y with the shapes "
        f"[tasks, examples, …]; got {what}."
    )


def stack_trees(trees: Sequence[Any]) -> Any:
    """Stack pytrees of equal structure and shapes along a new first dimension."""
    return map_tree(lambda *leaves: torch.stack(leaves), *trees)


def convert_arrays(tree: Any, what: str) -> Any:
    """Convert NumPy arrays, and pandas frames and columns, in a pytree to tensors.

    Raises:
        UsageError: the tree contains something else.
    """

    def convert(leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            return leaf
        array = leaf.to_numpy() if hasattr(leaf, "to_numpy") else leaf
        if not isinstance(array, np.ndarray):
            raise UsageError(f"{what} must contain tensors or arrays, not {type(leaf).__name__}.")
        if array.dtype.kind not in "biuf":
            raise UsageError(f"{what} contains an array of type {array.dtype} instead of numbers.")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))  # a writable copy

    return tree_map(convert, tree)
