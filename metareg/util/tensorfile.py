"""Tensors with a JSON header in one safetensors file; loading one executes nothing.

The header stands in the file's metadata under the key ``metareg`` and begins with a SHA-256 over every other byte of the
file, so that a flipped bit or a missing end is noticed wherever it is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from metareg.errors import UsageError
from metareg.util.files import write_bytes
from metareg.util.torch_internals import OperationMode

__all__ = ["DamagedFileError", "TensorFile", "limit_allocation", "write_tensors"]

_LONGEST_HEADER = 16 << 20
_NO_DIGEST = "0" * 64
_SMALLEST_BOUND = 1 << 24


class DamagedFileError(UsageError):
    """A file is not what was written, or was never one of metareg's."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header as one file, complete or not at all.

    Args:
        tensors: by name; on any device, in any layout.
        header: what JSON can hold.

    Raises:
        MetaregError: the file cannot be written; what stood there before is as it was.
    """
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    blob = bytearray(save(own, {"metareg": json.dumps({"sha256": _NO_DIGEST, **header})}))
    place = blob.find(_NO_DIGEST.encode())
    blob[place : place + len(_NO_DIGEST)] = hashlib.sha256(blob).hexdigest().encode()
    write_bytes(path, blob)


class TensorFile:
    """What `write_tensors` wrote. Opening it reads the header alone, to be judged before any memory is taken.

    Args:
        path: the file.
        what: what it should be, for messages, as in ``"learner"``.

    Raises:
        UsageError: there is no such file.
        DamagedFileError: it is no such file, or its header is damaged.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._what = what
        with self._translate_errors():
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= _LONGEST_HEADER:
                    raise ValueError("it does not begin with a header")
                head = file.read(length)
            entries = json.loads(head.decode())
            self.header: dict[str, Any] = json.loads(entries.pop("__metadata__")["metareg"])
            self._digest: str = self.header.pop("sha256")
            self.shapes: dict[str, tuple[int, ...]] = {
                name: tuple(int(size) for size in entry["shape"]) for name, entry in entries.items()
            }
            self._digest_at = 8 + head.find(self._digest.encode())
        self.bytes = path.stat().st_size
        """The size of the file."""

    def read(self) -> dict[str, Tensor]:
        """The tensors by name, each in memory of its own.

        Raises:
            DamagedFileError: the file is not what was written.
        """
        with self._translate_errors():
            blob = self.path.read_bytes()
            end = self._digest_at + len(_NO_DIGEST)
            digest = hashlib.sha256(blob[: self._digest_at])
            digest.update(_NO_DIGEST.encode())
            digest.update(memoryview(blob)[end:])
            if digest.hexdigest() != self._digest:
                raise ValueError("its checksum is wrong")
            # Copies are aligned as every other tensor is, on which the last bit of a matrix product can depend.
            return {name: value.clone() for name, value in load(blob).items()}

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UsageError(f"There is no {self._what} at {self.path}.") from None
        # A damaged header can be any JSON, or none.
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedFileError(
                f"{self.path} is no {self._what} that metareg saved, or it is damaged: {error}."
            ) from error


@contextmanager
def limit_allocation(bytes_at_most: int, where: str) -> Iterator[None]:
    """Refuse to create a tensor that is larger than what it is to be filled with.

    A file from a stranger says how wide its model is; building it must not take more memory than the file itself.

    Args:
        bytes_at_most: the size of the file; at least 16 MiB are always allowed.
        where: the file, for the message.

    Raises:
        UsageError: a tensor would have been larger.
    """
    with _AllocationBound(max(_SMALLEST_BOUND, bytes_at_most), where):
        yield


class _AllocationBound(OperationMode):  # type: ignore[misc]
    _FACTORIES = frozenset(
        ("empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "new_empty", "new_zeros", "new_full")
    )

    def __init__(self, bytes_at_most: int, where: str) -> None:
        super().__init__()
        self._numbers_at_most = bytes_at_most
        self._where = where

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "overloadpacket", func).__name__ in self._FACTORIES:
            integers = tuple(part for part in args if isinstance(part, int))
            sizes = next((part for part in args if isinstance(part, list | tuple)), integers)
            if math.prod(sizes) > self._numbers_at_most:
                raise UsageError(
                    f"{self._where} names a model with a tensor of the shape {tuple(sizes)}, which is larger than the "
                    "whole file; it is damaged or made up."
                )
        return func(*args, **(kwargs or {}))

    __torch_function__ = __torch_dispatch__
