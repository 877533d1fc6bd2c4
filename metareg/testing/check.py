"""A check of a plugin, the plugin under check, and comparisons of computed values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from metareg.contract.episodes import Episodes
from metareg.errors import MetaregError, describe_error
from metareg.registry.dispatch import list_hooks
from metareg.registry.plugins import Plugin, resolve
from metareg.util.seeding import restore_global_generators, save_global_generators
from metareg.util.torch_internals import tree_flatten, tree_map

__all__ = [
    "ROUNDING", "Check", "CheckFailed", "Subject", "are_equal", "difference", "fail", "find_worst",
    "refuse_global_randomness", "snapshot",
]  # fmt: skip

ROUNDING = 1e-9
"""An upper bound of rounding differences in float64 between two orders of summing a few hundred numbers."""


class CheckFailed(AssertionError):
    """A plugin fails a check.

    Args:
        problem: what is wrong, and where.
        remedy: how to fix it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} To fix it: {remedy}")
        self.problem = problem
        self.remedy = remedy


def fail(problem: str, remedy: str) -> NoReturn:
    """Fail a check."""
    raise CheckFailed(problem, remedy)


@dataclass(frozen=True)
class Subject:
    """The plugin under check: its name, class or object, and the options to check it with."""

    kind: str
    plugin: str | type | object
    config: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self, **config: Any) -> Plugin:
        """Build a new instance of the plugin, so that checks do not affect each other."""
        return resolve(self.kind, self.plugin, {**self.config, **config})

    @property
    def label(self) -> str:
        return self.resolve().label

    def attribute(self, attribute: str, default: Any = None) -> Any:
        """Return an attribute of the class, such as ``adapts``."""
        return getattr(self.resolve().instance, attribute, default)

    @property
    def hooks(self) -> list[str]:
        """The hooks that the plugin implements."""
        return list_hooks(type(self.resolve().instance))


@dataclass(frozen=True)
class Check:
    """A check, ready to be called; `str` gives its name, which serves as pytest's id."""

    name: str
    summary: str
    subject: Subject
    function: Callable[[Subject], None]

    def __call__(self) -> None:
        """Run the check.

        Raises:
            CheckFailed: the plugin fails the check.
            MetaregError: the plugin cannot be used at all; the message says why.
        """
        try:
            self.function(self.subject)
        except (CheckFailed, MetaregError):
            raise
        except (Exception, SystemExit) as error:
            problem = f"The check '{self.name}' of {self.subject.label} ended in {describe_error(error)}."
            raise CheckFailed(problem, "follow the traceback to what the plugin returned or raised.") from error

    def problem(self) -> str | None:
        """Run the check and return the problem, or None if the plugin passes."""
        try:
            self()
        except (CheckFailed, MetaregError) as error:
            return str(error)
        return None

    def __str__(self) -> str:
        return self.name


def snapshot(tree: Any) -> Any:
    """Copy a value, so that later in-place changes do not affect it; copy a module's state and episodes' parts."""

    def copy_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        if isinstance(leaf, Episodes):
            return tree_map(copy_leaf, leaf.parts)
        if isinstance(leaf, nn.Module):
            return {name: value.detach().clone() for name, value in leaf.state_dict().items()}
        return leaf

    return tree_map(copy_leaf, tree)


def are_equal(a: Any, b: Any) -> bool:
    """Return whether two pytrees have the same structure and bits."""
    first, structure = tree_flatten(a)
    second, other = tree_flatten(b)
    return structure == other and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or bool(x == y)
        for x, y in zip(first, second, strict=True)
    )


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference between two dicts of tensors, relative to the largest entry, and its name."""
    scale = max(1e-12, *(value.abs().max().item() for value in a.values()))
    return find_worst({name: (a[name] - b[name]).abs().max().item() / scale for name in a})


def find_worst(errors: Mapping[str, float]) -> tuple[float, str]:
    """Return the largest error, or one that is NaN, and its name."""
    name = max(errors, key=lambda each: math.inf if math.isnan(errors[each]) else errors[each])
    return errors[name], name


@contextmanager
def refuse_global_randomness(subject: Subject, remedy: str, where: str = "") -> Iterator[None]:
    """Fail if a block uses the global random generators of Python, NumPy or torch; restore them afterwards."""
    before = save_global_generators()
    try:
        yield
        after = save_global_generators()
    finally:
        restore_global_generators(before)
    moved = [name for name in ("torch", "numpy", "python") if not are_equal(before[name], after[name])]
    if moved:
        fail(f"The {subject.label} changes the global random state of {' and '.join(moved)}{where}.", remedy)
