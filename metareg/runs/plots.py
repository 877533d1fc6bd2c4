"""The plots of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metareg.contract.splits import TRAIN, VALIDATION
from metareg.errors import describe_error
from metareg.printable import format_count
from metareg.registry.dispatch import find_hook
from metareg.runs.folder import PLOTS
from metareg.util.files import replace_file
from metareg.util.plotting import COLOURS, STYLE, create_axes, mark_diverged, set_log_scale

if TYPE_CHECKING:
    from metareg.contract.evaluation import Evaluation
    from metareg.runs.run import Run

__all__ = ["draw", "format_metric", "plot_inner_steps", "plot_learning_curve"]

log = logging.getLogger("metareg")


def draw(run: Run) -> list[Path]:
    """Draw the learning curve, the metric against inner steps, and the task's own plots; return the files.

    A plot that fails only causes a warning.
    """
    assert run.evaluation is not None
    figures: dict[str, Figure] = {}
    with _warn("learning-curve"):
        figures["learning-curve"] = plot_learning_curve(run)
    with _warn("inner-steps"):
        figures["inner-steps"] = plot_inner_steps(run.evaluation, run.config.title)
    of_task = find_hook(run.source.plugin, "figures")
    if of_task is not None:
        with _warn(f"those of the {run.source.plugin.label}"):
            figures |= of_task(learner=run.learner, seed=run.config.seed) or {}
    paths = []
    for name, figure in figures.items():
        path = run.path / PLOTS / f"{name}.png"
        with _warn(name):
            with replace_file(path) as temporary:
                figure.savefig(temporary, format="png", dpi=120)
            paths.append(path)
    return paths


@contextmanager
def _warn(pictures: str) -> Iterator[None]:
    """Log why plots cannot be drawn, and continue."""
    try:
        yield
    # Tasks, data and fonts can fail in any way, and the results are already saved.
    except Exception as error:
        log.warning("Could not draw plots (%s): %s", pictures, describe_error(error))


@rc_context(STYLE)
def plot_learning_curve(run: Run) -> Figure:
    """Plot the metric in training (query sets, after the inner steps) and validation against training steps."""
    lines = run.metrics()
    metric = run.learner.metric
    figure, axes = create_axes(7, 4.4)
    train = [(line["step"], line[metric.name]) for line in lines if line["split"] == TRAIN]
    axes.plot(*zip(*train, strict=True), lw=1, alpha=0.55, color=COLOURS[0], label="training")
    inner_steps = run.config.inner_steps
    validation = [line for line in lines if line["split"] == VALIDATION and line["inner_steps"] == inner_steps]
    if validation:
        points = [(v["step"], v[metric.name], v["ci95"]) for v in validation]
        finite = [point for point in points if math.isfinite(point[1])]
        steps, means, widths = np.array(finite).reshape(-1, 3).T
        axes.errorbar(
            steps, means, widths, fmt="o-", ms=4, lw=1.8, capsize=3, color=COLOURS[1], label="validation, 95 % interval"
        )
        mark_diverged(axes, [point[0] for point in points if point not in finite])
    if not metric.higher_is_better and min((value for _, value in train), default=0.0) > 0:
        set_log_scale(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training step")
    axes.set_ylabel(f"query {format_metric(metric.name)}")
    axes.set_title(run.config.title, fontsize=10)
    axes.legend()
    return figure


@rc_context(STYLE)
def plot_inner_steps(evaluation: Evaluation, title: str) -> Figure:
    """Plot the test metric with its 95 % interval against the number of inner steps; a cross if it is not finite."""
    figure, axes = create_axes(7, 4.4)
    means = {k: evaluation.mean(k) for k in evaluation.inner_steps}
    finite = {k: mean for k, mean in means.items() if math.isfinite(mean)}
    widths = [evaluation.ci95(k) for k in finite]
    axes.errorbar(
        list(finite), list(finite.values()), widths, fmt="o-", ms=5, lw=1.8, capsize=3, color=COLOURS[1],
        label="mean, 95 % interval",
    )  # fmt: skip
    for k, mean in finite.items():
        axes.annotate(f"{mean:.3g}", (k, mean), xytext=(6, 6), textcoords="offset points", fontsize=9)
    if finite and not evaluation.higher_is_better and max(finite.values()) > 10 * min(finite.values()) > 0:
        set_log_scale(axes)
    if len(finite) < len(means):
        mark_diverged(axes, [k for k in means if k not in finite])
        axes.legend()
    axes.set_xticks(list(means))
    axes.margins(x=0.08)
    axes.set_xlabel("inner steps")
    axes.set_ylabel(f"test {format_metric(evaluation.metric)}")
    axes.set_title(f"{title}: {format_count(evaluation.tasks, 'test task')}, mean and 95 % interval", fontsize=10)
    return figure


def format_metric(metric: str) -> str:
    return {"mse": "mean squared error"}.get(metric, metric)
