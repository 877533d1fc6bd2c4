"""The import of DGL on first use, and adapters that make its modules work with `torch.func`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from metareg import PluginError, UsageError

__all__ = ["call_opaque", "import_dgl", "make_softmax_twice_differentiable"]


def import_dgl() -> ModuleType:
    """Import the module `dgl`.

    Raises:
        PluginError: it is not installed or cannot be imported; the message says what to install.
    """
    # Otherwise, the first import prints its choice of backend and writes it to the user's home.
    os.environ.setdefault("DGLBACKEND", "pytorch")
    try:
        return importlib.import_module("dgl")
    except Exception as error:  # for example OSError or FileNotFoundError if DGL was built for another torch
        raise PluginError(_advise(error)) from error


def _advise(error: Exception) -> str:
    install = "`pip install 'metareg[graph]'` installs dgl 1.1.3"
    if sys.version_info >= (3, 12):
        python = ".".join(map(str, sys.version_info[:2]))
        install = f"it has no wheels for Python {python}: use Python 3.11, where {install}"
    missing = isinstance(error, ImportError) and error.name == "dgl"
    problem = "is not installed" if missing else f"cannot be imported ({type(error).__name__}: {error})"
    return f"Graph tasks need DGL, which {problem}; {install}. All other tasks work without it."


def call_opaque(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call ``function(*inputs)`` with plain tensors and ordinary autograd, even inside `torch.func.grad` and `vjp`.

    DGL passes its tensors to compiled code and has old-style autograd functions; `torch.func` supports neither.
    Derivatives of any order are exact. Each one runs the function again, so nothing is stored.

    Args:
        function: a function that ordinary autograd can differentiate; it must take all its tensors as arguments.
        inputs: tensors of any type.
    """
    result: Tensor = _Opaque.apply(function, *inputs)
    return result


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., Any], *inputs: Tensor) -> Any:
        # The pullback builds a separate graph, which must not connect to the outer graph.
        outputs = function(*(each.detach() for each in inputs))
        return outputs.detach() if isinstance(outputs, Tensor) else tuple(each.detach() for each in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, function = ctx.saved_tensors, ctx.function
        wanted = [position for position, needed in enumerate(ctx.needs_input_grad[1:]) if needed]

        def pullback(*arguments: Tensor) -> tuple[Tensor, ...]:
            parts = list(arguments[: len(inputs)])
            with torch.enable_grad():
                for position in wanted:
                    if not parts[position].requires_grad:
                        parts[position] = parts[position].detach().requires_grad_()
                outputs = function(*parts)
                return torch.autograd.grad(
                    outputs,
                    [parts[position] for position in wanted],
                    arguments[len(inputs) :],
                    create_graph=True,
                    materialize_grads=True,
                )

        found = dict(zip(wanted, _Opaque.apply(pullback, *inputs, *grads), strict=True))
        return None, *(found.get(position) for position in range(len(inputs)))

    @staticmethod
    def vmap(*_: Any) -> NoReturn:
        raise UsageError("A module on the DGL graph itself runs task by task; use strategy='serial'.")


@contextmanager
def make_softmax_twice_differentiable() -> Iterator[None]:
    """Give DGL's edge softmax a derivative that can be differentiated again, inside the block.

    On a CPU, its own backward pass calls a compiled kernel that autograd does not see, so second-order meta-gradients
    of attention layers would be wrong without an error.
    """
    sparse: Any = importlib.import_module("dgl.backend.pytorch.sparse")
    original = sparse.EdgeSoftmax

    class EdgeSoftmax(original):  # type: ignore[misc, valid-type]
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
            index, (out,) = ctx.backward_cache, ctx.saved_tensors
            weighted = out * grad
            total = sparse.gspmm(index, "copy_rhs", "sum", None, weighted)
            return None, weighted - sparse.gsddmm(index, "mul", out, total, "e", "v"), None, None

    sparse.EdgeSoftmax = EdgeSoftmax
    try:
        yield
    finally:
        sparse.EdgeSoftmax = original
