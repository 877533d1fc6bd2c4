"""How numbers are written: an accuracy in per cent with one decimal, anything else with three significant digits.

Where rounding would make a zero of half an interval, or hide on which side of zero one ends, there are more decimals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metareg.comparison.statistics import Estimate

__all__ = ["MISSING", "Scale", "p_value", "significant"]

MISSING = "–"
"""Stands for a number that does not exist."""

_MINUS = "\N{MINUS SIGN}"
_MORE = 2
"""How many more decimals there are at most, so that what is nonzero does not show as zero."""


@dataclass(frozen=True)
class Scale:
    """How the values of a metric are shown."""

    metric: str
    higher_is_better: bool

    @property
    def percent(self) -> bool:
        """Whether values are parts of one that are shown in per cent."""
        return self.metric == "accuracy"

    @property
    def factor(self) -> float:
        """What a value is multiplied by to be shown."""
        return 100.0 if self.percent else 1.0

    @property
    def heading(self) -> str:
        """The metric with its unit."""
        return "accuracy in %" if self.percent else self.metric

    @property
    def difference(self) -> str:
        """What a difference is, with its unit."""
        return "accuracy in percentage points" if self.percent else self.metric

    @property
    def better(self) -> str:
        """Which way is better."""
        return "higher is better" if self.higher_is_better else "lower is better"

    def value(self, number: float) -> str:
        """One value, as ``81.3`` or ``0.137``."""
        return _fixed(number * self.factor, self._decimals(number))

    def estimate(self, found: Estimate) -> str:
        """A mean with half its interval, as ``0.137 ± 0.017``; the mean alone where there is no interval."""
        if not math.isfinite(found.mean):
            return MISSING
        if not math.isfinite(found.half):
            return self.value(found.mean)
        decimals = self._decimals(found.mean)
        shared = self._shared(decimals, found.half)
        # With an exponent for one of them, each has its own.
        mean = _fixed(found.mean * self.factor, decimals if shared is None else shared)
        return f"{mean} ± {_fixed(found.half * self.factor, shared)}"

    def half(self, found: Estimate) -> str:
        """Half an interval alone, with the decimals of its mean."""
        return self.estimate(found).partition(" ± ")[2] or MISSING

    def signed(self, found: Estimate) -> str:
        """A difference, as ``+1.2`` or ``−0.021``."""
        return _signed(found.mean * self.factor, self._common(found))

    def interval(self, found: Estimate) -> str:
        """A difference's interval, as ``−0.030 to −0.012``."""
        if not math.isfinite(found.half):
            return MISSING
        decimals = self._common(found)
        return " to ".join(_signed(end * self.factor, decimals) for end in (found.low, found.high))

    def _decimals(self, number: float) -> int | None:
        return 1 if self.percent else _decimals(number, 3)

    def _shared(self, decimals: int | None, half: float) -> int | None:
        """So many decimals for a mean, or as many as show a digit of half its interval too."""
        if self.percent:
            return _telling([half * self.factor], 1)
        own = _decimals(half, 1)
        return None if decimals is None or own is None else max(decimals, own)

    def _common(self, found: Estimate) -> int | None:
        """Decimals for a difference and the ends of its interval alike."""
        ends = [found.mean] if math.isnan(found.half) else [found.mean, found.low, found.high]
        fewest = self._decimals(max(map(abs, ends)))
        return None if fewest is None else _telling([end * self.factor for end in ends], fewest)


def significant(number: float, digits: int = 3) -> str:
    """A number with so many significant digits."""
    return _fixed(number, _decimals(number, digits))


def p_value(p: float) -> str:
    """As ``0.032`` or ``< 0.001``."""
    if math.isnan(p):
        return MISSING
    # Cut, not rounded, at the bound that words depend on: 0.0499 is no 0.050, and 0.05 no 0.049.
    return "< 0.001" if p < 0.001 else f"{math.floor(p * 1000 + 1e-9) / 1000:.3f}"


def _decimals(number: float, digits: int) -> int | None:
    """The decimals that show so many significant digits; None for a number that is written with an exponent."""
    if number == 0 or not math.isfinite(number):
        return digits - 1
    exponent = math.floor(math.log10(abs(float(f"{number:.{digits - 1}e}"))))
    return None if exponent >= 4 or exponent < -4 else max(0, digits - 1 - exponent)


def _telling(numbers: Sequence[float], fewest: int) -> int:
    """How many decimals, not many more than `fewest`, show none of the numbers as zero that is not."""
    largest = max(map(abs, numbers))
    # What is left of a sum that should be zero is zero.
    nonzero = [number for number in numbers if abs(number) > 1e-12 * largest]
    most = fewest + _MORE
    return next((each for each in range(fewest, most) if all(float(_plain(number, each)) for number in nonzero)), most)


def _plain(number: float, decimals: int | None) -> str:
    return f"{number:.2e}" if decimals is None else f"{number:.{decimals}f}"


def _fixed(number: float, decimals: int | None) -> str:
    if not math.isfinite(number):
        return MISSING
    text = _plain(number, decimals)
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", _MINUS)


def _signed(number: float, decimals: int | None) -> str:
    text = _fixed(number, decimals)
    return text if text in (MISSING, _fixed(0, decimals)) or text.startswith(_MINUS) else f"+{text}"
