"""A compiled program that takes many training steps without returning to Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from metareg.contract.episodes import Episodes
from metareg.engine.agreement import compare
from metareg.engine.context import Task, Tensors
from metareg.engine.products import simplify_products
from metareg.engine.python_state import PythonState
from metareg.engine.shared_graphs import SHARED
from metareg.engine.tracing import Description, create_graph, lift_factors, prepare_to_trace
from metareg.util.compiler import compile_graph
from metareg.util.imports import collect_no_garbage
from metareg.util.layout import copy_contiguous
from metareg.util.torch_internals import create_loop, import_compiler, trace, tree_flatten, tree_unflatten

__all__ = ["Batches", "OuterUpdate", "StepLoop", "Steps", "divide", "join"]


@dataclass(frozen=True)
class OuterUpdate:
    """The update of the meta-parameters as a function of tensors."""

    function: Callable[[Tensor, Tensor, Sequence[Tensor], Tensor], list[Tensor]]
    """Given all meta-parameters ``[numbers]``, their gradient ``[numbers]``, the optimiser's state and the step's factors,
    returns the meta-parameters and the state after the step; pure."""
    identity: Hashable
    """Equal for equal functions."""
    state: Sequence[Tensor]
    """The optimiser's state."""
    factors: Tensor
    """The numbers that the update for each of the `Batches` needs, such as the learning rate ``[batches, factors]``."""


@dataclass(frozen=True)
class Batches:
    """Batches of equal shapes, and a range of them to train on."""

    stack: Episodes
    """The tasks of all batches ``[batches · tasks, …]``."""
    tasks: int
    """Tasks per batch."""
    which: range
    """The batches of the steps, one per step."""

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, some: slice) -> Batches:
        return Batches(self.stack, self.tasks, self.which[some])

    def first(self) -> Episodes:
        """The batch of the first step."""
        return self.stack[self.which[0] * self.tasks : (self.which[0] + 1) * self.tasks]


@dataclass(frozen=True)
class Steps:
    """The result of some training steps."""

    meta: Tensors
    """The meta-parameters after them."""
    state: list[Tensor]
    """The optimiser's state after them."""
    scalars: list[Tensor]
    """The function's scalars, each ``[steps]``."""
    grads: Tensors
    """The gradient of the last step, or of a step that was not taken because one of its scalars is not finite."""


@dataclass(frozen=True)
class _Compiled:
    """What is compiled, which learners that differ only by seed can share."""

    program: Callable[..., list[Tensor]]
    scalars: Sequence[torch.dtype]
    """The types of the scalars."""
    factors: Sequence[Tensor]
    """Constants of the function that are inputs of the program."""


@dataclass(frozen=True)
class _First:
    """The first step that a program takes."""

    meta: Tensors
    batch: int
    """Its batch among those of `stacks`."""
    stacks: Sequence[Tensor]
    """The parts of all batches ``[batches, tasks, …]``."""
    structure: Any
    """That of the parts."""
    update: OuterUpdate
    expected: Sequence[Tensor]
    """What the function returns for the step."""
    checked: Sequence[int]
    """The positions of the scalars that must be finite."""


