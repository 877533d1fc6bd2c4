"""Measures how costs grow with tasks, ways, shots, parameters and processes: ``python benchmarks/scale.py [--only PART …]``.

Every point is measured in a fresh process with one thread, by CPU time, so that its memory is its own: the median of some
steps after those that trace, and the peak of resident memory over that before the first step.

    tasks       sinusoids, 10 to 100,000 a step, whole and in chunks of 1,000
    examples    5-way 1-shot to 50-way and to 50-shot, Conv4 of 16 channels at 28×28
    parameters  MLPs of 10³ to 10⁷ parameters, by the width of their layers
    reduction   the sum of gradients of 10³ to 10⁸ bytes over two processes (gloo), by wall time
    stream      drawing 1,000 tasks from the first, the millionth and the billionth on
    gpus        not measured: a step on 1 to 64 GPUs, reckoned from figures of one GPU (docs/benchmarks.md)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from harness import RESULTS, machine
from rich.console import Console
from rich.table import Table

from metareg import MetaLearner, TaskSpec
from metareg.registry.plugins import resolve
from metareg.util.devices import peak_memory, reset_peak_memory

MB = 1e6
LINK, HOP = 50e9, 5e-6
"""Assumed bytes per second of a 400 Gbit/s link, and seconds per hop."""
GPU_WORKS = [
    ("Conv4-64, 28×28", 4, 20.8e-3, 0.42e-3, 4 * 112_000),
    ("ResNet12, 84×84", 2, 98.9e-3, 3.3e-3, 4 * 7_999_365),
]
"""Tasks per GPU, seconds of a step on one (an H100, docs/benchmarks.md) and of drawing a task, bytes of a gradient."""
POINTS = TaskSpec((1,), (1,))


def measure_steps(learner: MetaLearner, batch: Any, steps: int) -> dict[str, float]:
    """Return CPU seconds per step, and the peak bytes above the level before the first step."""
    before = reset_memory()
    learner.step(batch)
    learner.step(batch)
    seconds = [time_work(lambda: learner.step(batch)) for _ in range(steps)]
    return {"seconds": statistics.median(seconds), "bytes": peak() - before}


def time_work(work: Callable[[], object]) -> float:
    """Return the CPU seconds of some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def reset_memory() -> int:
    """Reset the record of peak memory, and return the current memory."""
    reset_peak_memory(torch.device("cpu"))
    return peak()


def peak() -> int:
    found = peak_memory(torch.device("cpu"))
    if found is None:
        raise SystemExit("This system does not say how much memory a process took.")
    return found


def probe_tasks(tasks: int, chunk: int | None) -> dict[str, float]:
    learner = MetaLearner("mlp", loss="mse", spec=POINTS, strategy="vectorized", chunk=chunk, inner_lr=0.01)
    batch = resolve("tasks", "sinusoid").instance.episodes("train", range(tasks), 0)
    return measure_steps(learner, batch, 5 if tasks <= 1000 else 2)


def probe_examples(ways: int, shots: int) -> dict[str, float]:
    task = resolve("tasks", "glyphs", {"ways": ways, "shots": shots}).instance
    batch = task.episodes("train", range(4), 0)
    learner = MetaLearner("conv4", spec=task.spec, model_options={"width": 16}, strategy="traced", inner_lr=0.4)
    return measure_steps(learner, batch, 3) | {"examples": batch.support_y[0].numel() + batch.query_y[0].numel()}


def probe_parameters(width: int) -> dict[str, float]:
    learner = MetaLearner(
        "mlp", loss="mse", spec=POINTS, model_options={"hidden": [width, width]}, strategy="vectorized", inner_lr=0.001
    )
    batch = resolve("tasks", "sinusoid").instance.episodes("train", range(4), 0)
    learner.initialize(batch.support_x[0])
    parameters = sum(value.numel() for value in learner.meta_parameters.values())
    return measure_steps(learner, batch, 5) | {"parameters": parameters}


