"""Replay of traced graphs as CUDA graphs, which launch all kernels of a step at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from metareg.util.torch_internals import copy_tensors

__all__ = ["capture", "find_gpu"]

log = logging.getLogger("metareg")

Run = Callable[..., list[Tensor]]

_LARGEST_SHARE = 0.125
"""Of the GPU's memory. Large steps keep a GPU busy in any case, and what a CUDA graph holds nothing else can use."""
_MODE = "thread_local"
"""Other threads may use the GPU during a capture."""

_lock = Lock()
_pools: dict[torch.cuda.Stream, tuple[Any, torch.cuda.CUDAGraph]] = {}
"""The memory in which the CUDA graphs of a stream compute, one after the other, and a first graph that keeps it: torch does
not accept the memory again after its last graph is gone."""


def find_gpu(graph: torch.fx.GraphModule, leaves: Sequence[Tensor]) -> torch.device | None:
    """Return the GPU whose CUDA graph can replace a traced graph; None if there is none.

    What a graph computes on the CPU becomes a constant of the CUDA graph. So there must not be random numbers, or tensors
    that a program may change between steps.

    Args:
        graph: the graph; it changes none of its inputs.
        leaves: inputs of the graph.
    """
    devices = {leaf.device for leaf in leaves}
    device = devices.pop()
    if devices or device.type != "cuda" or any(map(_can_change, graph.graph.nodes)):
        return None
    return device


def capture(run: Run, leaves: Sequence[Tensor], device: torch.device) -> Run:
    """Return a function that does the same as a CUDA graph; `run` itself if that is impossible.

    For small tasks, Python takes longer to launch a kernel than the GPU takes to run it. A CUDA graph launches all kernels
    at once.

    Args:
        run: runs a graph, or what was compiled from it, without looking at values.
        leaves: inputs of the graph.
        device: the result of `find_gpu`.
    """
    with _lock, torch.cuda.device(device):
        try:
            return _Replay(run, leaves, device)
        except Exception as error:  # libraries refuse to be captured with many kinds of errors
            log.debug("A step runs without a CUDA graph: %s", error.__context__ or error)
            # Until another capture succeeds, torch draws no random numbers on the device.
            _create_pool(torch.cuda.current_stream(device))
            return run


class _Replay:
    """A function of tensors that is replayed as a CUDA graph; arguments as for `capture`."""

    def __init__(self, run: Run, leaves: Sequence[Tensor], device: torch.device) -> None:
        self._run = run
        self._stream = torch.cuda.current_stream(device)
        self._inputs = [torch.empty_like(leaf).copy_(leaf) for leaf in leaves]
        self._graph = torch.cuda.CUDAGraph()
        # The first call of a kernel loads it, which cannot be captured.
        other = torch.cuda.Stream(device)
        other.wait_stream(self._stream)
        with torch.cuda.stream(other):
            run(*self._inputs)
        self._stream.wait_stream(other)
        if self._stream not in _pools:
            _create_pool(self._stream)
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(device)
        with torch.cuda.graph(self._graph, pool=_pools[self._stream][0], capture_error_mode=_MODE):
            self._outputs = run(*self._inputs)
        size = torch.cuda.memory_reserved(device) - reserved
        total = torch.cuda.get_device_properties(device).total_memory
        if size > _LARGEST_SHARE * total:
            raise MemoryError(f"it would hold {size / 2**20:,.0f} MiB of {total / 2**20:,.0f}")

    def __call__(self, *leaves: Tensor) -> list[Tensor]:
        if torch.cuda.current_stream(self._stream.device) != self._stream:
            return self._run(*leaves)
        with _lock:
            copy_tensors(self._inputs, leaves)
            self._graph.replay()
            outputs = [torch.empty_like(value) for value in self._outputs]
            copy_tensors(outputs, self._outputs)
        return outputs


def _can_change(node: torch.fx.Node) -> bool:
    """Return whether a node of a graph draws random numbers, or holds a tensor of the CPU."""
    if node.op == "get_attr":
        value = getattr(node.graph.owning_module, str(node.target), None)
        return isinstance(value, Tensor) and value.device.type == "cpu"
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _create_pool(stream: torch.cuda.Stream) -> None:
    """Create the memory of a stream's CUDA graphs, and the graph that keeps it."""
    pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode=_MODE):
        torch.zeros(1, device=stream.device)
    _pools[stream] = pool, graph
