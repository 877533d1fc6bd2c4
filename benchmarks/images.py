"""Measures image tasks against reference loops: ``python benchmarks/images.py [--only NAME …] [--compiled]``.

Before two steps are compared, their meta-gradients are checked to be equal.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from harness import RESULTS, Row, check_same_gradient, interleaved, interleaved_clocks, machine, paired, report
from loops import ClonedModules
from operations import time_operations
from torch import nn

from metareg import Episodes, MetaLearner, TaskSpec
from metareg.engine.blocks import fuse_blocks
from metareg.registry.plugins import resolve
from metareg.util.malloc import keep_freed_memory

WAYS, SHOTS, QUERY = 5, 1, 15
TASKS = {28: 4, 84: 2}
INNER_LR = 0.4
INNER_STEPS = {"maml": 1, "anil": 5, "boil": 1, "metasgd": 1}
SPECS = {28: TaskSpec((1, 28, 28), (WAYS,)), 84: TaskSpec((3, 84, 84), (WAYS,))}


Result = tuple[list[Row], dict[str, Any]]
"""The rows of a part, and its raw times."""


def episodes(spec: TaskSpec, shots: int = SHOTS) -> Episodes:
    """Return one meta-batch of random images, channels last in memory like those of image tasks."""
    draw = torch.Generator().manual_seed(0)
    channels, height, width = spec.input_shape
    tasks = TASKS[height]
    parts: list[torch.Tensor] = []
    for each in (shots, QUERY):
        images = torch.rand(tasks, WAYS * each, height, width, channels, generator=draw)
        parts += [images.movedim(-1, 2), torch.arange(WAYS).repeat_interleave(each).expand(tasks, -1)]
    return Episodes(*parts)


def as_published(model: nn.Module) -> nn.Module:
    """Conv4 with ReLU before pooling, as everybody writes it; metareg's pools first, which is the same function."""
    model = copy.deepcopy(model)
    body: Any = model.body
    for layer in (1, 3, 5):
        body[layer] = nn.Sequential(*reversed(body[layer]))
    return model


def conv4(size: int, arguments: argparse.Namespace) -> Result:
    """Conv4 with 64 channels, MAML, one inner step: metareg against a loop over cloned modules."""
    spec = SPECS[size]
    batch = episodes(spec)
    model = resolve("models", "conv4").instance.build(spec)
    loop = ClonedModules(as_published(model), F.cross_entropy, inner_lr=INNER_LR)
    # The loop gets its images as data loaders give them: the channels first.
    tasks = tuple(part.clone(memory_format=torch.contiguous_format) for part in batch.parts)
    # In float64: in float32 two right gradients differ by 2e-3 here, since rounding moves the places of some maxima.
    exact = batch.to("cpu", torch.float64)
    expected = ClonedModules(as_published(model).double(), F.cross_entropy, inner_lr=INNER_LR).gradient(exact.parts)
    works: dict[str, Callable[[int], object]] = {"loop": _repeated(lambda: loop.step(tasks))}
    strategies: list[dict[str, Any]] = [
        {"strategy": "auto"},
        {"strategy": "auto", "precision": "bf16"},
        {"strategy": "vectorized"},
        {"strategy": "serial"},
        *[{"strategy": "compiled", "chunk": 1}] * arguments.compiled,
    ]
    for options in strategies:
        learner = MetaLearner(model, "maml", inner_lr=INNER_LR, **options)
        name = " ".join(f"{key}={value}" for key, value in options.items())
        if options.get("precision") != "bf16":
            checked = MetaLearner(copy.deepcopy(model).double(), "maml", inner_lr=INNER_LR, **options)
            check_same_gradient(name, checked.meta_gradient(exact)[1], expected, tolerance=1e-6)
        for _ in range(2):  # the second call of a shape traces
            learner.step(batch)
        works[name] = _repeated(lambda learner=learner: learner.step(batch))
    times = interleaved(works, dict.fromkeys(works, 1), arguments.rounds, seconds=400)
    rows = []
    for name in list(works)[1:]:
        target = None
        if "strategy=auto" in name:
            target = 2.4 if "bf16" in name else 1.5
        ours, theirs = min(times[name]), min(times["loop"])
        rows.append(
            Row(
                f"Conv4-64, {size}×{size}, {name}", "a loop over cloned modules", 1e3 * ours, 1e3 * theirs, "ms",
                target=target, figure=paired(times["loop"], times[name]),
            )
        )  # fmt: skip
    return rows, {f"conv4-{size}": times}


