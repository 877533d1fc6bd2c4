"""Sampling of episodes from a graph: the classes and nodes of a task, and the padded dense blocks around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metareg import Episodes, UsageError, format_count, task_uniform
from metareg_graph._dgl import import_dgl
from metareg_graph.data import GraphData

__all__ = ["Inputs", "Pools", "Seeds"]


@dataclass(frozen=True)
class Seeds:
    """The labelled nodes of some tasks: ``[tasks, ways · shots]`` and ``[tasks, ways · query]``, class by class."""

    support: np.ndarray
    query: np.ndarray


class Pools:
    """The nodes from which the tasks of a split are drawn, by graph and class.

    Args:
        groups: for each graph, the nodes of each class in this split.
        where: the split's name in messages.
        ways: number of classes of a task.
        shots: number of support nodes of each class.
        query: number of query nodes of each class.
        shared_labels: keep a task's classes in their own order instead of a random one.

    Raises:
        UsageError: there are too few classes, or a class has too few nodes.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[int, np.ndarray]],
        where: str,
        ways: int,
        shots: int,
        query: int,
        *,
        shared_labels: bool = False,
    ) -> None:
        self.ways, self.shots, self.query, self.shared_labels = ways, shots, query, shared_labels
        for group in groups:
            for label, nodes in group.items():
                if len(nodes) < shots + query:
                    raise UsageError(
                        f"Class {label} has {format_count(len(nodes), 'node')} in {where}; {shots} support and "
                        f"{query} query nodes need {shots + query}. Lower --shots or --query."
                    )
            if len(group) < ways:
                listed = ", ".join(str(label) for label in group) or "none"
                raise UsageError(
                    f"A task of {ways} classes needs as many in {where}; there are {len(group)}: {listed}."
                )
        self._classes = np.array([len(group) for group in groups])
        self._first_pool = np.cumsum(self._classes) - self._classes
        pools = [nodes for group in groups for nodes in group.values()]
        self._sizes = np.array([len(nodes) for nodes in pools])
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.nodes = np.concatenate(pools)
        """All nodes that can occur in a task."""

    def draw(self, split: str, indices: Sequence[int], seed: int) -> Seeds:
        """Draw the nodes of tasks, each depending only on (seed, split, task number)."""
        tasks, each = len(indices), self.shots + self.query
        most = int(self._classes.max())
        u = task_uniform(seed, split, indices, 1 + most + 2 * self.ways * each, "nodes")
        group = (u[:, 0] * len(self._classes)).astype(np.int64)
        absent = np.arange(most) >= self._classes[group][:, None]
        classes = np.argsort(np.where(absent, 2.0, u[:, 1 : 1 + most]), axis=1)[:, : self.ways]
        if self.shared_labels:
            classes = np.sort(classes, axis=1)
        pool = (self._first_pool[group][:, None] + classes).reshape(-1)
        picks, order = u[:, 1 + most :].reshape(tasks * self.ways, 2, each).transpose(1, 0, 2)
        chosen = np.take_along_axis(_draw_distinct(picks, self._sizes[pool]), np.argsort(order, axis=1), axis=1)
        nodes = self.nodes[self._starts[pool][:, None] + chosen].reshape(tasks, self.ways, each)
        return Seeds(nodes[:, :, : self.shots].reshape(tasks, -1), nodes[:, :, self.shots :].reshape(tasks, -1))


