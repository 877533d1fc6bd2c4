"""Small drawings: SVG that takes its colours from the page, so that it suits light, dark and paper."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import LogLocator, MaxNLocator

__all__ = ["Axis", "drawing", "element", "marker", "path", "shapes", "text", "tooltip"]

_MARKERS = {
    "circle": "M-3.4,0a3.4,3.4 0 1,0 6.8,0a3.4,3.4 0 1,0 -6.8,0z",
    "square": "M-3,-3h6v6h-6z",
    "diamond": "M0,-4.2L4.2,0L0,4.2L-4.2,0z",
    "triangle": "M0,-4L4,3.2H-4z",
    "point": "M0,4L4,-3.2H-4z",
    "plus": "M-1.3,-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
    "bar": "M-1.7,-4.2h3.4v8.4h-3.4z",
}


@dataclass(frozen=True)
class Axis:
    """From values to places on a drawing.

    Args:
        low: the value at `begin`.
        high: the value at `end`.
        begin: a coordinate.
        end: a coordinate.
        log: whether it is logarithmic, which needs values above zero.
    """

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of a value; of one below a logarithmic axis, its beginning."""
        if self.log:
            value = max(value, self.low)
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.begin + part * (self.end - self.begin)

    def inside(self, value: float) -> bool:
        """Whether a value is on the axis."""
        return self.low <= value <= self.high

    def ticks(self, count: int = 4) -> list[float]:
        """Round values on it, about `count`."""
        if self.log:
            for subs in ((1, 2, 5), (1, 3), (1,)):
                found = self._within(LogLocator(subs=subs, numticks=40).tick_values(self.low, self.high))
                if len(found) <= count + 1:
                    break
            if len(found) >= 2:
                return found
        return self._within(MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high))

    def _within(self, values: Iterable[float]) -> list[float]:
        return [float(value) for value in values if self.inside(value)]


def drawing(width: float, height: float, parts: Sequence[str], label: str) -> str:
    """A drawing of its own, which a screen reader calls `label`."""
    return element(
        "svg", "".join(parts), viewBox=f"0 0 {_number(width)} {_number(height)}", role="img", aria_label=label
    )


def element(name: str, content: str = "", /, **attributes: str | float) -> str:
    """An element; `content` is markup already. ``class_`` and ``aria_label`` stand for ``class`` and ``aria-label``."""
    texts = {key: _number(value) if isinstance(value, float) else value for key, value in attributes.items()}
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in texts.items() if value
    )
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def text(content: str, x: float, y: float, **attributes: str | float) -> str:
    """A line of text."""
    return element("text", html.escape(content), x=float(x), y=float(y), **attributes)


def path(points: Sequence[tuple[float, float]], class_: str, *, closed: bool = False, **attributes: str) -> str:
    """A line through points, or the area that it encloses."""
    steps = "L".join(f"{_number(x)},{_number(y)}" for x, y in points)
    return element("path", d=f"M{steps}{'z' if closed else ''}", class_=class_, **attributes)


def marker(shape: str, x: float, y: float, class_: str, tip: str = "", *, size: float = 1.0) -> str:
    """A mark at a point, with a text that shows while the pointer is near it."""
    place = f"translate({_number(x)},{_number(y)})"
    drawn = element("path", d=_MARKERS[shape], class_=class_, transform="" if size == 1 else f"scale({size:g})")
    if tip:
        drawn += element("circle", r=9.0, class_="near")
    return element("g", drawn + tooltip(tip), transform=place)


def tooltip(content: str) -> str:
    """What shows while the pointer is on the element that this is put into."""
    return element("title", html.escape(content)) if content else ""


def shapes() -> list[str]:
    """The shapes of marks, the most distinct first."""
    return list(_MARKERS)


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
