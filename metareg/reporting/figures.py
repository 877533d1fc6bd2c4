"""The figures of the HTML page: one panel per algorithm or task, so that each is legible on a phone."""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from metareg.comparison.plan import Arm
from metareg.comparison.results import TaskResults
from metareg.comparison.statistics import Estimate, Verdict
from metareg.reporting.analysis import (
    Pair,
    Report,
    average_over_seeds,
    average_over_tasks,
    average_validations,
    rank_methods,
)
from metareg.reporting.numbers import MISSING, Scale, format_significant
from metareg.reporting.tables import describe_verdict
from metareg.util.plotting import COLOURS, GRID, INK, PAPER, SOFT, STYLE, create_axes, set_log_scale

__all__ = ["draw_costs", "draw_differences", "draw_inner_steps", "draw_key", "draw_learning_curves", "draw_ranking"]

_STYLE = STYLE | {
    "axes.titlesize": 12.5, "axes.titleweight": "bold", "figure.titlesize": 12.5, "figure.titleweight": "bold",
    "font.size": 11, "lines.linewidth": 1.8, "lines.markeredgecolor": PAPER, "lines.markersize": 7, "svg.fonttype": "none",
}  # fmt: skip
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_DASHES = ("--", "-", ":", "-", "-.", (0, (3, 2)), (0, (9, 3)))

_WIDTH, _WIDE, _HEIGHT, _ROW = 300, 340, 208, 21
"""Width of panels and of panels in two columns, height of curves and of a row, in the page's pixels."""
_PIXEL = 1 / 72
"""A pixel in inches, matplotlib's unit."""
_LONGEST_LABEL = 26

_NAMES = {PAPER: "paper", INK: "ink", SOFT: "soft", GRID: "line"} | {c: f"s{n}" for n, c in enumerate(COLOURS)}
_VARIABLES = {colour: f"var(--{name})" for colour, name in _NAMES.items()}
"""The colours in the page's style sheet, which differ in dark mode."""

_Curve = Mapping[int, Estimate]


@rc_context(_STYLE)
def draw_key(report: Report, name: str, section: str) -> Markup:
    """Draw the line and marker of one of the report's series for the legend of a section."""
    figure = Figure(figsize=(28 * _PIXEL, 14 * _PIXEL))
    figure.add_artist(Line2D([0.05, 0.5, 0.95], [0.5] * 3, markevery=[1], **_choose_style(report, name)))
    return _write_svg(figure, f"{name} in {section}")


