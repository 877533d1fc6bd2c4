"""How long a training step takes in each strategy, beside a loop over cloned modules as learn2learn has it."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from harness import interleaved, paired
from images import SPECS, as_published, episodes
from loops import ClonedModules, Loss, Tasks, mlp
from torch import Tensor, nn

from device_parts.jobs import Job, Row, describe_problem
from metareg import Episodes, MetaLearner
from metareg.engine import tracing
from metareg.engine.shared_graphs import SHARED
from metareg.registry.plugins import resolve
from metareg.registry.task_source import TaskSource
from metareg.util.devices import move_tensors, peak_memory, reset_peak_memory

__all__ = ["LAUNCHED", "SETTINGS", "STRATEGIES", "Cell", "list_compilations", "list_jobs"]

LAUNCHED = ", no CUDA graph"
"""Follows a strategy whose kernels Python launches one by one: what the CUDA graph gains."""
STRATEGIES = ("vectorized", f"vectorized{LAUNCHED}", "traced", "serial", "compiled", f"compiled{LAUNCHED}")
"""Those that may take all the time come last."""
Cell = tuple[str, str]
"""A setting (of `SETTINGS`) and a precision, ``"fp32"`` or ``"bf16"``."""
_ROUNDS = 40
_CONVOLVES = ("Conv4", "ResNet12")
"""How the names of settings begin whose compilation takes minutes on a GPU; `auto` does not choose it."""


@dataclass(frozen=True)
class Work:
    """MAML on one batch of tasks, for metareg and for the loop."""

    model: nn.Module
    batch: list[Episodes]
    loss: Loss
    options: Mapping[str, Any]
    """Of both: the inner loop's."""
    loop_model: nn.Module
    loop_tasks: Tasks


def sinusoid(inner_steps: int) -> Work:
    torch.manual_seed(0)
    model = mlp()
    batch = TaskSource.of("sinusoid").episodes("train", range(25), 0)
    return Work(model, batch, F.mse_loss, {"inner_lr": 0.01, "inner_steps": inner_steps}, model, batch[0].parts)


def images(size: int, model_name: str, model_options: Mapping[str, Any]) -> Work:
    torch.manual_seed(0)
    model = resolve("models", model_name, model_options).instance.build(SPECS[size])
    batch = episodes(SPECS[size])
    tasks = tuple(part.contiguous() for part in batch.parts)  # as data loaders give images: the channels first
    published = as_published(model) if model_name == "conv4" else model
    return Work(model, [batch], F.cross_entropy, {"inner_lr": 0.4, "inner_steps": 1}, published, tasks)


def cora() -> Work:
    """Cora, 2-way 3-shot, 8 tasks, 5 inner steps: the loop propagates over the whole graph, by a sparse product."""
    from metareg_graph import BlockNetwork, Cora

    options = {"shots": 3, "query": 12, "standardised": False}
    task = Cora(Cora.Config(inputs="gcn", **options))
    torch.manual_seed(0)
    model = BlockNetwork("gcn", task.spec, 64, 2)
    (nodes,) = Cora(Cora.Config(inputs="nodes", **options)).episodes("train", range(8), 0)
    tasks = (nodes.support_x["nodes"], nodes.support_y, nodes.query_x["nodes"], nodes.query_y)
    batch = task.episodes("train", range(8), 0)
    inner = {"inner_lr": 0.1, "inner_steps": 5}
    return Work(model, batch, F.cross_entropy, inner, WholeGraph(model, task.data.graph, task.data.features), tasks)


class WholeGraph(nn.Module):
    """The two-layer GCN of `BlockNetwork`, written on all nodes; it maps numbers of nodes to scores."""

    def __init__(self, blocks: nn.Module, graph: Any, features: Tensor) -> None:
        super().__init__()
        self.layers, self.head = copy.deepcopy(blocks.body.layers), copy.deepcopy(blocks.head)
        source, target = graph.edges()
        loops = torch.arange(graph.num_nodes())
        ends = torch.stack([torch.cat([target, loops]), torch.cat([source, loops])])
        degree = torch.bincount(ends[0]).float()
        weights = (degree[ends[0]] * degree[ends[1]]).rsqrt()
        self.register_buffer(
            "adjacency", torch.sparse_coo_tensor(ends, weights, (len(loops),) * 2, check_invariants=False).coalesce()
        )
        self.register_buffer("features", features)

    def forward(self, nodes: Tensor) -> Tensor:
        hidden = self.features
        for layer in self.layers:
            hidden = torch.sparse.mm(self.adjacency, hidden @ layer.weight.T).add(layer.bias).relu()
        outputs: Tensor = self.head(hidden[nodes])
        return outputs


SETTINGS: Mapping[str, Callable[[], Work]] = {
    "sinusoid, 25 tasks": lambda: sinusoid(1),
    "sinusoid, 25 tasks, 5 inner steps": lambda: sinusoid(5),
    "Conv4-64, 28×28, 4 tasks": lambda: images(28, "conv4", {}),
    "Conv4-64, 84×84, 2 tasks": lambda: images(84, "conv4", {}),
    "Cora, GCN, 8 tasks": cora,
    "ResNet12, 84×84, 2 tasks": lambda: images(84, "resnet12", {}),
    "Conv4-8, 28×28, 4 tasks": lambda: images(28, "conv4", {"width": 8}),
}


def choose_strategies(cell: Cell, device: str, *, compiled: bool = True) -> list[str]:
    """Return the strategies that a cell is timed in."""
    setting, precision = cell
    compiled = compiled and not setting.startswith(_CONVOLVES)
    launched = torch.device(device).type == "cuda" and precision == "fp32"
    return [
        name
        for name in STRATEGIES
        if (compiled or not name.startswith("compiled")) and (launched or not name.endswith(LAUNCHED))
    ]


