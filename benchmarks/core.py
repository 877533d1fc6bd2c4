"""Measures the core against reference loops in one run: ``python benchmarks/core.py [--only NAME …] [--threads N]``.

Before two steps are compared, their meta-gradients are checked to be equal. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import RESULTS, Row, check_same_gradient, interleaved, interleaved_clocks, machine, report
from loops import (
    ClonedModules,
    Conv4,
    FunctionalLoop,
    Higher,
    LoopByHand,
    ParallelMetalearn,
    Reference,
    Tasks,
    TracedByHand,
    mlp,
)

from metareg import Episodes, MetaLearner
from metareg.registry.task_source import TaskSource
from metareg.util.malloc import keep_freed_memory

Result = tuple[list[Row], dict[str, Any]]

TASKS = 25
SINUSOID: dict[str, Any] = {"inner_lr": 0.01, "inner_steps": 1}
_BLOCK = 100


@cache
def sinusoid_source() -> TaskSource:
    """The plugin, loaded once: finding it takes metareg some milliseconds, which no longer training would notice."""
    return TaskSource.of("sinusoid")


def sinusoid_blocks(steps: int) -> Iterator[Tasks]:
    """The sinusoid plugin's training tasks of some steps, drawn in blocks of many steps like in `MetaLearner.fit`."""
    for first in range(0, steps, _BLOCK):
        last = min(first + _BLOCK, steps)
        (drawn,) = sinusoid_source().episodes("train", range(first * TASKS, last * TASKS), seed=0)
        yield tuple(part.contiguous() for part in drawn.parts)


def sinusoid_batches(steps: int) -> Iterator[Tasks]:
    """The same tasks, one batch after the other."""
    for stack in sinusoid_blocks(steps):
        for start in range(0, len(stack[0]), TASKS):
            yield tuple(part[start : start + TASKS] for part in stack)


def by_hand(reference: Reference) -> Callable[[int], None]:
    """Train with a reference loop: draw tasks, compute the meta-gradient, update with Adam."""

    def run(steps: int) -> None:
        total = 0.0
        for tasks in sinusoid_batches(steps):
            total += reference.step(tasks)

    def run_blocks(steps: int) -> None:
        for stack in sinusoid_blocks(steps):
            reference.take_steps(tuple(part.unflatten(0, (-1, TASKS)) for part in stack)).sum().item()

    return run_blocks if isinstance(reference, LoopByHand) else run


def by_metareg(learner: MetaLearner) -> Callable[[int], object]:
    """Train with `MetaLearner.fit`, which does the same work."""
    return lambda steps: learner.fit(sinusoid_source(), steps, meta_batch=TASKS)


def checked_learner(
    model: torch.nn.Module,
    tasks: Tasks,
    expected: dict[str, torch.Tensor],
    tolerance: float = 1e-4,
    **options: Any,
) -> MetaLearner:
    """Return a learner whose meta-gradient was checked, already traced or compiled if its strategy does so."""
    learner = MetaLearner(model, **options)
    for _ in range(2):  # the second call traces the graph
        _, grads = learner.meta_gradient(Episodes(*tasks))
        check_same_gradient(f"metareg {options}", grads, expected, tolerance)
    return learner


# ------------------------------------------------------------------------------------------------------------- sinusoid


def sinusoid() -> Result:
    """Time whole training steps on sinusoids: 25 tasks, 10-shot, one inner step."""
    torch.manual_seed(0)
    model = mlp()
    (tasks,) = sinusoid_batches(1)
    references: dict[str, Reference] = {
        "module clones": ClonedModules(model, F.mse_loss, **SINUSOID),
        "functional_call loop": FunctionalLoop(model, F.mse_loss, **SINUSOID),
        "higher": Higher(model, F.mse_loss, **SINUSOID),
        "parallel-metalearn": ParallelMetalearn(model, F.mse_loss, tasks=TASKS, **SINUSOID),
    }
    expected = references["functional_call loop"].gradient(tasks)
    for name, reference in references.items():
        check_same_gradient(name, reference.gradient(tasks), expected)
    works = {name: by_hand(reference) for name, reference in references.items()}
    for strategy in ("compiled", "vectorized", "serial"):
        learner = checked_learner(model, tasks, expected, loss="mse", strategy=strategy, **SINUSOID)
        works[strategy] = by_metareg(learner)
    steps = dict.fromkeys(works, 4) | {"compiled": 1000, "vectorized": 200, "parallel-metalearn": 20}
    for name, work in works.items():
        work(steps[name])
    times = interleaved_clocks(works, steps, rounds=30, seconds=30)
    medians = {name: 1e3 * statistics.median(each.cpu for each in blocks) for name, blocks in times.items()}

    def row(ours: str, theirs: str, target: float | None = None) -> Row:
        return Row(f"sinusoid, 25 tasks, {ours}", theirs, medians[ours], medians[theirs], "ms", target=target)

    rows = [
        row("compiled", "module clones", 70),
        row("vectorized", "module clones", 17),
        row("compiled", "parallel-metalearn", 7),
        row("compiled", "higher"),
        row("compiled", "functional_call loop"),
        row("vectorized", "parallel-metalearn"),
        row("serial", "module clones"),
        row("serial", "functional_call loop"),
    ]
    return rows, {"milliseconds_per_step": medians}


