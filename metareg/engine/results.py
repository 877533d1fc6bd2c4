"""What hooks return: each function gives back a result that keeps the contract of its hook, and refuses any other."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from metareg.registry.dispatch import Implementation
from metareg.util.torch_internals import tree_leaves

__all__ = [
    "complete", "match", "match_count", "match_with_state", "select", "take_noise", "take_tensors", "take_term",
]  # fmt: skip

Tensors = dict[str, Tensor]


def match(expected: Tensors, given: Any, by: Implementation) -> Tensors:
    """The tensors in the order of `expected`, if they have its names, shapes, types and devices."""
    if not isinstance(given, dict):
        by.reject(f"it must return a dict of tensors, not {_describe(given)}")
    if given.keys() != expected.keys():
        missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
        parts = [
            f"{verb} {', '.join(sorted(names))}" for verb, names in (("misses", missing), ("adds", extra)) if names
        ]
        by.reject(f"its result {' and '.join(parts)}")
    for name, value in expected.items():
        if not isinstance(given[name], Tensor) or given[name].shape != value.shape:
            by.reject(f"'{name}' must be a tensor of shape {tuple(value.shape)}, not {_describe(given[name])}")
        if given[name].dtype != value.dtype or given[name].device != value.device:
            wanted, found = (f"{each.dtype} on {each.device}" for each in (value, given[name]))
            by.reject(f"'{name}' must be a tensor of {wanted}, not of {found}")
    return {name: given[name] for name in expected}


def complete(expected: Tensors, given: Any, by: Implementation) -> Tensors:
    """`match`, with zeros for the tensors that are left out."""
    zeros = {name: torch.zeros_like(value) for name, value in expected.items()}
    return match(expected, zeros | given if isinstance(given, dict) else given, by)


def match_with_state(expected: Tensors, given: Any, by: Implementation) -> tuple[Tensors, dict[str, Any]]:
    """`match` for the first of two parts, the second of which is a state."""
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict)):
        by.reject("it must return the new meta-parameters and a dict, the new state")
    return match(expected, given[0], by), given[1]


def match_count(count: int, given: Any, by: Implementation) -> list[float]:
    """The weights, one for each inner step."""
    weights = [float(weight) for weight in given]
    if len(weights) != count:
        by.reject(f"it returned {len(weights)} weights for {count} inner steps")
    return weights


def select(names: tuple[str, ...], given: Any, by: Implementation) -> tuple[str, ...]:
    """Those of the names that are given, in the order of `names`; there must be one."""
    if isinstance(given, str) or not isinstance(given, Collection):
        by.reject(f"it must return a sequence of names, not {_describe(given)}")
    unknown = [name for name in given if name not in names]
    if unknown or not given:
        by.reject(f"it named {unknown or 'no parameter'}; the model has {', '.join(names)}")
    return tuple(name for name in names if name in set(given))


def take_term(logs: Tensors, _: Any, given: Any, by: Implementation) -> Tensor:
    """A term of the outer loss; what is to be logged beside it is added to `logs`."""
    term, extra = given if isinstance(given, tuple) and len(given) == 2 else (given, {})
    if not _is_scalar(term):
        by.reject(f"it must return a scalar tensor, not {_describe(term)}")
    if not isinstance(extra, dict) or not all(_is_scalar(value) for value in extra.values()):
        by.reject("what it wants logged must be a dict of scalar tensors")
    logs |= {f"{by.name}.{key}": value.detach() for key, value in extra.items()}
    return term


def take_tensors(given: Any, by: Implementation) -> Tensors:
    """New tensors by name."""
    if not isinstance(given, dict) or not all(isinstance(v, Tensor) and v.is_floating_point() for v in given.values()):
        by.reject("it must return a dict of floating-point tensors by name")
    return given


def take_noise(given: Any, by: Implementation) -> Any:
    """A pytree of tensors, in which None may stand."""
    if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(given) if leaf is not None):
        by.reject("it must return a pytree of tensors")
    return given


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
