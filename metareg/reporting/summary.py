"""What a comparison shows, in words that say no more than its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metareg.comparison.statistics import Verdict
from metareg.reporting.analysis import Pair, Report
from metareg.reporting.numbers import format_count

__all__ = ["Finding", "describe_runs", "describe_tests", "list_findings"]


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
