"""Plots of test tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from metareg import Episodes, MetaLearner, format_count

__all__ = ["draw_predictions"]


def draw_predictions(
    learner: MetaLearner, episodes: Episodes, names: Sequence[str], target: str, offset: float, scale: float
) -> Figure:
    """Draw predicted against true values of query rows, before and after adaptation, one panel per task.

    Args:
        learner: adapts to each task.
        episodes: regression tasks.
        names: the tasks' names.
        target: the target's name.
        offset: added to targets and outputs after scaling.
        scale: the factor of targets and outputs.
    """
    figure = Figure(figsize=(3.2 * len(names), 3.6), layout="constrained")
    steps = max(1, learner.config.inner_steps)
    for number, axes in enumerate(figure.subplots(1, len(names), squeeze=False).flat):
        support_x, support_y, query_x, query_y = episodes.unstack(number)
        truth = query_y.flatten() * scale + offset
        for after, marker, label in ((0, "x", "before"), (steps, "o", f"after {format_count(steps, 'step')}")):
            adapted = learner.adapt(support_x, support_y, steps=after)
            with torch.no_grad():
                outputs = adapted(query_x.to(learner.device)).cpu().flatten() * scale + offset
            axes.plot(truth, outputs, marker, ms=5, alpha=0.8, label=label)
        ends = [float(truth.min()), float(truth.max())]
        axes.plot(ends, ends, color="0.5", lw=1)
        axes.set_title(names[number], fontsize=10)
        axes.set_xlabel(f"true {target}")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel(f"predicted {target}")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
