"""The nodes of a graph from files by name, for predictions and programs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metareg import NamedExamples, UsageError
from metareg_graph.sampling import Inputs

__all__ = ["Nodes"]


class Nodes(NamedExamples):
    """The nodes of some graphs.

    Args:
        inputs: the model's inputs; they use all neighbours of a node, whatever `fanout` is.
    """

    column: ClassVar[str] = "node"

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = copy.copy(inputs)
        self._inputs.fanout = None
        self.names: Sequence[str] | None = inputs.data.ids or None
        self.table: Tensor | None = inputs.table if inputs.takes_rows else None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        names = self.names or [str(number) for number in range(self._inputs.data.graph.num_nodes())]
        return {name: number for number, name in enumerate(names)}

    def number(self, names: Sequence[str]) -> Tensor:
        return torch.tensor([self._numbers[name] for name in names], dtype=torch.int64)

    def read(self, numbers: Tensor) -> Any:
        return self._inputs.select(numbers.numpy())

    def bind(self, module: nn.Module) -> nn.Module:
        if self._inputs.kind == "nodes":
            raise UsageError(
                "A module that runs on the DGL graph itself always needs DGL and cannot be exported as a program; use "
                "`metareg predict`, or export the learner with --to FILE.safetensors."
            )
        return _OnWholeGraph(module, self._inputs)


class _OnWholeGraph(nn.Module):
    """Computes a model's outputs for nodes by number, from the whole graph, which the module contains."""

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.module = module
        self._blocks = 0 if inputs.takes_rows else inputs.hops - 1
        self.table: Tensor
        self.destination: Tensor
        self.source: Tensor
        self.weight: Tensor
        self.register_buffer("table", inputs.table)
        if self._blocks:
            for name, values in zip(("destination", "source", "weight"), inputs.list_edges(), strict=True):
                self.register_buffer(name, values)

    def forward(self, numbers: Tensor) -> Tensor:
        if not self._blocks:
            outputs: Tensor = self.module(self.table[numbers])
            return outputs
        block = _SparseBlock(self.destination, self.source, self.weight)
        outputs = self.module({"x": self.table, "blocks": [block] * self._blocks})
        return outputs[numbers]


class _SparseBlock:
    """A block of all nodes by all nodes that supports only the product with features."""

    def __init__(self, to: Tensor, source: Tensor, weight: Tensor) -> None:
        self._to, self._source, self._weight = to, source, weight

    def __matmul__(self, features: Tensor) -> Tensor:
        return torch.zeros_like(features).index_add(0, self._to, self._weight[:, None] * features[self._source])
