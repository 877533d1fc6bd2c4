"""The tables of a report as text, which every format lays out in its own way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metareg.comparison.results import ArmResults, Gap, TaskResults
from metareg.comparison.statistics import ALPHA
from metareg.reporting.analysis import Pair, Report, average_validations, seed_interval, task_interval
from metareg.reporting.numbers import MISSING, Scale, p_value, significant

__all__ = [
    "Table", "collect", "costs", "differences", "environment", "favour", "gaps", "overview", "results", "settings", "steps",
    "validations", "verdict_note", "verdict_text",
]  # fmt: skip

_LONGEST_REASON = 400


@dataclass(frozen=True)
class Table:
    """Cells of plain text.

    Args:
        title: what it is about.
        columns: their headings.
        rows: cells, as many as columns.
        note: what its numbers and every ± mean.
        key: what is to be known of all tables of its kind; where several stand together, once is enough.
        headers: how many columns, from the left, name the row.
        texts: columns that hold sentences or lists, not numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    key: str = ""
    headers: int = 2
    texts: Sequence[int] = ()

    def is_text(self, column: int) -> bool:
        """Whether a column holds words, not numbers."""
        return column < self.headers or column in self.texts


def collect(report: Report) -> dict[str, list[Table]]:
    """The tables of all tasks, by what they show."""
    found: dict[str, list[Table | None]] = {
        "results": [results(report, task) for task in report.tasks],
        "differences": [differences(report, task) for task in report.tasks],
        "validations": [validations(task) for task in report.tasks],
        "costs": [costs(task) for task in report.tasks],
        "settings": [settings(task) for task in report.results.tasks],
    }
    return {name: [table for table in each if table] for name, each in found.items()}


def results(report: Report, task: TaskResults) -> Table:
    """The means of every arm of a task, after each number of inner steps."""
    scale, headline, of_tasks = Scale(task.metric, task.higher_is_better), report.headline[task.label], task.single
    rows = [
        [
            each.arm.algorithm,
            each.arm.augmenter,
            _count(len(each.seeds), each.planned),
            *(_mean(each, scale, number, of_tasks=of_tasks) for number in task.inner_steps),
            *([] if of_tasks else [scale.half(task_interval(each, headline))]),
        ]
        for each in task.arms
    ]
    columns = ["algorithm", "augmenter", "seeds", *map(steps, task.inner_steps)]
    note = f"{_capital(scale.heading)} on the test tasks after so many inner steps, {scale.better}. "
    if of_tasks:
        note += (
            "± is half the 95 % interval over test tasks (Student's t). With one seed there is no interval over seeds: "
            "nothing here says what another seed would give."
        )
    else:
        columns.append(f"± over tasks, {steps(headline)}")
        note += (
            "± is half the 95 % interval of the mean over seeds (Student's t); the last column is half the interval "
            "that other test tasks would move it in, these trained models given. A mean without ± is that of one seed."
        )
    if any("diverged" in cell for row in rows for cell in row):
        note += (
            " A seed has diverged where its training did or one of its scores is not finite; the mean is that of the "
            "other seeds."
        )
    statistics = [each for each in task.bn_statistics if each != "none"]
    note += f" BatchNorm: {', '.join(statistics)}." if statistics else ""
    return Table(task.label, columns, rows, note)


def differences(report: Report, task: TaskResults) -> Table | None:
    """Every augmenter against none on a task; None where no pair of arms is there to be compared."""
    pairs = [pair for pair in report.pairs if pair.task == task.label]
    if not pairs:
        return None
    scale, after = Scale(task.metric, task.higher_is_better), steps(report.headline[task.label])
    rows = [
        [
            pair.algorithm,
            pair.augmenter,
            scale.signed(pair.difference.over_seeds),
            scale.interval(pair.difference.over_seeds),
            scale.interval(pair.difference.over_tasks),
            favour(pair),
            p_value(pair.difference.p),
            p_value(pair.corrected),
            verdict_text(pair),
        ]
        for pair in pairs
    ]
    columns = [
        "algorithm", "augmenter", "difference", "95 % over seeds", "95 % over tasks", "seeds in favour", "p",
        "p (Holm)", "in words",
    ]  # fmt: skip
    note = f"Augmenter minus none after {after} in {scale.difference}; {scale.better}."
    key = (
        "Pairs are those of the same seed and test task. The intervals are 95 % ones of the mean difference (Student's "
        "t): over seeds, or where it says so over test tasks with these trained models given. p is that of the two-sided "
        f"paired t test over seeds; {_corrected(report)}. Better and worse need p (Holm) < {ALPHA:g}; 'no "
        "difference shown' does not say that there is none."
    )
    return Table(task.label, columns, rows, note, key, texts=(8,))