def auto(shots: int, arguments: argparse.Namespace) -> Result:
    """For each algorithm, what `auto` chooses against the fastest of the other strategies; Conv4 with 32 channels."""
    spec = SPECS[28]
    batch = episodes(spec, shots)
    model = resolve("models", "conv4", {"width": 32}).instance.build(spec)
    rows, raw = [], {}
    for algorithm, inner_steps in INNER_STEPS.items():
        options: dict[str, Any] = {"inner_lr": INNER_LR, "inner_steps": inner_steps}
        works: dict[str, Callable[[int], object]] = {}
        for strategy in ("serial", "traced", "vectorized", *["compiled"] * arguments.compiled):
            chunk = 1 if strategy == "compiled" else None
            learner = MetaLearner(model, algorithm, strategy=strategy, chunk=chunk, **options)
            for _ in range(2):
                learner.step(batch)
            works[strategy] = _repeated(lambda learner=learner: learner.step(batch))
        chosen, _ = MetaLearner(model, algorithm, **options).choose_strategy(TASKS[28], steps=10_000)
        times = interleaved(works, dict.fromkeys(works, 1), arguments.rounds, seconds=60)
        best = min((name for name in works if name != chosen), key=lambda name: statistics.median(times[name]))
        rows.append(
            Row(
                f"{algorithm}, Conv4-32, 28×28, {shots}-shot, auto: {chosen}", best,
                *(1e3 * statistics.median(times[name]) for name in (chosen, best)), "ms", compare="ratio", target=1.05,
                figure=paired(times[chosen], times[best]),
            )
        )  # fmt: skip
        raw[algorithm] = times
    return rows, {f"auto-{shots}-shot": raw}


def data(size: int, _: argparse.Namespace) -> Result:
    """What drawing the tasks of a step takes of the step, on glyphs of the size."""
    task = resolve("tasks", "glyphs", {"size": size, "channels": 1 if size == 28 else 3, "query": 15}).instance
    learner = MetaLearner("conv4", "maml", spec=task.spec, inner_lr=INNER_LR)
    tasks = TASKS[size]
    task.episodes("train", range(tasks), 0)
    drawing, stepping = [], []
    for number in range(1, 6):
        start = time.perf_counter()
        batch = task.episodes("train", range(number * tasks, (number + 1) * tasks), 0)
        middle = time.perf_counter()
        learner.step(batch)
        drawing.append(middle - start)
        stepping.append(time.perf_counter() - middle)
    row = Row(
        f"drawing {tasks} tasks of {size}×{size} glyphs", "a Conv4-64 step on them", 1e3 * min(drawing),
        1e3 * min(stepping), "ms", compare="ratio", target=0.05,
    )  # fmt: skip
    return [row], {f"data-{size}": {"drawing": drawing, "step": stepping}}


