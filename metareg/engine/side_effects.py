"""Side effects of a forward pass: writes to tensors and attributes, random draws, and attention.

A learner is a function of its meta-parameters. Writes of its model's forward pass, such as running statistics, the
power iteration of a spectral norm, a counter or a cached mask, are therefore discarded after each call. Every call
starts from the same values, in every strategy, and gradients, evaluation and adaptation do not change the learner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from metareg.engine.python_state import PythonState
from metareg.errors import UsageError
from metareg.util.seeding import restore_global_generators, save_global_generators
from metareg.util.torch_internals import count_writes, tree_leaves

__all__ = ["SideEffects", "call_purely", "observe"]

_ATTENTION = (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.multi_head_attention_forward)
_ATTENTION_LOCK = RLock()
"""Held while attention kernels are selected, because torch's selection is global to the process."""


@dataclass(frozen=True)
class SideEffects:
    """The side effects of a module's forward pass."""

    tensors: tuple[str, ...] = ()
    """The names of the parameters and buffers that it writes in place."""
    attributes: tuple[str, ...] = ()
    """The attributes and variables that it changes."""
    attends: bool = False
    """Whether it computes attention."""

    def __bool__(self) -> bool:
        return bool(self.tensors or self.attributes or self.attends)


def observe(module: nn.Module, values: Mapping[str, Tensor], x: Any) -> tuple[Tensor, SideEffects]:
    """Call a module once, and restore everything that it changes.

    Args:
        module: the module to observe.
        values: parameters by their names in it.
        x: its inputs ``[examples, …]``.

    Returns:
        Its outputs and its side effects.

    Raises:
        UsageError: the forward pass draws random numbers.
    """
    tensors = _list_tensors(module, values)
    state, watch, generators = PythonState(module), _AttentionWatch(), save_global_generators()
    with torch.no_grad():
        copies = _copy(tensors)
        writes = {place: count_writes(copy) for place, copy in copies.items()}
        try:
            with _take_math_kernel(), watch:
                outputs = functional_call(module, copies, (x,), tie_weights=False)
            attributes = tuple(state.find_changes())
            draws = not _are_equal(generators, save_global_generators())
        finally:
            state.restore()
            restore_global_generators(generators)
    if draws:
        raise UsageError(
            f"The forward pass of {type(module).__name__} draws random numbers (for example, F.dropout or torch.rand): "
            "inner steps need outputs that depend only on parameters and inputs. Remove the draws, or call "
            "model.eval() first if the layers draw only in training mode."
        )
    written = tuple(place for place, copy in copies.items() if count_writes(copy) > writes[place])
    return outputs, SideEffects(written, attributes, watch.attends)


def call_purely(module: nn.Module, values: Mapping[str, Tensor], x: Any, effects: SideEffects) -> Tensor:
    """Return the outputs of a module without side effects; arguments as in `observe`."""
    if not effects:
        outputs: Tensor = functional_call(module, dict(values), (x,), tie_weights=False)
        return outputs
    own = {place: values[place] if place in values else _get_tensor(module, place) for place in effects.tensors}
    state = PythonState(module) if effects.attributes else None
    try:
        with _take_math_kernel() if effects.attends else nullcontext():
            outputs = functional_call(module, {**values, **_copy(own)}, (x,), tie_weights=False)
    finally:
        if state is not None:
            state.restore()
    return outputs


def _list_tensors(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """List all parameters and buffers of a module by name, each name once, with values from `values` if present."""
    owners = ((place, *place.rpartition(".")[::2]) for place in values)
    given = {(module.get_submodule(owner), name): place for place, owner, name in owners}
    tensors = dict(values)
    for path, each in module.named_modules():
        for name, tensor in (*each.named_parameters(recurse=False), *each.named_buffers(recurse=False)):
            if (each, name) not in given:
                tensors[f"{path}.{name}" if path else name] = tensor
    return tensors


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy each tensor; a tensor with several names is copied once."""
    copies: dict[int, Tensor] = {}
    return {place: copies.setdefault(id(tensor), tensor.clone()) for place, tensor in tensors.items()}


def _get_tensor(module: nn.Module, place: str) -> Tensor:
    owner, _, name = place.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor


@contextmanager
def _take_math_kernel() -> Iterator[None]:
    """Compute attention from its basic operations, because PyTorch's fused kernels have no second derivative."""
    with _ATTENTION_LOCK:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


class _AttentionWatch(TorchFunctionMode):
    """Detects whether a block computes attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attends = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.attends |= func in _ATTENTION
        return func(*args, **kwargs or {})


def _are_equal(states: Any, others: Any) -> bool:
    """Return whether the states of generators are equal."""
    pairs = zip(tree_leaves(states), tree_leaves(others), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
