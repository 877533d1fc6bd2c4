"""What the functions of one task are given: its data, its meta-parameters, and where the inner loop stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from metareg.util.torch_internals import tree_map

__all__ = ["Adaptation", "Task", "TaskContext", "TaskOptions", "Tensors"]

Tensors = dict[str, Tensor]
Task = tuple[Any, Tensor, Any, Any]
"""Support inputs and targets, query inputs and targets; the last two may be None where a task is only adapted to."""


class TaskOptions(Protocol):
    """The options of a learner that decide what happens in one task; `first_order` as in Finn et al. (2017), §5.2."""

    @property
    def inner_steps(self) -> int: ...

    @property
    def first_order(self) -> bool: ...

    @property
    def memory(self) -> Literal["store", "recompute"]: ...

    @property
    def bn_statistics(self) -> Literal["transductive", "support"]: ...

    @property
    def precision(self) -> Literal["full", "bf16"]: ...


@dataclass(frozen=True)
class TaskContext:
    """One task at some values of the meta-parameters: all that the inner steps and the outer loss need."""

    meta: Tensors
    """Every meta-parameter by name."""
    support_x: Any
    """Inputs ``[examples, …]`` in the precision that the model runs in."""
    support_y: Tensor
    query_x: Any
    query_y: Tensor
    noise: Mapping[str, Any]
    """What each plugin drew for the task."""
    weights: Tensor | None
    """Of the query loss after each inner step ``[inner_steps]``; None for that after the last step alone."""
    features: tuple[Tensor, ...] = ()
    """Of the support set, and of the query set where they are known, if only the head adapts; they depend on `meta`."""

    def detach(self) -> TaskContext:
        """The same values as constants."""
        meta, features = tree_map(Tensor.detach, (self.meta, self.features))
        return replace(self, meta=meta, features=features)


class Adaptation(NamedTuple):
    """Where the inner loop of a task stands."""

    params: Tensors
    """The adapted parameters by name."""
    state: Any
    """What the algorithm keeps from step to step, a pytree of tensors."""
    start: Tensors
    """The adapted parameters before the first step; empty where no plugin asks for them."""
