"""Formats of numbers: accuracies in per cent with one decimal, others with three significant digits.

There are more decimals if rounding would turn half an interval into zero, or hide on which side of zero an interval
ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metareg.comparison.statistics import Estimate

__all__ = ["MISSING", "Scale", "format_p_value", "format_significant"]

MISSING = "–"
"""The placeholder for a number that does not exist."""

_MINUS = "\N{MINUS SIGN}"
_MAX_EXTRA_DECIMALS = 2
"""Maximum number of additional decimals to keep a nonzero number from showing as zero."""


@dataclass(frozen=True)
class Scale:
    """The format of a metric's values."""

    metric: str
    higher_is_better: bool

    @property
    def percent(self) -> bool:
        """Whether values are fractions that are shown in per cent."""
        return self.metric == "accuracy"

    @property
    def factor(self) -> float:
        """The factor between a value and the shown number."""
        return 100.0 if self.percent else 1.0

    @property
    def heading(self) -> str:
        """The metric with its unit."""
        return "accuracy in %" if self.percent else self.metric

    @property
    def difference_heading(self) -> str:
        """The unit of a difference."""
        return "accuracy in percentage points" if self.percent else self.metric

    @property
    def direction(self) -> str:
        """Whether higher or lower is better."""
        return "higher is better" if self.higher_is_better else "lower is better"

    def format_value(self, number: float) -> str:
        """Format a value, such as ``81.3`` or ``0.137``."""
        return _format_number(number * self.factor, self._count_decimals(number))

    def format_estimate(self, found: Estimate) -> str:
        """Format a mean with half its interval, such as ``0.137 ± 0.017``; only the mean if there is no interval."""
        if not math.isfinite(found.mean):
            return MISSING
        if not math.isfinite(found.half):
            return self.format_value(found.mean)
        decimals = self._count_decimals(found.mean)
        shared = self._count_shared_decimals(decimals, found.half)
        # If one of them has an exponent, each is formatted separately.
        mean = _format_number(found.mean * self.factor, decimals if shared is None else shared)
        return f"{mean} ± {_format_number(found.half * self.factor, shared)}"

    def format_half_width(self, found: Estimate) -> str:
        """Format only half an interval, with the decimals of its mean."""
        return self.format_estimate(found).partition(" ± ")[2] or MISSING

    def format_difference(self, found: Estimate) -> str:
        """Format a difference, such as ``+1.2`` or ``−0.021``."""
        return _format_signed(found.mean * self.factor, self._count_difference_decimals(found))

    def format_interval(self, found: Estimate) -> str:
        """Format a difference's interval, such as ``−0.030 to −0.012``."""
        if not math.isfinite(found.half):
            return MISSING
        decimals = self._count_difference_decimals(found)
        return " to ".join(_format_signed(end * self.factor, decimals) for end in (found.low, found.high))

    def _count_decimals(self, number: float) -> int | None:
        return 1 if self.percent else _count_decimals(number, 3)

    def _count_shared_decimals(self, decimals: int | None, half: float) -> int | None:
        """Return the decimals of a mean, or more if half its interval needs them to show a digit."""
        if self.percent:
            return _find_nonzero_decimals([half * self.factor], 1)
        own = _count_decimals(half, 1)
        return None if decimals is None or own is None else max(decimals, own)

    def _count_difference_decimals(self, found: Estimate) -> int | None:
        """Return the decimals of a difference and of the ends of its interval."""
        ends = [found.mean] if math.isnan(found.half) else [found.mean, found.low, found.high]
        fewest = self._count_decimals(max(map(abs, ends)))
        return None if fewest is None else _find_nonzero_decimals([end * self.factor for end in ends], fewest)


def format_significant(number: float, digits: int = 3) -> str:
    """Format a number with a given number of significant digits."""
    return _format_number(number, _count_decimals(number, digits))


def format_p_value(p: float) -> str:
    """Format a p value, such as ``0.032`` or ``< 0.001``."""
    if math.isnan(p):
        return MISSING
    # Truncated instead of rounded, because verdicts depend on 0.05: 0.0499 must not become 0.050, nor 0.05 become
    # 0.049.
    return "< 0.001" if p < 0.001 else f"{math.floor(p * 1000 + 1e-9) / 1000:.3f}"


def _count_decimals(number: float, digits: int) -> int | None:
    """Return the decimals that show this many significant digits; None for a number with an exponent."""
    if number == 0 or not math.isfinite(number):
        return digits - 1
    exponent = math.floor(math.log10(abs(float(f"{number:.{digits - 1}e}"))))
    return None if exponent >= 4 or exponent < -4 else max(0, digits - 1 - exponent)


def _find_nonzero_decimals(numbers: Sequence[float], fewest: int) -> int:
    """Return the decimals, slightly more than `fewest` at most, with which no nonzero number shows as zero."""
    largest = max(map(abs, numbers))
    # Rounding errors of a sum that should be zero count as zero.
    nonzero = [number for number in numbers if abs(number) > 1e-12 * largest]
    most = fewest + _MAX_EXTRA_DECIMALS
    enough = (n for n in range(fewest, most) if all(float(_format_ascii(number, n)) for number in nonzero))
    return next(enough, most)


def _format_ascii(number: float, decimals: int | None) -> str:
    return f"{number:.2e}" if decimals is None else f"{number:.{decimals}f}"


def _format_number(number: float, decimals: int | None) -> str:
    if not math.isfinite(number):
        return MISSING
    text = _format_ascii(number, decimals)
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", _MINUS)


def _format_signed(number: float, decimals: int | None) -> str:
    text = _format_number(number, decimals)
    return text if text in (MISSING, _format_number(0, decimals)) or text.startswith(_MINUS) else f"+{text}"
