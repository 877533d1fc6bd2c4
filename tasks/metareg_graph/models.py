"""Graph networks on padded blocks, and a wrapper for any `dgl.nn` module on the DGL graph itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from metareg import PluginConfig, TaskSpec, UsageError, hookimpl
from metareg_graph._dgl import call_opaque, import_dgl, make_softmax_twice_differentiable

__all__ = ["GCN", "SGC", "BlockNetwork", "GraphSAGE", "OnGraph"]


class GraphModelConfig(PluginConfig):
    """Options of the graph models."""

    hidden: int = Field(32, ge=1, description="Width of every layer, and number of features.")
    layers: int = Field(2, ge=1, le=4, description="Layers of propagation.")
    skip: bool = Field(True, description="Also give the head the inputs that the layers propagate without weights.")


class _GraphModel:
    contract = 1
    example_task = "csbm"
    Config = GraphModelConfig
    inputs: Literal["gcn", "sgc", "mean"]

    def __init__(self, config: GraphModelConfig) -> None:
        self.config = config

    @property
    def recommended(self) -> Mapping[str, Any]:
        """The options of the task that this model needs."""
        return {"task.inputs": self.inputs, "task.hops": self.config.layers}

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        config = self.config
        return BlockNetwork(self.inputs, spec, config.hidden, config.layers, skip=config.skip)


class GCN(_GraphModel):
    """Graph convolutions H ← ReLU(Â H W + b), then a linear head.

    Reference:
        Kipf and Welling, Semi-Supervised Classification with Graph Convolutional Networks, ICLR 2017, arXiv 1609.02907
        (there, the last convolution outputs the classes; here, a head on its features does).
    """

    inputs = "gcn"


class SGC(_GraphModel):
    """Features smoothed by Â^layers once, then one layer ReLU(X W + b) and a linear head, as in Meta-GNN.

    References:
        Wu et al., Simplifying Graph Convolutional Networks, ICML 2019, arXiv 1902.07153;
        Zhou et al., Meta-GNN: On Few-shot Node Classification in Graph Meta-learning, CIKM 2019, arXiv 1905.09718.
    """

    inputs = "sgc"


class GraphSAGE(_GraphModel):
    """Layers H ← ReLU([H ‖ mean of the neighbours' H] W + b), then a linear head.

    Reference:
        Hamilton, Ying and Leskovec, Inductive Representation Learning on Large Graphs, NeurIPS 2017, arXiv 1706.02216
        (the mean aggregator, without the normalisation of each layer's outputs).
    """

    inputs = "mean"


class BlockNetwork(nn.Module):
    """Inputs of `metareg_graph.Inputs` → features ``[examples, width]`` → ``[examples, ways]``.

    The width is `hidden`, plus the width of the inputs with `skip`. A head on a few random directions of bags of words
    cannot distinguish unseen classes; a head that also sees the propagated inputs can from the start.

    Args:
        inputs: ``"gcn"``, ``"sgc"`` or ``"mean"``.
        spec: a node's features and the classes of a task.
        hidden: the width of every layer.
        layers: the number of layers.
        skip: append the inputs, propagated without weights, to the last layer's outputs, as in jumping knowledge
            networks (Xu et al., ICML 2018, arXiv 1806.03536).
    """

    def __init__(self, inputs: str, spec: TaskSpec, hidden: int, layers: int, *, skip: bool = False) -> None:
        super().__init__()
        self.body = _Blocks(inputs, spec.input_shape[0], hidden, layers, skip)
        self.head = nn.Linear(self.body.width, spec.output_shape[0])

    def forward(self, x: Any) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        return outputs


class _Blocks(nn.Module):
    def __init__(self, inputs: str, features: int, hidden: int, layers: int, skip: bool) -> None:
        super().__init__()
        self.inputs, self.depth, self.skip = inputs, layers, skip
        copies = 2 if inputs == "mean" else 1  # a node's own and its neighbours'
        self.width = hidden + copies * features * skip
        widths = [features, *[hidden] * (1 if inputs == "sgc" else layers)]
        linear = [nn.Linear(copies * before, after) for before, after in pairwise(widths)]
        self.layers = nn.ModuleList(linear)
        for layer in linear:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Any) -> Tensor:
        rows, blocks = self._unpack(x)
        first, *others = self.layers
        hidden: Tensor = first(rows).relu()
        for layer, block in zip(others, blocks, strict=True):
            near = block @ hidden
            if self.inputs == "mean":
                near = torch.cat([hidden[: near.shape[0]], near], 1)
            hidden = layer(near).relu()
            rows = block @ rows
        return torch.cat([hidden, rows], 1) if self.skip else hidden

    def _unpack(self, x: Any) -> tuple[Tensor, list[Tensor]]:
        if isinstance(x, Tensor):
            rows, blocks = x, []
        elif isinstance(x, dict) and "blocks" in x:
            rows, blocks = x["x"], x["blocks"]
        else:
            raise UsageError(f"This model needs tasks with inputs='{self.inputs}' and hops={self.depth}.")
        width = self.layers[0].in_features
        if rows.shape[-1] != width or len(blocks) != len(self.layers) - 1:
            raise UsageError(
                f"This model needs tasks with inputs='{self.inputs}' and hops={self.depth}, with {width} numbers per "
                f"row; these have {rows.shape[-1]} and {len(blocks)} blocks."
            )
        return rows, blocks


class OnGraph(nn.Module):
    """A wrapper for any module of `dgl.nn` layers, run on the DGL graph itself, with a head on the task's nodes.

    It takes tasks with ``inputs="nodes"``, one at a time (``strategy="serial"``), and supports derivatives of any
    order, including through attention layers.

    Args:
        body: ``body(graph, features) -> [nodes, hidden]`` with ``features`` ``[nodes, features]``.
        head: a module on ``[examples, hidden]``.
        self_loops: add a self-loop to every node, which `dgl.nn.GraphConv` and the attention layers need.

    Example:
        >>> model = OnGraph(MyGAT(task.spec.input_shape[0], 64), nn.Linear(64, 2))
        >>> MetaLearner(model, algo="maml", inner_lr=0.1).fit(Cora(Cora.Config(inputs="nodes")), steps=100)
    """

    def __init__(self, body: nn.Module, head: nn.Module, *, self_loops: bool = True) -> None:
        super().__init__()
        self.body = _OnGraphBody(body, self_loops)
        self.head = head

    def forward(self, x: Any) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        return outputs


class _OnGraphBody(nn.Module):
    def __init__(self, module: nn.Module, self_loops: bool) -> None:
        super().__init__()
        self.module, self.self_loops = module, self_loops

    def forward(self, x: Any) -> Tensor:
        if not isinstance(x, dict) or "edges" not in x:
            raise UsageError("A module on the DGL graph itself needs tasks with inputs='nodes'.")
        # Inside functional_call, these are the passed parameters, not the module's own.
        names, parameters = zip(*self.module.named_parameters(), strict=True)
        return call_opaque(self._run(names), x["edges"], x["features"], x["nodes"], *parameters)

    def _run(self, names: tuple[str, ...]) -> Callable[..., Tensor]:
        def run(edges: Tensor, features: Tensor, nodes: Tensor, *parameters: Tensor) -> Tensor:
            graph = import_dgl().graph((edges[0], edges[1]), num_nodes=len(features))
            if self.self_loops:
                graph = import_dgl().add_self_loop(graph)
            with make_softmax_twice_differentiable():
                out: Tensor = functional_call(self.module, dict(zip(names, parameters, strict=True)), (graph, features))
            return out[nodes]

        return run
