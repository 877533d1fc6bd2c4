"""Measures graph tasks: their speed against a full-graph DGL loop, and how their cost grows with the graph.

    METAREG_DATA=FOLDER python benchmarks/graphs.py speed     # Cora, 2-way 3-shot, 8 tasks, 5 inner steps, 2-layer GCN
    METAREG_DATA=FOLDER python benchmarks/graphs.py growth    # the same task on graphs of up to 10⁶ nodes and 10⁷ edges

`speed` runs both sides in turns in one process and reports medians of CPU time, for a batch of one stack and for those of
the first 40 batches that contain a hub, whose tasks form several stacks; all after tracing. `growth` runs every size in its
own process, to measure its peak memory; `arxiv` has as many nodes and edges as ogbn-arxiv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metareg import MetaLearner, TaskSpec, task_uniform
from metareg_graph import BlockNetwork, Cora, GraphData, Inputs, Pools

WAYS, SHOTS, QUERY, TASKS, INNER_STEPS, HIDDEN, INNER_LR = 2, 3, 12, 8, 5, 64, 0.1
SIZES = {"cora": 0, "3k": 2_708, "10k": 10_000, "100k": 100_000, "arxiv": 169_343, "1M": 1_000_000}
DEGREES = {"arxiv": 14}
DEGREE, FEATURES, CLASSES, STEPS = 10, 128, 10, 40
BATCHES, CALLS_BEFORE_TRACING = 40, 34


def median_ms(function: Callable[[], Any], repeats: int) -> float:
    """Return the median CPU time of a call after one warm-up call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


# ---------------------------------------------------------------------------------------------------------------- speed


class FullGraph(nn.Module):
    """A GCN as a user of DGL would write it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        from dgl.nn import GraphConv

        self.first, self.second = GraphConv(features, HIDDEN), GraphConv(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, WAYS)

    def forward(self, graph: Any, x: Tensor, nodes: Tensor) -> Tensor:
        hidden = self.second(graph, self.first(graph, x).relu()).relu()
        outputs: Tensor = self.head(hidden[nodes])
        return outputs


def speed(repeats: int) -> dict[str, Any]:
    task = Cora(Cora.Config(inputs="gcn", shots=SHOTS, query=QUERY, standardised=False))
    episodes = task.episodes("train", range(TASKS), 0)
    blocks = BlockNetwork("gcn", task.spec, HIDDEN, 2)
    learner = MetaLearner(blocks, "maml", inner_steps=INNER_STEPS, inner_lr=INNER_LR, strategy="vectorized")

    import dgl

    graph, x = dgl.add_self_loop(task.data.graph), task.data.features
    model = FullGraph(x.shape[1])
    twins = {"first": "body.layers.0", "second": "body.layers.1", "head": "head"}
    names = {name: name.replace(name.split(".")[0], twins[name.split(".")[0]]) for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            twin = blocks.get_parameter(names[name])
            value.copy_(twin.T if _transposed(name) else twin)
    params = dict(model.named_parameters())
    nodes = Cora(task.config.model_copy(update={"inputs": "nodes"})).episodes("train", range(TASKS), 0)[0]
    support_y, query_y = nodes.support_y[0], nodes.query_y[0]

    def full_graph() -> list[Tensor]:
        """Run the tasks one by one, each inner step on the whole graph."""
        total = [torch.zeros_like(value) for value in params.values()]
        for support, query in zip(nodes.support_x["nodes"], nodes.query_x["nodes"], strict=True):
            adapted = dict(params)
            for _ in range(INNER_STEPS):
                loss = F.cross_entropy(functional_call(model, adapted, (graph, x, support)), support_y)
                grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
                adapted = {
                    name: value - INNER_LR * grad for (name, value), grad in zip(adapted.items(), grads, strict=True)
                }
            loss = F.cross_entropy(functional_call(model, adapted, (graph, x, query)), query_y) / TASKS
            for sum_, grad in zip(total, torch.autograd.grad(loss, list(params.values())), strict=True):
                sum_ += grad
        return total

    def on_blocks(batch: int = 0) -> dict[str, Tensor]:
        return learner.meta_gradient(task.episodes("train", range(batch * TASKS, (batch + 1) * TASKS), 0))[1]

    expected = dict(zip(params, full_graph(), strict=True))
    found = on_blocks()
    differences = [
        ((found[names[name]].T if _transposed(name) else found[names[name]]) - value).norm() / value.norm()
        for name, value in expected.items()
    ]
    on_blocks()  # the second call traces
    block_ms, build_ms, full_ms = (
        median_ms(on_blocks, 4 * repeats),
        median_ms(lambda: task.episodes("train", range(TASKS), 0), 4 * repeats),
        median_ms(full_graph, repeats),
    )
    hubs = [b for b in range(BATCHES) if len(task.episodes("train", range(b * TASKS, (b + 1) * TASKS), 0)) > 1]
    with_hubs = []
    for batch in hubs:
        for _ in range(CALLS_BEFORE_TRACING):
            on_blocks(batch)
        with_hubs.append(median_ms(lambda batch=batch: on_blocks(batch), 2 * repeats))
    return {
        "threads": torch.get_num_threads(),
        "batches_with_hubs": f"{len(hubs)} of {BATCHES}",
        "metareg_with_hubs_ms": [round(value, 1) for value in with_hubs],
        "ratio_with_hubs": [round(full_ms / value, 1) for value in with_hubs],
        "full_graph_ms": round(full_ms, 1),
        "metareg_ms": round(block_ms, 1),
        "of_which_building_the_blocks_ms": round(build_ms, 1),
        "ratio": round(full_ms / block_ms, 1),
        "largest_relative_difference_float32": float(max(differences)),
        "stacks": [len(stack) for stack in episodes],
    }


def _transposed(name: str) -> bool:
    """DGL's convolutions keep their weights as ``[inputs, outputs]``."""
    return name.endswith("weight") and not name.startswith("head")