def operations(size: int, arguments: argparse.Namespace) -> Result:
    """What a step of Conv4-64 consists of, in CPU time, and what its arithmetic would take at a bare convolution's speed."""
    spec = SPECS[size]
    batch = episodes(spec)
    learner = MetaLearner("conv4", "maml", spec=spec, inner_lr=INNER_LR)
    for _ in range(2):  # the second call of a shape traces
        learner.step(batch)
    shares = time_operations(lambda: learner.step(batch), arguments.rounds)
    speed = _measure_convolution(size // 2)
    whole = 1e3 * sum(share.seconds for share in shares.values())
    flops = sum(share.flops for share in shares.values())
    rows = [
        Row(f"{kind} of Conv4-64, {size}×{size}", "the step", 1e3 * share.seconds, whole, "ms", compare="ratio")
        for kind, share in sorted(shares.items(), key=lambda item: -item[1].seconds)
    ]
    work = f"{flops / 1e9:.1f} GFLOP of it at {speed / 1e9:.0f} GFLOP/s"
    rows.append(Row(work, "the step", 1e3 * flops / speed, whole, "ms", compare="ratio"))
    raw = {kind: dataclasses.asdict(share) for kind, share in shares.items()}
    return rows, {f"operations-{size}": {"flops_per_second_of_a_convolution": speed, **raw}}


def blocks(size: int, arguments: argparse.Namespace) -> Result:
    """BatchNorm, pooling and ReLU as one operation, against the layers one by one: a step's CPU time."""
    rows, raw = [], {}
    for algorithm, width, shots in (("maml", 64, 1), ("maml", 32, 1), ("maml", 64, 5), ("anil", 64, 5)):
        batch = episodes(SPECS[size], shots)
        model = resolve("models", "conv4", {"width": width}).instance.build(SPECS[size])
        works: dict[str, Callable[[int], object]] = {}
        for name, fuse in (("fused", fuse_blocks), ("layers", lambda module: module)):
            with mock.patch("metareg.engine.split_model.fuse_blocks", fuse):
                learner = MetaLearner(model, algorithm, inner_lr=INNER_LR, inner_steps=INNER_STEPS[algorithm])
            works[name] = _repeated(partial(learner.step, batch))
            works[name](2)  # the second call of a shape traces
        clocks = interleaved_clocks(works, dict.fromkeys(works, 1), arguments.rounds, seconds=90)
        times = {name: [each.cpu for each in found] for name, found in clocks.items()}
        rows.append(
            Row(
                f"{algorithm}, Conv4-{width}, {size}×{size}, {shots}-shot", "the layers one by one",
                *(1e3 * statistics.median(times[name]) for name in works), "ms", compare="ratio",
                figure=paired(times["fused"], times["layers"]),
            )
        )  # fmt: skip
        raw[f"{algorithm}-{width}-{shots}"] = times
    return rows, {f"blocks-{size}": raw}


def _measure_convolution(size: int) -> float:
    """The floating-point operations per second of a 3×3 convolution of 64 channels, 75 images that lie channels last."""
    images = torch.rand(75, 64, size, size).contiguous(memory_format=torch.channels_last)
    weight = torch.rand(64, 64, 3, 3)
    seconds = []
    for _ in range(10):
        start = time.process_time()
        F.conv2d(images, weight, padding=1)
        seconds.append(time.process_time() - start)
    return 2 * 9 * 64 * images.numel() / min(seconds)


def _repeated(step: Callable[[], object]) -> Callable[[int], None]:
    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


PARTS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "data-28": partial(data, 28), "data-84": partial(data, 84),
    "conv4-28": partial(conv4, 28), "conv4-84": partial(conv4, 84),
    "blocks-28": partial(blocks, 28), "blocks-84": partial(blocks, 84),
    "operations-28": partial(operations, 28), "operations-84": partial(operations, 84),
    "auto-1-shot": partial(auto, 1), "auto-5-shot": partial(auto, 5),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME")
    parser.add_argument(
        "--compiled", action="store_true", help="also one compiled task at a time (compiling takes minutes)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command does
    torch.set_num_threads(arguments.threads)
    about = machine(arguments.threads)
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    for name in arguments.only:
        found = PARTS[name](arguments)
        rows += found[0]
        raw |= found[1]
    report(rows, about, raw, RESULTS / "images.json")


if __name__ == "__main__":
    main()
