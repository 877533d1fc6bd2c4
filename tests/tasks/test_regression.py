"""The curve tasks: pure functions of (seed, split, index), within their ranges, and sufficiently random."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metareg import TaskSpec, UsageError, derive_seed, task_uniform
from metareg_regression import MLP, CurveConfig, Harmonic, Sinusoid, SinusoidLine

TASKS = {"sinusoid": Sinusoid, "harmonic": Harmonic, "sinusoid-line": SinusoidLine}
SPLITS = ("train", "validation", "test")
_indices = st.lists(st.integers(0, 2**40), min_size=1, max_size=12)


def drawn(kind: str, split: str, indices: Any, seed: int = 0, **options: int) -> tuple[torch.Tensor, ...]:
    return TASKS[kind](CurveConfig(**options)).episodes(split, indices, seed).parts


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(TASKS)), st.sampled_from(SPLITS), _indices, st.integers(0, 2**63 - 1), st.randoms())
def test_a_task_is_a_function_of_seed_split_and_index(
    kind: str, split: str, indices: list[int], seed: int, random: Any
) -> None:
    """A task does not depend on which other tasks are drawn, in which order, and how often."""
    whole = drawn(kind, split, indices, seed)
    order = random.sample(range(len(indices)), len(indices))
    shuffled = drawn(kind, split, [indices[position] for position in order], seed)
    for part, other in zip(whole, shuffled, strict=True):
        assert part[order].equal(other)
    start = random.randrange(len(indices))
    for part, other in zip(whole, drawn(kind, split, indices[start:], seed), strict=True):
        assert part[start:].equal(other)


@pytest.mark.parametrize("kind", TASKS)
def test_shapes_and_types(kind: str) -> None:
    parts = drawn(kind, "train", range(4), shots=3, query=5, eval_query=7)
    assert [tuple(part.shape) for part in parts] == [(4, 3, 1), (4, 3, 1), (4, 5, 1), (4, 5, 1)]
    assert {part.dtype for part in parts} == {torch.float32}
    for split in ("validation", "test"):
        assert drawn(kind, split, range(2), shots=3, query=5, eval_query=7)[2].shape == (2, 7, 1)


@pytest.mark.parametrize("kind", TASKS)
def test_splits_and_seeds_differ(kind: str) -> None:
    draws = [drawn(kind, split, range(5), seed)[1] for split in SPLITS for seed in (0, 1)]
    for number, one in enumerate(draws):
        for other in draws[number + 1 :]:
            assert not (one[:, :5] == other[:, :5]).any()


def test_tasks_do_not_depend_on_the_number_of_shots() -> None:
    """More shots add points to the same curves: results of different shots are paired."""
    few, many = drawn("sinusoid", "test", range(6), shots=5), drawn("sinusoid", "test", range(6), shots=20)
    assert many[0][:, :5].equal(few[0])
    assert many[1][:, :5].equal(few[1])


def test_sine_curves_are_in_their_ranges() -> None:
    """Amplitude and phase are recovered from the points by least squares on sin x and cos x."""
    x, y, query_x, query_y = drawn("sinusoid", "train", range(3000))
    inputs, targets = torch.cat([x, query_x], 1).double(), torch.cat([y, query_y], 1).double()
    solution = torch.linalg.lstsq(torch.cat([inputs.sin(), inputs.cos()], -1), targets).solution.squeeze(-1)
    amplitude = solution.norm(dim=1)
    phase = torch.atan2(-solution[:, 1], solution[:, 0])
    torch.testing.assert_close(
        amplitude[:, None, None] * (inputs - phase[:, None, None]).sin(), targets, atol=1e-4, rtol=0
    )
    assert 0.1 - 1e-4 <= amplitude.min() < 0.12
    assert 4.97 < amplitude.max() <= 5 + 1e-4
    assert -1e-3 <= phase.min() < 0.02
    assert math.pi - 0.02 < phase.max() <= math.pi + 1e-3
    assert amplitude.mean().item() == pytest.approx(2.55, abs=0.1)
    assert phase.mean().item() == pytest.approx(math.pi / 2, abs=0.06)
    assert (inputs.min().item(), inputs.max().item()) == pytest.approx((-5, 5), abs=0.01)
    assert abs(np.corrcoef(amplitude, phase)[0, 1]) < 0.06


def test_half_of_the_mixed_tasks_are_lines() -> None:
    x, y, *_ = (part.double() for part in drawn("sinusoid-line", "train", range(2000)))
    design = torch.cat([x, torch.ones_like(x)], -1)
    solution = torch.linalg.lstsq(design, y).solution
    lines = (design @ solution - y).abs().amax((1, 2)) < 1e-4
    assert lines.double().mean().item() == pytest.approx(0.5, abs=0.04)
    coefficients = solution[lines].squeeze(-1)
    assert coefficients.abs().max() <= 3 + 1e-3
    assert coefficients.std(0).tolist() == pytest.approx([3**0.5, 3**0.5], rel=0.06)


def test_harmonic_curves() -> None:
    u = np.array([[0.0, 1.0, 0.0, 0.25, 0.0], [1.0, 0.0, 0.5, 0.0, 0.25]])
    x = np.array([[0.0, 1.0], [0.0, 1.0]])
    expected = [[2 * math.sin(math.pi / 2), 2 * math.sin(0.5 + math.pi / 2)], [1.0, math.sin(4 + math.pi / 2)]]
    np.testing.assert_allclose(Harmonic(CurveConfig()).curve(u, x), expected, atol=1e-12)


@pytest.mark.parametrize("options", [{"shots": 0}, {"query": -1}, {"eval_query": 0}, {"shots": 1.5}, {"ways": 5}])
def test_impossible_options(options: dict[str, Any]) -> None:
    from metareg.registry.plugins import resolve

    with pytest.raises(UsageError):
        resolve("tasks", "sinusoid", options)


@pytest.mark.parametrize(("spec", "hidden"), [(TaskSpec((1,), (1,)), [40, 40]), (TaskSpec((3, 2), (4,)), [7])])
def test_multilayer_perceptron(spec: TaskSpec, hidden: list[int]) -> None:
    model = MLP(MLP.Config(hidden=hidden)).build(spec)
    x = torch.randn(6, *spec.input_shape)
    assert model(x).shape == (6, *spec.output_shape)
    assert model.head(model.body(x)).equal(model(x))
    assert model.body(x).shape == (6, hidden[-1])


@pytest.mark.parametrize("hidden", [[], [0], [40, -1], ["wide"], 40])
def test_impossible_widths(hidden: Any) -> None:
    from metareg.registry.plugins import resolve

    with pytest.raises(UsageError, match=r"hidden|widths"):
        resolve("models", "mlp", {"hidden": hidden})


# ------------------------------------------------------------------------------------------------- the numbers beneath


def test_uniform_numbers_are_uniform() -> None:
    """Moments, bins, and every digit of the mantissa, of consecutive task numbers."""
    numbers = task_uniform(0, "train", range(20_000), 10, "test").ravel()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    count = numbers.size
    assert numbers.mean() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / count))
    assert numbers.var() == pytest.approx(1 / 12, rel=0.01)
    bins = np.histogram(numbers, 100, (0, 1))[0]
    chi_square = ((bins - count / 100) ** 2 / (count / 100)).sum()
    assert 99 - 5 * math.sqrt(2 * 99) < chi_square < 99 + 5 * math.sqrt(2 * 99)
    bits = (numbers * 2.0**53).astype(np.uint64)
    ones = [((bits >> np.uint64(place)) & np.uint64(1)).mean() for place in range(53)]
    assert max(abs(share - 0.5) for share in ones) < 5 * 0.5 / math.sqrt(count)
    assert np.unique(numbers).size == count


@pytest.mark.parametrize("step", [1, 2, 3, 5, 1 << 20])
def test_neighbours_are_not_correlated(step: int) -> None:
    """Tasks whose numbers differ by `step`, positions of a task, and streams of a task are uncorrelated."""
    indices = np.arange(20_000) * step
    numbers = task_uniform(3, "train", indices, 4, "a")
    other = task_uniform(3, "train", indices, 4, "b")
    bound = 5 / math.sqrt(len(indices))
    for position in range(4):
        assert abs(np.corrcoef(numbers[:-1, position], numbers[1:, position])[0, 1]) < bound
        assert abs(np.corrcoef(numbers[:, position], other[:, position])[0, 1]) < bound
        for later in range(position + 1, 4):
            assert abs(np.corrcoef(numbers[:, position], numbers[:, later])[0, 1]) < bound


def test_seeds_and_labels_give_other_streams() -> None:
    streams = [
        task_uniform(seed, split, range(2000), 1, label).ravel()
        for seed in (0, 1, 2**40)
        for split in SPLITS
        for label in ("", "curve")
    ]
    matrix = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(matrix).max() < 5 / math.sqrt(2000)


def test_more_numbers_begin_with_the_same_numbers() -> None:
    few, many = (task_uniform(0, "test", [5, 9], count) for count in (3, 8))
    assert (many[:, :3] == few).all()
    assert task_uniform(0, "test", [], 3).shape == (0, 3)


def test_derived_seeds() -> None:
    """These numbers must never change: every task and weight of published runs depends on them."""
    assert derive_seed(0) != derive_seed(1)
    assert derive_seed(0, "a", "b") != derive_seed(0, "ab") != derive_seed(0, "b", "a")
    seeds = {derive_seed(seed, label) for seed in range(100) for label in "abcde"}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)
