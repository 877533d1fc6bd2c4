"""What every test shares: one thread, one cache, runs without pictures, and where real data lies."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pictures
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=20)
settings.register_profile("strangers", deadline=None, max_examples=1000)
settings.load_profile("default")

STRANGERS = (
    "containers", "configurations", "architectures", "images", "graphs", "archives", "tables", "reports", "plugins",
    "terminals", "kills", "disks",
)  # fmt: skip
"""The groups of what is tried with strangers' files and on hard days."""

_held: Counter[str] = Counter()


@pytest.fixture(scope="session")
def tried() -> Callable[..., None]:
    """``tried(group)`` counts an attempt that was held, ``tried(group, n)`` several; called once it was."""

    def count(group: str, attempts: int = 1) -> None:
        assert group in STRANGERS
        _held[group] += attempts

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of what was tried and held, where that alone was asked for."""
    if config.option.markexpr == "strangers":
        terminalreporter.section("strangers' files and hard days: attempts that held")
        for group in STRANGERS:
            terminalreporter.write_line(f"{group:<16}{_held[group]:>8,}")


@pytest.fixture(scope="session", autouse=True)
def _image_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the user's cache is read; all processes of a test run draw the letters of `glyphs` once."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAREG_CACHE", str(folder / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Runs draw no pictures but ``with pictures.drawn():``."""
    with pictures.left_out():
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with real data; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("METAREG_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data: METAREG_DATA is not set and there is no folder {folder}")
    return folder
