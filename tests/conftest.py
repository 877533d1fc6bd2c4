"""Shared by all tests: one thread, one cache, runs without plots, and the folder of real data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pictures
import pytest
import torch
from hypothesis import settings

from metareg.engine import step_loop, tracing
from metareg.engine.shared_graphs import SharedGraphs

torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=20)
settings.register_profile("strangers", deadline=None, max_examples=1000)
settings.load_profile("default")

STRANGERS = (
    "containers", "configurations", "architectures", "images", "graphs", "archives", "tables", "reports", "plugins",
    "terminals", "kills", "disks",
)  # fmt: skip
"""The groups of attempts with untrusted files and under failures."""

_held: Counter[str] = Counter()


@pytest.fixture(scope="session")
def tried() -> Callable[..., None]:
    """``tried(group)`` counts an attempt after it succeeded, ``tried(group, n)`` several."""

    def count(group: str, attempts: int = 1) -> None:
        assert group in STRANGERS
        _held[group] += attempts

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of attempts, if only these tests were selected."""
    if config.option.markexpr == "strangers":
        terminalreporter.section("strangers' files and hard days: attempts that held")
        for group in STRANGERS:
            terminalreporter.write_line(f"{group:<16}{_held[group]:>8,}")


@pytest.fixture(autouse=True)
def _no_shared_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not let a test use the graphs that another has traced."""
    for module in (tracing, step_loop):
        monkeypatch.setattr(module, "SHARED", SharedGraphs(50_000))


@pytest.fixture(scope="session", autouse=True)
def _image_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Do not use the user's cache; all processes of a test run share one, which holds the images of `glyphs`."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAREG_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Draw no plots in runs, except ``with pictures.drawn():``."""
    with pictures.left_out():
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder with real data, or skip the test without one."""
    folder = Path(os.environ.get("METAREG_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data: METAREG_DATA is not set and there is no folder {folder}")
    return folder
