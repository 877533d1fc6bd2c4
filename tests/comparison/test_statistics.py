"""Intervals, paired differences, Holm's correction and verdicts: by hand, against scipy, and as properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from metareg.comparison.statistics import Verdict, compare, holm, over_seeds, over_tasks, verdict

Arms = tuple[dict[int, np.ndarray], dict[int, np.ndarray]]


def arm(*rows: list[float]) -> dict[int, np.ndarray]:
    """Scores by seed."""
    return {seed: np.array(row, dtype=float) for seed, row in enumerate(rows)}


# --------------------------------------------------------------------------------------------------------------- by hand


def test_an_interval_over_seeds_by_hand() -> None:
    found = over_seeds([1, 2, 3])
    # standard deviation 1, standard error 1/√3; the 97.5 % quantile of Student's t with 2 degrees is 0.95·√(2/(1 − 0.95²))
    quantile = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    assert (found.mean, found.count) == (2, 3)
    assert found.half == pytest.approx(quantile / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx((2 - found.half, 2 + found.half))


def test_a_paired_difference_by_hand() -> None:
    found = compare(arm([2, 4], [5, 5], [6, 6]), arm([1, 3], [2, 4], [3, 3]), higher_is_better=True)
    # by seed 1, 2, 3; t = 2√3 with 2 degrees of freedom, whose two-sided p is 1 − t/√(t² + 2)
    assert (found.over_seeds.mean, found.pairs, found.in_favour, found.untested) == (2, 3, 3, "")
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    # by task 1, 1 · 3, 1 · 3, 3: only the second seed varies, with variance 2, one degree and standard error 1/3 of 1
    assert found.over_tasks.mean == 2
    assert found.over_tasks.half == pytest.approx(math.tan(0.95 * math.pi / 2) / 3)


def test_seeds_can_have_different_numbers_of_tasks() -> None:
    found = compare(arm([1, 2], [2, 4, 9]), arm([0, 2, 7], [1, 2, 3]), higher_is_better=True)
    # by seed (1 + 0)/2 and (1 + 2 + 6)/3
    assert (found.by_seed, found.pairs, found.untested) == ((0.5, 3.0), 2, "")


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([0.02, math.nan, 0.04]) == pytest.approx([0.04, math.nan, 0.04], nan_ok=True)
    assert holm([]) == []


# --------------------------------------------------------------------------------------------------------- against scipy


def test_as_scipy() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(0.7, 0.2, (5, 40))
    other = base + generator.normal(0.02, 0.1, (5, 40))
    found = compare(dict(enumerate(other)), dict(enumerate(base)), higher_is_better=True)
    test = stats.ttest_rel(other.mean(1), base.mean(1))
    assert found.p == pytest.approx(test.pvalue, rel=1e-9)
    assert (found.over_seeds.low, found.over_seeds.high) == pytest.approx(
        tuple(test.confidence_interval(0.95)), rel=1e-9
    )
    # Welch's interval is for the difference of two means; the interval of the mean of two is half of it.
    welch = stats.ttest_ind(base[0], -base[1], equal_var=False).confidence_interval(0.95)
    halved = over_tasks([base[0], base[1]])
    assert (halved.low, halved.high) == pytest.approx((welch.low / 2, welch.high / 2), rel=1e-9)
    ordinary = stats.ttest_1samp(base[0], 0).confidence_interval(0.95)
    single = over_tasks([base[0]])
    assert (single.low, single.high) == pytest.approx(tuple(ordinary), rel=1e-9)


def test_the_interval_over_tasks_covers_what_other_tasks_give() -> None:
    generator = np.random.default_rng(1)
    models = np.array([0.2, 0.5, 0.9])
    covered = 0
    for _ in range(400):
        found = over_tasks([generator.normal(each, spread, 30) for each, spread in zip(models, (1, 2, 4), strict=True)])
        covered += found.low <= models.mean() <= found.high
    assert stats.binomtest(covered, 400, 0.95).pvalue > 0.01


# ------------------------------------------------------------------------------------------------------------- odd cases


@pytest.mark.parametrize(
    ("augmented", "baseline", "reason"),
    [
        (arm([1, 2]), arm([0, 1]), "one pair of seeds"),
        ({1: np.zeros(2)}, {2: np.zeros(2)}, "no pair of seeds"),
        (arm([1, 2], [2, 3]), arm([0, 1], [1, 2]), "every seed gives exactly the same difference"),
        (arm([0.8, 0.9], [0.7, 0.8]), arm([0.5, 0.6], [0.4, 0.5]), "every seed gives exactly the same difference"),
        (arm([1, 2], [3, 3], [math.nan, 1]), arm([0, 1], [0, 1], [0, 1]), "1 of 3 pairs diverged"),
        (arm([1, 2], [3, 3], [2, 1]), arm([0, 1], [math.inf, 1], [0, math.nan]), "2 of 3 pairs diverged"),
    ],
)
def test_no_test_where_it_would_say_too_much(augmented: dict, baseline: dict, reason: str) -> None:
    found = compare(augmented, baseline, higher_is_better=True)
    assert math.isnan(found.p)
    assert found.untested == reason
    assert verdict(found, holm([found.p])[0], higher_is_better=True) is Verdict.NOT_TESTED


def test_one_seed_has_an_interval_over_tasks_only() -> None:
    found = compare(arm([1, 2, 4]), arm([0, 2, 1]), higher_is_better=True)
    assert math.isnan(found.over_seeds.half)
    assert found.over_seeds.mean == found.over_tasks.mean == 4 / 3
    assert found.over_tasks.half == pytest.approx(stats.sem([1, 0, 3]) * stats.t.ppf(0.975, 2))


def test_the_pairs_that_did_not_diverge_have_their_interval() -> None:
    found = compare(arm([1, 2], [3, 5], [math.nan, 1]), arm([0, 1], [0, 1], [0, 1]), higher_is_better=True)
    assert (found.pairs, found.diverged, found.in_favour) == (3, 1, 2)
    assert found.over_seeds == over_seeds([1, 3.5])


def test_only_common_seeds_are_paired() -> None:
    full = {seed: np.array([seed, seed + 1.0]) for seed in range(5)}
    found = compare({0: full[0] + 1, 3: full[3] + 2, 9: full[0]}, full, higher_is_better=False)
    assert (found.pairs, found.in_favour) == (2, 0)
    assert found.over_seeds == over_seeds([1, 2])


def test_identical_arms() -> None:
    scores = arm([1, 2], [3, 5], [4, 4])
    found = compare(scores, scores, higher_is_better=True)
    assert (found.over_seeds.mean, found.over_seeds.half, found.over_tasks.half, found.p) == (0, 0, 0, 1)
    assert found.in_favour == 0
    assert verdict(found, 1.0, higher_is_better=True) is Verdict.NOT_SHOWN


def test_of_unequal_numbers_of_tasks_the_first_are_paired() -> None:
    found = compare(arm([1, 2], [1, 4, 9]), arm([0, 2, 7], [1, 2]), higher_is_better=True)
    assert found.by_seed == (0.5, 1)
    assert found.over_tasks.count == 4


def test_numbers_of_any_size() -> None:
    found = over_seeds([1e300, 3e300])
    assert found.half == pytest.approx(1e300 * over_seeds([1, 3]).half, rel=1e-9)
    assert over_seeds([]).count == over_tasks([]).count == 0
    assert math.isnan(over_tasks([np.array([1.0])]).half)


@pytest.mark.parametrize(("higher", "word"), [(True, Verdict.BETTER), (False, Verdict.WORSE)])
def test_the_words_need_the_corrected_test(higher: bool, word: Verdict) -> None:
    found = compare(arm([1, 2], [2, 3.1], [3, 4.2]), arm([0, 1], [1, 2], [2, 3]), higher_is_better=higher)
    assert found.p < 0.01
    assert verdict(found, found.p, higher_is_better=higher) is word
    assert verdict(found, 0.049999, higher_is_better=higher) is word
    assert verdict(found, 0.05, higher_is_better=higher) is Verdict.NOT_SHOWN


# ------------------------------------------------------------------------------------------------------------ properties

_SCORE = st.integers(-1000, 1000).map(lambda value: value / 64)


@st.composite
def arms(draw: st.DrawFn) -> Arms:
    """Draw two arms with the same seeds; sums and differences of the scores are exact."""
    seeds, tasks = draw(st.integers(1, 6)), draw(st.integers(2, 4))
    rows = st.lists(_SCORE, min_size=tasks, max_size=tasks)
    first, second = (draw(st.lists(rows, min_size=seeds, max_size=seeds)) for _ in range(2))
    return arm(*first), arm(*second)


def same(first: float, second: float) -> bool:
    return first == pytest.approx(second, rel=1e-9, abs=1e-12, nan_ok=True)


@given(arms(), st.booleans())
def test_the_difference_is_antisymmetric(both: Arms, higher: bool) -> None:
    there = compare(both[0], both[1], higher_is_better=higher)
    back = compare(both[1], both[0], higher_is_better=not higher)
    assert there.over_seeds.mean == -back.over_seeds.mean
    assert same(there.over_seeds.half, back.over_seeds.half)
    assert same(there.over_tasks.half, back.over_tasks.half)
    assert same(there.p, back.p)
    assert (there.in_favour, there.untested) == (back.in_favour, back.untested)
    swapped = compare(both[1], both[0], higher_is_better=higher)
    words = {Verdict.BETTER: Verdict.WORSE, Verdict.WORSE: Verdict.BETTER}
    found = verdict(there, there.p, higher_is_better=higher)
    assert verdict(swapped, swapped.p, higher_is_better=higher) is words.get(found, found)
    assert there.in_favour + swapped.in_favour <= there.pairs


@given(arms(), st.integers(-100, 100))
def test_what_both_arms_gain_changes_nothing(both: Arms, shift: int) -> None:
    plain = compare(*both, higher_is_better=True)
    moved = compare(*({seed: row + shift for seed, row in each.items()} for each in both), higher_is_better=True)
    assert same(plain.over_seeds.mean, moved.over_seeds.mean)
    assert same(plain.over_seeds.half, moved.over_seeds.half)
    assert same(plain.over_tasks.half, moved.over_tasks.half)
    assert plain.untested == moved.untested
    assert same(plain.p, moved.p)


@given(arms(), st.randoms())
def test_the_order_of_seeds_does_not_matter(both: Arms, random) -> None:
    seeds = list(both[0])
    random.shuffle(seeds)
    shuffled = [{seed: each[seed] for seed in seeds} for each in both]
    assert compare(*both, higher_is_better=True) == compare(*shuffled, higher_is_better=True) or len(seeds) == 1
    values = [float(row.mean()) for row in both[0].values()]
    assert same(over_seeds(values).half, over_seeds(values[::-1]).half)


@given(arms(), st.booleans(), st.floats(0, 1))
def test_words_say_no_more_than_the_interval(both: Arms, higher: bool, corrected: float) -> None:
    found = compare(*both, higher_is_better=higher)
    words = verdict(found, max(corrected, found.p), higher_is_better=higher)
    if words in (Verdict.BETTER, Verdict.WORSE):
        assert not found.over_seeds.low <= 0 <= found.over_seeds.high
        assert (found.over_seeds.mean > 0) == ((words is Verdict.BETTER) == higher)
        assert found.in_favour > 0 or words is Verdict.WORSE


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=12))
def test_holm_keeps_the_order_and_lowers_nothing(p: list[float]) -> None:
    corrected = holm(p)
    kept = [(raw, new) for raw, new in zip(p, corrected, strict=True) if not math.isnan(raw)]
    assert all(math.isnan(new) == math.isnan(raw) for raw, new in zip(p, corrected, strict=True))
    assert all(raw <= new <= 1 for raw, new in kept)
    assert all(new <= min(1, raw * len(kept)) for raw, new in kept)
    ordered = [new for _, new in sorted(kept)]
    assert ordered == sorted(ordered)
    assert sorted(new for new in holm(p[::-1]) if not math.isnan(new)) == ordered
