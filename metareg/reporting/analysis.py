"""The content of a report in every format: statistics of the results, and statements that the intervals support."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from metareg.comparison.config import Axis, ComparisonConfig
from metareg.comparison.plan import Arm
from metareg.comparison.results import ArmResults, Results, TaskResults, read_results
from metareg.comparison.statistics import Difference, Estimate, Verdict, compare, holm, over_seeds, over_tasks, verdict
from metareg.contract.config import NO_PLUGIN
from metareg.errors import UsageError
from metareg.printable import format_count
from metareg.reporting.numbers import Scale

__all__ = [
    "Finding", "Pair", "Rank", "Report", "analyze_comparison", "average_over_seeds", "average_over_tasks",
    "average_validations", "describe_family", "describe_runs", "describe_tests", "list_findings", "rank_methods",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pair:
    """An arm compared with another on the same task."""

    arm: Arm
    other: Arm
    """The baseline, which is otherwise the same."""
    scale: Scale
    difference: Difference
    planned: int
    """The configured number of pairs."""
    corrected: float
    """The p value after Holm's correction over the report, or over the task's pairs if all pairs are compared."""
    verdict: Verdict

    @property
    def has_single_seed(self) -> bool:
        """Whether there is only one difference, which has no interval over seeds."""
        return len(self.difference.by_seed) == 1

    @property
    def estimate(self) -> Estimate:
        """The difference with its interval over seeds, or over test tasks for a single seed."""
        return self.difference.over_tasks if self.has_single_seed else self.difference.over_seeds


@dataclass(frozen=True, eq=False)
class Report:
    """A comparison with its statistics."""

    results: Results
    baseline: str
    """The baseline: the name of an augmenter, an algorithm or a variant, or ``"all"``."""
    axis: Axis
    """The kind of the baseline."""
    inner_steps: int | None
    """The requested number of inner steps."""
    headline: Mapping[str, int]
    """For each task with results, the number of inner steps after which pairs are compared."""
    pairs: Sequence[Pair]
    """In the order of tasks and arms, including pairs without a common seed."""

    @property
    def title(self) -> str:
        """The heading."""
        config = self.results.plan.config
        return " ".join(config.title.split()) or f"Comparison {self.results.plan.folder.resolve().name}"

    @property
    def family_size(self) -> int:
        """The number of comparisons that the correction covers."""
        return sum(not pair.difference.untested for pair in self.pairs)

    @property
    def tasks(self) -> list[TaskResults]:
        """The tasks with results."""
        return [task for task in self.results.tasks if task.label in self.headline]

    @property
    def settings(self) -> list[str]:
        """The settings (augmenters and variants) in the comparison's order."""
        return [*dict.fromkeys(arm.setting for arm in self.results.plan.arms)]

    @property
    def setting_heading(self) -> str:
        """The heading of a column of settings."""
        return "augmenter, variant" if self.results.plan.config.variants else "augmenter"

    @property
    def constant_columns(self) -> dict[str, str]:
        """The heading and value of the column of algorithms or settings if all rows of a table have the same value."""
        algorithms = self.results.plan.config.algo
        if len(self.settings) == 1:
            return {self.setting_heading: self.settings[0]}
        return {"algorithm": algorithms[0]} if len(algorithms) == 1 else {}

    @property
    def has_single_setting(self) -> bool:
        """Whether only algorithms are compared, and several of them."""
        return len(self.settings) == 1 and len(self.results.plan.config.algo) > 1

    @property
    def series(self) -> list[str]:
        """The series that figures distinguish by colour: settings, or algorithms if only these are compared."""
        return self.results.plan.config.algo if self.has_single_setting else self.settings

    @property
    def against(self) -> str:
        """The baseline as part of a sentence."""
        return "each other" if self.axis == "all" else self.baseline

    def get_series(self, arm: Arm) -> str:
        """Return the series of an arm."""
        return arm.algorithm if self.has_single_setting else arm.setting

    def find_baseline(self, arm: Arm) -> Arm | None:
        """Find the baseline of an arm: itself if it is a baseline, None if the comparison does not have one.

        If all pairs are compared, it is the task's first arm.
        """
        plan = self.results.plan
        if self.axis == "all":
            return next(each for each in plan.arms if each.task == arm.task)
        return plan.find_arm(replace(arm, **{self.axis: self.baseline}))


def analyze_comparison(path: str | Path, inner_steps: int | None = None, baseline: str | None = None) -> Report:
    """Read a comparison and compute its statistics; arguments as in `metareg.report`.

    Raises:
        UsageError: there is no comparison, none of its runs has finished, no run was tested after `inner_steps`, or the
            comparison has no such baseline.
    """
    found = read_results(path)
    if not found.finished:
        raise UsageError(
            f"No run of the comparison at {path} has finished ({_count_states(found)}); a report needs at least one."
        )
    config = found.plan.config
    baseline = baseline or config.baseline or _choose_baseline(config)
    inner_steps = config.inner_steps if inner_steps is None else inner_steps
    headline = found.choose_inner_steps(inner_steps)
    axis = "augmenter" if baseline == NO_PLUGIN else config.find_axis(baseline)
    report = Report(found, baseline, axis, inner_steps, headline, [])
    compared = [(task, *pair) for task in report.tasks for pair in _compare_pairs(report, task)]
    families = [task.label if report.axis == "all" else "" for task, *_ in compared]
    corrected = _correct(families, [difference.p for *_, difference in compared])
    pairs = []
    for (task, one, other, difference), p in zip(compared, corrected, strict=True):
        words = verdict(difference, p, higher_is_better=task.higher_is_better)
        scale = Scale(task.metric, task.higher_is_better)
        pairs.append(Pair(one.arm, other.arm, scale, difference, one.planned, p, words))
    return replace(report, pairs=pairs)


