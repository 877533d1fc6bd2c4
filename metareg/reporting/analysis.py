"""What a report says, whatever the format: statistics of the results, and words that say no more than their intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metareg.comparison.plan import Arm
from metareg.comparison.results import ArmResults, Results, TaskResults, read_results
from metareg.comparison.statistics import Difference, Estimate, Verdict, compare, holm, over_seeds, over_tasks, verdict
from metareg.errors import UsageError
from metareg.reporting.numbers import Scale, format_count

__all__ = [
    "Finding", "Pair", "Report", "analyze_comparison", "average_over_seeds", "average_over_tasks", "average_validations",
    "describe_runs", "describe_tests", "list_findings",
]  # fmt: skip


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
    found = read_results(folder)
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


# ---------------------------------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class Finding:
    """An augmenter against none over the whole comparison."""

    augmenter: str
    sentence: str
    tasks: Sequence[str]
    """A line for each task: with which algorithms it is what."""


def describe_runs(report: Report) -> str:
    """Say what was compared, and how many runs have finished."""
    found, config = report.results, report.results.plan.config
    tasks, seeds = format_count(len(config.tasks), "task"), format_count(len(config.seeds), "seed")
    diverged = f"; {found.diverged} diverged" if found.diverged else ""
    return (
        f"{format_count(len(config.algo), 'algorithm')} ({', '.join(config.algo)}) with {_join_names(config.augment)} on "
        f"{tasks}, {seeds} each: {found.finished} of {found.planned} runs "
        f"{'has' if found.finished == 1 else 'have'} finished{diverged}."
    )


def list_findings(report: Report) -> list[Finding]:
    """List what each augmenter does, in the comparison's order."""
    found = []
    for augmenter in report.augmenters:
        pairs = [pair for pair in report.pairs if pair.arm.augmenter == augmenter]
        if pairs:
            counts = [f"{each.value} in {len(members)}" for each, members in _group_by_verdict(pairs)]
            sentence = f"Against none: {', '.join(counts)} of {format_count(len(pairs), 'comparison')}."
            tasks = [
                _describe_task(task, [pair for pair in pairs if pair.arm.task == task])
                for task in dict.fromkeys(pair.arm.task for pair in pairs)
            ]
            found.append(Finding(augmenter, sentence, tasks))
    return found


def describe_tests(report: Report) -> str:
    """Say what the verdicts rest on."""
    if not report.pairs:
        return "No algorithm was run both with an augmenter and without one, so that there is no difference to show."
    after = _describe_inner_steps(report)
    if not report.family_size:
        reasons = dict.fromkeys(pair.difference.untested for pair in report.pairs)
        return (
            f"{after} No pair could be tested ({', '.join(reasons)}): a test needs two seeds "
            "or more, with both arms finished and none diverged. An interval over test tasks says nothing about other "
            "seeds."
        )
    unfinished = (
        " The comparison is not finished: these words may change with the runs that are missing, and the 5 % hold for a "
        "look at the end alone."
        if report.results.missing
        else ""
    )
    return (
        f"{after} Better and worse are what a paired t test over seeds shows at the 5 % level after Holm's correction "
        f"over {format_count(report.family_size, 'tested comparison')}. No difference shown does not say that there is none."
        f"{unfinished}"
    )


def _describe_inner_steps(report: Report) -> str:
    """After how many inner steps pairs are compared, and on which tasks it could not be the number asked for."""
    tasks: dict[int, list[str]] = {}
    for task in dict.fromkeys(pair.arm.task for pair in report.pairs):
        tasks.setdefault(report.headline[task], []).append(task)
    numbers = [
        format_count(number, "inner step") + (f" on {_join_names(labels)}" if len(tasks) > 1 else "")
        for number, labels in tasks.items()
    ]
    others = [label for number, labels in tasks.items() if number != report.inner_steps for label in labels]
    untested = (
        f" There are no results after {format_count(report.inner_steps, 'inner step')} on {_join_names(others)}."
        if report.inner_steps is not None and others
        else ""
    )
    return f"The scores are those after {'; '.join(numbers)}.{untested}"


def _describe_task(task: str, pairs: Sequence[Pair]) -> str:
    """As 'sinusoid: better (lower mse) with maml; no difference shown with anil and boil.'"""
    parts = [
        f"{_describe_verdict(each, members[0])} with {_join_names([pair.arm.algorithm for pair in members])}"
        for each, members in _group_by_verdict(pairs)
    ]
    return f"{task}: {'; '.join(parts)}."


def _describe_verdict(verdict: Verdict, pair: Pair) -> str:
    if verdict not in (Verdict.BETTER, Verdict.WORSE):
        return verdict.value
    higher = pair.scale.higher_is_better == (verdict is Verdict.BETTER)
    return f"{verdict.value} ({'higher' if higher else 'lower'} {pair.scale.metric})"


def _group_by_verdict(pairs: Sequence[Pair]) -> list[tuple[Verdict, list[Pair]]]:
    groups = [(each, [pair for pair in pairs if pair.verdict is each]) for each in Verdict]
    return [(each, members) for each, members in groups if members]


def _join_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
