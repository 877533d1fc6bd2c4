"""Where tasks come from: a task plugin, or any object with an `episodes` method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from metareg.contract.episodes import Episodes
from metareg.errors import PluginError, UsageError
from metareg.registry.dispatch import find_hook
from metareg.registry.plugins import Plugin, resolve

__all__ = ["TaskSource"]


class TaskSource:
    """The tasks of a task plugin, by split and number; its `episodes` may also stand without `metareg.hookimpl`."""

    def __init__(self, plugin: Plugin) -> None:
        self.plugin = plugin
        self.stackable: bool = getattr(plugin.instance, "stackable", True)
        self._episodes: Callable[..., Any] = _find_episodes(plugin)

    @classmethod
    def of(cls, source: str | type | object) -> TaskSource:
        """The source that a name, a class or an object stands for."""
        return source if isinstance(source, TaskSource) else cls(resolve("tasks", source))

    def episodes(self, split: str, indices: Sequence[int], seed: int) -> list[Episodes]:
        """The tasks number `indices` of a split, as stacks of equal sizes; several need not be in the order of `indices`."""
        given = self._episodes(split=split, indices=indices, seed=seed)
        batches = [given] if isinstance(given, Episodes) else given
        if not isinstance(batches, list) or not all(isinstance(batch, Episodes) for batch in batches):
            raise PluginError(
                f"The {self.plugin.label} must return Episodes, or a list of them, from episodes(); it returned a "
                f"{type(given).__name__}."
            )
        count = sum(len(batch) for batch in batches)
        if count != len(indices):
            raise PluginError(f"The {self.plugin.label} returned {count} tasks where {len(indices)} were asked for.")
        return [batch for batch in batches if len(batch)]

    def placed_episodes(self, split: str, indices: Sequence[int], seed: int) -> tuple[list[Episodes], list[int]]:
        """`episodes`, and where in `indices` each task stands, counted through the stacks.

        Where several stacks do not say it, their tasks are drawn once more, one by one.
        """
        batches = self.episodes(split, indices, seed)
        if len(batches) == 1 and batches[0].positions is None:
            return batches, list(range(len(indices)))
        positions = [position for batch in batches for position in batch.positions or ()]
        if sorted(positions) != list(range(len(indices))):
            alone = [self.episodes(split, [index], seed)[0] for index in indices]
            batches = Episodes.group([task.unstack(0) for task in alone])
            positions = [position for batch in batches for position in batch.positions or ()]
        return batches, positions


def _find_episodes(plugin: Plugin) -> Callable[..., Any]:
    implementation = find_hook(plugin, "episodes")
    if implementation is not None:
        return implementation
    method = getattr(plugin.instance, "episodes", None)
    if not callable(method):
        raise UsageError(
            f"A task source needs a method episodes(split, indices) that returns Episodes; {plugin.name} has none."
        )
    wanted = [name for name in inspect.signature(method).parameters if name in ("split", "indices", "seed")]
    return lambda **available: method(**{name: available[name] for name in wanted})
