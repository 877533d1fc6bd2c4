"""Downloads: checked against a checksum, written aside and renamed."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from metareg import MetaregError

__all__ = ["download"]

_BLOCK = 1 << 16
_SECONDS = 60


def download(url: str, path: Path, md5: str) -> None:
    """Fetch a file, unless it is there.

    Raises:
        MetaregError: it cannot be fetched, or is another file than the checksum says; `path` is as it was.
    """
    if path.is_file():
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    digest = hashlib.md5(usedforsecurity=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=_SECONDS) as response,
            aside.open("wb") as file,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            task = progress.add_task(path.name, total=int(response.headers.get("Content-Length", 0)) or None)
            while block := response.read(_BLOCK):
                digest.update(block)
                file.write(block)
                progress.advance(task, len(block))
        if digest.hexdigest() != md5:
            raise MetaregError(
                f"{url} gave another file than expected: its MD5 is {digest.hexdigest()} instead of {md5}. Nothing was kept."
            )
        aside.replace(path)
    except OSError as error:
        raise MetaregError(
            f"{url} cannot be fetched ({getattr(error, 'reason', error)}); put the file at {path} by hand, or try again."
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
