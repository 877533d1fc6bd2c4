"""The 95 % interval of a mean, by Student's t: the one of results, terminal, plots, reports and verdicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LEVEL", "compute_half_width", "compute_quantile", "compute_spread"]

LEVEL = 0.95
"""The level of every interval."""


def compute_half_width(values: NDArray[Any]) -> float:
    """Half the width of the interval of the mean of independent values: t standard errors.

    Args:
        values: ``[count]``.

    Returns:
        NaN where there are fewer than two values, or one is not finite.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan")
    return compute_quantile(len(values) - 1) * compute_spread(values) / float(np.sqrt(len(values)))


def compute_spread(values: NDArray[Any]) -> float:
    """The estimated standard deviation; exactly zero where all values are the same, and never an overflow."""
    largest = np.abs(values).max()
    return 0.0 if np.all(values == values[0]) else float(largest * np.std(values / largest, ddof=1))


def compute_quantile(degrees: float) -> float:
    """Half an interval in standard errors, by Student's t with the given degrees of freedom."""
    from scipy.special import stdtrit  # its import takes 0.2 s, and training needs none

    return float(stdtrit(degrees, (1 + LEVEL) / 2))