def probe_reduction(size: int, rank: int, port: int) -> dict[str, float]:
    """Return the wall-clock seconds to sum a float32 gradient of the given bytes over two processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    gradient, seconds = torch.zeros(size // 4), []
    for _ in range(12):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(gradient)
        seconds.append(time.perf_counter() - start)
    torch.distributed.destroy_process_group()
    return {"seconds": statistics.median(seconds[2:])}


def probe_stream(first: int) -> dict[str, float]:
    """Return the CPU seconds to draw tasks from a number on, and check that they equal tasks drawn one by one."""
    source = resolve("tasks", "sinusoid").instance
    batch = source.episodes("train", range(first, first + 1000), 0)
    alone = source.episodes("train", [first + 999], 0)
    if not torch.equal(batch.query_y[999], alone.query_y[0]):
        raise SystemExit("A task depends on those that are drawn beside it.")
    draw = [time_work(lambda: source.episodes("train", range(first, first + 1000), 0)) for _ in range(20)]
    return {"seconds": statistics.median(draw)}


def reckon_gpus() -> Iterator[dict[str, Any]]:
    """Estimate a step of several GPUs: computing, drawing a share, and a ring all-reduce of gradients.

    A ring moves 2 (G − 1) / G of the gradient over each link and takes 2 (G − 1) hops.
    """
    for name, tasks, step, draw, size in GPU_WORKS:
        for gpus in (1, 8, 64):
            sent = 2 * (gpus - 1) / gpus * size / LINK + 2 * (gpus - 1) * HOP
            alone = step + draw * tasks
            yield {
                "work": name, "GPUs": gpus, "computing": step, "drawing": draw * tasks, "sum": sent,
                "efficiency": alone / (alone + sent),
            }  # fmt: skip


PROBES: dict[str, Callable[..., dict[str, float]]] = {
    "tasks": probe_tasks,
    "examples": probe_examples,
    "parameters": probe_parameters,
    "reduction": probe_reduction,
    "stream": probe_stream,
}
GRID: dict[str, list[list[Any]]] = {
    "tasks": [*([n, None] for n in (10, 100, 1000, 10_000)), *([n, 1000] for n in (10_000, 100_000))],
    "examples": [[5, 1], [10, 1], [20, 1], [50, 1], [5, 5], [5, 15]],
    "parameters": [[width] for width in (30, 100, 316, 1000, 3160)],
    "reduction": [[10**power] for power in range(3, 9)],
    "stream": [[0], [10**6], [10**9]],
}
TITLES = {
    "tasks": ("tasks", "chunk"),
    "examples": ("ways", "shots"),
    "parameters": ("width",),
    "reduction": ("bytes",),
    "stream": ("first task",),
}


def run_probe(part: str, point: list[Any]) -> dict[str, float]:
    """Measure one point in a fresh process, or in two if gradients are summed over processes."""
    requests = [[*point, rank, 29_511 + len(str(point[0]))] for rank in (0, 1)] if part == "reduction" else [point]
    commands = [[sys.executable, __file__, "--probe", json.dumps([part, request])] for request in requests]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    answers = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{part} {point} failed.")
    found: dict[str, float] = json.loads(answers[0].splitlines()[-1])
    return found


def measure(part: str) -> Iterator[dict[str, Any]]:
    if part == "gpus":
        yield from reckon_gpus()
        return
    for point in GRID[part]:
        yield dict(zip(TITLES[part], point, strict=True)) | run_probe(part, point)


def show(part: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(*rows[0], title=part)
    for row in rows:
        table.add_row(*(format_cell(name, value) for name, value in row.items()))
    return table


def format_cell(name: str, value: Any) -> str:
    if name in ("seconds", "computing", "drawing", "sum"):
        return f"{1e3 * value:.3g} ms"
    if name == "efficiency":
        return f"{100 * value:.0f} %"
    if name == "bytes" and isinstance(value, float | int):
        return f"{value / MB:.3g} MB"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*GRID, "gpus"], default=[*GRID, "gpus"], help="what to measure")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.probe:
        part, point = json.loads(options.probe)
        print(json.dumps(PROBES[part](*point)))
        return
    path = RESULTS / "scale.json"
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for part in options.only:
        content[part] = {"machine": machine(threads=1), "rows": list(measure(part))}
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        Console().print(show(part, content[part]["rows"]))


if __name__ == "__main__":
    main()
