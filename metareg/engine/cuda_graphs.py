"""Replay of traced graphs as CUDA graphs, which launch all kernels of a step at once."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from threading import Lock

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from metareg.util.torch_internals import TO_COPY, copy_tensors

__all__ = ["capture", "find_gpu"]

log = logging.getLogger("metareg")

Run = Callable[..., list[Tensor]]

_LARGEST_SHARE = 0.125
"""Of the GPU's memory, for all CUDA graphs. Large steps keep a GPU busy in any case, and nothing else can use what a CUDA
graph holds."""
_MODE = "thread_local"
"""Other threads may use the GPU during a capture."""
_COPIES = (TO_COPY, torch.ops.aten.copy.default)

_lock = Lock()
_held: Counter[torch.device] = Counter()
"""The memory that CUDA graphs hold."""


def find_gpu(graph: GraphModule, leaves: Sequence[Tensor]) -> torch.device | None:
    """Return the GPU whose CUDA graph can replace a traced graph; None if there is none.

    What a graph computes on the CPU becomes a constant of the CUDA graph. So there must not be random numbers, tensors that
    a program may change between steps, or copies to the GPU.

    Args:
        graph: the graph, with the values of fake tensors; it changes none of its inputs.
        leaves: inputs of the graph.
    """
    devices = {leaf.device for leaf in leaves}
    device = devices.pop()
    if devices or device.type != "cuda" or any(map(_can_change, graph.graph.nodes)):
        return None
    return device


def capture(graph: GraphModule, run: Run, leaves: Sequence[Tensor], device: torch.device) -> Run:
    """Return a function that does the same as a CUDA graph; `run` itself if that is impossible.

    For small tasks, Python takes longer to launch a kernel than the GPU takes to run it. A CUDA graph launches all kernels
    at once.

    Args:
        graph: the graph.
        run: runs the graph, or what was compiled from it, without looking at values.
        leaves: inputs of the graph.
        device: the result of `find_gpu`.
    """
    with _lock, torch.cuda.device(device):
        stream, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        try:
            return _Replay(graph, run, leaves, stream, side)
        except Exception as error:  # libraries refuse to be captured with many kinds of errors
            log.debug("A step runs without a CUDA graph: %s", error.__context__ or error)
            torch.cuda.set_stream(stream)
            # Until another capture succeeds, torch draws no random numbers on the device.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side, capture_error_mode=_MODE):
                torch.zeros(1, device=device)
            return run


class _Replay:
    """A function of tensors that is replayed as a CUDA graph.

    Args:
        graph, run, leaves: as for `capture`.
        stream: the current stream, the only one on which the CUDA graph is replayed.
        side: a stream for the capture.
    """

    def __init__(
        self, graph: GraphModule, run: Run, leaves: Sequence[Tensor], stream: torch.cuda.Stream, side: torch.cuda.Stream
    ) -> None:
        device = stream.device
        self._run, self._stream, self._settings = run, stream, _read_settings()
        constants = (getattr(graph, str(node.target)) for node in graph.graph.find_nodes(op="get_attr"))
        self._constants = [(each, each.data_ptr()) for each in constants if isinstance(each, Tensor)]
        self._inputs = [torch.empty_like(leaf).copy_(leaf) for leaf in leaves]
        self._graph = torch.cuda.CUDAGraph()
        # The first call of a kernel loads it, which cannot be captured.
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            run(*self._inputs)
        stream.wait_stream(side)
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(device)
        with torch.cuda.graph(self._graph, stream=side, capture_error_mode=_MODE):
            self._outputs = run(*self._inputs)
        size = torch.cuda.memory_reserved(device) - reserved
        total = torch.cuda.get_device_properties(device).total_memory
        if _held[device] + size > _LARGEST_SHARE * total:
            raise MemoryError(f"it would hold {size / 2**20:,.0f} MiB beside {_held[device] / 2**20:,.0f}")
        _held[device] += size
        weakref.finalize(self, _release, device, size)

    def __call__(self, *leaves: Tensor) -> list[Tensor]:
        if not self._is_valid():
            return self._run(*leaves)
        with _lock:
            copy_tensors(self._inputs, leaves)
            self._graph.replay()
            outputs = [torch.empty_like(value) for value in self._outputs]
            copy_tensors(outputs, self._outputs)
        return outputs

    def _is_valid(self) -> bool:
        """Return whether what the CUDA graph took over is as it was."""
        return (
            torch.cuda.current_stream(self._stream.device) == self._stream
            and _read_settings() == self._settings
            and all(tensor.data_ptr() == address for tensor, address in self._constants)
        )


def _can_change(node: Node) -> bool:
    """Return whether a node of a graph draws random numbers, holds a tensor of the CPU, or copies one."""
    if node.op == "get_attr":
        return _is_on_cpu(getattr(node.graph.owning_module, str(node.target), None))
    sources = (each.meta.get("val") for each in node.all_input_nodes)
    copies = node.target in _COPIES and any(map(_is_on_cpu, sources)) and not _is_on_cpu(node.meta.get("val"))
    return copies or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_on_cpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def _read_settings() -> Hashable:
    """Return torch's settings that decide which kernels run."""
    cudnn = torch.backends.cudnn
    return (
        torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cuda"),
    )  # fmt: skip


def _release(device: torch.device, size: int) -> None:
    _held[device] -= size