def average_over_seeds(results: ArmResults, inner_steps: int) -> Estimate:
    """Return the mean of an arm with its interval over seeds."""
    return over_seeds([float(scores.mean()) for scores in results.by_seed(inner_steps).values()])


def average_over_tasks(results: ArmResults, inner_steps: int) -> Estimate:
    """Return the mean of an arm with its interval over tasks."""
    return over_tasks([*results.by_seed(inner_steps).values()])


def average_validations(results: ArmResults) -> dict[int, Estimate]:
    """Return an arm's mean over seeds with its interval, for every training step at which all seeds were validated."""
    curves = list(results.curves.values())
    shared = set.intersection(*map(set, curves)) if curves else set()
    return {step: over_seeds([curve[step] for curve in curves]) for step in sorted(shared)}


def _choose_baseline(config: ComparisonConfig) -> str:
    """Choose the default baseline: no augmenter if there are others, otherwise the first variant."""
    if config.variants and config.augment == [NO_PLUGIN]:
        return next(iter(config.variants))
    return NO_PLUGIN


def _compare_pairs(report: Report, task: TaskResults) -> Iterator[tuple[ArmResults, ArmResults, Difference]]:
    """Compare every arm with its baseline, or with every arm before it."""
    inner_steps, arms = report.headline[task.label], {each.arm: each for each in task.arms}
    for place, (arm, each) in enumerate(arms.items()):
        baseline = report.find_baseline(arm)
        others = task.arms[:place] if report.axis == "all" else [arms[baseline]] if baseline not in (None, arm) else []
        for other in others:
            scores = each.outcomes(inner_steps), other.outcomes(inner_steps)
            yield each, other, compare(*scores, higher_is_better=task.higher_is_better)


def _correct(families: Sequence[str], p: Sequence[float]) -> list[float]:
    """Correct each family's p values separately, and keep their order."""
    corrected = np.full(len(p), np.nan)
    for family in dict.fromkeys(families):
        places = [place for place, name in enumerate(families) if name == family]
        corrected[places] = holm([p[place] for place in places])
    return corrected.tolist()


def _count_states(found: Results) -> str:
    counts = Counter(gap.state for gap in found.gaps)
    states = ("diverged", "broken", "unfinished", "not begun")
    return ", ".join(f"{counts[state]} {state}" for state in states if counts[state])


# ---------------------------------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class Finding:
    """The result of one augmenter, algorithm or variant compared with the baseline, or the best method on a task."""

    name: str
    sentence: str
    lines: Sequence[str]
    """Details: for each task, where it is better or worse."""
    comparisons: int = 0
    """The number of pairs that it summarises; 0 if it is no summary."""


@dataclass(frozen=True)
class Rank:
    """A method's rank on a task."""

    arm: Arm
    scale: Scale
    mean: Estimate
    """The mean with its interval over seeds, or over tasks if no arm has several seeds."""
    better_than: Sequence[Arm]
    """The methods that it is shown to be better than, the best first."""


def describe_runs(report: Report) -> str:
    """Describe what was compared, and how many runs have finished."""
    found, config = report.results, report.results.plan.config
    tasks, seeds = format_count(len(config.tasks), "task"), format_count(len(config.seeds), "seed")
    diverged = f"; {found.diverged} diverged" if found.diverged else ""
    augmenters = "" if config.augment == ["none"] else f" with {_join_names(config.augment)}"
    variants = f", each as {_join_names([*config.variants])}," if config.variants else ""
    return (
        f"{format_count(len(config.algo), 'algorithm')} ({', '.join(config.algo)}){augmenters}{variants} on "
        f"{tasks}, {seeds} each: {found.finished} of {found.planned} runs "
        f"{'has' if found.finished == 1 else 'have'} finished{diverged}."
    )


def list_findings(report: Report) -> list[Finding]:
    """List the result of each augmenter, algorithm or variant; for all pairs, the best method on each task."""
    if report.axis == "all":
        return [_find_leader(report, task) for task in report.tasks]
    groups: dict[str, list[Pair]] = {}
    for pair in report.pairs:
        groups.setdefault(getattr(pair.arm, report.axis), []).append(pair)
    found = []
    for name, pairs in groups.items():
        counts = [f"{each.value} in {len(members)}" for each, members in _group_by_verdict(pairs)]
        lines = [
            _describe_task(report, task, [pair for pair in pairs if pair.arm.task == task])
            for task in dict.fromkeys(pair.arm.task for pair in pairs)
        ]
        if len(pairs) == 1:
            found.append(Finding(name, f"Against {report.against} on {lines[0]}", [], 1))
        else:
            sentence = f"Against {report.against}: {', '.join(counts)} of {len(pairs)} comparisons."
            found.append(Finding(name, sentence, lines, len(pairs)))
    return found


