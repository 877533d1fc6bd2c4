"""Switches the plots of runs, which take most of a small run's time, off (in `conftest`) and on (in single tests)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from metareg.runs import plots

_draw = plots.draw


@contextmanager
def left_out() -> Iterator[None]:
    """Draw no plots in runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda _run: [])
        yield


@contextmanager
def drawn() -> Iterator[None]:
    """Draw plots in runs, as outside the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", _draw)
        yield
