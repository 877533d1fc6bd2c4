"""The layout for papers: one table of methods and tasks, with the best in bold, in LaTeX or Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from metareg.comparison.plan import Arm
from metareg.comparison.results import TaskResults
from metareg.comparison.statistics import Estimate
from metareg.printable import format_count
from metareg.registry.plugins import list_entries
from metareg.reporting.analysis import Report, average_over_seeds, average_over_tasks
from metareg.reporting.numbers import MISSING, Scale

__all__ = ["Cell", "PaperTable", "build_paper_table", "name_method"]


@dataclass(frozen=True)
class Cell:
    """A formatted mean with its interval."""

    mean: str
    half: str
    """Half the interval; empty if there is none."""
    best: bool = False
    """Whether no method has a better formatted mean on the task."""

    def mark_up(self, escape: Callable[[str], str], bold: tuple[str, str]) -> Markup:
        """Format the cell, with the format's marks for bold around the best mean."""
        mean = escape(self.mean)
        half = f" {escape(f'± {self.half}')}" if self.half else ""
        return Markup((f"{bold[0]}{mean}{bold[1]}" if self.best else mean) + half)


@dataclass(frozen=True)
class PaperTable:
    """A table with methods as rows and tasks as columns."""

    tasks: list[str]
    metrics: list[str]
    """For each task, the metric with its unit and an arrow for the better direction."""
    methods: list[str]
    cells: list[list[Cell]]
    """``[methods][tasks]``"""
    caption: str


def build_paper_table(report: Report, over: Literal["seeds", "tasks"]) -> PaperTable:
    """Build the table of a report, with intervals over seeds or over tasks."""
    methods = list(dict.fromkeys((arm.algorithm, arm.augmenter, arm.variant) for arm in report.results.plan.arms))
    columns = []
    for task in report.tasks:
        found = {(each.arm.algorithm, each.arm.augmenter, each.arm.variant): each for each in task.arms}
        average = average_over_seeds if over == "seeds" else average_over_tasks
        number = report.headline[task.label]
        means = {method: average(each, number) for method, each in found.items() if each.seeds}
        columns.append(_make_column(task, [means.get(method) for method in methods]))
    scales = [Scale(task.metric, task.higher_is_better) for task in report.tasks]
    return PaperTable(
        tasks=[task.label for task in report.tasks],
        metrics=[f"{scale.heading} {'↑' if scale.higher_is_better else '↓'}" for scale in scales],
        methods=[
            name_method(report, Arm(algorithm, augmenter, "", variant)) for algorithm, augmenter, variant in methods
        ],
        cells=[list(row) for row in zip(*columns, strict=True)],
        caption=_describe(report, over),
    )


def name_method(report: Report, arm: Arm) -> str:
    """Return a method's name in a paper: ``MAML + CML``, with a variant ``MAML + CML (bf16)``.

    A plugin's name comes from the comparison's ``names``, or else from its class.
    """
    given = report.results.plan.config.names
    classes = {
        name: entry.target.rpartition(":")[2]
        for kind in ("algorithms", "augmenters")
        for entry in list_entries(kind)
        for name in (entry.name, entry.qualified)
    }
    parts = [given.get(each) or classes.get(each) or each for each in (arm.algorithm, *arm.augmenters)]
    return " + ".join(parts) + (f" ({given.get(arm.variant, arm.variant)})" if arm.variant else "")


def _make_column(task: TaskResults, means: list[Estimate | None]) -> list[Cell]:
    scale = Scale(task.metric, task.higher_is_better)
    finite = [each for each in means if each is not None and math.isfinite(each.mean)]
    best = (max if scale.higher_is_better else min)((each.mean for each in finite), default=math.nan)
    cells = []
    for each in means:
        mean, _, half = scale.format_estimate(each).partition(" ± ") if each else (MISSING, "", "")
        shown = each is not None and (each.mean == best or mean == scale.format_value(best))
        cells.append(Cell(mean, half, shown and mean != MISSING))
    return cells


def _describe(report: Report, over: str) -> str:
    numbers = {report.headline[task.label] for task in report.tasks}
    after = [
        format_count(report.headline[task.label], "inner step") + (f" on {task.label}" if len(numbers) > 1 else "")
        for task in (report.tasks if len(numbers) > 1 else report.tasks[:1])
    ]
    seeds = {len(each.seeds) for task in report.tasks for each in task.arms if each.seeds}
    count = format_count(max(seeds), "seed") if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)} seeds"
    spread = count if over == "seeds" else f"test tasks, for the trained models of {count}"
    return (
        f"Test tasks after {'; '.join(after)}: the mean ± half its 95 % interval over {spread} (Student's t). "
        "Bold: the best mean of a column; it does not show whether the difference to the others is more than chance."
    )
