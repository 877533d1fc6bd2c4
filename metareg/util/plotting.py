"""The look of every plot: colours, axes and logarithmic scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

__all__ = ["COLOURS", "GRID", "INK", "PAPER", "SOFT", "STYLE", "create_axes", "mark_diverged", "set_log_scale"]

PAPER, INK, SOFT, GRID = "#fdfdfb", "#1d2328", "#5a646e", "#d9dcdd"
"""Colours of the background, text, secondary text and grid lines."""

COLOURS = ("#66707a", "#0072b2", "#c44f00", "#00805c", "#a3478c", "#7d6000", "#3f3fa0")
"""Distinct for any colour vision, with a contrast of at least 3 to the background; grey is for baselines."""

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True, "axes.edgecolor": SOFT, "axes.grid": True, "axes.labelcolor": SOFT, "axes.spines.right": False,
    "axes.spines.top": False, "axes.titlecolor": INK, "axes.titlelocation": "left", "font.sans-serif": ["DejaVu Sans"],
    "grid.color": GRID, "legend.frameon": False, "text.color": INK, "text.parse_math": False, "xtick.color": SOFT,
    "ytick.color": SOFT,
}  # fmt: skip
"""Settings for `matplotlib.rc_context`."""


def create_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure, in inches, with one pair of axes and room for their labels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def mark_diverged(axes: Axes, places: Sequence[float]) -> None:
    """Mark positions on the horizontal axis where a value is not finite with a cross below the upper edge."""
    if places:
        axes.plot(
            places, [0.96] * len(places), "x", ms=9, mew=2, color=COLOURS[2], label="diverged",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def set_log_scale(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers at 1, 2 and 5, or only at 1 if it spans many decades."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if math.log10(high / low) < 2.5 else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
