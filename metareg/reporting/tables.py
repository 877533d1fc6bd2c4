"""The tables of a report, independent of the format."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metareg.comparison.results import ArmResults, Gap, TaskResults
from metareg.comparison.statistics import ALPHA, Estimate, Verdict, over_seeds
from metareg.contract.config import NO_PLUGIN
from metareg.printable import format_count
from metareg.reporting.analysis import (
    Pair,
    Report,
    average_over_seeds,
    average_over_tasks,
    average_validations,
    describe_family,
    rank_methods,
)
from metareg.reporting.numbers import MISSING, Scale, format_p_value, format_significant

__all__ = [
    "Table", "build_adaptation", "build_all", "build_costs", "build_differences", "build_environment", "build_gaps",
    "build_overview", "build_ranking", "build_results", "build_settings", "build_validations",
    "describe_verdict", "explain_verdict", "format_seeds_in_favour",
]  # fmt: skip

_LONGEST_REASON = 400


@dataclass(frozen=True)
class Table:
    """Cells of plain text.

    Args:
        note: the meaning of its numbers and of ±.
        key: an explanation for all tables of its kind, needed only once if there are several.
        headers: the number of columns, from the left, that name the row.
        texts: columns of sentences or lists instead of numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    key: str = ""
    headers: int = 2
    texts: Sequence[int] = ()

    def is_text(self, column: int) -> bool:
        """Return whether a column contains text instead of numbers."""
        return column < self.headers or column in self.texts

    def without(self, columns: Container[str]) -> Table:
        """Return the table without some columns."""
        kept = [place for place, column in enumerate(self.columns) if column not in columns]
        return replace(
            self,
            columns=[self.columns[place] for place in kept],
            rows=[[row[place] for place in kept] for row in self.rows],
            headers=sum(place < self.headers for place in kept),
            texts=[number for number, place in enumerate(kept) if place in self.texts],
        )


def build_all(report: Report) -> dict[str, list[Table]]:
    """Build the tables of all tasks, by kind."""
    found: dict[str, list[Table | None]] = {
        "results": [build_results(report, task) for task in report.tasks],
        "ranking": [build_ranking(report, task) for task in report.tasks],
        "differences": [build_differences(report, task) for task in report.tasks],
        "validations": [build_validations(report, task) for task in report.tasks],
        "adaptation": [build_adaptation(report, task) for task in report.tasks],
        "costs": [build_costs(report, task) for task in report.tasks],
        "settings": [build_settings(report, task) for task in report.results.tasks],
    }
    return {name: [table for table in each if table] for name, each in found.items()}


def build_results(report: Report, task: TaskResults) -> Table:
    """Tabulate the means of every arm of a task after each number of inner steps."""
    scale, headline, of_tasks = Scale(task.metric, task.higher_is_better), report.headline[task.label], task.single
    rows = []
    for each in task.arms:
        seeds = str(each.planned) if len(each.seeds) == each.planned else f"{len(each.seeds)} of {each.planned}"
        means = [_format_mean(each, scale, number, of_tasks=of_tasks) for number in task.inner_steps]
        of_models = [] if of_tasks else [scale.format_half_width(average_over_tasks(each, headline))]
        rows.append([each.arm.algorithm, each.arm.setting, seeds, *means, *of_models])
    columns = [
        "algorithm",
        report.setting_heading,
        "seeds",
        *(format_count(number, "step") for number in task.inner_steps),
    ]
    note = f"{_capitalize(scale.heading)} on the test tasks after the given number of inner steps; {scale.direction}. "
    if of_tasks:
        note += (
            "± is half the 95 % interval over test tasks (Student's t). With one seed, there is no interval over seeds, "
            "and the table does not say what another seed would give."
        )
    else:
        columns.append(f"± over tasks, {format_count(headline, 'step')}")
        note += (
            "± is half the 95 % interval of the mean over seeds (Student's t). The last column is half its 95 % interval "
            "over test tasks, for these trained models. A mean without ± is from one seed."
        )
    if any("diverged" in cell for row in rows for cell in row):
        note += " A seed diverged if its training did, or if a score is not finite; the mean is over the other seeds."
    statistics = [each for each in task.bn_statistics if each != "none"]
    note += f" BatchNorm: {', '.join(statistics)}." if statistics else ""
    return Table(task.label, columns, rows, note).without(report.constant_columns)


