"""A compiled program that takes many training steps without returning to Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metareg.contract.episodes import Episodes
from metareg.engine.agreement import compare
from metareg.engine.context import Task, Tensors
from metareg.engine.python_state import PythonState
from metareg.engine.tracing import TRACING, create_graph, lift_factors
from metareg.util.torch_internals import compile_graph, create_loop, trace, tree_flatten, tree_unflatten

__all__ = ["Batches", "OuterUpdate", "StepLoop", "Steps"]


@dataclass(frozen=True)
class OuterUpdate:
    """The update of the meta-parameters as a function of tensors."""

    function: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Tensor], list[Tensor]]
    """Given the meta-parameters, their gradient, the optimiser's state and the learning rate, returns the meta-parameters
    and the state after the step; pure."""
    state: Sequence[Tensor]
    """The optimiser's state."""
    rates: Tensor
    """The learning rate of each batch of the `Batches` ``[batches]``."""


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
    rows: list[list[Tensor]]
    """The scalars of each step: the objective and the logs."""
    grads: Tensors
    """The gradient of the last step, or of a step that was not taken because a value in its row is not finite."""


class StepLoop:
    """A compiled loop over training steps, for one set of shapes.

    The loop stops before a step whose objective or gradient is not finite. The result does not depend on how the steps
    are divided into calls, bit for bit.

    Args:
        function: returns the gradients in the order of the meta-parameters, then scalars, given ``(meta, tasks)``; pure.
        find_checked: returns the positions of the scalars that must be finite; called after `function`.
        reads: functions, objects and modules of the user whose variables the function reads.
    """

    def __init__(
        self,
        function: Callable[[Tensors, Task], list[Tensor]],
        find_checked: Callable[[], Sequence[int]],
        reads: Sequence[Any],
    ) -> None:
        self._function = function
        self._find_checked = find_checked
        self._state = PythonState(*reads)
        self._program: Callable[..., list[Tensor]] | None = None
        self._buffers: list[Tensor] = []
        """One for each scalar, with its value in every step ``[batches]``."""
        self._factors: list[Tensor] = []
        """Constants of the function that are inputs of the program."""
        self._key: Any = None

    def fits(self, batches: Batches) -> bool:
        """Return whether the program, if any, fits these batches, and no variable that it reads has changed."""
        known = self._key is None or self._key == _describe(batches)
        return known and next(self._state.find_changes(), None) is None

    def __call__(self, meta: Tensors, batches: Batches, update: OuterUpdate) -> Steps:
        """Take the steps, of which there must be at least one.

        Raises:
            RuntimeError: the program and the function compute different values.
        """
        leaves, structure = tree_flatten(batches.stack.parts)
        stacks = [leaf.unflatten(0, (-1, batches.tasks)) for leaf in leaves]
        with torch.no_grad():
            if self._program is None:
                self._compile(meta, batches, stacks, structure, update)
            return self._run(meta, batches.which, stacks, update)

    def _run(self, meta: Tensors, which: range, stacks: Sequence[Tensor], update: OuterUpdate) -> Steps:
        assert self._program is not None
        carried = self._carry(meta, which.start, update)
        next_batch, _, *values = self._program(
            *carried, torch.tensor(which.stop), update.rates, *stacks, *self._factors
        )
        done, count = int(next_batch), len(meta)
        buffers, values = values[: len(self._buffers)], values[len(self._buffers) :]
        rows = [list(row) for row in zip(*(buffer[which.start : done].unbind() for buffer in buffers), strict=True)]
        return Steps(
            dict(zip(meta, values[count:], strict=False)),
            values[2 * count :],
            rows,
            dict(zip(meta, values, strict=False)),
        )

    def _carry(self, meta: Tensors, batch: int, update: OuterUpdate) -> list[Tensor]:
        """Return the loop's initial state: the number of the batch, whether the last step was finite, the scalars of every
        step, the last gradient, the meta-parameters and the optimiser's state."""
        grads = [torch.zeros_like(value) for value in meta.values()]
        start = [torch.tensor(batch), torch.ones((), dtype=torch.bool)]
        return [*start, *self._buffers, *grads, *meta.values(), *update.state]

    def _compile(
        self, meta: Tensors, batches: Batches, stacks: Sequence[Tensor], structure: Any, update: OuterUpdate
    ) -> None:
        names, count, states = tuple(meta), len(meta), len(update.state)

        first = batches.which[0]
        expected = self._function(meta, tree_unflatten([stack[first] for stack in stacks], structure))
        checked = self._find_checked()
        self._buffers = [scalar.new_zeros(len(stacks[0])) for scalar in expected[count:]]
        width = len(self._buffers)
        end = width + 2 * count + states  # of the carried values after the number and the flag

        def take_step(number: Tensor, _: Tensor, *leaves: Tensor) -> list[Tensor]:
            """Return the loop's state after the step on a batch."""
            buffers, before, given = leaves[:width], leaves[width + count : end], leaves[end + 1 :]
            rate, *parts = (torch.index_select(each, 0, number.view(1)).squeeze(0) for each in given)
            params, state = before[:count], before[count:]
            values = self._function(dict(zip(names, params, strict=True)), tree_unflatten(parts, structure))
            grads, scalars = values[:count], values[count:]
            is_finite = torch.stack([scalars[position].isfinite() for position in checked]).all()
            rows = zip(buffers, scalars, strict=True)
            written = [torch.index_copy(buffer, 0, number.view(1), scalar.view(1)) for buffer, scalar in rows]
            pairs = zip(update.function(params, grads, state, rate), before, strict=True)
            kept = [torch.where(is_finite, value, old) for value, old in pairs]
            return [number + 1, is_finite, *written, *grads, *kept]

        def goes_on(number: Tensor, is_finite: Tensor, *leaves: Tensor) -> Tensor:
            return (number < leaves[end]) & is_finite

        carried = self._carry(meta, first, update)
        inputs = [*carried, torch.tensor(first), update.rates, *stacks]
        with TRACING:
            body = create_graph(take_step, inputs)
            self._factors = lift_factors(body)
            inputs += self._factors
            loop = create_loop(trace(goes_on, inputs), body, len(carried))
            self._program = compile_graph(loop, inputs)
        self._check(meta, range(first, first + 1), stacks, update, expected)
        self._key = _describe(batches)

    def _check(
        self, meta: Tensors, which: range, stacks: Sequence[Tensor], update: OuterUpdate, expected: Sequence[Tensor]
    ) -> None:
        """Compare the program's first step with the function.

        Raises:
            RuntimeError: they differ.
        """
        found, count = self._run(meta, which, stacks, update), len(meta)
        difference = compare(list(found.grads.values()), expected[:count])
        if difference is None and all(bool(each.isfinite()) for each in expected[count:]):
            # An optimiser such as Adam turns rounding errors of tiny gradients into full steps: compare updates for the
            # same gradient.
            grads, rate = list(found.grads.values()), update.rates[which.start]
            after = update.function(list(meta.values()), grads, update.state, rate)
            pairs = zip([*found.meta.values(), *found.state], after, strict=True)
            difference = next(filter(None, (compare([one], [other]) for one, other in pairs)), None)
        if difference is not None:
            self._program = None
            raise RuntimeError(f"the compiled values are not those of the function: {difference}")


def _describe(batches: Batches) -> Any:
    leaves, structure = tree_flatten(batches.stack.parts)
    return batches.tasks, str(structure), [(leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves]
