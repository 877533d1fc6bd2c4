"""The pictures of runs, which take most of a small run's time: `conftest` leaves them out, a test can have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from metareg.runs import plots

_draw = plots.draw


@contextmanager
def left_out() -> Iterator[None]:
    """Runs draw no pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda _run: [])
        yield


@contextmanager
def drawn() -> Iterator[None]:
    """Runs draw their pictures, as they do outside the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", _draw)
        yield