def build_differences(report: Report, task: TaskResults) -> Table | None:
    """Tabulate every arm against its baseline on a task; None if there is no pair.

    If all pairs are compared, only those that are shown to differ.
    """
    of_task = [pair for pair in report.pairs if pair.arm.task == task.label]
    all_pairs = report.axis == "all"
    pairs = [pair for pair in of_task if not all_pairs or pair.verdict in (Verdict.BETTER, Verdict.WORSE)]
    if not (pairs if all_pairs else of_task):
        return None
    scale, after = Scale(task.metric, task.higher_is_better), format_count(report.headline[task.label], "step")
    rows = []
    for pair in pairs:
        over_seeds, over_tasks = pair.difference.over_seeds, pair.difference.over_tasks
        ends = [scale.format_interval(over_seeds), scale.format_interval(over_tasks), format_seeds_in_favour(pair)]
        test = [format_p_value(pair.difference.p), format_p_value(pair.corrected), describe_verdict(pair)]
        names = [pair.arm.name, pair.other.name] if all_pairs else [pair.arm.algorithm, pair.arm.setting]
        rows.append([*names, scale.format_difference(over_seeds), *ends, *test])
    columns = [
        *(["method", "minus"] if all_pairs else ["algorithm", report.setting_heading]), "difference", "95 % over seeds",
        "95 % over tasks", "seeds in favour", "p", "p (Holm)", "verdict",
    ]  # fmt: skip
    what = "The first method minus the second" if all_pairs else f"{_capitalize(report.axis)} minus {report.baseline}"
    note = f"{what} after {after} in {scale.difference_heading}; {scale.direction}."
    if all_pairs:
        note += (
            f" Of {format_count(len(of_task), 'pair')}, these are shown to differ; --format pairs lists all of them."
        )
    key = (
        "Runs are paired by seed and test task. The intervals are 95 % intervals of the mean difference (Student's t) "
        "over seeds or, where stated, over test tasks for these trained models. p is from the two-sided paired t test "
        f"over seeds; {_describe_correction(report)}. 'Better' and 'worse' require p (Holm) < {ALPHA:g}; 'no difference "
        "shown' does not mean that there is none."
    )
    return Table(task.label, columns, rows, note, key, texts=(8,)).without(report.constant_columns)


def build_overview(report: Report, task: TaskResults) -> Table:
    """Tabulate the means and the differences to the baselines of a task in few columns, for a terminal."""
    if report.axis == "all":
        return build_ranking(report, task) or build_results(report, task)
    scale, headline, of_tasks = Scale(task.metric, task.higher_is_better), report.headline[task.label], task.single
    pairs = {pair.arm: pair for pair in report.pairs}
    rows = []
    for each in task.arms:
        pair = pairs.get(each.arm)
        words = [""] * 3 if pairs else []
        if pair is not None:
            interval = scale.format_interval(pair.difference.over_tasks if of_tasks else pair.difference.over_seeds)
            words = [interval, format_p_value(pair.corrected), describe_verdict(pair)]
        mean = _format_mean(each, scale, headline, of_tasks=of_tasks)
        rows.append([each.arm.algorithm, each.arm.setting, mean, *words])
    heading = f"{scale.heading} ({format_count(headline, 'step')})"
    columns = ["algorithm", report.setting_heading, heading]
    columns += [f"minus {report.baseline}", "p (Holm)", "verdict"] if pairs else []
    note = f"± and intervals are 95 % over {'tasks (one seed)' if of_tasks else 'seeds'}; {scale.direction}."
    note += "".join(f" The {name} is {value}." for name, value in report.constant_columns.items() if value != NO_PLUGIN)
    return Table(task.label, columns, rows, note, texts=(5,) if pairs else ()).without(report.constant_columns)