def rank_methods(report: Report, task: TaskResults) -> list[Rank]:
    """Rank a task's arms with a score, the best mean first, with the arms that each is shown to be better than."""
    scale, inner_steps = Scale(task.metric, task.higher_is_better), report.headline[task.label]
    average = average_over_tasks if task.single else average_over_seeds
    shown: dict[Arm, list[Arm]] = {each.arm: [] for each in task.arms}
    for pair in report.pairs:
        if pair.arm.task == task.label and pair.verdict in (Verdict.BETTER, Verdict.WORSE):
            ends = (pair.arm, pair.other) if pair.verdict is Verdict.BETTER else (pair.other, pair.arm)
            shown[ends[0]].append(ends[1])
    means = {each.arm: average(each, inner_steps) for each in task.arms}
    known = [arm for arm, mean in means.items() if math.isfinite(mean.mean)]
    known.sort(key=lambda arm: means[arm].mean, reverse=scale.higher_is_better)
    return [Rank(arm, scale, means[arm], [other for other in known if other in shown[arm]]) for arm in known]


def _find_leader(report: Report, task: TaskResults) -> Finding:
    ranks = rank_methods(report, task)
    best = ranks[0]
    others, count = format_count(len(ranks) - 1, "other"), len(best.better_than)
    shown = (
        f"shown to be better than {count} of the {others}"
        if count
        else f"not shown to be better than any of the {others}"
    )
    names = [other.arm.name for other in ranks[1:] if other.arm not in best.better_than]
    rest = [f"Not shown to be worse than it: {_join_names(names)}."] if names and count else []
    return Finding(
        task.label, f"{best.arm.name} has the best mean, {best.scale.format_estimate(best.mean)}, and is {shown}.", rest
    )


def describe_tests(report: Report) -> str:
    """Describe the basis of the verdicts."""
    if not report.pairs:
        if report.baseline == NO_PLUGIN:
            return "No algorithm was run both with and without an augmenter, so there is no difference to test."
        return f"Nothing was run besides {report.baseline}, so there is no difference to test."
    after = _describe_inner_steps(report)
    if not report.family_size:
        reasons = dict.fromkeys(pair.difference.untested for pair in report.pairs)
        return (
            f"{after} No pair could be tested ({', '.join(reasons)}): a test needs at least two seeds, with both arms "
            "finished and none diverged. An interval over test tasks says nothing about other seeds."
        )
    unfinished = (
        " The comparison is not finished: the missing runs may change these verdicts, and the 5 % level applies only to "
        "the final report."
        if report.results.missing
        else ""
    )
    return (
        f"{after} 'Better' and 'worse' mean that a paired t test over seeds is significant at the 5 % level after Holm's "
        f"correction over {describe_family(report)}. 'No difference shown' does not mean that there is none."
        f"{unfinished}"
    )


def describe_family(report: Report) -> str:
    """Describe which comparisons Holm's correction covers."""
    if report.axis != "all":
        return format_count(report.family_size, "tested comparison")
    tested = Counter(pair.arm.task for pair in report.pairs if not pair.difference.untested)
    sizes = sorted({*tested.values()})
    numbers = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    return f"the {numbers} tested pairs of each task separately"


def _describe_inner_steps(report: Report) -> str:
    """Describe after how many inner steps pairs are compared, and which tasks have no results after that number."""
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
    return f"Scores are after {'; '.join(numbers)}.{untested}"


def _describe_task(report: Report, task: str, pairs: Sequence[Pair]) -> str:
    """Write, for example, 'sinusoid: better (lower mse) with maml; no difference shown with anil and boil.'"""
    parts = []
    for each, members in _group_by_verdict(pairs):
        rest = [*dict.fromkeys(filter(None, (_name_rest(report, pair.arm) for pair in members)))]
        difference = _describe_difference(members[0]) if len(members) == 1 else ""
        parts.append(_describe_verdict(each, members[0]) + (f" with {_join_names(rest)}" if rest else "") + difference)
    return f"{task}: {'; '.join(parts)}."


def _describe_difference(pair: Pair) -> str:
    """Write, for example, ' (+0.2 points, 95 % interval −0.1 to +0.4)'; empty if no seed has both scores."""
    found = pair.difference.over_seeds
    if not found.count:
        return ""
    unit = " points" if pair.scale.percent else ""
    interval = f", 95 % interval {pair.scale.format_interval(found)}" if found.count > 1 else ""
    return f" ({pair.scale.format_difference(found)}{unit}{interval})"


def _name_rest(report: Report, arm: Arm) -> str:
    """Name what an arm and its baseline have in common; empty if it is the same for all."""
    if report.axis == "augmenter":
        return replace(arm, augmenter=NO_PLUGIN).name
    if report.axis == "variant":
        return replace(arm, variant="").name
    return "" if report.has_single_setting else arm.setting


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
