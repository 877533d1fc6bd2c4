"""A user's own tasks: iterables of batches, such as a DataLoader, and functions that return them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from metareg.contract.episodes import Episodes, read_episodes
from metareg.contract.splits import TRAIN, VALIDATION, find_split
from metareg.errors import UsageError
from metareg.printable import format_count
from metareg.registry.plugins import Plugin
from metareg.util.seeding import SeparateGenerators, derive_seed
from metareg.util.torch_internals import tree_leaves

__all__ = ["EpisodeFunction", "EpisodeStreams", "is_same", "wrap_tasks"]

_ARGUMENTS = ("split", "indices", "seed")
_END = object()


def wrap_tasks(given: Any) -> Any:
    """Wrap a source of tasks in an object with a method `episodes`; return such objects, names and classes unchanged.

    Args:
        given: a function ``f(split, indices, seed)`` that returns Episodes; a function ``f(split, seed)`` that returns
            or yields batches; an iterable of batches, such as a list or a `torch.utils.data.DataLoader`; or a mapping
            from splits to such iterables. A batch is anything that `metareg.contract.episodes.read_episodes` accepts.
            Functions can omit some of these arguments.

    Raises:
        UsageError: `given` is an iterator, which can be used only once, or a mapping without splits.
    """
    if isinstance(given, str | type | Plugin) or hasattr(given, "episodes"):
        return given
    if inspect.isroutine(given):
        names = inspect.signature(given).parameters
        unknown = [name for name, each in names.items() if name not in _ARGUMENTS and each.default is each.empty]
        if unknown:
            raise UsageError(
                f"The function {given.__name__} takes '{unknown[0]}'; a source of tasks takes (split, indices, seed) and "
                "returns Episodes, or (split, seed) and returns an iterable of them."
            )
        if "indices" in names:
            return EpisodeFunction(given)
        return EpisodeStreams(
            given.__name__, lambda split, seed: _call(given, split=split, seed=seed), "split" in names
        )
    if isinstance(given, Mapping):
        return _wrap_mapping(given)
    if isinstance(given, Iterator):
        raise UsageError(
            f"A {type(given).__name__} can be iterated only once, but a reproducible training must restart it: pass "
            "the function that creates it, or a list."
        )
    if isinstance(given, Iterable):
        return EpisodeStreams(type(given).__name__.lower(), lambda split, seed: given, False)  # noqa: ARG005
    return given


def _wrap_mapping(given: Mapping[Any, Any]) -> EpisodeStreams:
    named = {find_split(str(name)): each for name, each in given.items()}
    if None in named or len(named) < len(given):
        raise UsageError(
            f"A mapping of tasks has the keys train, validation and test, once each; this one has "
            f"{', '.join(map(str, given)) or 'none'}."
        )
    for split, each in given.items():
        if isinstance(each, Iterator) or not isinstance(each, Iterable):
            raise UsageError(
                f"The {split} tasks are a {type(each).__name__}; each split takes an iterable that can be iterated "
                "repeatedly, such as a list or a DataLoader."
            )

    def get(split: str, seed: int) -> Iterable[Any]:  # noqa: ARG001
        if split not in named:
            raise UsageError(f"The mapping of tasks has no '{split}': it has {', '.join(map(str, given))}.")
        return named[split]

    kinds = {type(each).__name__.lower() for each in given.values()}
    return EpisodeStreams(kinds.pop() if len(kinds) == 1 else "tasks", get, True)


def _call(function: Callable[..., Any], **available: Any) -> Any:
    wanted = inspect.signature(function).parameters
    return function(**{name: value for name, value in available.items() if name in wanted})


class EpisodeFunction:
    """A source of tasks that calls a function of the tasks' numbers."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        self.episodes = function