def _draw_distinct(u: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Draw, for each row of uniform numbers, a set of ``u.shape[1]`` different numbers below ``sizes[row]``.

    Floyd's algorithm (Bentley and Floyd, A sample of brilliance, CACM 1987): time and memory do not grow with the
    sizes.
    """
    chosen = np.full(u.shape, -1, dtype=np.int64)
    for position in range(u.shape[1]):
        last = sizes - u.shape[1] + position
        drawn = (u[:, position] * (last + 1)).astype(np.int64)
        taken = (chosen == drawn[:, None]).any(1)
        chosen[:, position] = np.where(taken, last, drawn)
    return chosen


# ------------------------------------------------------------------------------------------------------------------ blocks


class Uniform(Protocol):
    """A function for random numbers in [0, 1) ``[tasks, count]`` that depend only on the task."""

    def __call__(self, count: int, label: str) -> np.ndarray: ...


class Inputs:
    """The inputs of a model on a graph, as tensors that can be stacked over tasks.

    ===========  =========================================================================================================
    ``gcn``      ``{"x": [tasks, rows, features], "blocks": [[tasks, examples, rows], …]}``: features after the first
                 propagation Â X, which depends on no parameter, and for each further layer the rows of Â that a task needs
    ``sgc``      ``[tasks, examples, features]``: features after `hops` propagations; so are the others' for a single layer
    ``mean``     as ``gcn``, with x = [X ‖ mean of the neighbours' X] and blocks that average over neighbours; a layer's
                 outputs are for the first rows of its inputs
    ``nodes``    ``{"edges": [tasks, 2, edges], "features": [tasks, nodes, features], "nodes": [tasks, examples]}``: the
                 graphs whole, for modules that run on them
    ===========  =========================================================================================================

    Â = D^−½ (A + I) D^−½ with the degrees of the whole graph, as in `dgl.nn.GraphConv` on a graph with self-loops.

    Rows are padded to one of a few sizes, so that training sees few shapes. Padding meets zero columns of the blocks
    and does not change results. If tasks' sizes differ so much that padding would more than double the rows, they form
    separate stacks.

    Args:
        data: the graph.
        kind: one of the above.
        hops: number of layers of propagation.
        fanout: the maximum number of neighbours of a node in a block, drawn anew for each task; None for all. The
            weights of drawn neighbours are scaled so that sums are right on average.
        degree: the mean number of neighbours, if known in advance.
        standardised: subtract the mean of a graph's rows from each row of `table`, and scale it to the length `LENGTH`.
            The length of a sum over neighbours depends on their number, which hides the class.
    """

    LENGTH = 4.0
    """Length of standardised rows, large enough that heads and layers can use the same inner step size."""

    def __init__(
        self,
        data: GraphData,
        kind: str,
        hops: int,
        fanout: int | None = None,
        degree: float | None = None,
        *,
        standardised: bool = False,
    ) -> None:
        self.data, self.kind, self.hops, self.fanout, self.standardised = data, kind, hops, fanout, standardised
        self._near = _Neighbourhoods(data, loops=kind != "mean")
        self._usual = 1 + (data.graph.num_edges() / data.graph.num_nodes() if degree is None else degree)
        self._most = int(torch.bincount(data.members).max())

    @cached_property
    def table(self) -> Tensor:
        """Each node's features before the first layer with parameters ``[nodes, …]``."""
        x = self.data.features
        if self.kind == "mean":
            x = torch.cat([x, self._near.propagate(x)], 1)
        else:
            for _ in range(self.hops if self.kind == "sgc" else 1):
                x = self._near.propagate(x)
        return _standardise(x, self.data.members, self.LENGTH) if self.standardised else x

    @property
    def takes_rows(self) -> bool:
        """Whether a node's input is its row of `table`."""
        return self.kind == "sgc" or (self.hops == 1 and self.kind != "nodes")

    def select(self, nodes: np.ndarray) -> Any:
        """Return the inputs of some nodes of one task ``[examples, …]``, with all neighbours."""
        if self.kind == "nodes":
            return {name: values[0] for name, values in self._expand_graph(nodes[None]).items()}
        if self.takes_rows:
            return self.table[torch.from_numpy(nodes)]
        layers = self._sample_layers(nodes[None], _refuse_to_draw, "")
        counts = np.array([layer.counts[0] for layer in layers])
        inputs = self._fill_blocks(nodes[None], layers, np.zeros(1, dtype=np.int64), counts)
        return {"x": inputs["x"][0], "blocks": [block[0] for block in inputs["blocks"]]}

    def list_edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """List the entries of the blocks' weights over the whole graph: row, column and weight ``[edges]``."""
        return self._near.list_edges()

    def episodes(self, seeds: Seeds, targets: tuple[Tensor, Tensor], uniform: Uniform) -> list[Episodes]:
        """Return the tasks as stacks of equal shapes, usually one.

        Args:
            seeds: the tasks' nodes.
            targets: their classes within the task, ``[tasks, support]`` and ``[tasks, query]``.
            uniform: the tasks' random numbers.
        """
        if self.kind == "nodes":
            return [
                Episodes(self._expand_graph(seeds.support), targets[0], self._expand_graph(seeds.query), targets[1])
            ]
        if self.takes_rows:
            support, query = (self.table[torch.from_numpy(nodes)] for nodes in (seeds.support, seeds.query))
            return [Episodes(support, targets[0], query, targets[1])]
        parts = [
            self._sample_layers(nodes, uniform, label) for nodes, label in ((seeds.support, "s"), (seeds.query, "q"))
        ]
        sizes = np.stack([layer.counts for layers in parts for layer in layers], 1)
        floors = [
            self._choose_floor(layer) if not depth else 0 for layers in parts for depth, layer in enumerate(layers)
        ]
        stacks = []
        split = self.hops - 1
        for tasks, capacities in _group_by_size(sizes, np.array(floors, dtype=np.int64), self._most, split):
            support_x = self._fill_blocks(seeds.support, parts[0], tasks, capacities[:split])
            query_x = self._fill_blocks(seeds.query, parts[1], tasks, capacities[split:])
            stacks.append(Episodes(support_x, targets[0][tasks], query_x, targets[1][tasks]).placed(tasks.tolist()))
        return stacks

    def _sample_layers(self, seeds: np.ndarray, uniform: Uniform, label: str) -> list[_Layer]:
        """Sample, from the model's last layer to its second, the edges into the nodes that the next layer needs."""
        tasks, each = seeds.shape
        node, task, row = seeds.reshape(-1), np.repeat(np.arange(tasks), each), np.tile(np.arange(each), tasks)
        layers = []
        for depth in range(self.hops - 1):
            own = partial(uniform, label=f"{label}{depth}")
            layer = self._near.sample_edges_into(node, task, row, tasks, self.fanout, own)
            layers.append(layer)
            node, task, row = layer.node, layer.node_task, layer.node_column
        return layers

    def _choose_floor(self, layer: _Layer) -> int:
        """Choose a size that fits most tasks, less than twice the expected size."""
        drawn = layer.rows / len(layer.counts) * self._usual
        different = self._most * -math.expm1(-drawn / self._most)
        return min(4 * math.ceil(1.6 * different / 4), self._most)

    def _fill_blocks(
        self, seeds: np.ndarray, layers: list[_Layer], tasks: np.ndarray, capacities: np.ndarray
    ) -> dict[str, Any]:
        """Return blocks and input rows of some tasks, padded to `capacities`, in the order in which models use them."""
        place = np.full(len(seeds), -1)
        place[tasks] = np.arange(len(tasks))
        blocks, rows, nodes = [], seeds.shape[1], seeds[tasks]
        for layer, capacity in zip(layers, capacities.tolist(), strict=True):
            block = np.zeros((len(tasks), rows, capacity), dtype=self._near.dtype)
            at = place[layer.task]
            here = at >= 0
            block[at[here], layer.row[here], layer.column[here]] = layer.weight[here]
            blocks.append(torch.from_numpy(block))
            nodes = np.zeros((len(tasks), capacity), dtype=np.int64)
            at = place[layer.node_task]
            here = at >= 0
            nodes[at[here], layer.node_column[here]] = layer.node[here]
            rows = capacity
        x = self.table.index_select(0, torch.from_numpy(nodes.reshape(-1))).view(*nodes.shape, -1)
        return {"x": x, "blocks": blocks[::-1]}

    def _expand_graph(self, nodes: np.ndarray) -> dict[str, Tensor]:
        """Return views of the whole graph, the same for every task."""
        edges, features = torch.stack(self.data.graph.edges()), self.data.features
        return {
            "edges": edges.expand(len(nodes), *edges.shape),
            "features": features.expand(len(nodes), *features.shape),
            "nodes": torch.from_numpy(nodes),
        }


def _refuse_to_draw(count: int, label: str) -> np.ndarray:
    raise AssertionError(f"{count} numbers are asked for ({label}) where no neighbours are drawn")


def _standardise(x: Tensor, members: Tensor, length: float) -> Tensor:
    """Subtract the mean row of the graph from its rows, and scale all to one length ``[nodes, …]``."""
    sums = x.new_zeros(int(members.max()) + 1, x.shape[1]).index_add_(0, members, x)
    means = sums / torch.bincount(members, minlength=len(sums)).unsqueeze(1)
    return length * F.normalize(x - means[members], dim=1)


@dataclass(frozen=True)
class _Layer:
    """The edges of one layer for some tasks: row ← column with a weight, numbered within the task."""

    task: np.ndarray
    row: np.ndarray
    column: np.ndarray
    weight: np.ndarray
    rows: int
    """Total number of rows of all tasks."""
    counts: np.ndarray
    """Number of columns of each task."""
    node: np.ndarray
    """The node of each column, with its task and column."""
    node_task: np.ndarray
    node_column: np.ndarray


class _Neighbourhoods:
    """The edges into nodes, from the CSC arrays of a DGL graph, with propagation weights.

    Args:
        data: the graph.
        loops: use the weights of D^−½ (A + I) D^−½; otherwise, those of the mean over neighbours.
    """

    def __init__(self, data: GraphData, *, loops: bool) -> None:
        self.graph = import_dgl().add_self_loop(data.graph) if loops else data.graph
        pointers, sources, _ = self.graph.adj_tensors("csc")
        self._pointers, self._sources = pointers.numpy(), sources.numpy()
        into = self.graph.in_degrees().to(data.features.dtype).clamp(min=1)
        out_of = self.graph.out_degrees().to(data.features.dtype).clamp(min=1)
        self._to = into.rsqrt() if loops else 1 / into
        self._from = out_of.rsqrt() if loops else torch.ones_like(out_of)
        self.dtype = self._to.numpy().dtype

    def list_edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """List all edges as destinations, sources and weights ``[edges]``."""
        to = torch.from_numpy(np.repeat(np.arange(len(self._pointers) - 1), np.diff(self._pointers)))
        source = torch.from_numpy(self._sources.astype(np.int64))
        return to, source, self._to[to] * self._from[source]

    def propagate(self, x: Tensor) -> Tensor:
        """Return the weighted sum over each node's neighbours ``[nodes, features]``."""
        result: Tensor = import_dgl().ops.copy_u_sum(self.graph, x * self._from[:, None]) * self._to[:, None]
        return result

    def sample_edges_into(
        self,
        node: np.ndarray,
        task: np.ndarray,
        row: np.ndarray,
        tasks: int,
        fanout: int | None,
        uniform: Callable[[int], np.ndarray],
    ) -> _Layer:
        """Sample the edges into `node`, each in one task; a task's own nodes are its first columns, in order."""
        degree = self._pointers[node + 1] - self._pointers[node]
        owner = np.repeat(np.arange(len(node)), degree)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(degree) - degree, degree)
        source = self._sources[self._pointers[node][owner] + within]
        weight = self._to.numpy()[node][owner] * self._from.numpy()[source]
        if fanout is not None and (degree > fanout).any():
            keep, scale = _thin_out(owner, source == node[owner], task[owner], fanout, uniform)
            owner, source, weight = owner[keep], source[keep], (weight * scale)[keep]
        # Every pair (task, node) gets a unique number.
        base = len(self._pointers)
        rows_key, source_key = task * base + node, task[owner] * base + source
        keys, at = np.unique(np.concatenate([rows_key, source_key]), return_inverse=True)
        row_of = np.full(len(keys), -1)
        row_of[at[: len(node)]] = row
        is_row, task_of = row_of >= 0, keys // base
        rows_of_task = np.bincount(task, minlength=tasks)
        others = np.cumsum(~is_row)
        before = np.concatenate([[0], others])[np.searchsorted(task_of, np.arange(tasks))]
        column_of = np.where(is_row, row_of, rows_of_task[task_of] + others - 1 - before[task_of])
        return _Layer(
            task=task[owner],
            row=row[owner],
            column=column_of[at[len(node) :]],
            weight=weight,
            rows=len(node),
            counts=np.bincount(task_of, minlength=tasks),
            node=keys % base,
            node_task=task_of,
            node_column=column_of,
        )


def _thin_out(
    owner: np.ndarray, loop: np.ndarray, task: np.ndarray, fanout: int, uniform: Callable[[int], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the edges to keep, `fanout` per owner in addition to its self-loop, and the factors of their weights."""
    per_task = np.bincount(task)
    within = np.arange(len(task)) - (np.cumsum(per_task) - per_task)[task]
    priority = np.where(loop, -1.0, uniform(int(per_task.max()))[task, within])
    order = np.lexsort((priority, owner))
    rank = np.empty(len(owner), dtype=np.int64)
    degree = np.bincount(owner)
    rank[order] = np.arange(len(owner)) - (np.cumsum(degree) - degree)[owner[order]]
    loops = np.bincount(owner[loop], minlength=len(degree))
    others = degree - loops
    scale = np.where(loop, 1.0, np.maximum(1.0, others / fanout)[owner])
    return rank < fanout + loops[owner], scale


def _group_by_size(sizes: np.ndarray, floors: np.ndarray, most: int, depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Group tasks that are padded together, and choose the padded sizes.

    Args:
        sizes: the size that each task needs ``[tasks, parts]``.
        floors: the minimum size of each part.
        most: the maximum size of a task.
        depth: the number of consecutive parts that are the layers of one set.
    """
    tasks = np.arange(len(sizes))
    together = _choose_capacities(sizes.max(0, initial=0), floors, most, depth)
    if len(tasks) * together.sum() <= 2 * sizes.sum():
        return [(tasks, together)]
    own = np.stack([_choose_capacities(each, floors, most, depth) for each in sizes])
    kinds, which = np.unique(own, axis=0, return_inverse=True)
    return [(tasks[which.reshape(-1) == number], kind) for number, kind in enumerate(kinds)]


def _choose_capacities(needed: np.ndarray, floors: np.ndarray, most: int, depth: int) -> np.ndarray:
    """Round each part up to one of a few sizes, each 1.5 times the previous one.

    A layer's own rows are its first columns, including padding, so no layer is smaller than the one before it.
    """
    found = []
    for need, floor in zip(needed.tolist(), floors.tolist(), strict=True):
        capacity = max(floor, 8)
        while capacity < need:
            capacity = 4 * math.ceil(1.5 * capacity / 4)
        found.append(min(capacity, max(most, 1)))
    return np.maximum.accumulate(np.array(found, dtype=np.int64).reshape(-1, depth), axis=1).reshape(-1)
