"""Measures the speed-up of a second process: ``torchrun --nproc-per-node 2 benchmarks/processes.py [--only WORK …]``.

The processes take steps together, in turns with the first one alone: with one thread and, where tensors are large enough to
be shared by threads, with as many as there are processes. The others wait meanwhile, asleep. Before anything is timed, the
meta-gradient of all together is checked to be that of one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from harness import RESULTS, Row, check_same_gradient, interleaved, machine, report

from metareg import Episodes, MetaLearner, TaskSpec
from metareg.learner.processes import Processes, join_processes
from metareg.registry.plugins import resolve

_IMAGES, _POINTS = TaskSpec((1, 28, 28), (5,)), TaskSpec((1,), (1,))


def images(tasks: int) -> Episodes:
    """5-way 1-shot tasks of 28×28 images, with 15 queries for a class."""
    draw = torch.Generator().manual_seed(0)
    parts: list[torch.Tensor] = []
    for examples in (1, 15):
        parts += [torch.rand(tasks, 5 * examples, *_IMAGES.input_shape, generator=draw)]
        parts += [torch.arange(5).repeat_interleave(examples).expand(tasks, -1)]
    return Episodes(*parts)


def points(tasks: int) -> Episodes:
    """10-shot sinusoids."""
    batch: Episodes = resolve("tasks", "sinusoid").instance.episodes("train", range(tasks), 0)
    return batch


WORKS: dict[str, tuple[Callable[[], MetaLearner], Callable[[], Episodes], int]] = {
    "vectorized": (
        lambda: MetaLearner("mlp", "maml", loss="mse", spec=_POINTS, strategy="vectorized", inner_lr=0.01),
        lambda: points(25),
        100,
    ),
    "compiled": (
        lambda: MetaLearner("mlp", "maml", loss="mse", spec=_POINTS, strategy="compiled", inner_lr=0.01),
        lambda: points(25),
        200,
    ),
    "conv4": (
        lambda: MetaLearner("conv4", "maml", spec=_IMAGES, strategy="traced", inner_lr=0.4),
        lambda: images(8),
        1,
    ),
}
"""The learners, their batches, and the steps of one turn."""
TITLES = {
    "vectorized": "sinusoid, 25 tasks, vectorized",
    "compiled": "sinusoid, 25 tasks, compiled",
    "conv4": "Conv4-64, 28×28, 8 tasks",
}


def measured(work: str, processes: Processes, rounds: int) -> dict[str, list[float]]:
    """Return seconds per step, together and alone; only in the first process."""
    make, draw, steps = WORKS[work]
    alone, shared, batch = make(), make(), draw()
    _, expected = alone.meta_gradient(batch)
    with shared.split_over(processes):
        _, given = shared.meta_gradient(batch)
        check_same_gradient(work, given, expected)

        def together(count: int) -> None:
            for _ in range(processes.first(lambda: count)):
                shared.step(batch)

        together(2)  # the second call of a shape traces
        if not processes.leads:
            while processes.first(lambda: False):
                together(0)
            return {}

        def by_itself(threads: int) -> Callable[[int], None]:
            def run(count: int) -> None:
                torch.set_num_threads(threads)
                for _ in range(count):
                    alone.step(batch)
                torch.set_num_threads(1)

            run(2)
            return run

        def call(count: int) -> None:
            processes.first(lambda: True)
            together(count)

        works = {"together": call, "1 thread": by_itself(1)}
        if work == "conv4":  # more threads do not help small models: metareg uses one
            works[f"{processes.size} threads"] = by_itself(processes.size)
        times = interleaved(works, dict.fromkeys(works, steps), rounds, seconds=100)
        processes.first(lambda: False)
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each")
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS), help="what to measure")
    arguments = parser.parse_args()
    about, rows, raw = machine(1), [], {}
    with join_processes() as processes:
        for work in arguments.only:
            times = measured(work, processes, arguments.rounds)
            if processes.leads:
                raw[work] = times
                ours = min(times["together"])
                rows += [
                    Row(
                        f"{TITLES[work]}, {processes.size} processes",
                        f"one process, {name}",
                        1e3 * ours,
                        1e3 * min(theirs),
                        "ms",
                    )
                    for name, theirs in list(times.items())[1:]
                ]
        if processes.leads:
            report(rows, about, raw, RESULTS / "processes.json")


if __name__ == "__main__":
    main()