class EpisodeStreams:
    """A source of tasks from one iterable per split; task n is the n-th that the iterable yields.

    While an iterable runs, the global generators of Python, NumPy and torch, and a DataLoader's own generators, are
    seeded by the seed, the split and the number of the pass, so that shuffling is reproducible. Training tasks restart
    when the iterable ends; those of other splits do not.

    Args:
        name: the name in messages.
        get: returns the iterable of a split.
        has_splits: whether the splits differ.
    """

    def __init__(self, name: str, get: Callable[[str, int], Iterable[Any]], has_splits: bool) -> None:
        self.name = name
        self.has_splits = has_splits
        self._get = get
        self._streams: dict[tuple[str, int], _Stream] = {}

    def episodes(self, split: str, indices: Sequence[int], seed: int) -> list[Episodes]:
        """Return the tasks with these numbers, as stacks of equal sizes."""
        key = (split, seed)
        if key not in self._streams:
            self._streams[key] = _Stream(self.name, split, seed, lambda: self._get(split, seed))
        return self._streams[key].read(indices)

    def begin_anew(self) -> None:
        """Restart every iterable from its beginning."""
        for stream in self._streams.values():
            stream.begin()


class _Stream:
    """The tasks of one split in order; keeps the last ones that were requested."""

    def __init__(self, name: str, split: str, seed: int, get: Callable[[], Iterable[Any]]) -> None:
        self._name, self._split, self._seed, self._get = name, split, seed, get
        self._start: list[torch.Tensor] | None = None
        self.begin()

    def begin(self) -> None:
        self._first = 0
        self._tasks: list[tuple[Any, ...]] = []
        self._drawn = self._draw()

    def read(self, indices: Sequence[int]) -> list[Episodes]:
        low, high = min(indices), max(indices)
        if low < self._first:
            self.begin()
        while self._first + len(self._tasks) <= high:
            task = next(self._drawn, None)
            if task is None:
                count = self._first + len(self._tasks)
                raise UsageError(
                    f"'{self._name}' has {format_count(count, f'{self._split} task')}, but at least {high + 1} are needed; "
                    f"lower {'eval_tasks' if self._split == VALIDATION else 'test_tasks'}, or add tasks."
                )
            self._check_start(task)
            self._tasks.append(task)
        del self._tasks[: low - self._first]
        self._first = low
        return Episodes.group([self._tasks[index - low] for index in indices])

    def _check_start(self, task: tuple[Any, ...]) -> None:
        """Remember the first task, and refuse a different one after a restart."""
        if self._first or self._tasks:
            return
        leaves = tree_leaves(task)
        if self._start is None:
            self._start = [leaf.clone() for leaf in leaves]
        elif len(leaves) != len(self._start) or not all(map(is_same, leaves, self._start)):
            raise UsageError(
                f"'{self._name}' yields different {self._split} tasks on each pass, which makes runs irreproducible: "
                "draw from torch's, NumPy's or Python's global generators, which metareg seeds, or create a seeded "
                "generator on each pass."
            )

    def _draw(self) -> Iterator[tuple[Any, ...]]:
        """Yield the tasks of all passes."""
        number, found = 0, True
        while found:
            found = False
            for batch in self._go_through(number):
                for stack in read_episodes(batch):
                    for position in range(len(stack)):
                        found = True
                        yield stack.unstack(position)
            if self._split != TRAIN:
                return
            number += 1
        raise UsageError(f"'{self._name}' yields no {self._split} tasks.")

    def _go_through(self, number: int) -> Iterator[Any]:
        """Yield the batches of one pass, with generators seeded for it."""
        generators = SeparateGenerators(derive_seed(self._seed, "own tasks", self._split, number))
        with generators.use():
            iterable = self._get()
            generators.add(_list_generators(iterable))
            batches = iter(iterable)
        while True:
            with generators.use():
                batch = next(batches, _END)
            if batch is _END:
                return
            yield batch


def _list_generators(iterable: Any) -> list[torch.Generator]:
    """List the generators of a DataLoader and its sampler."""
    parts = iterable, getattr(iterable, "sampler", None), getattr(iterable, "batch_sampler", None)
    found = {id(each): each for each in (getattr(part, "generator", None) for part in parts)}
    return [each for each in found.values() if isinstance(each, torch.Generator)]


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have equal values, where NaN equals NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a != a)).all())