def list_compilations(cells: Sequence[Cell], device: str) -> list[Job]:
    """Jobs that compile, side by side, what `list_jobs` times: compilers keep what they made."""
    keys = [
        {"setting": cell[0], "precision": cell[1], "strategy": strategy}
        for cell in cells
        for strategy in choose_strategies(cell, device)
        if strategy == "compiled"
    ]
    return [Job(key, compile_step, {**key, "device": device}, seconds=300) for key in keys]


def list_jobs(cells: Sequence[Cell], device: str, seconds: float, *, compiled: bool = True) -> list[Job]:
    """A job for each cell, which times one strategy after the other for so many seconds."""
    jobs = []
    for cell in cells:
        key = {"setting": cell[0], "precision": cell[1]}
        strategies = choose_strategies(cell, device, compiled=compiled)
        arguments = {**key, "strategies": strategies, "device": device, "seconds": seconds}
        jobs.append(Job(key, time_strategies, arguments, 60 + 5 * seconds * len(strategies)))
    return jobs


def compile_step(setting: str, precision: str, strategy: str, device: str) -> Iterator[Row]:
    """How long it takes to the end of the first compiled step."""
    work = SETTINGS[setting]()
    learner = _create_learner(work, precision, strategy, device)
    began = time.perf_counter()
    learner.step(work.batch)
    yield {"status": "compiled", "seconds": round(time.perf_counter() - began, 1)}


def time_strategies(
    setting: str, precision: str, strategies: Sequence[str], device: str, seconds: float
) -> Iterator[Row]:
    """A row for each strategy: milliseconds a step, the loop's beside it, and what memory each took at most."""
    work = SETTINGS[setting]()
    loop = ClonedModules(work.loop_model.to(device), work.loss, **work.options)
    expected = loop.gradient(move_tensors(work.loop_tasks, device))

    def step_loop(lowered: bool = False) -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16) if lowered else nullcontext():
            loop.step(move_tensors(work.loop_tasks, device))

    step_loop()
    if precision == "bf16":
        yield _guard(
            {"strategy": "the loop with autocast"}, lambda: _time(lambda: step_loop(True), step_loop, device, seconds)
        )
    for strategy in strategies:

        def measure(strategy: str = strategy) -> Row:
            began = time.perf_counter()
            learner = _create_learner(work, precision, strategy, device)

            def step() -> None:
                learner.step(work.batch)

            with _launch(strategy):
                _, grads = learner.meta_gradient(work.batch)
                off = _difference(list(grads.values()), list(expected.values()))
                for _ in range(3):  # the second call of a shape traces
                    step()
                ready = round(time.perf_counter() - began, 1)
                return _time(step, step_loop, device, seconds) | {"gradient_difference": off, "ready_seconds": ready}

        yield _guard({"strategy": strategy}, measure)


@contextmanager
def _launch(strategy: str) -> Iterator[None]:
    """Let a block's steps run without CUDA graphs if the strategy says so."""
    if not strategy.endswith(LAUNCHED):
        yield
        return
    with (
        mock.patch.object(tracing, "find_gpu", return_value=None),
        mock.patch.object(SHARED, "find", return_value=None),
    ):
        yield


def _create_learner(work: Work, precision: str, strategy: str, device: str) -> MetaLearner:
    precision = {"fp32": "full"}.get(precision, precision)
    strategy = strategy.removesuffix(LAUNCHED)
    return MetaLearner(
        work.model, "maml", loss=work.loss, metric=_metric(work.loss), precision=precision, strategy=strategy, device=device,
        **work.options,
    )  # fmt: skip


def _metric(loss: Loss) -> str:
    return "mse" if loss is F.mse_loss else "accuracy"


def _guard(row: Row, measure: Callable[[], Row]) -> Row:
    try:
        return {**row, "status": "timed", **measure()}
    except Exception as error:
        return {**row, **describe_problem(error)}


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of two gradients whose tensors come in one order, relative; in float32 rounding moves the places of maxima too."""
    distance = sum(float((a - b).double().square().sum()) for a, b in zip(found, expected, strict=True)) ** 0.5
    return distance / sum(float(b.double().square().sum()) for b in expected) ** 0.5


def _time(step: Callable[[], object], step_loop: Callable[[], object], device: str, seconds: float) -> Row:
    """Medians of blocks of steps, the two in turns."""
    works = {"step": step, "loop": step_loop}
    peaks, counts = {}, {}
    for name, work in works.items():
        work()
        reset_peak_memory(torch.device(device))
        began = time.perf_counter()
        work()
        _synchronize(device)
        took = time.perf_counter() - began
        counts[name] = max(1, round(seconds / _ROUNDS / took))
        peaks[name] = _peak_megabytes(device)
    times = interleaved(
        {name: _repeated(work, device) for name, work in works.items()}, counts, rounds=_ROUNDS, seconds=seconds
    )
    ours, theirs = (1e3 * statistics.median(times[name]) for name in works)
    return {
        "ms": ours, "loop_ms": theirs, "ratio": paired(times["loop"], times["step"]), "blocks": len(times["step"]),
        "peak_mb": peaks["step"], "loop_peak_mb": peaks["loop"],
    }  # fmt: skip


def _repeated(step: Callable[[], object], device: str) -> Callable[[int], None]:
    def run(steps: int) -> None:
        for _ in range(steps):
            step()
        _synchronize(device)

    return run


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _peak_megabytes(device: str) -> float | None:
    """Of tensors on a GPU; on a CPU it would be that of all that the process did before."""
    peak = peak_memory(torch.device(device)) if torch.device(device).type == "cuda" else None
    return None if peak is None else round(peak / 2**20, 1)