def build_ranking(report: Report, task: TaskResults) -> Table | None:
    """Tabulate the methods of a task by their means, and which differences are shown; None unless all pairs are compared."""
    if report.axis != "all":
        return None
    ranks = rank_methods(report, task)
    scale, after = Scale(task.metric, task.higher_is_better), format_count(report.headline[task.label], "step")
    rows = []
    for number, rank in enumerate(ranks, 1):
        worse = sum(rank.arm in other.better_than for other in ranks)
        names = ", ".join(other.name for other in rank.better_than) or MISSING
        rows.append([str(number), rank.arm.name, scale.format_estimate(rank.mean), str(worse), names])
    over = "test tasks (one seed)" if task.single else "seeds"
    note = (
        f"{_capitalize(scale.heading)} after {after}, {scale.direction}: the mean ± half its 95 % interval over {over}. "
        "Methods are ordered by their means; the last columns say which differences are shown. 'Behind' counts the "
        "methods that are shown to be better."
    )
    key = (
        "A difference is shown if the two-sided paired t test over seeds is significant at the 5 % level after Holm's "
        f"correction over {describe_family(report)}."
        if report.family_size
        else "No pair of this report could be tested."
    )
    columns = ["rank", "method", scale.heading, "behind", "shown to be better than"]
    return Table(task.label, columns, rows, note, key, texts=(4,))


def build_costs(report: Report, task: TaskResults) -> Table:
    """Tabulate time and memory of every arm of a task."""
    rows = []
    arms = {each.arm: each for each in task.arms}
    against = task.arms[0].arm.name if report.axis == "all" else report.baseline
    for each in task.arms:
        baseline = report.find_baseline(each.arm)
        milliseconds, peak = 1000 * _drop_nonfinite(each.seconds_per_step), _drop_nonfinite(each.peak_bytes)
        mean = format_significant(milliseconds.mean()) if milliseconds.size else MISSING
        seeds = _format_range([format_significant(value) for value in np.sort(milliseconds)])
        ratios = _format_range(
            [f"{ratio:.2f}" for ratio in np.sort(_compute_time_ratios(each, arms[baseline] if baseline else None))]
        )
        least = f"{peak.min() / 2**20:.0f}" if peak.size else MISSING
        rows.append([each.arm.algorithm, each.arm.setting, mean, seeds, ratios, least])
    heading = report.setting_heading
    columns = ["algorithm", heading, "ms per step", "from seed to seed", f"times {against}", "peak memory in MiB"]
    same = "that method" if report.axis == "all" else f"the same arm and seed with {report.baseline}"
    key = (
        f"Time per training step: the mean over seeds of each run's median, and the range over seeds. 'times {against}' "
        f"is the range over seeds of its ratio to {same}. Runs that share a machine slow each other down, which makes "
        "the range wide. Memory: the smallest peak over seeds; on a GPU, of the tensors; on a CPU, of the whole process, "
        "including memory left by earlier runs."
    )
    return Table(task.label, columns, rows, "", key).without(report.constant_columns)


def build_validations(report: Report, task: TaskResults) -> Table | None:
    """Tabulate every arm's validation metric at up to five training steps; None without validations."""
    curves = {each.arm: average_validations(each) for each in task.arms}
    shared = sorted(set.intersection(*map(set, filter(None, curves.values())))) if any(curves.values()) else []
    if not shared:
        return None
    scale = Scale(task.metric, task.higher_is_better)
    shown = [shared[place] for place in np.unique(np.linspace(len(shared) - 1, 0, 5).round().astype(int))]
    rows = [
        [arm.algorithm, arm.setting, *(scale.format_estimate(curve[step]) for step in shown)]
        for arm, curve in curves.items()
        if curve
    ]
    heading = _capitalize(scale.heading)
    note = f"{heading} in validation: the mean over seeds ± half its 95 % interval; {scale.direction}."
    columns = ["algorithm", report.setting_heading, *(format_count(step, "step") for step in shown)]
    return Table(task.label, columns, rows, note).without(report.constant_columns)


