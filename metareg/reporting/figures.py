"""The figures of the HTML page: a panel for every algorithm or task, so that each is legible on a phone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from metareg.comparison.results import ArmResults, TaskResults
from metareg.comparison.statistics import Estimate, Verdict, over_seeds
from metareg.reporting.analysis import Pair, Report, seed_interval, task_interval
from metareg.reporting.numbers import MISSING, Scale, significant
from metareg.reporting.svg import Axis, drawing, element, marker, path, shapes, text, tooltip
from metareg.reporting.tables import favour, steps, verdict_text

__all__ = ["costs", "differences", "inner_steps", "key", "learning_curves"]

_STYLES = 6
"""How many colours and shapes there are beside those of none."""

_WIDTH, _HEIGHT = 300.0, 208.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 42.0, 14.0, 26.0, 34.0
_ROW, _GROUP = 21.0, 22.0
_LONGEST = 26
"""Characters of an augmenter's name beside its row."""
_FORWARD, _BACKWARD = "M0,-3.5L5,0L0,3.5z", "M0,-3.5L-5,0L0,3.5z"
_UP, _DOWN = "M-3.5,0L0,-5L3.5,0z", "M-3.5,0L0,5L3.5,0z"


@dataclass(frozen=True)
class _Point:
    x: float
    found: Estimate
    tip: str


@dataclass(frozen=True)
class _Series:
    """The points of one arm."""

    augmenter: str
    points: Sequence[_Point]


@dataclass(frozen=True)
class _Style:
    """How an augmenter is drawn: a colour, and a shape of marks with the dashes of lines that go with it."""

    colour: int
    number: int

    @property
    def shape(self) -> str:
        """The shape of its marks."""
        return shapes()[self.number]

    def of(self, kind: str) -> str:
        """The classes of an element."""
        return f"{kind} s{self.colour}"

    @property
    def line(self) -> str:
        """The classes of a line."""
        return f"{self.of('line')} d{self.number}"


def _style(report: Report, augmenter: str) -> _Style:
    """An augmenter's style, the same in every figure; each time that the colours begin again, the shapes are others."""
    if augmenter == "none":
        return _Style(0, 0)
    cycle, place = divmod([name for name in report.augmenters if name != "none"].index(augmenter), _STYLES)
    return _Style(1 + place, 1 + (place + cycle) % _STYLES)


def key(report: Report, augmenter: str) -> str:
    """An augmenter's line and mark, for the legend."""
    style = _style(report, augmenter)
    parts = [path([(2, 7), (26, 7)], style.line), marker(style.shape, 14, 7, style.of("mark"))]
    return element("svg", "".join(parts), viewBox="0 0 28 14", class_="key", aria_hidden="true")


# -------------------------------------------------------------------------------------------------- curves over numbers


def learning_curves(report: Report, task: TaskResults) -> list[str]:
    """The metric in validation against training steps: the mean over seeds and its interval as a band."""
    return _panels(
        report, task, lambda each: _validations(each, Scale(task.metric, task.higher_is_better)), _curve_panel
    )


def inner_steps(report: Report, task: TaskResults) -> list[str]:
    """The metric on test tasks against the number of inner steps."""
    scale = Scale(task.metric, task.higher_is_better)

    def points(each: ArmResults) -> Iterator[_Point]:
        for number in each.inner_steps:
            found = (task_interval if task.single else seed_interval)(each, number)
            if math.isfinite(found.mean):
                yield _Point(task.inner_steps.index(number), found, f"after {steps(number)}: {scale.estimate(found)}")

    return _panels(report, task, points, _steps_panel)


def _validations(each: ArmResults, scale: Scale) -> Iterator[_Point]:
    curves = list(each.curves.values())
    if not curves:
        return
    shared = set.intersection(*(set(curve.steps.tolist()) for curve in curves))
    for step in sorted(shared):
        found = over_seeds([float(curve.values[curve.steps == step][0]) for curve in curves])
        if math.isfinite(found.mean):
            yield _Point(step, found, f"step {step}: {scale.estimate(found)}, {_seeds(found.count)}")


_Draw = Callable[[Report, TaskResults, str, Sequence[_Series], Axis], str]


def _panels(
    report: Report, task: TaskResults, points: Callable[[ArmResults], Iterator[_Point]], draw: _Draw
) -> list[str]:
    """A panel for every algorithm, all with the same vertical axis; none where nothing but one number is across."""
    algorithms: dict[str, list[_Series]] = {}
    for each in task.arms:
        series = _Series(each.arm.augmenter, list(points(each)))
        if series.points:
            algorithms.setdefault(each.arm.algorithm, []).append(series)
    drawn = [point for every in algorithms.values() for series in every for point in series.points]
    if len({point.x for point in drawn}) < 2:
        return []
    axis = _vertical([point.found for point in drawn], Scale(task.metric, task.higher_is_better))
    return [draw(report, task, algorithm, series, axis) for algorithm, series in algorithms.items()]


