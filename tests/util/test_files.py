"""Writing files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from metareg.errors import UsageError
from metareg.util.files import write_bytes, write_text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """As root, `metareg report RUN --out /dev/null` would leave a file in place of the device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (lambda: write_text(pipe, "text"), lambda: write_bytes(pipe, b"bytes")):
        with pytest.raises(UsageError, match="pipe or a device"):
            write()
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