def build_adaptation(report: Report, task: TaskResults) -> Table | None:
    """Tabulate where the arms of a task adapt; None if no run was analysed."""
    analysed = [each for each in task.arms if each.analyses]
    if not analysed:
        return None
    scale, rows = Scale(task.metric, task.higher_is_better), []

    def average(values: Iterable[float | None]) -> Estimate:
        return over_seeds([math.nan if value is None else value for value in values])

    for each in analysed:
        found = [*each.analyses.values()]
        moved = [average(_find_update(one, part) for one in found) for part in ("body", "head")]
        scores = [average(_find_score(one, part) for one in found) for part in ("all", "body", "head")]
        train = average(one["train"][-1]["mean"] for one in found)
        angle = average(
            next((angle["degrees"]["mean"] for angle in one["angles"] if angle["part"] == "body"), None)
            for one in found
        )
        plain = Scale("", higher_is_better=True)
        cells = [*map(plain.format_estimate, moved), *map(scale.format_estimate, [*scores, train])]
        rows.append([each.arm.algorithm, each.arm.setting, str(len(found)), *cells, plain.format_estimate(angle)])
    steps = sorted({one["inner_steps"] for each in analysed for one in each.analyses.values()})
    fewest = f"{steps[0]} to " if len(steps) > 1 else ""
    columns = [
        "algorithm", report.setting_heading, "seeds", "body moves", "head moves", "all adapted", "body alone", "head alone",
        "training tasks", "angle",
    ]  # fmt: skip
    note = (
        f"After {fewest}{format_count(steps[-1], 'inner step')}, from 'metareg analyse'. Moves: ‖change‖ / ‖start‖ in the "
        f"inner loop, the mean over the layers of the part. Next, {scale.heading} on test tasks ({scale.direction}) if "
        "everything that the algorithm adapts may change, the body alone or the head alone; then on training tasks. "
        "Angle: in degrees, on the body, between the algorithm's outer gradient and what the augmenter adds. "
        "± is half the 95 % interval over seeds."
    )
    return Table(task.label, columns, rows, note).without(report.constant_columns)


def _find_update(analysis: Mapping[str, Any], part: str) -> float | None:
    moved = [layer["relative"][-1]["mean"] for layer in analysis["layers"] if layer["part"] == part]
    return sum(moved) / len(moved) if moved else None


def _find_score(analysis: Mapping[str, Any], part: str) -> float | None:
    means = analysis["adapting"].get(part)
    return means[-1]["mean"] if means else None


def build_settings(report: Report, task: TaskResults) -> Table | None:
    """Tabulate the chosen settings of a task's arms; None if nothing was tuned."""
    rows = []
    for arm, chosen in ((each.arm, each.chosen) for each in task.arms if each.chosen):
        values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in chosen.options.items()}
        settings = ", ".join(f"{key} = {value}" for key, value in values.items()) or "the defaults"
        tried = f"{chosen.trials}, {chosen.failed} failed" if chosen.failed else str(chosen.trials)
        rows.append([arm.algorithm, arm.setting, settings, tried])
    if not rows:
        return None
    key = (
        "The best of the tried settings on the validation split; test tasks were not used. A setting fails if training "
        "diverges or the arm cannot use it."
    )
    columns = ["algorithm", report.setting_heading, "settings", "tried"]
    return Table(task.label, columns, rows, "", key, texts=(2,)).without(report.constant_columns)


def build_environment(report: Report) -> Table:
    """Tabulate the environment of the runs."""
    finished = report.results.finished
    rows = []
    for name, counts in report.results.environment.items():
        values = [value if count == finished else f"{value} ({count} runs)" for value, count in counts.most_common()]
        rows.append([name, ", ".join(values)])
    note = f"The environment of the {finished} finished runs. Where runs differ, each value has its number of runs."
    return Table("Environment", ["what", "value"], rows, note, headers=1, texts=(1,))


