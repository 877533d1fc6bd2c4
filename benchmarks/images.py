"""The figures of image tasks, measured side by side: ``python benchmarks/images.py [--only NAME …] [--compiled]``.

Every two steps that are compared are first checked to give the same meta-gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import RESULTS, Row, check_same_gradient, interleaved, machine, paired, report
from loops import ClonedModules

from metareg import Episodes, MetaLearner, TaskSpec
from metareg.registry import resolve

WAYS, SHOTS, QUERY, TASKS = 5, 1, 15, 4
INNER_LR = 0.4
SPECS = {28: TaskSpec((1, 28, 28), (WAYS,)), 84: TaskSpec((3, 84, 84), (WAYS,))}


def episodes(spec: TaskSpec) -> Episodes:
    """One meta-batch of random images, in memory as image tasks give them: the channels last."""
    draw = torch.Generator().manual_seed(0)
    channels, height, width = spec.input_shape
    parts: list[torch.Tensor] = []
    for each in (SHOTS, QUERY):
        images = torch.rand(TASKS, WAYS * each, height, width, channels, generator=draw)
        parts += [images.movedim(-1, 2), torch.arange(WAYS).repeat_interleave(each).expand(TASKS, -1)]
    return Episodes(*parts)


def conv4(size: int, strategies: list[dict[str, Any]], rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """Conv4 with 64 channels, MAML, one inner step: metareg against a loop over cloned modules."""
    spec = SPECS[size]
    batch = episodes(spec)
    model = resolve("models", "conv4").instance.build(spec)
    loop = ClonedModules(model, F.cross_entropy, inner_lr=INNER_LR)
    # The loop gets its images as data loaders give them: the channels first.
    tasks = tuple(part.clone(memory_format=torch.contiguous_format) for part in batch.parts)
    expected = loop.gradient(tasks)
    works: dict[str, Callable[[int], object]] = {"loop": _repeated(lambda: loop.step(tasks))}
    for options in strategies:
        learner = MetaLearner(model, "maml", inner_lr=INNER_LR, **options)
        name = " ".join(f"{key}={value}" for key, value in options.items())
        if options.get("precision") != "bf16":
            check_same_gradient(name, learner.meta_gradient(batch)[1], expected, tolerance=1e-3)
        for _ in range(2):  # the second call of a shape traces
            learner.step(batch)
        works[name] = _repeated(lambda learner=learner: learner.step(batch))
    times = interleaved(works, dict.fromkeys(works, 1), rounds, seconds=400)
    rows = []
    for name in list(works)[1:]:
        target = None
        if "strategy=auto" in name:
            target = 1.8 if "bf16" in name else 1.3
        ours, theirs = min(times[name]), min(times["loop"])
        rows.append(
            Row(
                f"Conv4-64, {size}×{size}, {name}", "a loop over cloned modules", 1e3 * ours, 1e3 * theirs, "ms",
                target=target, figure=paired(times["loop"], times[name]),
            )
        )  # fmt: skip
    return rows, {f"conv4-{size}": times}


def data(size: int) -> tuple[list[Row], dict[str, Any]]:
    """What drawing the tasks of a step takes of the step, on glyphs of the size."""
    task = resolve("tasks", "glyphs", {"size": size, "channels": 1 if size == 28 else 3}).instance
    learner = MetaLearner("conv4", "maml", spec=task.spec, inner_lr=INNER_LR)
    task.episodes("train", range(TASKS), 0)
    drawing, stepping = [], []
    for number in range(1, 6):
        start = time.perf_counter()
        batch = task.episodes("train", range(number * TASKS, (number + 1) * TASKS), 0)
        middle = time.perf_counter()
        learner.step(batch)
        drawing.append(middle - start)
        stepping.append(time.perf_counter() - middle)
    row = Row(
        f"drawing {TASKS} tasks of {size}×{size} glyphs", "a Conv4-64 step on them", 1e3 * min(drawing),
        1e3 * min(stepping), "ms", compare="ratio", target=0.05,
    )  # fmt: skip
    return [row], {f"data-{size}": {"drawing": drawing, "step": stepping}}


def _repeated(step: Callable[[], object]) -> Callable[[int], None]:
    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["data-28", "data-84", "conv4-28", "conv4-84"], metavar="NAME")
    parser.add_argument(
        "--compiled", action="store_true", help="also one compiled task at a time (compiling takes minutes)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = machine(arguments.threads)
    strategies: list[dict[str, Any]] = [
        {"strategy": "auto"},
        {"strategy": "auto", "precision": "bf16"},
        {"strategy": "vectorized"},
        {"strategy": "serial"},
    ]
    if arguments.compiled:
        strategies.append({"strategy": "compiled", "chunk": 1})
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    for name in arguments.only or ["data-28", "data-84", "conv4-28", "conv4-84"]:
        kind, _, size = name.partition("-")
        found = data(int(size)) if kind == "data" else conv4(int(size), strategies, arguments.rounds)
        rows += found[0]
        raw |= found[1]
    report(rows, about, raw, RESULTS / "images.json")


if __name__ == "__main__":
    main()