class StepLoop:
    """A compiled loop over training steps, for one set of shapes.

    The loop stops before a step whose objective or gradient is not finite. The result does not depend on how the steps
    are divided into calls, bit for bit.

    In the program, all meta-parameters are one vector, which one kernel updates, as are their gradient and the optimiser's
    moments. Allocating a tensor for each parameter would take a third of a small model's step.

    Args:
        function: returns the gradients in the order of the meta-parameters, then scalars, and describes them, given
            ``(meta, tasks)``; pure.
        find_checked: returns the positions of the scalars that must be finite, given their description.
        reads: functions, objects and modules of the user whose variables the function reads.
        identity: a description of everything else that the function is traced from; loops with equal ones share their
            program. None if it is not shared.
    """

    def __init__(
        self,
        function: Callable[[Tensors, Task], tuple[list[Tensor], Description]],
        find_checked: Callable[[Any], Sequence[int]],
        reads: Sequence[Any],
        identity: Hashable | None,
    ) -> None:
        self._function = function
        self._find_checked = find_checked
        self._state = PythonState(*reads)
        self._identity = identity
        self._compiled: _Compiled | None = None
        self._description: Any = None
        """The function's of its scalars."""
        self._key: Any = None

    def fits(self, batches: Batches) -> bool:
        """Return whether the program, if any, fits these batches, and no variable that it reads has changed."""
        known = self._key is None or self._key == _describe(batches)
        return known and next(self._state.find_changes(), None) is None

    def __call__(self, meta: Tensors, batches: Batches, update: OuterUpdate) -> tuple[Steps, Any]:
        """Take the steps, of which there must be at least one; return their results, and the description of the scalars.

        Raises:
            RuntimeError: the program and the function compute different values.
        """
        leaves, structure = tree_flatten(batches.stack.parts)
        stacks = [leaf.unflatten(0, (-1, batches.tasks)) for leaf in leaves]
        with torch.no_grad():
            if self._compiled is None:
                with collect_no_garbage():
                    import_compiler()
                self._compiled = self._prepare(meta, batches, stacks, structure, update)
                self._key = _describe(batches)
            return self._run(self._compiled, meta, batches.which, stacks, update), self._description

    def _run(
        self, compiled: _Compiled, meta: Tensors, which: range, stacks: Sequence[Tensor], update: OuterUpdate
    ) -> Steps:
        carried = _carry(meta, which.start, update, len(compiled.scalars))
        next_batch, _, table, gradient, vector, *state = compiled.program(
            *carried, torch.tensor(which.stop), update.factors, *stacks, *compiled.factors
        )
        columns = zip(table[which.start : int(next_batch)].unbind(1), compiled.scalars, strict=True)
        scalars = [column.to(dtype) for column, dtype in columns]
        return Steps(copy_contiguous(divide(vector, meta)), state, scalars, divide(gradient, meta))

    def _prepare(
        self, meta: Tensors, batches: Batches, stacks: Sequence[Tensor], structure: Any, update: OuterUpdate
    ) -> _Compiled:
        """Find a shared program or compile one, and check that its first step is the function's."""
        number = batches.which[0]
        tasks = tree_unflatten([stack[number] for stack in stacks], structure)
        expected, (_, self._description) = self._function(meta, tasks)
        checked = self._find_checked(self._description)
        first = _First(meta, number, stacks, structure, update, expected, checked)
        names = tuple((name, value.shape, value.dtype) for name, value in meta.items())
        key = self._identity, update.identity, names, _describe(batches)
        shared = None if self._identity is None else SHARED.find(key)
        if shared is not None and self._find_difference(shared, first, close=True) is None:
            return shared
        with prepare_to_trace():
            compiled, graph = self._compile(first)
        difference = self._find_difference(compiled, first)
        if difference is not None:
            raise RuntimeError(f"the compiled values are not those of the function: {difference}")
        if self._identity is not None:
            SHARED.add(key, graph, compiled, self._state)
        return compiled

    def _compile(self, first: _First) -> tuple[_Compiled, torch.fx.GraphModule]:
        """Return a program for such steps, and the graph of one of them."""
        meta, update = first.meta, first.update
        count, states = len(meta), len(update.state)

        def take_step(number: Tensor, _: Tensor, table: Tensor, __: Tensor, *leaves: Tensor) -> list[Tensor]:
            """Return the loop's state after the step on a batch."""
            before, given = leaves[: 1 + states], leaves[2 + states :]
            factors, *parts = (torch.index_select(each, 0, number.view(1)).squeeze(0) for each in given)
            vector, *state = before
            values = self._function(divide(vector, meta), tree_unflatten(parts, first.structure))[0]
            gradient, scalars = join(values[:count]), values[count:]
            is_finite = reduce(torch.logical_and, [scalars[position].isfinite() for position in first.checked])
            row = torch.stack([scalar.double() for scalar in scalars])
            pairs = zip(update.function(vector, gradient, state, factors), before, strict=True)
            kept = [torch.where(is_finite, value, old) for value, old in pairs]
            return [number + 1, is_finite, table.index_copy(0, number.view(1), row[None]), gradient, *kept]

        def goes_on(number: Tensor, is_finite: Tensor, _: Tensor, __: Tensor, *leaves: Tensor) -> Tensor:
            return (number < leaves[1 + states]) & is_finite

        scalars = [scalar.dtype for scalar in first.expected[count:]]
        carried = _carry(meta, first.batch, update, len(scalars))
        inputs = [*carried, torch.tensor(first.batch), update.factors, *first.stacks]
        body = create_graph(take_step, inputs)
        simplify_products(body)
        factors = lift_factors(body)
        inputs += factors
        loop = create_loop(trace(goes_on, inputs), body, len(carried))
        return _Compiled(compile_graph(loop, inputs), scalars, factors), body

    def _find_difference(self, compiled: _Compiled, first: _First, *, close: bool = False) -> str | None:
        """Describe how a program's first step differs from what the function returns; None if they agree."""
        which, update, count = range(first.batch, first.batch + 1), first.update, len(first.meta)
        found = self._run(compiled, first.meta, which, first.stacks, update)
        difference = compare(list(found.grads.values()), first.expected[:count], close=close)
        if difference is None and all(bool(each.isfinite()) for each in first.expected[count:]):
            # An optimiser such as Adam turns rounding errors of tiny gradients into full steps: compare updates for the
            # same gradient.
            gradient, factors = join(found.grads.values()), update.factors[first.batch]
            after = update.function(join(first.meta.values()), gradient, update.state, factors)
            pairs = zip([join(found.meta.values()), *found.state], after, strict=True)
            difference = next(filter(None, (compare([one], [other]) for one, other in pairs)), None)
        return difference


def _carry(meta: Tensors, batch: int, update: OuterUpdate, scalars: int) -> list[Tensor]:
    """Return a loop's initial state: the number of the batch, whether the last step was finite, the scalars of every step
    ``[batches, scalars]``, the last gradient, the meta-parameters and the optimiser's state."""
    vector = join(meta.values())
    # Double precision holds a scalar of any type.
    table = torch.zeros(len(update.factors), scalars, dtype=torch.float64)
    return [
        torch.tensor(batch), torch.ones((), dtype=torch.bool), table, torch.zeros_like(vector), vector, *update.state
    ]  # fmt: skip


def join(tensors: Iterable[Tensor]) -> Tensor:
    """Join the numbers of some tensors, in order, to one vector ``[numbers]``."""
    return torch.cat([value.reshape(-1) for value in tensors])


def divide(vector: Tensor, like: Tensors) -> Tensors:
    """Divide a vector from `join` into views of it with the names and shapes of `like`."""
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def _describe(batches: Batches) -> Hashable:
    leaves, structure = tree_flatten(batches.stack.parts)
    return batches.tasks, str(structure), tuple((leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves)