# ---------------------------------------------------------------------------------------------------------------- hooks


def hooks() -> Result:
    """Time the overhead of the registry and hooks per step, against the same step written by hand."""
    torch.manual_seed(0)
    model = mlp()
    (tasks,) = sinusoid_batches(1)
    expected = FunctionalLoop(model, F.mse_loss, **SINUSOID).gradient(tasks)
    rows, raw = [], {}
    for strategy, hand, steps in (
        ("vectorized", TracedByHand(model, F.mse_loss, **SINUSOID), 200),
        ("compiled", LoopByHand(model, F.mse_loss, **SINUSOID), 1000),
    ):
        check_same_gradient(f"by hand, {strategy}", hand.gradient(tasks), expected)
        learner = checked_learner(model, tasks, expected, loss="mse", strategy=strategy, **SINUSOID)
        works = {"metareg": by_metareg(learner), "by hand": by_hand(hand)}
        for work in works.values():
            work(_BLOCK)
        if isinstance(hand, LoopByHand):
            check_same_gradient("weights by hand", hand.weights, learner.meta_parameters)
        times = interleaved_clocks(works, dict.fromkeys(works, steps), rounds=300, seconds=20)
        ours, theirs = ([1e3 * each.cpu for each in blocks] for blocks in times.values())
        figure = statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
        medians = statistics.median(ours), statistics.median(theirs)
        name, against = f"hooks, sinusoid, {strategy}, CPU time", "the same by hand"
        rows.append(Row(name, against, *medians, "ms", "difference", 0.03, figure))
        raw[strategy] = {"metareg": ours, "by hand": theirs, "paired": figure}
    return rows, {"milliseconds_per_step": raw}


# ----------------------------------------------------------------------------------------------------------------- ANIL


def anil() -> Result:
    """Time ANIL against MAML with the default strategy: Conv4, 28×28, 5-way, 15 queries per class, 4 tasks."""
    keep_freed_memory()  # as the command does
    rows, raw = [], {}
    for channels, shots, target in ((32, 1, 2.4), (64, 1, 2.4), (32, 5, 4.0)):
        torch.manual_seed(0)
        model = Conv4(channels, 28)
        tasks = image_tasks(4, 28, 1, shots)
        # In float64: in float32 two right gradients differ by 2e-3 here, since rounding moves the places of some maxima.
        exact_model, exact = copy.deepcopy(model).double(), Episodes(*tasks).to("cpu", torch.float64)
        settings: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 5}
        works: dict[str, Callable[[int], object]] = {}
        for algorithm, adapts in (("anil", ("head.",)), ("maml", ("",))):
            expected = FunctionalLoop(exact_model, F.cross_entropy, adapts=adapts, **settings).gradient(exact.parts)
            checked_learner(exact_model, exact.parts, expected, tolerance=1e-6, algo=algorithm, **settings)
            learner = MetaLearner(model, algo=algorithm, **settings)
            for _ in range(2):  # the second call traces the graph
                learner.meta_gradient(Episodes(*tasks))
            works[algorithm] = stepping(learner, Episodes(*tasks))
        times = interleaved_clocks(works, {"anil": 2, "maml": 1}, rounds=12, seconds=12)
        ours, theirs = (1e3 * statistics.median(each.cpu for each in blocks) for blocks in times.values())
        work = f"ANIL, 5 inner steps, Conv4-{channels}, {shots}-shot"
        rows.append(Row(work, "MAML here", ours, theirs, "ms", target=target))
        raw[f"Conv4-{channels}, {shots}-shot"] = {"anil": ours, "maml": theirs}
    return rows, {"milliseconds_per_step": raw}


