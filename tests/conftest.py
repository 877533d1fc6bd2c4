"""What every test shares: one thread, and where real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with real data; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("METAREG_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data: METAREG_DATA is not set and there is no folder {folder}")
    return folder
