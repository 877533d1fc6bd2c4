"""The formats of numbers."""

from __future__ import annotations

import pytest

from metareg.comparison.statistics import Estimate, over_seeds
from metareg.reporting.numbers import Scale, format_p_value


@pytest.mark.parametrize(
    ("mean", "half", "accuracy", "mse"),
    [
        (0.8126, 0.0123, "81.3 ± 1.2", "0.813 ± 0.012"),
        (0.10712, 0.0133, "10.7 ± 1.3", "0.107 ± 0.013"),
        (2.8366, 0.2181, "283.7 ± 21.8", "2.84 ± 0.22"),
        (0.10712, 0.0004, "10.71 ± 0.04", "0.1071 ± 0.0004"),
        (1.2203, 0.0031, "122.0 ± 0.3", "1.220 ± 0.003"),
        (0.9996, 0.0, "100.0 ± 0.0", "1.00 ± 0.00"),
        (1e-5, 2e-5, "0.001 ± 0.002", "1.00e−05 ± 2.00e−05"),
        (5.0, 2e-6, "500.000 ± 0.000", "5.00 ± 2.00e−06"),
        (float("nan"), float("nan"), "–", "–"),
        (0.5, float("nan"), "50.0", "0.500"),
    ],
)
def test_numbers(mean: float, half: float, accuracy: str, mse: str) -> None:
    found = Estimate(mean, half, 5)
    assert Scale("accuracy", True).format_estimate(found) == accuracy
    assert Scale("mse", False).format_estimate(found) == mse


def test_signed_numbers() -> None:
    found = over_seeds([-0.0213, -0.0301, -0.0125])
    assert Scale("mse", False).format_difference(found) == "−0.0213"
    assert Scale("mse", False).format_interval(found) == "−0.0432 to +0.0006"
    assert Scale("accuracy", True).format_difference(over_seeds([0.012, 0.012])) == "+1.2"
    assert Scale("accuracy", True).format_difference(over_seeds([0.0, 0.0])) == "0.0"
    assert Scale("accuracy", True).format_difference(Estimate(0.012, 0.012 - 1e-18, 5)) == "+1.2"


@pytest.mark.parametrize(
    ("low", "high", "accuracy", "mse"),
    [
        (0.0003, 0.0123, "+0.03 to +1.23", "+0.0003 to +0.0123"),
        (-0.0123, -0.00001, "−1.230 to −0.001", "−0.01230 to −0.00001"),
        (0.00021, 0.00036, "+0.02 to +0.04", "+0.000210 to +0.000360"),
        (-0.3, 0.0006, "−30.0 to +0.1", "−0.300 to +0.001"),
    ],
)
def test_rounding_does_not_hide_the_sign(low: float, high: float, accuracy: str, mse: str) -> None:
    found = Estimate((low + high) / 2, (high - low) / 2, 5)
    assert Scale("accuracy", True).format_interval(found) == accuracy
    assert Scale("mse", False).format_interval(found) == mse


def test_p_values_are_cut_not_rounded() -> None:
    assert [format_p_value(p) for p in (0.04999, 0.05, 0.0009, float("nan"))] == ["0.049", "0.050", "< 0.001", "–"]
