"""The plot of an analysis."""

from __future__ import annotations

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metareg.runs.adaptation import Analysis
from metareg.runs.plots import format_metric
from metareg.util.plotting import COLOURS, SOFT, STYLE

__all__ = ["plot_analysis"]


@rc_context(STYLE)
def plot_analysis(found: Analysis, title: str) -> Figure:
    """Plot each layer's relative update, the metric with parts of the model adapted, and the angles of gradients."""
    figure = Figure(figsize=(13 if found.angles else 9.5, 4.4), layout="constrained")
    panels = figure.subplots(1, 3 if found.angles else 2)
    _plot_updates(panels[0], found)
    _plot_parts(panels[1], found)
    if found.angles:
        names = [f"{angle.part}\n{angle.ratio.mean:.2g} × its length" for angle in found.angles]
        means, widths = zip(*((angle.degrees.mean, angle.degrees.ci95) for angle in found.angles), strict=True)
        panels[2].axhline(90, color=SOFT, lw=1)
        panels[2].errorbar(names, means, widths, fmt="o", ms=6, capsize=3, color=COLOURS[1])
        panels[2].set(ylim=(0, 180), yticks=range(0, 181, 30), ylabel="degrees")
        panels[2].margins(x=0.4)
        panels[2].set_title(f"angle of {found.augmenters} to the algorithm's gradient", fontsize=10)
    figure.suptitle(title, fontsize=10)
    return figure


def _plot_updates(axes: Axes, found: Analysis) -> None:
    """Plot a bar for each layer: its distance from its start after the last inner step."""
    colours = {"body": COLOURS[1], "head": COLOURS[2], "plugin": COLOURS[3]}
    layers = found.layers[::-1]
    means = [layer.relative[-1].mean for layer in layers]
    axes.barh([layer.layer for layer in layers], means, 0.6, color=[colours[layer.part] for layer in layers], alpha=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("‖change‖ / ‖start‖")
    axes.set_title(f"what {found.inner_steps} inner steps change", fontsize=10)


def _plot_parts(axes: Axes, found: Analysis) -> None:
    """Plot the metric against inner steps, on test tasks for each adapted part, and on training tasks."""
    curves = {f"test, {name} adapted": means for name, means in found.adapting.items()} | {
        "training tasks": found.train
    }
    for number, (label, means) in enumerate(curves.items()):
        values, widths = zip(*((each.mean, each.ci95) for each in means), strict=True)
        is_test = label.startswith("test")
        colour, line = (COLOURS[1 + number], "o-") if is_test else (COLOURS[0], "o--")
        axes.errorbar(range(len(means)), values, widths, fmt=line, ms=4, lw=1.5, capsize=3, color=colour, label=label)
    axes.set(xlabel="inner steps", xticks=range(len(found.train)))
    axes.set_ylabel(f"query {format_metric(found.metric)}")
    axes.legend(fontsize=8)
