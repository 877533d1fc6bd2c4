"""What a comparison shows, in words that say no more than its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metareg.comparison.statistics import Verdict
from metareg.reporting.analysis import Pair, Report

__all__ = ["Finding", "caveats", "findings", "overview"]


@dataclass(frozen=True)
class Finding:
    """An augmenter against none over the whole comparison."""

    augmenter: str
    sentence: str
    tasks: Sequence[str]
    """A line for each task: with which algorithms it is what."""


def overview(report: Report) -> str:
    """What was compared, and how much of it is there."""
    found, config = report.results, report.results.plan.config
    seeds = len(config.seeds)
    diverged = f"; {found.diverged} diverged" if found.diverged else ""
    return (
        f"{_plural(len(config.algo), 'algorithm')} ({', '.join(config.algo)}) with {_joined(config.augment)} on "
        f"{_plural(len(config.tasks), 'task')}, {_plural(seeds, 'seed')} each: {found.finished} of {found.planned} "
        f"runs {'has' if found.finished == 1 else 'have'} finished{diverged}."
    )


def findings(report: Report) -> list[Finding]:
    """What each augmenter does, in the comparison's order."""
    found = []
    for augmenter in report.augmenters:
        pairs = [pair for pair in report.pairs if pair.augmenter == augmenter]
        if pairs:
            counts = [f"{each.value} in {len(members)}" for each, members in _by_verdict(pairs)]
            sentence = f"Against none: {', '.join(counts)} of {_plural(len(pairs), 'comparison')}."
            tasks = [
                _line(task, [pair for pair in pairs if pair.task == task])
                for task in dict.fromkeys(pair.task for pair in pairs)
            ]
            found.append(Finding(augmenter, sentence, tasks))
    return found


def caveats(report: Report) -> str:
    """How the words come about."""
    if not report.pairs:
        return "No algorithm was run both with an augmenter and without one, so that there is no difference to show."
    after = _after(report)
    if not report.tested:
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
        f"over {_plural(report.tested, 'tested comparison')}. No difference shown does not say that there is none."
        f"{unfinished}"
    )


def _after(report: Report) -> str:
    """After how many inner steps pairs are compared, and on which tasks it could not be the number asked for."""
    tasks: dict[int, list[str]] = {}
    for task in dict.fromkeys(pair.task for pair in report.pairs):
        tasks.setdefault(report.headline[task], []).append(task)
    numbers = [
        _plural(number, "inner step") + (f" on {_joined(labels)}" if len(tasks) > 1 else "")
        for number, labels in tasks.items()
    ]
    others = [label for number, labels in tasks.items() if number != report.inner_steps for label in labels]
    untested = (
        f" There are no results after {_plural(report.inner_steps, 'inner step')} on {_joined(others)}."
        if report.inner_steps is not None and others
        else ""
    )
    return f"The scores are those after {'; '.join(numbers)}.{untested}"


def _line(task: str, pairs: Sequence[Pair]) -> str:
    """As 'sinusoid: better (lower mse) with maml; no difference shown with anil and boil.'"""
    parts = [
        f"{_words(each, members[0])} with {_joined([pair.algorithm for pair in members])}"
        for each, members in _by_verdict(pairs)
    ]
    return f"{task}: {'; '.join(parts)}."


def _words(verdict: Verdict, pair: Pair) -> str:
    if verdict not in (Verdict.BETTER, Verdict.WORSE):
        return verdict.value
    higher = pair.scale.higher_is_better == (verdict is Verdict.BETTER)
    return f"{verdict.value} ({'higher' if higher else 'lower'} {pair.scale.metric})"


def _by_verdict(pairs: Sequence[Pair]) -> list[tuple[Verdict, list[Pair]]]:
    groups = [(each, [pair for pair in pairs if pair.verdict is each]) for each in Verdict]
    return [(each, members) for each, members in groups if members]


def _plural(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
