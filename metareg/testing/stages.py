"""Checks of stage functions: they are pure, and keep and demand names, shapes and types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metareg.errors import MetaregError
from metareg.testing.benches import Pair
from metareg.testing.calls import list_stage_calls
from metareg.testing.check import Subject, fail
from metareg.testing.compare import are_equal, snapshot, watch_global_randomness

__all__ = ["check_purity", "check_shapes", "check_wrong_shapes"]


def check_purity(subject: Subject) -> None:
    """Stage functions change nothing in place, use no global random numbers, and repeat their results."""
    for call in list_stage_calls(subject, torch.float64):
        arguments = call.arguments()
        before = snapshot(arguments)
        with watch_global_randomness() as moved:
            first = snapshot(call(arguments))
        if not are_equal(snapshot(arguments), before):
            changed = [name for name in arguments if not are_equal(snapshot(arguments[name]), before[name])]
            fail(
                f"The {subject.label} changes its argument {', '.join(changed)} in place in {call.hook}.",
                "return new tensors and dicts: no add_(), no mul_(), no +=, no assignment into a dict that was given, and "
                "nothing added to the model.",
            )
        if moved:
            fail(
                f"The {subject.label} moves the global random state of {' and '.join(moved)} in {call.hook}.",
                "draw random numbers in draw_noise, from the generator that it is given.",
            )
        if not are_equal(first, snapshot(call(call.arguments()))):
            fail(
                f"The {subject.label} gives another result when {call.hook} is called again with the same arguments.",
                "keep nothing on self that changes between calls, and draw random numbers from the generator only.",
            )


def check_shapes(subject: Subject) -> None:
    """Results have the names, shapes and types that the contract asks for, in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        for call in list_stage_calls(subject, dtype):
            arguments = call.arguments()
            expected = arguments.get("params" if "params" in arguments else "grads")
            result = call(arguments)
            if not isinstance(expected, dict) or not isinstance(result, dict):
                continue
            for name, value in result.items():
                if name in expected and value.dtype != expected[name].dtype:
                    fail(
                        f"The {subject.label} returns '{name}' as {value.dtype} from {call.hook}; it came as {dtype}.",
                        "make no tensors of a fixed dtype; take it from the arguments.",
                    )
        pair = Pair.of(subject)
        for bench in pair.benches:
            learner = pair.learner(bench, dtype=dtype)
            _, grads = learner.meta_gradient(bench.episodes)  # the stages refuse wrong names and shapes
            meta = learner.meta_parameters
            wrong = [name for name, value in grads.items() if value.dtype != meta[name].dtype]
            if wrong:
                fail(
                    f"The meta-gradient of '{wrong[0]}' is {grads[wrong[0]].dtype} where the parameter is {dtype}.",
                    "make no tensors of a fixed dtype; take it from the arguments.",
                )
            learner.step(bench.episodes)
            for name, value in learner.meta_parameters.items():
                if value.shape != meta[name].shape or value.dtype != meta[name].dtype:
                    fail(
                        f"The outer step turned '{name}' from {_describe(meta[name])} into {_describe(value)}.",
                        "return each meta-parameter from outer_update with its own shape and dtype.",
                    )


def check_wrong_shapes(subject: Subject) -> None:
    """What does not fit together is an error, never passed over in silence."""
    for call in list_stage_calls(subject, torch.float64):
        for part in ("grads", "features"):
            # Features of any shape are fine where no meta-parameter was made for a certain one.
            sized = part == "grads" or "init_meta" in subject.hooks
            if part not in call.implementation.arguments or call.hook == "init_meta" or not sized:
                continue
            for wrong, how in _wrong(call.arguments()[part]):
                arguments = call.arguments() | {part: wrong}
                try:
                    result = call(arguments)
                except (MetaregError, KeyError, RuntimeError, ValueError, IndexError):
                    continue
                given = arguments.get("params", call.arguments().get("grads"))
                if isinstance(result, dict) and isinstance(given, dict) and not _fits(result, given):
                    continue  # the stages refuse this result
                fail(
                    f"The {subject.label} passes over {how} in {call.hook}.",
                    "take every tensor by its name (grads[name]), without .get(), zip() or reshape(), so that what is "
                    "missing or misshapen raises.",
                )


def _wrong(value: Any) -> Iterator[tuple[Any, str]]:
    """Values that do not fit in the place of one that does."""
    if isinstance(value, dict):
        first = next(name for name, each in value.items() if each.dim() > 0)
        yield {name: each for name, each in value.items() if name != first}, f"the missing gradient of '{first}'"
        longer = torch.cat([value[first], value[first][:1]])
        yield {**value, first: longer}, f"a gradient of '{first}' with the shape {tuple(longer.shape)}"
    elif isinstance(value, Tensor):
        wider = torch.cat([value, value[:, :1]], 1)
        yield wider, f"features of the shape {tuple(wider.shape)} where they were {tuple(value.shape)}"


def _fits(result: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return result.keys() == expected.keys() and all(result[name].shape == expected[name].shape for name in result)


def _describe(value: Tensor) -> str:
    return f"a {value.dtype} of shape {tuple(value.shape)}"