def build_gaps(report: Report) -> Table | None:
    """Tabulate what is missing, one row for an arm's seeds with the same reason; None if nothing is missing."""
    alike: dict[tuple[str, str, str], list[Gap]] = {}
    for gap in report.results.gaps:
        alike.setdefault((gap.what, gap.state, gap.reason), []).append(gap)
    if not alike:
        return None
    rows = []
    for (what, state, reason), found in alike.items():
        seeds = ", ".join(gap.seed for gap in found if gap.seed) or MISSING
        folder = found[0].path if len(found) == 1 else found[0].path.parent
        rows.append([what, seeds, state, _shorten(reason), str(folder)])
    note = (
        "This report excludes runs that failed, are unfinished or have not begun: a pair needs both runs. If a run "
        "diverged, its pair gets no verdict. A damaged run counts, except for the named file."
    )
    columns = ["runs", "seeds", "state", "why", "folder"]
    return Table("Missing and broken runs", columns, rows, note, headers=1, texts=(2, 3, 4))


def describe_verdict(pair: Pair) -> str:
    """Describe the verdict on a pair, with its explanation."""
    note = explain_verdict(pair)
    return f"{pair.verdict.value} ({note})" if note else pair.verdict.value


def explain_verdict(pair: Pair) -> str:
    """Explain why a pair was not tested, or that seeds are missing; empty if the verdict is final."""
    missing = f"{pair.difference.pairs} of {pair.planned} seeds" if pair.difference.pairs < pair.planned else ""
    return pair.difference.untested or missing


def format_seeds_in_favour(pair: Pair) -> str:
    """Format the number of seeds in favour of an arm, the number that count, and the state of the others."""
    found = pair.difference
    others = [f"{found.diverged} diverged"] if found.diverged else []
    others += [f"{pair.planned} planned"] if found.pairs < pair.planned else []
    count = f"{found.in_favour} of {len(found.by_seed)}" if found.by_seed else MISSING
    return f"{count} ({', '.join(others)})" if others else count


def _describe_correction(report: Report) -> str:
    if not report.family_size:
        return "no pair of this report could be tested"
    if report.axis == "all":
        return f"Holm's correction covers {describe_family(report)}"
    which = f"all {report.family_size} tested comparisons" if report.family_size > 1 else "the one tested comparison"
    return f"Holm's correction covers {which} of this report"


def _format_mean(results: ArmResults, scale: Scale, inner_steps: int, *, of_tasks: bool) -> str:
    scores = results.outcomes(inner_steps)
    diverged = sum(not math.isfinite(each.mean()) for each in scores.values())
    if scores and diverged == len(scores):
        return "diverged"
    text = scale.format_estimate((average_over_tasks if of_tasks else average_over_seeds)(results, inner_steps))
    return f"{text} ({diverged} diverged)" if diverged else text


def _compute_time_ratios(results: ArmResults, baseline: ArmResults | None) -> np.ndarray:
    """Return the ratios ``[seeds]`` of an arm's times per step to another's, for seeds that have both."""
    of_baseline = dict(zip(baseline.seeds, baseline.seconds_per_step, strict=True)) if baseline else {}
    times = zip(results.seeds, results.seconds_per_step, strict=True)
    return _drop_nonfinite(np.array([seconds / of_baseline[seed] for seed, seconds in times if seed in of_baseline]))


def _format_range(ascending: Sequence[str]) -> str:
    """Format the ends of a range, or one value if both look the same."""
    return " to ".join(dict.fromkeys([ascending[0], ascending[-1]])) if ascending else MISSING


def _shorten(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} …"


def _capitalize(text: str) -> str:
    return text if text == "mse" else text[:1].upper() + text[1:]


def _drop_nonfinite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
