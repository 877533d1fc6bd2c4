"""The rows of a comparison's results as recipes, so that any of them can be run again and judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metareg.comparison.archive import ARCHIVE_SUFFIX
from metareg.comparison.plan import CONFIG_FILE
from metareg.comparison.recipe import Expected, Recipe
from metareg.comparison.results import ArmResults, Results, TaskResults, read_results
from metareg.comparison.statistics import summarise
from metareg.errors import UnknownNameError, UsageError

__all__ = ["find_row", "has_rows", "list_rows"]


def has_rows(path: str | Path) -> bool:
    """Whether this is a comparison's folder or archive."""
    return str(path).endswith(ARCHIVE_SUFFIX) or (Path(path) / CONFIG_FILE).is_file()


def list_rows(path: str | Path) -> dict[str, Recipe]:
    """List the rows with a finished run as recipes, by name: ``TASK/METHOD``, as their folders.

    A recipe has the settings that were chosen for its row and the seeds that have finished. Its expected value is their
    mean after the number of inner steps at which the comparison compares.

    Args:
        path: a comparison's folder or archive.

    Raises:
        UsageError: there is no comparison, none of its runs has finished, or it compares a program's own objects.
    """
    found = read_results(path)
    if found.plan.config.program:
        raise UsageError(f"{path} compares objects of a Python program; run that program to reproduce it.")
    headline = found.choose_inner_steps(found.plan.config.inner_steps)
    rows = {
        each.arm.folder.as_posix(): _make_recipe(Path(path), found, task, each, headline[task.label])
        for task in found.tasks
        for each in task.arms
        if each.seeds
    }
    if not rows:
        raise UsageError(f"No run of {path} has finished.")
    return rows


def find_row(path: str | Path, name: str) -> Recipe:
    """Find a row of a comparison's folder or archive by name; raise a `UsageError` if there is none."""
    rows = list_rows(path)
    if name not in rows:
        raise UnknownNameError("row", name, rows, f"`metareg reproduce {path}` lists them.")
    return rows[name]


def _make_recipe(path: Path, found: Results, task: TaskResults, results: ArmResults, inner_steps: int) -> Recipe:
    run = found.plan.list_arm_runs(results.arm, results.chosen.options if results.chosen else {})[0]
    if inner_steps not in results.inner_steps:
        inner_steps = results.inner_steps[-1]
    expected = _find_expected(results, inner_steps, str(path))
    return Recipe(
        name=f"{path.name.removesuffix(ARCHIVE_SUFFIX)}/{results.arm.folder.as_posix()}",
        summary=f"{results.arm}, a row of {path}",
        algo=results.arm.algorithm,
        augment=results.arm.augmenter,
        task=run.config["task"],
        options=run.options,
        seeds=list(results.seeds),
        metric=task.metric,
        inner_steps=inner_steps,
        expected=expected,
        unknown=None if expected else "No test of this row is finite.",
        minutes=_estimate_minutes(results),
        hardware=", ".join(found.environment.get("processor", {})),
        notes=f"Training diverged with {_list_seeds(results.diverged)}." if results.diverged else "",
    )


def _find_expected(results: ArmResults, inner_steps: int, source: str) -> Expected | None:
    """The mean after some inner steps, with its interval over seeds, or over tasks if there is one seed."""
    scores = [*results.by_seed(inner_steps).values()]
    estimate, over = summarise([float(each.mean()) for each in scores], scores)
    if not math.isfinite(estimate.mean):
        return None
    interval = (estimate.low, estimate.high) if math.isfinite(estimate.half) else None
    return Expected(mean=estimate.mean, interval=interval, over=over, source=source)


def _list_seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _estimate_minutes(results: ArmResults) -> float | None:
    """The duration of a run's training; None if its speed is not known."""
    seconds = results.seconds_per_step[np.isfinite(results.seconds_per_step)]
    if results.steps is None or not len(seconds):
        return None
    return float(np.median(seconds)) * results.steps / 60
