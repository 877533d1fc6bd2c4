"""A run that is killed at any moment, any number of times, ends like an uninterrupted one."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from metareg.registry.plugins import list_entries
from processes import Command, Nursery, kill

pytestmark = pytest.mark.strangers

RESULT = ("config.yaml", "metrics.jsonl", "results.json", "checkpoints/final.safetensors")

_ALGORITHMS = ("maml", "metasgd", "mamlpp", "reptile", "inner-adam")
"""Algorithms: plain, with own meta-parameters, a schedule, an outer gradient, or a state."""
_AUGMENTS = ("none", "cml", "gradient-noise", "dropgrad,cml", "cml,gradient-noise,dropgrad")
_SETTINGS = (
    "log_every=7", "eval_every=10", "eval_tasks=4", "test_tasks=6", "test_inner_steps=[0,1,2]", "checkpoint_every=4",
    "keep_checkpoints=2",
)  # fmt: skip
_TASKS: dict[str, tuple[str, ...]] = {
    "sinusoid": (),
    "csbm": (),
    "cora": ("--inner-steps", "2"),
    "glyphs": ("--ways", "3", "--shots", "1", "--query", "2", "--set=model.width=4"),
    "omniglot-small": ("--ways", "3", "--shots", "1", "--query", "2", "--set=model.width=4"),
}
"""A task of each kind without data, and some with data, with options that keep them small."""
_NEED_DATA = ("cora", "omniglot-small")


@dataclass
class Case:
    """A configuration for runs that are killed."""

    algo: str
    augment: str
    task: str = "sinusoid"
    strategy: str = "serial"
    options: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return "-".join((self.algo, self.augment, self.task, self.strategy, *self.options))

    def arguments(self, steps: int) -> list[str]:
        """Return the options of `metareg train`, without the folder."""
        settings = (f"--set={setting}" for setting in _SETTINGS)
        return [
            "--algo", self.algo, "--augment", self.augment, "--task", self.task, "--strategy", self.strategy,
            "--steps", str(steps), "--meta-batch", "3", "--seed", "5",
            *settings, *_TASKS[self.task], *self.options,
        ]  # fmt: skip


def _installed(kind: str) -> list[str]:
    return [entry.name for entry in list_entries(kind) if entry.distribution == "metareg"]


def _short() -> list[Case]:
    """Return cases with every kind of algorithm, every augmentation and every kind of task once."""
    algorithms = itertools.cycle(_ALGORITHMS)
    cases = [Case(next(algorithms), augment) for augment in _AUGMENTS]
    cases[0].strategy = "vectorized"
    cases[1].options = ("--set=select=best", "--set=reset_optimizer_every=10")
    return cases + [Case("maml", "cml,dropgrad", task) for task in _tasks() if task not in ("sinusoid", *_NEED_DATA)]


def _long() -> list[Case]:
    """Return cases with every algorithm and every augmentation on each kind of task."""
    strategies = itertools.cycle(("vectorized", "serial"))
    algorithms = [entry for entry in list_entries("algorithms") if entry.distribution == "metareg"]
    predict_numbers = {each.name: getattr(each.load(), "targets", "numbers") == "numbers" for each in algorithms}
    return [
        Case(algo, augment, task, next(strategies))
        for algo, augment, task in itertools.product(predict_numbers, _AUGMENTS, _tasks())
        if task != "sinusoid" or predict_numbers[algo]
    ]


def _tasks() -> list[str]:
    return [task for task in _TASKS if task in _installed("tasks")]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    first = {case.task: case for case in _short()}
    with Nursery(tmp_path_factory.mktemp("nursery"), [case.arguments(3) for case in first.values()]) as processes:
        yield processes


@pytest.mark.parametrize("case", _short(), ids=str)
def test_killed_runs_end_as_if_left_alone(
    case: Case, tmp_path: Path, nursery: Nursery, tried: Callable[..., None]
) -> None:
    # Steps of the other tasks take longer.
    _kill_and_compare(case, tmp_path, nursery, kills=2, steps=40 if case.task == "sinusoid" else 16)
    tried("kills", 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", _long(), ids=str)
def test_killed_commands_end_as_if_left_alone(
    case: Case,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tried: Callable[..., None],
) -> None:
    if case.task in _NEED_DATA:
        monkeypatch.setenv("METAREG_DATA", str(request.getfixturevalue("data_folder")))
    _kill_and_compare(case, tmp_path, Command(tmp_path), kills=6, steps=100)
    tried("kills", 6)


def _kill_and_compare(case: Case, folder: Path, processes: Nursery | Command, *, kills: int, steps: int) -> None:
    arguments = ["train", *case.arguments(steps)]
    alone, killed = folder / "alone", folder / "killed"
    began = time.monotonic()
    processes.start([*arguments, "--out", str(alone)])
    assert processes.wait() == 0, processes.output.read_text()
    duration = time.monotonic() - began
    expected = {name: (alone / name).read_bytes() for name in RESULT if name != "config.yaml"}

    moments = random.Random(str(case))
    done = 0
    while True:
        # Repeat the command, or use `resume` if there is a checkpoint.
        resumable = (killed / "config.yaml").is_file() and done % 2
        process = processes.start(
            ["resume", str(killed)] if resumable else [*arguments, "--out", str(killed), "--resume"]
        )
        if done < kills:
            time.sleep(moments.uniform(0, 0.8 * duration))
            with suppress(ProcessLookupError):
                kill(process)
        code = processes.wait()
        assert code in (0, -9), processes.output.read_text()
        if code == 0:
            for name, content in expected.items():
                assert (killed / name).read_bytes() == content, f"{name} differs after {done} kills"
            if done >= kills:
                return
            shutil.rmtree(killed)
        else:
            done += 1
