"""Export of a whole adaptation, from support set to predictions, as one `torch.export` program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from metareg.errors import UsageError
from metareg.util.torch_internals import trace_sizes

__all__ = ["AdaptiveProgram", "create_adaptive_program"]

Inputs = tuple[Tensor, Tensor, Tensor]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
Sizes = tuple[int, int]
"""Numbers of support and query examples."""

_TRACED = (7, 11)
"""The sizes of the traced task, if sizes are left open."""
_TRIED = (1, 2, 3, 5, 9, 17, 33, 65, 129)
"""Numbers of examples to try, to find those for which tracing would have taken another branch."""
_TOLERANCE = 1e-4
"""Tolerance of predictions, relative to the largest, because other sizes can use other kernels."""


@dataclass(frozen=True)
class AdaptiveProgram:
    """A program that takes ``support_x, support_y, query_x`` and returns the outputs ``[query, …]``."""

    program: torch.export.ExportedProgram
    support: int | None
    """The number of support examples that it takes; None for any number."""
    query: int | None


def create_adaptive_program(
    predict: Predict, draw: Callable[[int, int], Inputs], get_sizes: Callable[[], Sizes]
) -> AdaptiveProgram:
    """Create the program of a function: for any number of examples if that can be traced, otherwise for fixed numbers.

    `torch.func` and the plugins' Python code run only during tracing. The result is a graph of PyTorch's operations,
    including those of the inner gradients. Its outputs are compared with the function's, for several numbers of
    examples.

    Args:
        predict: a pure function that computes the outputs for a query set, given a support set.
        draw: draws a task with given numbers of support and query examples.
        get_sizes: returns the sizes to use if they cannot be left open.

    Raises:
        UsageError: the function cannot be traced.
    """
    problem = ""
    for free in ((True, True), (False, True), (False, False)):
        fixed = _TRACED if all(free) else get_sizes()
        sizes = (_TRACED[0] if free[0] else fixed[0], _TRACED[1] if free[1] else fixed[1])
        try:
            program = _export(predict, draw, sizes, free)
        # Tracing code of plugins and users can raise many kinds of errors.
        except Exception as error:
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        else:
            return AdaptiveProgram(program, *(None if is_free else n for n, is_free in zip(sizes, free, strict=True)))
    raise UsageError(f"This adaptation cannot be exported as one program: {problem}")


def _export(
    predict: Predict, draw: Callable[[int, int], Inputs], sizes: Sizes, free: tuple[bool, bool]
) -> torch.export.ExportedProgram:
    """Export the program for these sizes, with the free ones left open.

    Raises:
        ValueError: tracing fixed a size that should be free, or the program's predictions differ.
    """
    inputs = draw(*sizes)
    with torch.no_grad():
        graph, fixed, answer = trace_sizes(predict, inputs, (free[0], *free))
        if any(count is not None for count, is_free in zip((fixed[0], fixed[2]), free, strict=True) if is_free):
            raise ValueError("its operations depend on the number of examples")
        least = 1 if _runs(predict, draw(1 if free[0] else sizes[0], 1 if free[1] else sizes[1])) else 2
        support, query = (torch.export.Dim(name, min=least) for name in ("support", "query"))
        open_dims = [{0: support} if free[0] else {}, {0: support} if free[0] else {}, {0: query} if free[1] else {}]
        program = torch.export.export(_prepare(graph), inputs, dynamic_shapes=open_dims, strict=False)
        run = program.module()
        for other in _list_sizes(sizes, free, least, lambda n, q: answer((n, n, q))):
            task = draw(*other)
            _compare(run(*task), predict(*task), other)
    return program


def _prepare(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Convert a traced graph for torch.export: name its arguments, and register its tensors as buffers."""
    arguments = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, name in zip(arguments, ("support_x", "support_y", "query_x"), strict=True):
        node.target = node.name = name
    for name in {node.target for node in graph.graph.nodes if node.op == "get_attr"}:
        value = getattr(graph, name).detach()
        delattr(graph, name)
        graph.register_buffer(name, value)
    graph.recompile()
    return graph


def _runs(predict: Predict, inputs: Inputs) -> bool:
    try:
        predict(*inputs)
    except Exception:  # for example, BatchNorm of a single vector
        return False
    return True


def _list_sizes(
    sizes: Sizes, free: tuple[bool, bool], least: int, answer: Callable[[int, int], tuple[bool, ...]]
) -> Iterator[Sizes]:
    """List the sizes to compare: those traced, the smallest, and a pair for each other branch that tracing has."""
    yield sizes
    tried = [
        [count for count in _TRIED if count >= least] if is_free else [size]
        for size, is_free in zip(sizes, free, strict=True)
    ]
    seen = {answer(*sizes)}
    for number, (support, query) in enumerate(product(*tried)):
        answers = answer(support, query)
        if number == 0 or answers not in seen:
            yield support, query
        seen.add(answers)


def _compare(outputs: Tensor, expected: Tensor, sizes: Sizes) -> None:
    largest = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if expected.numel() else 0.0
    if outputs.shape != expected.shape or not torch.allclose(
        outputs, expected, rtol=0.0, atol=_TOLERANCE * largest, equal_nan=True
    ):
        raise ValueError("with {} support and {} query examples its predictions differ".format(*sizes))