def overview(report: Report, task: TaskResults) -> Table:
    """The means and the differences to none of a task in few columns, for a terminal."""
    scale, headline, of_tasks = Scale(task.metric, task.higher_is_better), report.headline[task.label], task.single
    pairs = {(pair.algorithm, pair.augmenter): pair for pair in report.pairs if pair.task == task.label}
    rows = []
    for each in task.arms:
        pair = pairs.get((each.arm.algorithm, each.arm.augmenter))
        rows.append(
            [
                each.arm.algorithm,
                each.arm.augmenter,
                _mean(each, scale, headline, of_tasks=of_tasks),
                *(
                    [""] * 3
                    if pair is None
                    else [
                        scale.interval(pair.difference.over_tasks if of_tasks else pair.difference.over_seeds),
                        p_value(pair.corrected),
                        verdict_text(pair),
                    ]
                ),
            ]
        )
    seeds = "tasks (one seed)" if of_tasks else "seeds"
    return Table(
        task.label,
        ["algorithm", "augmenter", f"{scale.heading} ({steps(headline)})", "minus none", "p (Holm)", "in words"],
        rows,
        f"± and intervals are 95 % over {seeds}; {scale.better}.",
        texts=(5,),
    )


def costs(task: TaskResults) -> Table:
    """Time and memory of every arm of a task."""
    rows = []
    for each in task.arms:
        milliseconds, peak = 1000 * _finite(each.seconds_per_step), _finite(each.peak_bytes)
        rows.append(
            [
                each.arm.algorithm,
                each.arm.augmenter,
                significant(milliseconds.mean()) if milliseconds.size else MISSING,
                _range([significant(value) for value in np.sort(milliseconds)]),
                _range([f"{ratio:.2f}" for ratio in np.sort(_times_none(task, each))]),
                f"{peak.min() / 2**20:.0f}" if peak.size else MISSING,
            ]
        )
    return Table(
        task.label,
        ["algorithm", "augmenter", "ms per step", "from seed to seed", "times none", "peak memory in MiB"],
        rows,
        "",
        "Time per training step: the mean over seeds of each run's median, and the range of the seeds; 'times none' is "
        "the range, from seed to seed, of its ratio to the same algorithm and seed without an augmenter. Runs that shared "
        "the machine slowed each other down: where the range is wide, that is what it shows. "
        "Memory: the least over the seeds of each run's peak; on a GPU that of its tensors, on a CPU that of the whole "
        "process, with what earlier runs in it left.",
    )


def validations(task: TaskResults) -> Table | None:
    """The metric in validation of every arm, after up to five training steps; None without a validation of all arms."""
    curves = {each.arm: average_validations(each) for each in task.arms}
    shared = sorted(set.intersection(*map(set, filter(None, curves.values())))) if any(curves.values()) else []
    if not shared:
        return None
    scale = Scale(task.metric, task.higher_is_better)
    shown = [shared[place] for place in np.unique(np.linspace(len(shared) - 1, 0, 5).round().astype(int))]
    rows = [
        [arm.algorithm, arm.augmenter, *(scale.estimate(curve[step]) for step in shown)]
        for arm, curve in curves.items()
        if curve
    ]
    note = f"{_capital(scale.heading)} in validation: the mean over seeds ± half its 95 % interval; {scale.better}."
    return Table(task.label, ["algorithm", "augmenter", *map(steps, shown)], rows, note)


def settings(task: TaskResults) -> Table | None:
    """What tuning chose for the arms of a task; None where nothing was tuned."""
    tuned = [(each.arm, each.chosen) for each in task.arms if each.chosen]
    if not tuned:
        return None
    rows = [
        [
            arm.algorithm,
            arm.augmenter,
            ", ".join(f"{key} = {_setting(value)}" for key, value in chosen.options.items()) or "the defaults",
            f"{chosen.trials}, {chosen.failed} failed" if chosen.failed else str(chosen.trials),
        ]
        for arm, chosen in tuned
    ]
    return Table(
        task.label,
        ["algorithm", "augmenter", "settings", "tried"],
        rows,
        "",
        "The best of so many settings that were tried on the validation split; test tasks had no part in it. One fails "
        "where training diverges or the arm cannot have it.",
        texts=(2,),
    )


