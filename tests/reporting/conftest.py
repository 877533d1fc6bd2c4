"""Comparisons that tests of reports read or damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from comparisons import SMALL, write_comparison
from metareg.comparison.plan import Plan
from metareg.reporting import report


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large, complete comparison, for tests that only read it."""
    folder = tmp_path_factory.mktemp("demo") / "comparison"
    write_comparison(folder)
    return folder


@pytest.fixture(scope="session")
def demo_page(demo: Path) -> str:
    """Its page."""
    return report(demo, "html")


@pytest.fixture
def small(tmp_path: Path) -> Plan:
    """A comparison that tests damage."""
    return write_comparison(tmp_path / "small", SMALL, tasks=7)
