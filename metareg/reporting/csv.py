"""A report's scores as one tidy CSV: a row for every task, arm, seed and number of inner steps."""

from __future__ import annotations

import csv
import io

from metareg.comparison.statistics import over_tasks
from metareg.reporting.analysis import Report

__all__ = ["COLUMNS", "render"]

COLUMNS = (
    "task", "algorithm", "augmenter", "seed", "inner_steps", "metric", "higher_is_better", "mean", "ci95", "tasks",
)  # fmt: skip


def render(report: Report) -> str:
    """Render the CSV; `ci95` is half the 95 % interval over tasks (Student's t) of that seed's mean."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for task in report.tasks:
        for each in task.arms:
            for number in each.inner_steps:
                for seed, scores in each.by_seed(number).items():
                    arm = each.arm
                    found = over_tasks([scores])
                    writer.writerow(
                        [
                            task.label, arm.algorithm, arm.augmenter, seed, number, task.metric,
                            str(task.higher_is_better).lower(), float(scores.mean()), found.half, len(scores),
                        ]
                    )  # fmt: skip
    return text.getvalue()
