"""The arguments of the functions of one task: its data, its meta-parameters, and the state of the inner loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from metareg.util.torch_internals import tree_map

__all__ = ["Adaptation", "Task", "TaskContext", "TaskOptions", "Tensors"]

Tensors = dict[str, Tensor]
Task = tuple[Any, Tensor, Any, Any]
"""Support inputs and targets, query inputs and targets; the last two can be None for adaptation without a query set."""


class TaskOptions(Protocol):
    """The options of a learner that apply to one task; `first_order` as in Finn et al. (2017), §5.2."""

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
    """One task with values of the meta-parameters: everything that the inner steps and the outer loss need."""

    meta: Tensors
    """Every meta-parameter by name."""
    support_x: Any
    """Inputs ``[examples, …]`` in the precision that the model runs in."""
    support_y: Tensor
    query_x: Any
    query_y: Tensor
    noise: Mapping[str, Any]
    """The noise that each plugin drew for the task."""
    weights: Tensor | None
    """Weights of the query loss after each inner step ``[inner_steps]``; None if only the last step counts."""
    features: tuple[Tensor, ...] = ()
    """Features of the support set and, if known, of the query set, if only the head adapts; they depend on `meta`."""

    def detach(self) -> TaskContext:
        """Return the context with detached tensors."""
        meta, features = tree_map(Tensor.detach, (self.meta, self.features))
        return replace(self, meta=meta, features=features)


class Adaptation(NamedTuple):
    """The state of a task's inner loop."""

    params: Tensors
    """The adapted parameters by name."""
    state: Any
    """The algorithm's state between steps, a pytree of tensors."""
    start: Tensors
    """The adapted parameters before the first step; empty if no plugin needs them."""
