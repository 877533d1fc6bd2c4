"""The pictures of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

from metareg.contract.splits import TRAIN, VALIDATION
from metareg.errors import describe_error
from metareg.registry.dispatch import find_hook
from metareg.runs.folder import PLOTS
from metareg.util.files import replace_file
from metareg.util.plotting import COLOURS, STYLE, create_axes, set_log_scale

if TYPE_CHECKING:
    from metareg.contract.evaluation import Evaluation
    from metareg.runs.run import Run

__all__ = ["draw", "format_metric", "plot_inner_steps", "plot_learning_curve"]

log = logging.getLogger("metareg")


def draw(run: Run) -> list[Path]:
    """Draw the run's learning curve, the metric against inner steps, and the task's own pictures; the files written.

    A picture that fails costs a warning.
    """
    assert run.evaluation is not None
    figures: dict[str, Figure] = {}
    with _warn("learning-curve"):
        figures["learning-curve"] = plot_learning_curve(run)
    with _warn("inner-steps"):
        figures["inner-steps"] = plot_inner_steps(run.evaluation)
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
    """Go on where pictures cannot be drawn, and say why."""
    try:
        yield
    # Whatever a task, its data or a font makes of it: the results stand already.
    except Exception as error:
        log.warning("Pictures could not be drawn (%s): %s", pictures, describe_error(error))


@rc_context(STYLE)
def plot_learning_curve(run: Run) -> Figure:
    """The metric in training (query sets, after the inner steps) and in validation, against training steps."""
    lines = run.metrics()
    metric = run.learner.metric
    figure, axes = create_axes(7, 4.4)
    train = [(line["step"], line[metric.name]) for line in lines if line["split"] == TRAIN]
    axes.plot(*zip(*train, strict=True), lw=1, alpha=0.55, color=COLOURS[0], label="training")
    inner_steps = run.config.inner_steps
    validation = [line for line in lines if line["split"] == VALIDATION and line["inner_steps"] == inner_steps]
    if validation:
        steps, means, widths = zip(*((v["step"], v[metric.name], v["ci95"]) for v in validation), strict=True)
        axes.errorbar(
            steps, means, widths, fmt="o-", ms=4, lw=1.8, capsize=3, color=COLOURS[1], label="validation, 95 % interval"
        )
    if not metric.higher_is_better and min((value for _, value in train), default=0.0) > 0:
        set_log_scale(axes)
    axes.set_xlabel("training step")
    axes.set_ylabel(f"query {format_metric(metric.name)}")
    axes.set_title(run.config.title, fontsize=10)
    axes.legend()
    return figure


@rc_context(STYLE)
def plot_inner_steps(evaluation: Evaluation) -> Figure:
    """The test metric with its 95 % interval against the number of inner steps."""
    figure, axes = create_axes(7, 4.4)
    steps = evaluation.inner_steps
    means = [evaluation.mean(k) for k in steps]
    widths = [evaluation.ci95(k) for k in steps]
    axes.errorbar(steps, means, widths, fmt="o-", ms=5, lw=1.8, capsize=3, color=COLOURS[1])
    for k, mean in zip(steps, means, strict=True):
        axes.annotate(f"{mean:.3g}", (k, mean), xytext=(6, 6), textcoords="offset points", fontsize=9)
    if not evaluation.higher_is_better and min(means) > 0 and max(means) > 10 * min(means):
        set_log_scale(axes)
    axes.set_xticks(steps)
    axes.margins(x=0.08)
    axes.set_xlabel("inner steps")
    axes.set_ylabel(f"test {format_metric(evaluation.metric)}")
    axes.set_title(f"{evaluation.tasks} test tasks, mean and 95 % interval", fontsize=10)
    return figure


def format_metric(metric: str) -> str:
    return {"mse": "mean squared error"}.get(metric, metric)
