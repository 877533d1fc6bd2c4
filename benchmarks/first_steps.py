"""Times the first training steps of a fresh process, imports and compilation included: ``python benchmarks/first_steps.py``.

100 steps on 25 sinusoids each, tasks drawn: metareg's compiled steps, with an empty cache of programs and with a filled one,
and the same steps in JAX, whose process does not import torch. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from harness import RESULTS, Clocks, Row, machine, report

_STEPS, _TASKS, _INNER_LR = 100, 25, 0.01
_SIZES = {"0": (40, 1), "2": (40, 40), "4": (1, 40)}
"""Outputs and inputs of the layers of `loops.mlp`."""
_SIDES = ("metareg, nothing cached", "metareg, cached", "JAX")


def train_metareg() -> None:
    """Take the steps in metareg."""
    import torch
    from loops import mlp

    from metareg import MetaLearner

    torch.set_num_threads(1)
    learner = MetaLearner(mlp(), loss="mse", inner_lr=_INNER_LR, inner_steps=1, strategy="compiled", head="4")
    learner.fit("sinusoid", _STEPS, meta_batch=_TASKS)


def train_jax() -> None:
    """Take the steps in JAX."""
    import numpy as np
    from jax_loops import JaxTraining, draw_sinusoids, mlp, mse

    generator = np.random.default_rng(0)
    meta = {}
    for name, (outputs, inputs) in _SIZES.items():
        meta[f"{name}.weight"] = generator.normal(size=(outputs, inputs)).astype("float32")
        meta[f"{name}.bias"] = np.zeros(outputs, "float32")
    training = JaxTraining(meta, mlp, mse, inner_lr=_INNER_LR, inner_steps=1)
    training.draw_and_train(_STEPS, partial(draw_sinusoids, tasks=_TASKS, shots=10, dtype="float32"))


def time_process(side: str, cache: str) -> Clocks:
    """Return the seconds that a process takes to its 100th step, with its children, such as the C++ compiler."""
    command = [sys.executable, __file__, "--side", side]
    start = time.monotonic()
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    cpu, end = json.loads(done.stdout)
    return Clocks(cpu, end - start)


def read_clocks() -> tuple[float, float]:
    """Return the CPU time of this process and its children, and the time on a clock that all processes share."""
    taken = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in taken), time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind; default 5")
    parser.add_argument("--out", type=Path, default=RESULTS / "first-steps.json", help="where the results are written")
    parser.add_argument("--side", choices=_SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        (train_jax if options.side == "JAX" else train_metareg)()
        print(json.dumps(read_clocks()))
        return
    times: dict[str, list[Clocks]] = {side: [] for side in _SIDES}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for side in _SIDES:
                times[side].append(time_process(side, cache))
    rows = []
    for clock in ("CPU time", "wall clock"):
        seconds = {
            side: statistics.median(getattr(each, clock.split()[0].lower()) for each in taken)
            for side, taken in times.items()
        }
        *ours, jax = seconds.values()
        for side, taken, target in zip(_SIDES, ours, (2.0, None), strict=False):
            name = f"{side}: to the 100th step"
            rows.append(Row(name, f"JAX, {clock}", taken, jax, "s", "ratio", target if clock == "CPU time" else None))
    raw = {side: [vars(each) for each in taken] for side, taken in times.items()}
    report(rows, machine(threads=1), {"seconds": raw}, options.out)


if __name__ == "__main__":
    main()