def image_tasks(tasks: int, size: int, image_channels: int, shots: int, ways: int = 5, query: int = 15) -> Tasks:
    """Return noise in the shape of few-shot image tasks; times do not depend on the content."""
    generator = torch.Generator().manual_seed(0)

    def drawn(examples: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.rand(tasks, ways * examples, image_channels, size, size, generator=generator)
        return x, torch.arange(ways).repeat(tasks, examples)

    return (*drawn(shots), *drawn(query))


def stepping(learner: MetaLearner, episodes: Episodes) -> Callable[[int], None]:
    """Train repeatedly on the same tasks."""

    def run(steps: int) -> None:
        for _ in range(steps):
            learner.step(episodes)

    return run


# --------------------------------------------------------------------------------------------------------------- memory


def memory() -> Result:
    """Compare the peak memory of 20 inner steps with that of one: Conv4-64 on 84×84, 5-way 5-shot, one task."""
    rows = []
    raw: dict[str, float] = {}
    for strategy in ("serial", "vectorized"):
        few, many = (memory_of(strategy, "recompute", steps) for steps in (1, 20))
        rows.append(Row(f"peak memory, 20 inner steps, {strategy}", "1 inner step", many, few, "MB", "ratio", 1.15))
        raw |= {f"{strategy}, recompute, 1 inner step": few, f"{strategy}, recompute, 20 inner steps": many}
        if strategy == "serial":
            # Storing the graphs of 20 steps takes more than 24 GiB.
            stored = raw["serial, store, 5 inner steps"] = memory_of(strategy, "store", 5)
            rows.append(
                Row("peak memory, 20 inner steps, serial", "memory='store', 5 steps", many, stored, "MB", "ratio")
            )
    return rows, {"megabytes_over_start": raw}


def memory_of(strategy: str, kind: str, inner_steps: int) -> float:
    """Return the peak memory of a fresh process above its start, in MB.

    Memory that large tensors free goes back to the system at once. By default, glibc keeps what it thinks will be needed,
    and the peaks of two equal processes differ by 15 %.
    """
    command = [sys.executable, __file__, "--memory-probe", strategy, kind, str(inner_steps)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(found.stdout.split()[-1])


def memory_probe(strategy: str, kind: str, inner_steps: int) -> None:
    """Compute two meta-gradients (some strategies trace the second), and print the peak resident memory in MB."""
    torch.manual_seed(0)
    learner = MetaLearner(Conv4(64, 84, 3), strategy=strategy, memory=kind, inner_steps=inner_steps, inner_lr=0.01)
    episodes = Episodes(*image_tasks(1, 84, 3, shots=5))
    start = _resident("VmRSS")
    for _ in range(1 if strategy == "serial" else 2):
        learner.meta_gradient(episodes)
    print(_resident("VmHWM") - start)


def _resident(field: str) -> float:
    """Return a memory size of this process in MB from Linux; getrusage would include the parent's peak before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit("The memory benchmark needs Linux: it reads /proc/self/status.")


# -------------------------------------------------------------------------------------------------------------- startup


def startup() -> Result:
    """Compare the wall-clock times of `metareg --help` and `metareg plugins` with that of an empty Python process."""
    metareg = shutil.which("metareg", path=str(Path(sys.executable).parent))
    if metareg is None:
        raise SystemExit("There is no command metareg beside this Python; install metareg into its environment.")
    commands = {
        "metareg --help": [metareg, "--help"],
        "metareg plugins": [metareg, "plugins"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }

    def running(command: list[str]) -> Callable[[int], object]:
        return lambda _: subprocess.run(command, check=True, capture_output=True)

    works = {name: running(command) for name, command in commands.items()}
    for work in works.values():
        work(1)
    times = interleaved(works, dict.fromkeys(works, 1), rounds=9)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    empty = medians.pop("python -c pass")
    rows = [Row(name, "python -c pass", taken, empty, "s", "difference", 0.3) for name, taken in medians.items()]
    return rows, {"seconds": {**medians, "python -c pass": empty}}


WORKS: dict[str, Callable[[], Result]] = {
    "sinusoid": sinusoid, "hooks": hooks, "anil": anil, "memory": memory, "startup": startup,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="measure these alone")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads for what is timed; default 1")
    parser.add_argument("--out", type=Path, default=RESULTS / "core.json", help="where the results are written")
    parser.add_argument("--memory-probe", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_probe:
        strategy, kind, inner_steps = options.memory_probe
        memory_probe(strategy, kind, int(inner_steps))
        return
    torch.set_num_threads(options.threads)
    about = machine(options.threads)
    rows: list[Row] = []
    raw: dict[str, Any] = {}
    for name in options.only:
        print(f"{name}: {(WORKS[name].__doc__ or '').strip()}", file=sys.stderr, flush=True)
        new_rows, raw[name] = WORKS[name]()
        rows += new_rows
    report(rows, about, raw, options.out)


if __name__ == "__main__":
    main()
