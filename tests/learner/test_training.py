"""`fit`: its tasks, observers and schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from learners import Source

from metareg import Episodes, MetaLearner, PluginError, UsageError, hookimpl
from reference import difference
from samples import MLP, episodes, tasks_of


def test_fit_takes_the_training_tasks_in_order() -> None:
    class Recording(Source):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[int] = []

        def episodes(self, split: str, indices: Sequence[int]) -> Episodes:
            assert split == "train"
            self.asked += indices
            return super().episodes(split, indices)

    source = Recording()
    MetaLearner(MLP(), loss="mse").fit(source, 5, meta_batch=3)
    assert list(dict.fromkeys(source.asked)) == list(range(15))


def test_fit_on_tasks_of_unequal_sizes_equals_single_steps() -> None:
    class Ragged(Source):
        stackable = False

        def episodes(self, split: str, indices: Sequence[int]) -> list[Episodes]:
            tasks = []
            for index, (x, y, *query) in zip(indices, tasks_of(super().episodes(split, indices)), strict=True):
                size = 3 + index % 3
                tasks.append((x[:size], y[:size], *query))
            return Episodes.group(tasks)

    source = Ragged()
    fitted = MetaLearner(MLP(), loss="mse").fit(source, 4, meta_batch=3)
    single = MetaLearner(MLP(), loss="mse", strategy="serial")
    for step in range(4):
        single.step(source.episodes("train", range(3 * step, 3 * step + 3)))
    assert difference(fitted.meta_parameters, single.meta_parameters) < 1e-12


def test_an_observer_whose_decorator_is_forgotten_is_refused() -> None:
    class Deaf:
        def on_step(self, step: int) -> None:
            raise AssertionError(step)

    with pytest.raises(PluginError, match=r"observer 'deaf' has a method on_step without @metareg\.hookimpl"):
        MetaLearner(MLP(), loss="mse").fit(Source(), 1, observers=[Deaf()])


def test_observers_hear_of_steps_and_validations() -> None:
    class Observer:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.validations: list[tuple[int, str]] = []

        @hookimpl
        def on_step(self, step: int, logs: dict[str, float]) -> None:
            assert {"loss", "query_loss", "mse", "grad_norm", "steps_per_second", "cml.colearner_metric"} == set(logs)
            assert all(math.isfinite(value) for value in logs.values())
            self.steps.append(step)

        @hookimpl
        def on_evaluation(self, step: int, split: str) -> None:
            self.validations.append((step, split))

    observer = Observer()
    learner = MetaLearner(MLP(), augment=["cml"], loss="mse")
    learner.fit(Source(), 7, log_every=3, eval_every=4, eval_tasks=2, observers=[observer])
    assert observer.steps == [3, 6, 7]
    assert observer.validations == [(4, "validation"), (7, "validation")]


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 3, "meta_batch": 0}, {"steps": 3, "eval_tasks": 1}])
def test_impossible_schedules(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        MetaLearner(MLP(), loss="mse").fit(Source(), **options)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (object(), r"a method episodes\(split, indices\)"),
        ("sinusoidd", "no task named 'sinusoidd'; did you mean 'sinusoid'"),
    ],
)
def test_bad_sources(source: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        MetaLearner(MLP(), loss="mse").fit(source, 2)


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (None, "it returned a NoneType"),
        (tuple(episodes("mlp").parts), "it returned a tuple"),
        (episodes("mlp", tasks=2), "returned 2 tasks instead of 4"),
    ],
)
def test_sources_that_break_their_contract(returned: Any, sentence: str) -> None:
    class Broken:
        def episodes(self, split: str, indices: Sequence[int]) -> Any:  # noqa: ARG002
            return returned

    with pytest.raises(UsageError, match=sentence):
        MetaLearner(MLP(), loss="mse").fit(Broken(), 2)
