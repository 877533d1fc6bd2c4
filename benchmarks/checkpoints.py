"""Measures the cost of checkpoints at the default interval: ``python benchmarks/checkpoints.py [--seconds S]``.

A real run is trained for long enough that checkpoints become due. The time spent on them (the check after every step, and
each write with its flushes) is divided by the training time. Also measured: the time of one write for models of several
sizes, and its share of the resulting interval. The target is at most 1 %.
See docs/runs.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, machine
from torch import nn

import metareg
from metareg import Episodes, MetaLearner, RunConfig, hookimpl
from metareg.learner.training import Progress
from metareg.runs import training
from metareg.runs.checkpoints import LEAST_RATIO, CheckpointManager, Checkpoints
from metareg.util.signals import StopRequest

_MINUTES = RunConfig.model_fields["checkpoint_minutes"].default
_KEEP = RunConfig.model_fields["keep_checkpoints"].default


class TimedManager(CheckpointManager):
    """Adds up the time spent in checkpoints."""

    seconds = 0.0
    saves = 0
    steps = 0

    def after_step(self, *, must: bool) -> None:
        began = time.perf_counter()
        super().after_step(must=must)
        TimedManager.seconds += time.perf_counter() - began
        TimedManager.steps += 1

    def save(self) -> None:
        super().save()
        TimedManager.saves += 1


class UntilThen:
    """Stops a run after a given time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.trained = 0.0

    @hookimpl
    def on_run_start(self) -> None:
        self._began = time.perf_counter()

    @hookimpl
    def on_step(self) -> None:
        self.trained = time.perf_counter() - self._began
        if self.trained > self._seconds:
            raise KeyboardInterrupt


def share_of_a_run(seconds: float, folder: Path) -> dict[str, Any]:
    """Train MAML with CML on sinusoids; a validation that is the best so far also writes a checkpoint."""
    until = UntilThen(seconds)
    training.CheckpointManager = TimedManager  # type: ignore[attr-defined]
    settings: dict[str, Any] = {"steps": 10**7, "eval_every": 2000, "strategy": "vectorized"}
    with suppress(metareg.Interrupted):
        metareg.train("maml", "cml", out=folder / "run", observers=[until], **settings)
    return {
        "seconds": until.trained,
        "steps": TimedManager.steps,
        "checkpoints": TimedManager.saves,
        "seconds_in_checkpoints": TimedManager.seconds,
        "share": TimedManager.seconds / until.trained,
    }


def conv4(channels: int, size: int) -> nn.Module:
    """Return a Conv4 for 5 classes of ``size × size`` images."""
    layers: list[nn.Module] = []
    for number in range(4):
        layers += [
            nn.Conv2d(3 if number == 0 else channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (size // 16) ** 2, 5))


def seconds_per_write(model: nn.Module, x: torch.Tensor, folder: Path, repeats: int) -> dict[str, Any]:
    """Return the median time to write one checkpoint with Adam's state and Meta-SGD's step sizes."""
    learner = MetaLearner(model, algo="metasgd", loss="mse", strategy="serial")
    y = torch.zeros(*x.shape[:2], learner.adapt(x[0], torch.zeros(x.shape[1], 1).expand(-1, 1), 0)(x[0]).shape[-1])
    learner.step(Episodes(x, y, x, y))
    store = Checkpoints(folder, _KEEP)
    manager = CheckpointManager(
        store, learner, Progress(), [], every_steps=None, every_minutes=_MINUTES, stop=StopRequest()
    )
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        manager.save()
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    return {
        "meta_parameters": sum(value.numel() for value in learner.meta_parameters.values()),
        "megabytes": store.path(1).stat().st_size / 1e6,
        "seconds": seconds,
        "interval": max(60 * _MINUTES, LEAST_RATIO * seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60 * _MINUTES * 2.2, help="how long to train")
    parser.add_argument("--repeats", type=int, default=15, help="writes of each model")
    arguments = parser.parse_args()
    sinusoid = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    models = {
        "MLP 1-40-40-1": (sinusoid, torch.ones(1, 4, 1)),
        "Conv4-64, 84×84": (conv4(64, 84), torch.randn(1, 5, 3, 84, 84)),
        "Conv4-512, 84×84": (conv4(512, 84), torch.randn(1, 2, 3, 84, 84)),
    }
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        writes = {}
        for model_name, (model, x) in models.items():
            target = folder / model_name.replace(" ", "-")
            target.mkdir()
            writes[model_name] = row = seconds_per_write(model, x, target, arguments.repeats)
            print(
                f"{model_name}: {row['meta_parameters']:,} meta-parameters, {row['megabytes']:.1f} MB, "
                f"{1e3 * row['seconds']:.1f} ms a write, {row['seconds'] / row['interval']:.3%} of {row['interval']:.0f} s",
                flush=True,
            )
        run = share_of_a_run(arguments.seconds, folder)
        print(
            f"maml + cml on sinusoid: {run['checkpoints']} checkpoints in {run['seconds']:.0f} s and {run['steps']:,} steps "
            f"take {run['seconds_in_checkpoints']:.3f} s, {run['share']:.3%} of the training (target: at most 1 %)"
        )
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(torch.get_num_threads()), "writes": writes, "run": run}
    (RESULTS / "checkpoints.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