# --------------------------------------------------------------------------------------------------------------- growth


def generated(nodes: int, degree: int) -> GraphData:
    """Return a random graph of a given mean degree, with random features and 10 classes."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(nodes, (2, nodes * degree // 2), generator=generator)
    return GraphData.from_edges(
        ends[0],
        ends[1],
        torch.randn(nodes, FEATURES, generator=generator),
        torch.randint(CLASSES, (nodes,), generator=generator),
    )


def one_size(name: str) -> dict[str, Any]:
    """Measure time and memory of training steps on one graph after it is loaded."""
    start = time.perf_counter()
    data = Cora(Cora.Config()).data if name == "cora" else generated(SIZES[name], DEGREES.get(name, DEGREE))
    labels = data.labels.numpy()
    inputs = Inputs(data, "gcn", 2)
    _ = inputs.table
    pools = Pools(
        [{label: np.flatnonzero(labels == label) for label in np.unique(labels).tolist()}], name, WAYS, SHOTS, QUERY
    )
    loaded = time.perf_counter() - start
    model = BlockNetwork("gcn", TaskSpec((data.features.shape[1],), (WAYS,)), HIDDEN, 2)
    learner = MetaLearner(model, "maml", inner_steps=INNER_STEPS, inner_lr=INNER_LR, strategy="vectorized")
    classes = torch.arange(WAYS)
    targets = tuple(classes.repeat_interleave(count).expand(TASKS, -1) for count in (SHOTS, QUERY))
    before = _memory_mib("VmRSS")
    _reset_peak()
    times = []
    for step in range(STEPS):
        start = time.process_time()
        tasks = range(step * TASKS, (step + 1) * TASKS)
        seeds = pools.draw("train", tasks, 0)
        episodes = inputs.episodes(
            seeds,
            targets,
            lambda count, label, tasks=tasks: task_uniform(0, "train", tasks, count, label),
        )
        learner.step(episodes)
        times.append(time.process_time() - start)
    return {
        "graph": name,
        "nodes": data.graph.num_nodes(),
        "edges": data.graph.num_edges(),
        "features": data.features.shape[1],
        "loading_s": round(loaded, 1),
        "step_ms": round(1e3 * statistics.median(times[STEPS // 4 :]), 1),
        "loaded_mib": round(before),
        "steps_add_mib": round(_memory_mib("VmHWM") - before),
    }


def _memory_mib(key: str) -> float:
    """Return a memory size of this process from Linux: ``VmRSS``, or its peak ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def _reset_peak() -> None:
    """Reset Linux's record of this process's peak memory."""
    Path("/proc/self/clear_refs").write_text("5")


def growth() -> list[dict[str, Any]]:
    rows = []
    for name in SIZES:
        done = subprocess.run([sys.executable, __file__, "size", name], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "growth", "size"])
    parser.add_argument("name", nargs="?", choices=list(SIZES), help="of a single size")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {"speed": lambda: speed(arguments.repeats), "growth": growth, "size": lambda: one_size(arguments.name)}
    print(json.dumps(result[arguments.what](), indent=2 if arguments.what != "size" else None))


if __name__ == "__main__":
    main()
