"""A compiled loop over training steps: its steps equal those taken one by one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from metareg import Episodes, MetaLearner, hookimpl
from metareg.engine import step_loop
from metareg.engine.step_loop import Batches
from metareg.errors import DivergenceError
from metareg.learner.config import Schedule
from metareg.learner.training import Progress, fit
from metareg.registry.task_source import TaskSource

TASKS = 3
OPTIONS: dict[str, Any] = {"lr_schedule": "multistep", "lr_milestones": [4, 11], "reset_optimizer_every": 8}


class Lines:
    """Regression tasks; optionally, the numbers of one batch are so large that its squared error overflows.

    Args:
        huge: the number of that batch; None for no such batch.
    """

    def __init__(self, huge: int | None = None) -> None:
        self.huge = huge

    def episodes(self, indices: Sequence[int]) -> Episodes:
        x = torch.stack([torch.linspace(-1, 1, 8, dtype=torch.float64) + 0.1 * index for index in indices]).unsqueeze(
            -1
        )
        y = (x + torch.tensor(indices).view(-1, 1, 1)).sin()
        if self.huge is not None:
            y[[index // TASKS == self.huge for index in indices]] *= 1e200
        return Episodes(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])


class Recorder:
    """An observer that records its calls."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        self.told.append((step, {name: value for name, value in logs.items() if name != "steps_per_second"}))


@pytest.fixture
def only_loops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many steps programs take per call; no step of a compiled learner may be taken outside of a program."""
    asked: list[int] = []
    take_step, take_steps = MetaLearner.take_step, MetaLearner.take_steps

    def refuse(learner: MetaLearner, episodes: Any) -> Any:
        assert learner.strategy != "compiled"
        return take_step(learner, episodes)

    def record(learner: MetaLearner, batches: Batches) -> Any:
        if learner.strategy == "compiled":
            asked.append(len(batches))
        return take_steps(learner, batches)

    monkeypatch.setattr(MetaLearner, "take_step", refuse)
    monkeypatch.setattr(MetaLearner, "take_steps", record)
    return asked


def create_learner(strategy: str) -> MetaLearner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return MetaLearner(model, loss="mse", inner_lr=0.1, strategy=strategy, **OPTIONS)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_steps_of_a_program_are_those_taken_one_by_one(only_loops: list[int]) -> None:
    seen = {}
    for strategy in ("vectorized", "compiled"):
        learner, recorder = create_learner(strategy), Recorder()
        learner.fit(Lines(), 25, meta_batch=TASKS, log_every=10, observers=[recorder])
        seen[strategy] = learner, recorder.told
    (expected, told), (learner, told_by_program) = seen.values()
    assert sum(only_loops) >= 25 > len(only_loops)
    assert_close(learner.meta_parameters, expected.meta_parameters)
    assert [step for step, _ in told_by_program] == [10, 20, 25]
    for (_, logs), (_, others) in zip(told, told_by_program, strict=True):
        assert others == pytest.approx(logs, rel=1e-9)

    resumed = create_learner("compiled")
    resumed.fit(Lines(), 13, meta_batch=TASKS, log_every=10)
    state = copy.deepcopy(resumed.state())
    resumed = create_learner("compiled")
    resumed.load_state(state)
    resumed.fit(Lines(), 12, meta_batch=TASKS)
    for name, value in learner.meta_parameters.items():
        assert torch.equal(resumed.meta_parameters[name], value), name


@pytest.mark.parametrize("then", ["stop", "skip"])
def test_a_program_ends_before_a_step_that_is_not_finite(then: str, only_loops: list[int]) -> None:
    seen = {}
    for strategy in ("vectorized", "compiled"):
        learner, progress = create_learner(strategy), Progress()
        schedule = Schedule(steps=10, meta_batch=TASKS, on_nonfinite=then)
        try:
            fit(learner, TaskSource.of(Lines(huge=6)), schedule, progress=progress)
        except DivergenceError as error:
            said = str(error)
        else:
            said = "nothing"
        seen[strategy] = said, learner.steps_done, progress.nonfinite, progress.averager.count, learner.meta_parameters
    (*expected, weights), (*found, others) = seen.values()
    assert found == expected
    assert found[1:3] == ([10, 1] if then == "skip" else [6, 0])
    assert only_loops
    assert_close(others, weights)


def test_settings_are_inputs_of_one_program() -> None:
    """Trials with other step sizes, seeds and numbers of steps reuse the first trial's program."""
    graphs = []
    for rate, seed, steps in ((0.1, 0, 2), (0.3, 1, 5)):
        model = nn.Linear(1, 1).double()
        learner = MetaLearner(
            model, loss="mse", inner_lr=rate, outer_lr=rate / 7, seed=seed, strategy="compiled", **OPTIONS
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_loop, "compile_graph", lambda graph, inputs: graphs.append(describe(graph)) or graph)
            learner.fit(Lines(), steps, meta_batch=TASKS)
    assert graphs[0] == graphs[1]


def test_steps_with_convolutions_are_compiled_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program with a loop over convolutional steps takes minutes to compile."""
    compiled: list[int] = []
    monkeypatch.setattr(step_loop, "compile_graph", lambda graph, inputs: compiled.append(len(inputs)) or graph)
    x = torch.rand(4, 2, 1, 4, 4)
    tasks = Episodes(x, x.mean((2, 3, 4)).unsqueeze(-1), x, x.mean((2, 3, 4)).unsqueeze(-1))
    for model in (nn.Conv2d(1, 2, 3), nn.Linear(16, 2)):
        first = nn.Flatten() if isinstance(model, nn.Linear) else nn.Identity()
        size = 2 if isinstance(model, nn.Linear) else 8
        learner = MetaLearner(
            nn.Sequential(first, model, nn.Flatten(), nn.Linear(size, 1)), loss="mse", strategy="compiled"
        )
        learner.take_steps(Batches(tasks, 2, range(2)))
        assert bool(compiled) == isinstance(model, nn.Linear)


def describe(graph: fx.GraphModule) -> list[str]:
    """Return the key of a graph in the cache of compiled programs."""
    return [part.code for part in graph.modules() if isinstance(part, fx.GraphModule)]