def _vertical(found: Sequence[Estimate], scale: Scale) -> Axis:
    """Room for all means, and for their intervals unless those are far larger than what the means differ by."""
    means = np.array([each.mean for each in found])
    halves = np.array([each.half if math.isfinite(each.half) else 0.0 for each in found])
    margin = max(float(np.ptp(means)), float(np.median(halves)), 1e-3 * float(np.abs(means).max()), 1e-12)
    low = max(float((means - halves).min()), float(means.min()) - margin)
    high = min(float((means + halves).max()), float(means.max()) + margin)
    begin, end = _HEIGHT - _BOTTOM, _TOP
    if not scale.higher_is_better and means.min() > 0 and means.max() > 5 * means.min():
        lows = means - halves
        lowest = float(min(means.min(), lows[lows > means.min() / 2].min(initial=np.inf)))
        return Axis(lowest / 1.15, high * 1.1, begin, end, log=True)
    room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    return Axis(max(low, 0.0), min(high, 1.0), begin, end) if scale.percent else Axis(low, high, begin, end)


def _curve_panel(report: Report, task: TaskResults, algorithm: str, every: Sequence[_Series], y: Axis) -> str:
    xs = [point.x for series in every for point in series.points]
    x = Axis(min(0.0, min(xs)), max(xs), _LEFT, _WIDTH - _RIGHT)
    frame = _frame(algorithm, Scale(task.metric, task.higher_is_better), y)
    ticks = [(x(tick), _tick(tick)) for tick in x.ticks(5)]
    frame += _horizontal(ticks, "training step")
    bands, lines, marks = [], [], []
    for series in every:
        style = _style(report, series.augmenter)
        banded = [point for point in series.points if math.isfinite(point.found.half)]
        upper = [(x(point.x), point.found.high) for point in banded]
        lower = [(x(point.x), point.found.low) for point in banded]
        outline = [(place, _clipped(y, value)) for place, value in [*upper, *reversed(lower)]]
        if len(banded) > 1:
            bands.append(path(outline, style.of("band"), closed=True))
        bands += [*_beyond(y, upper, _UP, style), *_beyond(y, lower, _DOWN, style)]
        lines.append(path([(x(point.x), y(point.found.mean)) for point in series.points], style.line))
        marks += [
            marker(
                style.shape,
                x(point.x),
                y(point.found.mean),
                style.of("mark"),
                f"{series.augmenter}, {point.tip}",
                size=0.72,
            )
            for point in series.points
        ]
    what = f"Learning curves of {algorithm} on {task.label}: {task.metric} in validation against training steps"
    label = f"{what}{_logarithmic(y)}. {_last(task, every)}"
    return drawing(_WIDTH, _HEIGHT, [*frame, *bands, *lines, *marks], label)


def _steps_panel(report: Report, task: TaskResults, algorithm: str, every: Sequence[_Series], y: Axis) -> str:
    scale = Scale(task.metric, task.higher_is_better)
    x = Axis(-0.45, len(task.inner_steps) - 0.55, _LEFT, _WIDTH - _RIGHT)
    frame = _frame(algorithm, scale, y)
    ticks = [(x(place), str(number)) for place, number in enumerate(task.inner_steps)]
    frame += _horizontal(ticks, "inner steps")
    gap = min(7.0, 0.8 * (x(1) - x(0)) / len(every))
    parts = []
    for place, series in enumerate(every):
        style = _style(report, series.augmenter)
        aside = gap * (place - (len(every) - 1) / 2)
        spots = [(x(point.x) + aside, y(point.found.mean)) for point in series.points]
        parts.append(path(spots, f"{style.line} thin"))
        for (spot, height), point in zip(spots, series.points, strict=True):
            if math.isfinite(point.found.half):
                low, high = point.found.low, point.found.high
                parts.append(path([(spot, _clipped(y, low)), (spot, _clipped(y, high))], style.of("whisker")))
                parts += [*_beyond(y, [(spot, low)], _DOWN, style), *_beyond(y, [(spot, high)], _UP, style)]
            parts.append(marker(style.shape, spot, height, style.of("mark"), f"{series.augmenter}, {point.tip}"))
    what = f"{algorithm} on {task.label}: {task.metric} on test tasks against the number of inner steps"
    return drawing(_WIDTH, _HEIGHT, [*frame, *parts], f"{what}{_logarithmic(y)}. {_last(task, every)}")


