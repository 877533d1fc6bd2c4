"""Archives of arrays (npz) from untrusted sources."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from metareg.errors import UsageError
from metareg.util.files import MALFORMED, refuse_special_file

__all__ = ["open_arrays"]

_LEAST_BYTES, _MOST_TIMES = 1 << 28, 100


@contextmanager
def open_arrays(path: Path, what: str) -> Iterator[Mapping[str, np.ndarray]]:
    """Open the arrays of an npz file by name, each read on access; nothing is unpickled.

    Args:
        path: the file.
        what: what to read it as, for messages, such as ``"a graph"``. Errors in the block are attributed to the file.

    Raises:
        UsageError: the file is missing or damaged, contains pickled objects, or would take many times its size; or the
            block raises an error that Python raises for wrong content.
    """
    try:
        refuse_special_file(path)
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > max(_LEAST_BYTES, _MOST_TIMES * path.stat().st_size):
            raise ValueError(f"its arrays would take {size >> 20} MiB, more than {_MOST_TIMES} times the file")
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.") from None
    except (OSError, zipfile.BadZipFile, zlib.error, SyntaxError, *MALFORMED) as error:
        raise UsageError(f"{path} cannot be read as {what}: {_explain(error)}.") from error


def _explain(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if "pickle" in text.lower():
        return "it contains pickled objects, which could run code and are not read"
    return text.strip("'\"").rstrip(".") if isinstance(error, KeyError) else text.rstrip(".")
