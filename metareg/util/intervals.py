"""The 95 % interval of a mean by Student's t, used in results, terminal output, plots, reports and verdicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LEVEL", "compute_half_width", "compute_quantile", "compute_spread"]

LEVEL = 0.95
"""The level of every interval."""


def compute_half_width(values: NDArray[Any]) -> float:
    """Return half the width of the interval of a mean of independent values: t standard errors.

    Args:
        values: ``[count]``.

    Returns:
        NaN if there are fewer than two values or one is not finite.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan")
    return compute_quantile(len(values) - 1) * compute_spread(values) / float(np.sqrt(len(values)))


def compute_spread(values: NDArray[Any]) -> float:
    """Estimate the standard deviation; exactly zero if all values are equal, and without overflow."""
    largest = np.abs(values).max()
    return 0.0 if np.all(values == values[0]) else float(largest * np.std(values / largest, ddof=1))


def compute_quantile(degrees: float) -> float:
    """Return half an interval in standard errors, by Student's t with the given degrees of freedom."""
    from scipy.special import stdtrit  # the import takes 0.2 s, and training does not need it

    return float(stdtrit(degrees, (1 + LEVEL) / 2))