def _beyond(y: Axis, ends: Sequence[tuple[float, float]], shape: str, style: _Style) -> list[str]:
    """An arrow in the middle of every stretch where intervals go on beyond the vertical axis.

    Args:
        y: the axis.
        ends: for each interval the place across and the value of its end.
        shape: of the arrow.
        style: of the augmenter.
    """
    arrows = []
    for inside, stretch in itertools.groupby(ends, lambda end: y.inside(end[1])):
        if not inside:
            places = [*stretch]
            place, value = places[len(places) // 2]
            arrows.append(_arrow(shape, place, _clipped(y, value), style))
    return arrows


def _arrow(shape: str, x: float, y: float, style: _Style) -> str:
    return element("path", d=shape, class_=style.of("mark"), transform=f"translate({x:.1f},{y:.1f})")


def _logarithmic(y: Axis) -> str:
    return ", log scale" if y.log else ""


def _frame(title: str, scale: Scale, y: Axis) -> list[str]:
    parts = [
        text(title, 0, 12, class_="title"),
        text(f"{scale.heading}{_logarithmic(y)}", _WIDTH - _RIGHT, 12, class_="unit", text_anchor="end"),
    ]
    for tick in y.ticks(4):
        parts.append(path([(_LEFT, y(tick)), (_WIDTH - _RIGHT, y(tick))], "grid"))
        parts.append(text(_tick(tick * scale.factor), _LEFT - 6, y(tick) + 3.5, text_anchor="end"))
    return parts


def _horizontal(ticks: Sequence[tuple[float, str]], label: str) -> list[str]:
    base = _HEIGHT - _BOTTOM
    parts = [path([(_LEFT, base), (_WIDTH - _RIGHT, base)], "axis")]
    for place, name in ticks:
        parts.append(path([(place, base), (place, base + 3)], "axis"))
        parts.append(text(name, place, base + 14, text_anchor="middle"))
    return [*parts, text(label, (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, text_anchor="middle", class_="unit")]


def _last(task: TaskResults, every: Sequence[_Series]) -> str:
    """The ends of the lines, for who cannot see them."""
    scale = Scale(task.metric, task.higher_is_better)
    ends = [f"{series.augmenter} {scale.value(series.points[-1].found.mean)}" for series in every]
    return f"At the end, in {scale.heading}: {', '.join(ends)}."


# ------------------------------------------------------------------------------------------------------- rows of an arm


def differences(report: Report, task: TaskResults) -> str:
    """The paired differences of a task with their intervals, a row for every pair; empty without a difference."""
    pairs = [pair for pair in report.pairs if pair.task == task.label]
    if not any(pair.difference.by_seed for pair in pairs):
        return ""
    scale = Scale(task.metric, task.higher_is_better)
    left, right = _label_width([pair.augmenter for pair in pairs]), _WIDTH + 40 - _RIGHT
    x = _differences_axis(pairs, left, right)
    parts, height = _rows(
        [(pair.algorithm, pair.augmenter, partial(_difference, report, pair, x)) for pair in pairs],
        text(_cut(task.label, 44), 0, 12, class_="title"),
    )
    ticks = x.ticks(4)
    grid = [path([(x(tick), 24), (x(tick), height)], "zero" if tick == 0 else "grid") for tick in ticks]
    labels = [text(_tick(tick * scale.factor), x(tick), height + 14, text_anchor="middle") for tick in ticks]
    # The better side's end says so; the unit stands at the other one.
    places = [(right, "end"), (left, "start")]
    better, other = places if scale.higher_is_better else places[::-1]
    words = "better →" if scale.higher_is_better else "← better"
    unit = "percentage points" if scale.percent else scale.metric
    labels += [
        text(words, better[0], height + 30, text_anchor=better[1], class_="better"),
        text(unit, other[0], height + 30, text_anchor=other[1], class_="unit"),
    ]
    told = "; ".join(f"{pair.algorithm} {pair.augmenter} {_told(pair)}, {verdict_text(pair)}" for pair in pairs)
    label = f"Paired differences on {task.label}, augmenter minus none, in {scale.difference}: {told}."
    return drawing(_WIDTH + 40, height + 36, [*grid, *parts, *labels], label)


def _differences_axis(pairs: Sequence[Pair], left: float, right: float) -> Axis:
    """Zero and every seed; intervals as far as they do not make the rest illegible."""
    every = [0.0, *(value for pair in pairs for value in pair.difference.by_seed)]
    low, high = min(every), max(every)
    room = (high - low) or 1e-9
    for pair in pairs:
        over = pair.estimate
        if math.isfinite(over.half):
            low, high = min(low, max(over.low, min(every) - room)), max(high, min(over.high, max(every) + room))
    margin = 0.05 * (high - low) or 1e-9
    return Axis(low - margin, high + margin, left, right)


def _difference(report: Report, pair: Pair, x: Axis, y: float) -> str:
    style, found, shown = _style(report, pair.augmenter), pair.difference, pair.estimate
    if not found.by_seed:
        return text(found.untested, x.begin + 4, y + 3.5, class_="unit")
    parts = [element("circle", cx=x(value), cy=y + 6.5, r=1.6, class_=style.of("seed")) for value in found.by_seed]
    if math.isfinite(shown.half):
        ends = [min(max(end, x.low), x.high) for end in (shown.low, shown.high)]
        parts.append(path([(x(end), y) for end in ends], style.of(f"whisker{' of-tasks' if pair.single else ''}")))
        for end, clipped, arrow in zip((shown.low, shown.high), ends, (_BACKWARD, _FORWARD), strict=True):
            if end != clipped:
                parts.append(_arrow(arrow, x(clipped), y, style))
    told = pair.verdict in (Verdict.BETTER, Verdict.WORSE)
    tip = (
        f"{pair.algorithm}, {pair.augmenter} minus none: {_told(pair)}, seeds in favour {favour(pair)}: "
        f"{verdict_text(pair)}"
    )
    parts.append(marker(style.shape, x(shown.mean), y, style.of(f"mark{'' if told else ' hollow'}"), tip))
    return "".join(parts)


def _told(pair: Pair) -> str:
    """A difference with its interval in words."""
    if not pair.difference.by_seed:
        return MISSING
    over = " over test tasks, one seed" if pair.single else ""
    return f"{pair.scale.signed(pair.estimate)} ({pair.scale.interval(pair.estimate)}{over})"


def costs(report: Report, task: TaskResults) -> list[str]:
    """Time per training step and peak memory of every arm; a panel each, none where nothing is known."""
    of_time = [(each, 1000 * each.seconds_per_step) for each in task.arms]
    # The process of a run may still hold what earlier runs in it took: the least is the least of that.
    of_memory = [(each, np.sort(each.peak_bytes)[:1] / 2**20) for each in task.arms]
    panels = [_bars(report, task, of_time, "ms per step"), _bars(report, task, of_memory, "peak memory in MiB")]
    return [panel for panel in panels if panel]


def _bars(report: Report, task: TaskResults, arms: Sequence[tuple[ArmResults, np.ndarray]], what: str) -> str:
    known = [(each, values[np.isfinite(values)]) for each, values in arms]
    highest = max((float(values.max()) for _, values in known if values.size), default=0.0)
    if highest <= 0:
        return ""
    left, right = _label_width([each.arm.augmenter for each, _ in known]), _WIDTH - _RIGHT - 36
    x = Axis(0, highest, left, right)

    def bar(each: ArmResults, values: np.ndarray, y: float) -> str:
        if not values.size:
            return text(MISSING, left + 4, y + 3.5)
        style, mean = _style(report, each.arm.augmenter), float(values.mean())
        tip = f"{each.arm.name}: {significant(mean)} {what}"
        drawn = element("rect", x=left, y=y - 6, width=max(x(mean) - left, 1.0), height=12.0, class_=style.of("bar"))
        if len(values) > 1:
            drawn += path([(x(values.min()), y), (x(values.max()), y)], "range")
            tip += f", {significant(values.min())} to {significant(values.max())} over seeds"
        label = text(significant(mean), max(x(values.max()), x(mean)) + 5, y + 3.5)
        return element("g", drawn + label + tooltip(tip))

    rows = [(each.arm.algorithm, each.arm.augmenter, partial(bar, each, values)) for each, values in known]
    parts, height = _rows(rows, text(what, 0, 12, class_="title"))
    axis = path([(left, 24), (left, height)], "axis")
    told = "; ".join(f"{each.arm.name} {significant(values.mean())}" for each, values in known if values.size)
    return drawing(_WIDTH, height + 4, [*parts, axis], f"{what} on {task.label}: {told}.")


def _rows(rows: Sequence[tuple[str, str, Callable[[float], str]]], heading: str) -> tuple[list[str], float]:
    """Rows below the names of their algorithms; returns the parts and how high they are."""
    parts, height, before = [heading], 22.0, None
    for algorithm, augmenter, draw in rows:
        if algorithm != before:
            parts.append(text(algorithm, 0, height + 15, class_="group"))
            height += _GROUP
        before = algorithm
        parts += [text(_cut(augmenter, _LONGEST), 10, height + _ROW / 2 + 3.5), draw(height + _ROW / 2)]
        height += _ROW
    return parts, height + 4


def _label_width(names: Sequence[str]) -> float:
    return 22 + 6.2 * min(_LONGEST, max(len(name) for name in names))


def _clipped(y: Axis, value: float) -> float:
    return min(max(y(min(max(value, y.low), y.high)), y.end), y.begin)


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def _cut(name: str, longest: int) -> str:
    """A name without its middle where it is too long: chains of augmenters begin alike."""
    half = longest // 2
    return name if len(name) <= longest else f"{name[: longest - half - 1]}…{name[-half:]}"


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"