@rc_context(_STYLE)
def draw_learning_curves(report: Report, task: TaskResults) -> list[Markup]:
    """Draw the validation metric against training steps: the mean over seeds, with its interval as a band."""

    def draw(axes: Axes, curves: Mapping[str, _Curve]) -> None:
        for name, curve in curves.items():
            style = _choose_style(report, name)
            steps, (mean, half) = list(curve), _to_arrays(curve.values())
            axes.fill_between(steps, mean - half, mean + half, color=style["color"], alpha=0.14, linewidth=0)
            axes.plot(steps, mean, markersize=5, markevery=max(1, len(steps) // 10), **style)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)

    curves = {each.arm: average_validations(each) for each in task.arms}
    return _draw_panels(report, task, curves, draw, "training step", "in validation against training steps")


@rc_context(_STYLE)
def draw_inner_steps(report: Report, task: TaskResults) -> list[Markup]:
    """Draw the metric on test tasks against the number of inner steps, evenly spaced."""

    def draw(axes: Axes, curves: Mapping[str, _Curve]) -> None:
        gap = min(0.1, 0.8 / len(curves))
        for number, (name, curve) in enumerate(curves.items()):
            style = _choose_style(report, name)
            places = np.array([task.inner_steps.index(int(step)) for step in curve], dtype=float)
            places += gap * (number - (len(curves) - 1) / 2)
            mean, half = _to_arrays(curve.values())
            axes.plot(places, mean, **style, linewidth=1)
            axes.vlines(places, mean - half, mean + half, color=style["color"], linewidth=2)
            _mark_clipped(axes, mean - half, mean + half, places, style["color"], vertical=True)
        axes.set_xticks(range(len(task.inner_steps)), [str(step) for step in task.inner_steps])
        axes.set_xlim(-0.5, len(task.inner_steps) - 0.5)

    estimate = average_over_tasks if task.single else average_over_seeds
    curves = {each.arm: {step: estimate(each, step) for step in each.inner_steps} for each in task.arms}
    return _draw_panels(report, task, curves, draw, "inner steps", "on test tasks against the number of inner steps")


@rc_context(_STYLE)
def draw_differences(report: Report, task: TaskResults) -> Markup | None:
    """Draw the paired differences of a task with their intervals, one row per pair; None if there are none."""
    pairs = [pair for pair in report.pairs if pair.arm.task == task.label]
    if report.axis == "all" or not any(pair.difference.by_seed for pair in pairs):
        return None
    scale = Scale(task.metric, task.higher_is_better)
    figure, axes, rows = _create_rows([pair.arm for pair in pairs], _WIDE)
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.set_xlim(*(scale.factor * end for end in _choose_horizontal_limits(pairs)))
    for row, pair in zip(rows, pairs, strict=True):
        _draw_difference(axes, row, pair, scale.factor, _choose_style(report, report.get_series(pair.arm)))
    unit = "percentage points" if scale.percent else scale.metric
    axes.set_xlabel(f"{unit} (better →)" if scale.higher_is_better else f"{unit} (← better)")
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:.6g}")
    title = f"Paired differences on {task.label}, {report.axis} minus {report.baseline}, in {scale.difference_heading}"
    return _write_svg(figure, title, f"{'; '.join(map(_describe_difference, pairs))}.")


@rc_context(_STYLE)
def draw_ranking(report: Report, task: TaskResults) -> Markup | None:
    """Draw the means of a task's methods with their intervals, the best first; None unless all pairs are compared."""
    if report.axis != "all":
        return None
    ranks = rank_methods(report, task)
    scale = Scale(task.metric, task.higher_is_better)
    figure, axes = create_axes(_WIDE * _PIXEL, (_ROW * len(ranks) + 48) * _PIXEL)
    axes.set_yticks(range(len(ranks)), [_shorten(rank.arm.name) for rank in ranks])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(ranks) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    means, halves = scale.factor * _to_arrays(rank.mean for rank in ranks)
    halves = np.nan_to_num(halves)
    if not scale.higher_is_better and means.min() > 0 and means.max() > 5 * means.min():
        axes.set_xscale("log")
    places = np.arange(len(ranks))
    axes.hlines(places, means - halves, means + halves, color=COLOURS[0], linewidth=2)
    axes.plot(means, places, "o", color=COLOURS[0])
    axes.set_xlabel(f"{scale.heading} (better →)" if scale.higher_is_better else f"{scale.heading} (← better)")
    texts = (f"{rank.arm.name} {scale.format_estimate(rank.mean)}" for rank in ranks)
    return _write_svg(figure, f"Methods on {task.label}, the best first, in {scale.heading}", f"{'; '.join(texts)}.")


@rc_context(_STYLE)
def draw_costs(report: Report, task: TaskResults) -> list[Markup]:
    """Draw time per training step and peak memory of every arm, one panel each; none if nothing is known."""
    times = [1000 * each.seconds_per_step for each in task.arms]
    # A process can still hold memory of earlier runs, so the smallest peak is closest to the run's own.
    memory = [np.sort(each.peak_bytes)[:1] / 2**20 for each in task.arms]
    panels = [_draw_bars(report, task, times, "ms per step"), _draw_bars(report, task, memory, "peak memory in MiB")]
    return [panel for panel in panels if panel]


# --------------------------------------------------------------------------------------------------------------- curves


def _draw_panels(
    report: Report,
    task: TaskResults,
    curves: Mapping[Arm, _Curve],
    draw: Callable[[Axes, Mapping[str, _Curve]], None],
    label: str,
    what: str,
) -> list[Markup]:
    """Draw one panel per algorithm, or one for all if only algorithms are compared, with the same vertical axis.

    There are no panels if the curves have only one point.
    """
    scale = Scale(task.metric, task.higher_is_better)
    panels: dict[str, dict[str, _Curve]] = {}
    for arm, curve in curves.items():
        finite = {
            x: Estimate(scale.factor * each.mean, scale.factor * each.half, each.count)
            for x, each in curve.items()
            if math.isfinite(each.mean)
        }
        if finite:
            title = "all algorithms" if report.has_single_setting else arm.algorithm
            panels.setdefault(title, {})[report.get_series(arm)] = finite
    shown = [curve for panel in panels.values() for curve in panel.values()]
    if len({x for curve in shown for x in curve}) < 2:
        return []
    low, high, log = _choose_vertical_limits([each for curve in shown for each in curve.values()], scale)
    drawings = []
    for name, panel in panels.items():
        figure, axes = create_axes(_WIDTH * _PIXEL, _HEIGHT * _PIXEL)
        axes.set_ylim(low, high)
        if log:
            set_log_scale(axes)
        else:
            axes.locator_params(axis="y", nbins=5)
            axes.yaxis.set_major_formatter("{x:.6g}")
        draw(axes, panel)
        axes.grid(axis="x", visible=False)
        axes.set(title=name, xlabel=label, ylabel=f"{scale.heading}, log scale" if log else scale.heading)
        ends = ", ".join(f"{each} {format_significant([*curve.values()][-1].mean)}" for each, curve in panel.items())
        title = f"{name} on {task.label}: {task.metric} {what}"
        drawings.append(_write_svg(figure, title, f"At the end, in {scale.heading}: {ends}."))
    return drawings


def _choose_vertical_limits(estimates: Sequence[Estimate], scale: Scale) -> tuple[float, float, bool]:
    """Choose the limits of the vertical axis, and whether it is logarithmic.

    All means fit, and their intervals too unless they are far larger than the differences between the means.
    """
    means, halves = _to_arrays(estimates)
    halves = np.nan_to_num(halves)
    margin = max(float(np.ptp(means)), float(np.median(halves)), 1e-3 * float(np.abs(means).max()), 1e-12)
    low = max(float((means - halves).min()), float(means.min()) - margin)
    high = min(float((means + halves).max()), float(means.max()) + margin)
    if not scale.higher_is_better and means.min() > 0 and means.max() > 5 * means.min():
        ends = means - halves
        return min(means.min(), ends[ends > means.min() / 2].min(initial=np.inf)) / 1.15, high * 1.1, True
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    # No ticks beyond 0 and 100 %, but room for markers.
    return (max(low, -2), min(high, 102), False) if scale.percent else (low, high, False)


# ----------------------------------------------------------------------------------------------------------------- rows


def _create_rows(arms: Iterable[Arm], width: int) -> tuple[Figure, Axes, list[int]]:
    """Create axes with a row per arm below the name of its algorithm; return the arms' rows as well."""
    labels: list[tuple[str, bool]] = []
    rows: list[int] = []
    for algorithm, group in itertools.groupby(arms, key=attrgetter("algorithm")):
        labels.append((algorithm, True))
        for arm in group:
            rows.append(len(labels))
            labels.append((arm.setting, False))
    figure, axes = create_axes(width * _PIXEL, (_ROW * len(labels) + 48) * _PIXEL)
    axes.set_yticks(range(len(labels)), [_shorten(label) for label, _ in labels])
    axes.tick_params(axis="y", length=0)
    for tick, (_, heading) in zip(axes.get_yticklabels(), labels, strict=True):
        if heading:
            tick.set(fontweight="bold", color=INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    return figure, axes, rows


def _draw_difference(axes: Axes, row: int, pair: Pair, factor: float, style: dict[str, Any]) -> None:
    if not pair.difference.by_seed:
        across = axes.get_yaxis_transform()  # a fraction of the axes' width
        axes.text(0.02, row, pair.difference.untested, transform=across, verticalalignment="center", color=SOFT)
        return
    colour, seeds = style["color"], factor * np.array(pair.difference.by_seed)
    axes.plot(seeds, 0 * seeds + row + 0.32, "o", color=colour, alpha=0.6, markersize=3, markeredgewidth=0)
    mean, half = factor * _to_arrays([pair.estimate])
    axes.hlines(row, mean - half, mean + half, colour, (0, (2, 2)) if pair.has_single_seed else "-", linewidth=2)
    _mark_clipped(axes, mean - half, mean + half, np.array([row]), colour, vertical=False)
    filled = pair.verdict in (Verdict.BETTER, Verdict.WORSE)
    fill = {} if filled else {"markerfacecolor": PAPER, "markeredgecolor": colour, "markeredgewidth": 1.5}
    axes.plot(mean, row, **style | fill)


def _choose_horizontal_limits(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Choose the limits of an axis: with zero, every seed, and the intervals as far as the rest stays legible."""
    values = [0.0, *(value for pair in pairs for value in pair.difference.by_seed)]
    room = np.ptp(values) or 1e-9
    ends = [end for pair in pairs for end in (pair.estimate.low, pair.estimate.high) if math.isfinite(end)]
    low, high = min([*values, *ends]), max([*values, *ends])
    low, high = max(low, min(values) - room), min(high, max(values) + room)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _draw_bars(report: Report, task: TaskResults, costs: Sequence[NDArray[np.float64]], what: str) -> Markup | None:
    """Draw the means over seeds as bars, each with the range of the seeds."""
    known = [values[np.isfinite(values)] for values in costs]
    if not any(values.any() for values in known):
        return None
    figure, axes, rows = _create_rows([each.arm for each in task.arms], _WIDTH)
    figure.suptitle(what, x=0, horizontalalignment="left")  # an axes title would start to the right of long names
    labels = []
    for row, each, values in zip(rows, task.arms, known, strict=True):
        mean = values.mean() if values.size else 0.0
        text = format_significant(mean) if values.size else MISSING
        bars = axes.barh(row, mean, 0.6, color=_choose_style(report, report.get_series(each.arm))["color"], alpha=0.8)
        axes.bar_label(bars, [text], padding=5)
        axes.hlines(row, values.min(initial=mean), values.max(initial=mean), color=INK, linewidth=1.2)
        labels.append(f"{each.arm.name} {text}")
    axes.set_xlim(0, 1.25 * max(values.max() for values in known if values.size))
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    return _write_svg(figure, f"{what} on {task.label}", f"{'; '.join(labels)}.")


def _describe_difference(pair: Pair) -> str:
    text = MISSING
    if pair.difference.by_seed:
        over = " over test tasks, one seed" if pair.has_single_seed else ""
        text = f"{pair.scale.format_difference(pair.estimate)} ({pair.scale.format_interval(pair.estimate)}{over})"
    return f"{pair.arm.algorithm} {pair.arm.setting} {text}, {describe_verdict(pair)}"


# ------------------------------------------------------------------------------------------------------------- elements


def _choose_style(report: Report, name: str) -> dict[str, Any]:
    """Choose the line and marker of a series, the same in every figure; if colours repeat, markers differ."""
    first = "none" if "none" in report.series else ""
    if name == first:
        return {"color": COLOURS[0], "marker": _MARKERS[0], "linestyle": _DASHES[0]}
    count = len(COLOURS) - 1
    cycle, place = divmod([each for each in report.series if each != first].index(name), count)
    shape = 1 + (place + cycle) % count
    return {"color": COLOURS[1 + place], "marker": _MARKERS[shape], "linestyle": _DASHES[shape]}


def _mark_clipped(
    axes: Axes,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    places: NDArray[np.float64],
    colour: str,
    *,
    vertical: bool,
) -> None:
    """Mark intervals that extend beyond the axes with an arrow at the edge."""
    start, stop = sorted(axes.get_ylim() if vertical else axes.get_xlim())
    markers = "v^" if vertical else "<>"
    for edge, clipped, marker in ((start, places[low < start], markers[0]), (stop, places[high > stop], markers[1])):
        for place in clipped:
            point = (place, edge) if vertical else (edge, place)
            axes.plot(*point, marker, color=colour, markersize=7, clip_on=False)


def _to_arrays(estimates: Iterable[Estimate]) -> NDArray[np.float64]:
    """Convert to means and half widths ``[2, n]``."""
    return np.array([(each.mean, each.half) for each in estimates]).T


def _shorten(name: str) -> str:
    """Omit the middle of a name that is too long, because chains of augmenters begin alike."""
    half = _LONGEST_LABEL // 2
    return name if len(name) <= _LONGEST_LABEL else f"{name[: half - 1]}…{name[-half:]}"


def _write_svg(figure: Figure, title: str, description: str = "") -> Markup:
    """Write a figure as an element of the page, with its colours from the page's style sheet.

    Args:
        figure: a matplotlib figure.
        title: unique on the page, because ids are derived from it.
        description: an alternative text; without one, screen readers skip the figure.
    """
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has other fonts
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(file.getvalue())
    root.remove(root[0])  # its style sheet would apply to the whole page
    for element in root.iter():
        element.text, element.tail = (element.text or "").strip(), None
        if element.tag.endswith("}g"):
            element.attrib.pop("id", None)
        if "style" in element.attrib:
            element.set("style", re.sub("#[0-9a-f]{6}", lambda found: _VARIABLES[found[0]], element.get("style", "")))
    if description:
        root.set("role", "img")
        for tag, text in (("desc", description), ("title", title)):
            child = ElementTree.Element(f"{{{_SVG}}}{tag}")
            child.text = text
            root.insert(0, child)
    else:
        root.set("aria-hidden", "true")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


_SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
