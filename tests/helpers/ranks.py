"""The code that `test_distributed` runs in one and in two processes: learners, and runs with failures.

``python tests/helpers/ranks.py FOLDER``, with torchrun's variables, runs all of `main` in the same processes, because
starting them takes longest. Process R writes its results to ``FOLDER/rank-R.pt``. With ``--codes FOLDER``, it runs the
command line, and writes its exit codes there.
"""

from __future__ import annotations

import contextlib
import io
import logging.handlers
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import metareg
import metareg.__main__
import metareg.cli.app
import metareg.runs.plots
from metareg import Episodes, MetaLearner, MetaregError, PluginConfig, TaskSpec, UsageError, hookimpl
from metareg.learner.batch_split import hash_tensors
from metareg.learner.processes import Processes, join_processes
from metareg.util.torchrun import read_rank
from samples import LOSSES, MODELS, episodes, tasks_of

RANK = read_rank().rank


# ------------------------------------------------------------------------------------------------------------- learners


class OuterNoise:
    """Changes the meta-gradient by noise and by its norm, which need the whole batch."""

    @hookimpl
    def draw_noise(self, shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    @hookimpl
    def augment_outer_gradient(self, grads: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.nn.utils.get_total_norm(list(grads.values()))
        return {name: value / norm + 0.1 * noise[name] for name, value in grads.items()}


class Tilt:
    """Weights the tasks by their losses and positions in the batch."""

    @hookimpl
    def combine_tasks(self, grads: dict[str, Tensor], losses: Tensor) -> dict[str, Tensor]:
        weights = losses.softmax(0) * torch.arange(1, 1 + len(losses))
        return {name: torch.einsum("t,t...->...", weights, value) for name, value in grads.items()}


class NoisyTilt:
    """Also weights the tasks by random numbers drawn for the batch."""

    @hookimpl
    def draw_noise(self, generator: torch.Generator) -> Tensor:
        return torch.rand((), generator=generator)

    @hookimpl
    def combine_tasks(self, grads: dict[str, Tensor], losses: Tensor, noise: Tensor) -> dict[str, Tensor]:
        return Tilt().combine_tasks({name: noise * value for name, value in grads.items()}, losses)


class Swap:
    """Gives each task of a stack the support set of another task."""

    @hookimpl
    def augment_episodes(self, episodes: Episodes, generator: torch.Generator) -> Episodes:
        order = torch.randperm(len(episodes), generator=generator)
        return Episodes(episodes.support_x[order], episodes.support_y[order], episodes.query_x, episodes.query_y)


class Ascent:
    """Takes the meta-gradient after a step along it (Sharp-MAML)."""

    @hookimpl
    def augment_outer_gradient(
        self,
        grads: dict[str, Tensor],
        every: dict[str, Tensor],
        gradient_at: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        norm = torch.nn.utils.get_total_norm(list(grads.values()))
        return gradient_at({name: value + 0.3 * grads[name] / norm for name, value in every.items()})


class Momentum:
    """An outer optimiser with its own state."""

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - 0.05 * grads[name] for name, value in params.items()}

    @hookimpl
    def outer_update(
        self, meta: dict[str, Tensor], grads: dict[str, Tensor], state: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        speed = {name: 0.9 * state.get(name, 0) + value for name, value in grads.items()}
        return {name: value - 0.01 * speed[name] for name, value in meta.items()}, speed


def _unequal() -> list[Episodes]:
    """Return five tasks of three sizes."""
    sizes = (2, 3, 2, 4, 2)
    return Episodes.group([tasks_of(episodes("mlp", 1, shots=size, seed=size))[0] for size in sizes])


def _channels_last(tasks: int) -> Episodes:
    """Return images in the memory layout of image tasks, which gradients of convolutions share."""
    drawn = episodes("conv", tasks)
    support_x, query_x = (
        x.movedim(-3, -1).clone(memory_format=torch.contiguous_format).movedim(-1, -3)
        for x in (drawn.support_x, drawn.query_x)
    )
    return Episodes(support_x, drawn.support_y, query_x, drawn.query_y)


LEARNERS: dict[str, tuple[dict[str, Any], str, Callable[[], Any]]] = {
    "unequal shares": ({"algo": "maml", "strategy": "serial"}, "mlp", lambda: episodes("mlp", 5)),
    "noise": (
        {"algo": "maml", "augment": ["gradient-noise", "cml", "dropgrad"], "strategy": "serial", "inner_steps": 2},
        "mlp",
        lambda: episodes("mlp", 5),
    ),
    "chunks": (
        {"algo": "maml", "augment": ["gradient-noise"], "strategy": "vectorized", "chunk": 2},
        "mlp",
        lambda: episodes("mlp", 6),
    ),
    "images": ({"algo": "metasgd", "augment": ["cml"], "strategy": "serial"}, "conv", lambda: _channels_last(3)),
    "graphs": ({"algo": "anil", "augment": ["cml"], "strategy": "traced"}, "conv", lambda: episodes("conv", 4)),
    "whole gradient": (
        {"algo": "anil", "augment": ["gradient-noise", OuterNoise], "strategy": "serial"},
        "mlp",
        lambda: episodes("mlp", 4),
    ),
    "reptile": (
        {"algo": "reptile", "augment": ["cml"], "strategy": "serial", "inner_steps": 3},
        "mlp",
        lambda: episodes("mlp", 3),
    ),
    "momentum": ({"algo": lambda: Momentum, "strategy": "serial"}, "mlp", lambda: episodes("mlp", 5)),
    "combined": (
        {"algo": "maml", "augment": ["gradient-noise", NoisyTilt, Ascent], "strategy": "vectorized", "chunk": 2},
        "mlp",
        lambda: episodes("mlp", 5),
    ),
    "unequal tasks combined": (
        {"algo": "maml", "augment": [Swap, Tilt, Ascent], "strategy": "serial"},
        "mlp",
        _unequal,
    ),
    "unequal tasks": ({"algo": "boil", "augment": ["gradient-noise"], "strategy": "serial"}, "mlp", _unequal),
}
"""Return learners, their models and their batches."""


class Numbered:
    """Numbered tasks of two sizes for a network."""

    def __init__(self, net: str) -> None:
        self.net = net

    def episodes(self, split: str, indices: Sequence[int]) -> list[Episodes]:
        drawn = (episodes(self.net, 1, query=2 + index % 2, seed=index + len(split)) for index in indices)
        return Episodes.group([tasks_of(one)[0] for one in drawn])


def learner_of(case: str) -> MetaLearner:
    options, net, _ = LEARNERS[case]
    algo = options["algo"] if isinstance(options["algo"], str) else options["algo"]()
    # Each process has different weights: all must start from those of the first.
    return MetaLearner(MODELS[net](seed=RANK), loss=LOSSES[net], seed=3, **options | {"algo": algo})


def trained(case: str, processes: Processes) -> dict[str, Any]:
    """Return a learner's results of three steps and an evaluation."""
    learner, (_, net, batch) = learner_of(case), LEARNERS[case]
    logs = []
    with learner.split_over(processes):
        for _ in range(3):
            learner.step(batch())
            logs.append(learner.logs)
        scores = learner.evaluate(Numbered(net), 5, inner_steps=(0, 2)).scores
    meta = learner.meta_parameters
    return {"meta": meta, "digest": hash_tensors(meta), "logs": logs, "scores": scores}


class Recorded:
    """Numbered tasks in one stack, and a record of the requested ones."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def episodes(self, split: str, indices: Sequence[int]) -> Episodes:
        self.asked.append(list(indices))
        return Episodes.group([tasks_of(episodes("mlp", 1, seed=index + len(split)))[0] for index in indices])[0]


FITTED = {"noise": True, "momentum": True, "combined": False}
"""Return learners to fit, and whether a process needs only its share of a batch."""


def fitted(case: str, processes: Processes) -> dict[str, Any]:
    """Return the result of six training steps in blocks of two, and the tasks drawn for training and test."""
    learner, source, tests = learner_of(case), Recorded(), Recorded()
    with mock.patch("metareg.learner.training._PREFETCHED_STEPS", 2), learner.split_over(processes):
        learner.fit(source, 6, meta_batch=5)
        learner.evaluate(tests, 5, inner_steps=(1,))
    meta = learner.meta_parameters
    return {"meta": meta, "digest": hash_tensors(meta), "asked": source.asked, "tested": tests.asked}


def drifted(processes: Processes) -> str:
    """Return the error about processes with different parameters."""
    learner = learner_of("unequal shares")
    with learner.split_over(processes):
        learner.step(episodes("mlp", 4))
        learner.meta_parameters["head.bias"].add_(RANK * 1e-15)
        return _error(lambda: learner.evaluate(Numbered("mlp"), 2))[1]


# ----------------------------------------------------------------------------------------------------------------- runs


class DoubleMLP:
    """A model in float64, where the order of a sum hardly matters."""

    @hookimpl
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()


RUN: dict[str, Any] = {
    "steps": 14, "meta_batch": 5, "log_every": 3, "eval_every": 6, "eval_tasks": 3, "test_tasks": 5,
    "test_inner_steps": [0, 1], "strategy": "serial", "checkpoint_every": 4, "keep_checkpoints": 100,
}  # fmt: skip


COMMAND = ["train", "--strategy", "serial", "--meta-batch", 2, "--set", "test_tasks=2", "--set", "eval_tasks=2"]


class AccidentsConfig(PluginConfig):
    """The training tasks at which failures happen."""

    infinite: tuple[int, ...] = ()
    signal: int | None = None
    failure: int | None = None
    end: int | None = None


class Accidents:
    """A regression task whose targets can be infinite; other failures happen only in process 1."""

    Config = AccidentsConfig
    loss = "mse"
    metric = None
    default_model = None
    stackable = True
    recommended: Mapping[str, Any] = {}
    spec = TaskSpec((1,), (1,))

    def __init__(self, config: AccidentsConfig) -> None:
        self.config = config

    @hookimpl
    def episodes(self, split: str, indices: range) -> list[Episodes]:
        x = torch.linspace(-1, 1, 6).reshape(1, 6, 1) + torch.tensor(indices).reshape(-1, 1, 1) / 100
        y = x.sin()
        if split == "train" and len(indices) == RUN["meta_batch"]:
            y[[index in self.config.infinite for index in indices]] = torch.inf
            if RANK == 1:
                self._happen(indices)
        whole = Episodes(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])
        return [whole[:1], whole[1:]]  # two stacks, so that each step draws its own tasks

    def _happen(self, indices: range) -> None:
        if self.config.signal in indices:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.config.failure in indices:
            raise UsageError("The disk of this machine is gone.")
        if self.config.end in indices:
            os._exit(9)


class Listener:
    """Observes a run, and uses its learner in this process only."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    @hookimpl
    def on_run_start(self, run: metareg.Run) -> None:
        self.learner = run.learner
        self.heard.append("start")

    @hookimpl
    def on_step(self, step: int) -> None:
        self.learner.evaluate(Accidents(AccidentsConfig()), 2)
        self.heard.append(f"step {step}")

    @hookimpl
    def on_run_end(self) -> None:
        self.heard.append("end")


class Failing:
    """An observer that fails."""

    @hookimpl
    def on_step(self) -> None:
        raise UsageError("The logbook is full.")


def run_of(path: Path, accidents: Mapping[str, Any] | None = None, **options: Any) -> metareg.Run:
    return metareg.train(
        "maml", ["gradient-noise", "cml"], (Accidents, accidents or {}), model=DoubleMLP, out=path, **RUN | options
    )


def _error(call: Callable[[], Any]) -> tuple[str, str]:
    """Return the name and text of the error that a call raises."""
    try:
        call()
    except MetaregError as error:
        return type(error).__name__, str(error)
    return "", ""


def _spoken(arguments: Sequence[Any]) -> tuple[int, str]:
    """Return the exit code of a command, and its output."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = metareg.cli.app.run([str(argument) for argument in arguments])
    return code, text.getvalue()


def main(folder: Path) -> dict[str, Any]:
    """Run everything that two processes do together."""
    found: dict[str, Any] = {}
    with join_processes() as processes:
        found["learners"] = {case: trained(case, processes) for case in LEARNERS}
        found["fitted"] = {case: fitted(case, processes) for case in FITTED}
        found["drifted"] = drifted(processes)
        with join_processes() as again:  # uses the program's own group, and does not change it
            found["again"] = again.gather(lambda: RANK)
        found["still"] = processes.gather(lambda: RANK)

    listener, logged = Listener(), logging.handlers.BufferingHandler(1000)
    logging.getLogger("metareg").addHandler(logged)
    logging.getLogger("metareg").setLevel(logging.INFO)
    run = run_of(folder / "run", observers=[listener])
    found["run"] = {"heard": listener.heard, "lines": len(logged.buffer), "scores": run.evaluation.scores}
    for policy in ("skip", "rollback"):
        run_of(folder / policy, {"infinite": [24, 47]}, on_nonfinite=policy)
    found["stopped"] = _error(lambda: run_of(folder / "stopped", {"signal": 5 * 6 + 1}))
    if RANK == 0:
        shutil.copytree(folder / "stopped", folder / "stopped, for one process")
    run_of(folder / "stopped", {"signal": 5 * 6 + 1}, resume=True)
    found["failure at first"] = _error(lambda: run_of(folder / "failed at first", {"failure": 1}))
    found["failure"] = _error(lambda: run_of(folder / "failed", {"failure": 5 * 9}))
    found["observer"] = _error(lambda: run_of(folder / "told", observers=[Failing()]))

    metareg.cli.app._wait_for_leader = lambda: None
    found["spoken"] = {
        "name": _spoken(["train", "--algo", "mamal", "--out", folder / "none"]),
        "option": _spoken(["train", "--steps", "many", "--out", folder / "none"]),
        "batch": _spoken(["train", "--meta-batch", 1, "--out", folder / "none"]),
        "taken": _spoken(["train", "--out", folder / "run"]),
        "missing": _spoken(["resume", folder / "none"]),
        "command": _spoken(["eval", folder / "run"]),
        "trained": _spoken([*COMMAND, "--steps", 3, "--out", folder / "command"]),
        "ended": _spoken(["resume", folder / "command"]),
    }
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.save(found, folder / f"rank-{RANK}.pt")
    found["lost"] = _error(lambda: run_of(folder / "lost", {"end": 5 * 9}))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    metareg.runs.plots.draw = lambda _run: []
    if sys.argv[1] == "--codes":  # the complete command, for its exit code
        codes, sys.argv[1:] = Path(sys.argv[2]), sys.argv[3:]
        try:
            metareg.__main__.main()
        except SystemExit as exit:
            (codes / str(RANK)).write_text(str(exit.code))
            raise
    where = Path(sys.argv[1])
    torch.save(main(where), where / f"rank-{RANK}.pt")
