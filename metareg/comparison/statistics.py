"""Statistics of a comparison: intervals over seeds and over tasks, paired differences, and verdicts.

There are two kinds of interval. *Over seeds*: how would the result vary with other seeds, that is, other initial
weights, training tasks and test tasks? *Over tasks*: how would it vary with other test tasks, for the same trained
models? Only the first is about a method. The second is about how precisely the test measured these models.

All functions are pure. Undefined numbers (the interval of one value, the test of one pair) are NaN.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from metareg.printable import format_count
from metareg.util.intervals import compute_half_width, compute_quantile, compute_spread

__all__ = [
    "ALPHA", "Difference", "Estimate", "Verdict", "compare", "holm", "over_seeds", "over_tasks", "summarise", "verdict",
]  # fmt: skip

ALPHA = 0.05
"""The significance level for corrected p values."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, ``mean ± half``."""

    mean: float
    half: float
    """Half the width of the interval; NaN for fewer than two values."""
    count: int
    """The number of values."""

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


class Verdict(enum.Enum):
    """The conclusion about an augmenter compared with none."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "no difference shown"
    NOT_TESTED = "not tested"


@dataclass(frozen=True)
class Difference:
    """An augmenter's score minus the score without it, paired by seed and test task."""

    over_seeds: Estimate
    over_tasks: Estimate
    p: float
    """The uncorrected p value of the two-sided paired t test over seeds; NaN if `untested` is set."""
    in_favour: int
    """Number of pairs in which the augmenter is better; diverged pairs do not count."""
    pairs: int
    """Number of seeds that both have."""
    diverged: int
    """Number of pairs with a score that is not finite; the intervals are over the others."""
    by_seed: tuple[float, ...]
    """The difference of each pair that did not diverge."""
    untested: str = ""
    """Why there is no test; empty if there is one."""


def over_seeds(values: Sequence[float] | Scores) -> Estimate:
    """Return the mean of the finite values, one per seed, with Student's t interval."""
    array = np.asarray(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    return Estimate(float(np.mean(finite)) if len(finite) else np.nan, compute_half_width(finite), len(finite))


def over_tasks(scores: Sequence[Scores]) -> Estimate:
    """Return the mean over seeds of each seed's mean over tasks, with its interval over test tasks.

    Each seed's tasks are a separate sample, so the squared standard errors of the seeds' means add up. The degrees of
    freedom are those of Welch and Satterthwaite. For one seed, it is the ordinary t interval.

    Args:
        scores: each seed's scores ``[tasks]``; seeds with a score that is not finite do not count.
    """
    samples = [each for each in scores if len(each) and np.isfinite(each).all()]
    if not samples:
        return Estimate(np.nan, np.nan, 0)
    count = sum(len(each) for each in samples)
    mean = float(np.mean([np.mean(each) for each in samples]))
    if len(samples) == 1:
        return Estimate(mean, compute_half_width(samples[0]), count)
    if min(len(each) for each in samples) < 2:
        return Estimate(mean, np.nan, count)
    errors = np.array([compute_spread(each) / np.sqrt(len(each)) for each in samples])
    largest = errors.max()
    if largest == 0:
        return Estimate(mean, 0.0, count)
    shares = (errors / largest) ** 2
    degrees = shares.sum() ** 2 / np.sum(shares**2 / np.array([len(each) - 1 for each in samples]))
    error = largest * np.sqrt(shares.sum()) / len(samples)
    return Estimate(mean, float(compute_quantile(degrees) * error), count)


def summarise(means: Sequence[float], scores: Sequence[Scores]) -> tuple[Estimate, str]:
    """Return a method's mean with its interval, and what this covers: the seeds, or for one seed its test tasks.

    Args:
        means: each seed's mean over tasks.
        scores: each seed's scores ``[tasks]``.
    """
    if len(means) == 1:
        return over_tasks(scores), format_count(len(scores[0]), "test task")
    return over_seeds(means), format_count(len(means), "seed")


def compare(augmented: Mapping[int, Scores], baseline: Mapping[int, Scores], *, higher_is_better: bool) -> Difference:
    """Return the paired difference between an augmenter and none.

    Only seeds that both have are paired. There is no test if it would be invalid: with fewer than two pairs, if a pair
    diverged (the others would be a biased selection), and if all pairs have exactly the same difference.

    Args:
        augmented: each seed's scores ``[tasks]`` with the augmenter; a single NaN if its training diverged.
        baseline: the same without it. A seed's tasks are the same in the same order; if one has more, only the first
            ones are shared.
        higher_is_better: whether a larger score is better.
    """
    seeds = sorted(augmented.keys() & baseline.keys())
    pairs = [(augmented[seed][: len(baseline[seed])], baseline[seed][: len(augmented[seed])]) for seed in seeds]
    sign = 1 if higher_is_better else -1
    finite = [(with_it, without) for with_it, without in pairs if np.isfinite([with_it, without]).all()]
    by_task = [with_it - without for with_it, without in finite]
    by_seed = np.array([np.mean(each) for each in by_task])
    p, untested = np.nan, ""
    if len(finite) < len(seeds):
        untested = f"{len(seeds) - len(finite)} of {len(seeds)} pairs diverged"
    elif len(seeds) < 2:
        untested = "one pair of seeds" if seeds else "no pair of seeds"
    else:
        p, untested = _paired_t(by_seed, max(np.abs(without).max() for _, without in pairs))
    return Difference(
        over_seeds=over_seeds(by_seed),
        over_tasks=over_tasks(by_task),
        p=p,
        in_favour=int(np.sum(sign * by_seed > 0)),
        pairs=len(seeds),
        diverged=len(seeds) - len(finite),
        by_seed=tuple(by_seed.tolist()),
        untested=untested,
    )


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's step-down Bonferroni correction of a family of p values, in the same order.

    With the corrected values, the probability of any false positive in the family is at most 5 %. NaN stays NaN and
    does not belong to the family.

    Reference: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979), 65–70.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]
    factors = np.arange(len(order), 0, -1)
    corrected = np.full(values.shape, np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1)
    return corrected.tolist()


def verdict(difference: Difference, corrected: float, *, higher_is_better: bool) -> Verdict:
    """Return the verdict that a difference's interval and its p value after `holm` support."""
    if difference.untested:
        return Verdict.NOT_TESTED
    if not corrected < ALPHA or difference.over_seeds.low <= 0 <= difference.over_seeds.high:
        return Verdict.NOT_SHOWN
    return Verdict.BETTER if (difference.over_seeds.mean > 0) == higher_is_better else Verdict.WORSE


def _paired_t(differences: Scores, scale: float) -> tuple[float, str]:
    """Return the p value of a two-sided t test against zero, or why there is none; `scale` is the scores' magnitude."""
    if not differences.any():
        return 1.0, ""
    deviation = compute_spread(differences)
    # Differences that are equal up to rounding do not vary with the seed, so a t test does not apply.
    if deviation <= 1e-12 * scale:
        return np.nan, "every seed gives exactly the same difference"
    statistic = np.mean(differences) / (deviation / np.sqrt(len(differences)))
    return float(2 * stdtr(len(differences) - 1, -abs(statistic))), ""