def environment(report: Report) -> Table:
    """What the runs were made with."""
    finished = report.results.finished
    rows = [
        [
            name,
            ", ".join(
                value if count == finished else f"{value} ({count} runs)" for value, count in counts.most_common()
            ),
        ]
        for name, counts in report.results.environment.items()
    ]
    return Table(
        "Environment",
        ["what", "value"],
        rows,
        f"What the {finished} finished runs were made with. Where they differ, the runs of each value are counted.",
        headers=1,
        texts=(1,),
    )


def gaps(report: Report) -> Table | None:
    """What is missing, a row for the seeds of an arm that share the reason; None where nothing is."""
    alike: dict[tuple[str, str, str], list[Gap]] = {}
    for gap in report.results.gaps:
        alike.setdefault((gap.what, gap.state, gap.reason), []).append(gap)
    if not alike:
        return None
    rows = [
        [
            what,
            ", ".join(gap.seed for gap in found if gap.seed) or MISSING,
            state,
            _shortened(reason),
            str(found[0].path if len(found) == 1 else found[0].path.parent),
        ]
        for (what, state, reason), found in alike.items()
    ]
    return Table(
        "Missing and broken runs",
        ["runs", "seeds", "state", "why", "folder"],
        rows,
        "Runs that are broken, unfinished or not begun count nowhere in this report: pairs need both of their runs. One "
        "that diverged takes the verdict from its pair. A damaged run counts, but for the file that is named.",
        headers=1,
        texts=(2, 3, 4),
    )


def verdict_text(pair: Pair) -> str:
    """The words for a pair, with what is to be known of them."""
    note = verdict_note(pair)
    return f"{pair.verdict.value} ({note})" if note else pair.verdict.value


def verdict_note(pair: Pair) -> str:
    """Why a pair was not tested, or that seeds are missing; empty where the words are final."""
    missing = f"{pair.difference.pairs} of {pair.planned} seeds" if pair.difference.pairs < pair.planned else ""
    return pair.difference.untested or missing


def steps(number: int) -> str:
    """A number of steps."""
    return "1 step" if number == 1 else f"{number} steps"


def favour(pair: Pair) -> str:
    """How many seeds are in favour of an augmenter, of how many that say anything, and what became of the others."""
    found = pair.difference
    others = [f"{found.diverged} diverged"] if found.diverged else []
    others += [f"{pair.planned} planned"] if found.pairs < pair.planned else []
    count = f"{found.in_favour} of {len(found.by_seed)}" if found.by_seed else MISSING
    return f"{count} ({', '.join(others)})" if others else count


def _corrected(report: Report) -> str:
    if not report.tested:
        return "no pair of this report could be tested"
    which = f"all {report.tested} tested comparisons" if report.tested > 1 else "the one tested comparison"
    return f"Holm's correction covers {which} of this report"


def _mean(results: ArmResults, scale: Scale, inner_steps: int, *, of_tasks: bool) -> str:
    scores = results.outcomes(inner_steps)
    diverged = sum(not math.isfinite(each.mean()) for each in scores.values())
    if scores and diverged == len(scores):
        return "diverged"
    text = scale.estimate((task_interval if of_tasks else seed_interval)(results, inner_steps))
    return f"{text} ({diverged} diverged)" if diverged else text


def _times_none(task: TaskResults, results: ArmResults) -> np.ndarray:
    """For each seed of an arm that ran without an augmenter too, the ratio of the times per step."""
    baseline = task.baselines.get(results.arm.algorithm)
    of_none = dict(zip(baseline.seeds, baseline.seconds_per_step, strict=True)) if baseline else {}
    times = zip(results.seeds, results.seconds_per_step, strict=True)
    return _finite(np.array([seconds / of_none[seed] for seed, seconds in times if seed in of_none]))


def _range(ascending: Sequence[str]) -> str:
    """The ends of a range; once where they are written alike."""
    return " to ".join(dict.fromkeys([ascending[0], ascending[-1]])) if ascending else MISSING


def _count(finished: int, planned: int) -> str:
    return str(finished) if finished == planned else f"{finished} of {planned}"


def _setting(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shortened(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} …"


def _capital(text: str) -> str:
    return text if text == "mse" else text[:1].upper() + text[1:]


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
