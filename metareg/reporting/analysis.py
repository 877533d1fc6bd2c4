"""What a report says: the comparison's results with their statistics, whatever the format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metareg.comparison import results
from metareg.comparison.plan import Arm
from metareg.comparison.results import ArmResults, Results, TaskResults
from metareg.comparison.statistics import Difference, Estimate, Verdict, compare, holm, over_seeds, over_tasks, verdict
from metareg.errors import UsageError
from metareg.reporting.numbers import Scale

__all__ = ["Pair", "Report", "analyze_comparison", "average_over_seeds", "average_over_tasks", "average_validations"]


@dataclass(frozen=True, eq=False)
class Pair:
    """An arm against the same without an augmenter."""

    arm: Arm
    scale: Scale
    difference: Difference
    planned: int
    """How many pairs the comparison asks for."""
    corrected: float
    """The p value after Holm's correction."""
    verdict: Verdict

    @property
    def has_single_seed(self) -> bool:
        """Whether there is one difference alone, which has no interval over seeds."""
        return len(self.difference.by_seed) == 1

    @property
    def estimate(self) -> Estimate:
        """The difference with its interval over seeds; of a single one, with that over test tasks."""
        return self.difference.over_tasks if self.has_single_seed else self.difference.over_seeds


@dataclass(frozen=True, eq=False)
class Report:
    """A comparison with its statistics."""

    results: Results
    inner_steps: int | None
    """The number of inner steps that was asked for."""
    headline: Mapping[str, int]
    """For each task with results, the number of inner steps that pairs are compared after."""
    pairs: Sequence[Pair]
    """In the order of the tasks, algorithms and augmenters; those without a pair of seeds among them."""

    @property
    def title(self) -> str:
        """The heading."""
        config = self.results.plan.config
        return " ".join(config.title.split()) or f"Comparison {self.results.plan.folder.resolve().name}"

    @property
    def family_size(self) -> int:
        """How many comparisons the correction covers."""
        return sum(not pair.difference.untested for pair in self.pairs)

    @property
    def tasks(self) -> list[TaskResults]:
        """The tasks with results."""
        return [task for task in self.results.tasks if task.label in self.headline]

    @property
    def augmenters(self) -> list[str]:
        """All of them in the comparison's order, ``none`` among them."""
        return self.results.plan.config.augment


def analyze_comparison(folder: str | Path, inner_steps: int | None = None) -> Report:
    """Read a comparison and compare what it holds; arguments as in `metareg.report`.

    Raises:
        UsageError: there is no comparison, none of its runs has finished, or no run was tested after `inner_steps`.
    """
    found = results.read_results(folder)
    if not found.finished:
        raise UsageError(
            f"No run of the comparison at {folder} has finished ({_count_states(found)}); a report needs at least one."
        )
    headline = _choose_inner_steps(found, inner_steps)
    pairs = [
        pair for task in found.tasks if task.label in headline for pair in _compare_pairs(task, headline[task.label])
    ]
    corrected = holm([difference.p for *_, difference in pairs])
    judged = []
    for (task, each, difference), p in zip(pairs, corrected, strict=True):
        words = verdict(difference, p, higher_is_better=task.higher_is_better)
        scale = Scale(task.metric, task.higher_is_better)
        judged.append(Pair(each.arm, scale, difference, each.planned, p, words))
    return Report(found, inner_steps, headline, judged)


def average_over_seeds(results: ArmResults, inner_steps: int) -> Estimate:
    """The mean of an arm with its interval over seeds."""
    return over_seeds([float(scores.mean()) for scores in results.by_seed(inner_steps).values()])


def average_over_tasks(results: ArmResults, inner_steps: int) -> Estimate:
    """The mean of an arm with its interval over tasks."""
    return over_tasks([*results.by_seed(inner_steps).values()])


def average_validations(results: ArmResults) -> dict[int, Estimate]:
    """An arm's mean over seeds with its interval, for every training step after which all its seeds were validated."""
    curves = list(results.curves.values())
    shared = set.intersection(*map(set, curves)) if curves else set()
    return {step: over_seeds([curve[step] for curve in curves]) for step in sorted(shared)}


def _compare_pairs(task: TaskResults, inner_steps: int) -> list[tuple[TaskResults, ArmResults, Difference]]:
    pairs = []
    for each in task.arms:
        none = task.baselines.get(each.arm.algorithm)
        if none is not None and each is not none:
            scores = each.outcomes(inner_steps), none.outcomes(inner_steps)
            pairs.append((task, each, compare(*scores, higher_is_better=task.higher_is_better)))
    return pairs


def _choose_inner_steps(found: Results, wanted: int | None) -> dict[str, int]:
    tasks = [task for task in found.tasks if task.inner_steps]
    known = sorted({number for task in tasks for number in task.inner_steps})
    if wanted is not None and wanted not in known:
        numbers = ", ".join(map(str, known))
        raise UsageError(f"No run was tested after {wanted} inner steps; there are results after {numbers}.")
    return {
        # Arms that share no number have none to be compared after; their means are still worth a table.
        task.label: wanted if wanted in task.inner_steps else (task.shared_inner_steps or task.inner_steps)[-1]
        for task in tasks
    }


def _count_states(found: Results) -> str:
    counts = Counter(gap.state for gap in found.gaps)
    states = ("diverged", "broken", "unfinished", "not begun")
    return ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
