"""Sources of tasks: task plugins, and objects with an `episodes` method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from metareg.contract.episodes import Episodes
from metareg.errors import PluginError, UsageError
from metareg.printable import format_count
from metareg.registry.dispatch import find_hook
from metareg.registry.own_tasks import EpisodeStreams, is_same, wrap_tasks
from metareg.registry.plugins import Plugin, resolve
from metareg.util.torch_internals import tree_leaves

__all__ = ["TaskSource"]


class TaskSource:
    """The tasks of a plugin or object by split and number; its `episodes` does not need `metareg.hookimpl`."""

    def __init__(self, plugin: Plugin) -> None:
        self.plugin = plugin
        self.stackable: bool = getattr(plugin.instance, "stackable", True)
        self._episodes, self._knows_splits = _find_episodes(plugin)
        self.is_stream = isinstance(plugin.instance, EpisodeStreams)
        """Whether a task can be read only after the ones before it."""
        self.evaluated_split: str | None = None
        """The split of the current or last evaluation; the display resets it to None at the end."""
        self.scored = 0
        """Number of tasks that the current evaluation has finished."""

    @classmethod
    def of(cls, source: str | type | object) -> TaskSource:
        """Create the source for a plugin's name, class or object, or for tasks that `wrap_tasks` accepts."""
        return source if isinstance(source, TaskSource) else cls(resolve("tasks", wrap_tasks(source)))

    def check_repeatable(self, split: str, seed: int) -> None:
        """Draw the first task of a split twice.

        Raises:
            UsageError: they differ, so training could not be repeated or resumed.
        """
        first = tree_leaves(self.episodes(split, [0], seed)[0].parts)
        if self.is_stream:
            self.plugin.instance.begin_anew()
        again = tree_leaves(self.episodes(split, [0], seed)[0].parts)
        if len(first) != len(again) or not all(map(is_same, first, again)):
            raise UsageError(
                f"'{self.plugin.name}' returns a different task each time for the same index, which makes runs "
                "irreproducible: make each task a function of (seed, split, index), for example with "
                "metareg.derive_seed."
            )

    def check_splits(self) -> None:
        """Refuse a source that has the same tasks for training, validation and test.

        Raises:
            UsageError: the source ignores the split.
        """
        if not self._knows_splits:
            raise UsageError(
                f"The tasks of '{self.plugin.name}' are the same for training, validation and test, so a test on them "
                'would be meaningless: use the argument `split`, or pass {"train": …, "validation": …, "test": …}.'
            )

    def episodes(self, split: str, indices: Sequence[int], seed: int) -> list[Episodes]:
        """Return tasks `indices` of a split as stacks of equal sizes, which need not keep the order of `indices`."""
        given = self._episodes(split=split, indices=indices, seed=seed)
        batches = [given] if isinstance(given, Episodes) else given
        if not isinstance(batches, list) or not all(isinstance(batch, Episodes) for batch in batches):
            raise PluginError(
                f"The {self.plugin.label} must return Episodes, or a list of them, from episodes(); it returned a "
                f"{type(given).__name__}."
            )
        count = sum(len(batch) for batch in batches)
        if count != len(indices):
            raise PluginError(
                f"The {self.plugin.label} returned {format_count(count, 'task')} instead of {len(indices)}."
            )
        return [batch for batch in batches if len(batch)]

    def placed_episodes(self, split: str, indices: Sequence[int], seed: int) -> tuple[list[Episodes], list[int]]:
        """Return `episodes`, and the position in `indices` of each task, counted through the stacks.

        If there are several stacks without positions, draws their tasks again, one by one.
        """
        self.evaluated_split, self.scored = split, indices[0]
        batches = self.episodes(split, indices, seed)
        if len(batches) == 1 and batches[0].positions is None:
            return batches, list(range(len(indices)))
        positions = [position for batch in batches for position in batch.positions or ()]
        if sorted(positions) != list(range(len(indices))):
            alone = [self.episodes(split, [index], seed)[0] for index in indices]
            batches = Episodes.group([task.unstack(0) for task in alone])
            positions = [position for batch in batches for position in batch.positions or ()]
        return batches, positions


def _find_episodes(plugin: Plugin) -> tuple[Callable[..., Any], bool]:
    """Return the function that draws a plugin's tasks, and whether it takes their split."""
    implementation = find_hook(plugin, "episodes")
    if implementation is not None:
        return implementation, True
    method = getattr(plugin.instance, "episodes", None)
    if not callable(method):
        raise UsageError(
            f"Tasks come from an object with a method episodes(split, indices) that returns Episodes, from a function with "
            f"these arguments, or from an iterable of batches; '{plugin.name}' is none of these."
        )
    parameters = inspect.signature(method).parameters
    wanted = [name for name in ("split", "indices", "seed") if name in parameters]
    knows_splits = getattr(plugin.instance, "has_splits", "split" in wanted)
    return lambda **available: method(**{name: available[name] for name in wanted}), knows_splits
