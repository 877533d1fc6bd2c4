"""Tensors with a JSON header in one safetensors file; loading one executes nothing.

The header is in the file's metadata under the key ``metareg``. It begins with a SHA-256 of every other byte of the
file, which detects any flipped bit or truncation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from metareg.errors import UsageError
from metareg.util.files import MALFORMED, parse_json, refuse_special_file, write_bytes
from metareg.util.torch_internals import OperationMode, tree_leaves

__all__ = ["DamagedFileError", "TensorFile", "limit_cost", "write_tensors"]

_LONGEST_HEADER = 16 << 20
_MOST_TENSORS = 10_000
_NO_DIGEST = "0" * 64
# Building a learner takes 3 to 6 times its file's size, and 5 to 7 operations per tensor.
_MOST_COPIES = 16
_MOST_OPERATIONS = 50
_LEAST_OPERATIONS = 1000


class DamagedFileError(UsageError):
    """A file is damaged, or was not written by metareg."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header to one file atomically.

    Args:
        tensors: tensors by name, on any device and in any layout.
        header: content for JSON.

    Raises:
        MetaregError: the file cannot be written; an existing file is unchanged.
    """
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    blob = bytearray(save(own, {"metareg": json.dumps({"sha256": _NO_DIGEST, **header})}))
    place = blob.find(_NO_DIGEST.encode())
    blob[place : place + len(_NO_DIGEST)] = hashlib.sha256(blob).hexdigest().encode()
    write_bytes(path, blob)


class TensorFile:
    """A file of `write_tensors`. Opening it reads only the header, so that you can check it before allocating memory.

    Args:
        path: the file.
        what: what it should be, for messages, as in ``"learner"``.

    Raises:
        UsageError: there is no such file.
        DamagedFileError: it is not a file of `write_tensors`, or its header is damaged.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._what = what
        with self._translate_errors():
            refuse_special_file(path)
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= _LONGEST_HEADER:
                    raise ValueError("it does not begin with a header")
                head = file.read(length)
            entries = parse_json(head.decode())
            self.header: dict[str, Any] = dict(parse_json(entries.pop("__metadata__")["metareg"]))
            self._digest = str(self.header.pop("sha256"))
            self.shapes: dict[str, tuple[int, ...]] = {
                name: tuple(int(size) for size in entry["shape"]) for name, entry in entries.items()
            }
            if len(self.shapes) > _MOST_TENSORS:
                raise ValueError(f"it holds {len(self.shapes)} tensors, more than {_MOST_TENSORS}")
            self._digest_at = 8 + head.find(self._digest.encode())
        self.bytes = path.stat().st_size
        """The size of the file."""

    def read(self) -> dict[str, Tensor]:
        """Read the tensors by name, each in separate memory.

        Raises:
            DamagedFileError: the file is damaged.
        """
        with self._translate_errors():
            blob = self.path.read_bytes()
            end = self._digest_at + len(_NO_DIGEST)
            digest = hashlib.sha256(blob[: self._digest_at])
            digest.update(_NO_DIGEST.encode())
            digest.update(memoryview(blob)[end:])
            if digest.hexdigest() != self._digest:
                raise ValueError("its checksum is wrong")
            # Copies have torch's usual alignment, which can affect the last bit of a matrix product.
            return {name: value.clone() for name, value in load(blob).items()}

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UsageError(f"There is no {self._what} at {self.path}.") from None
        # A damaged header can be any JSON, or not JSON at all.
        except (SafetensorError, OSError, *MALFORMED) as error:
            raise DamagedFileError(
                f"{self.path} is not a {self._what} that metareg saved, or it is damaged: {error}."
            ) from error


@contextmanager
def limit_cost(file: TensorFile, *, bytes_at_least: int) -> Iterator[None]:
    """Limit a block that builds what a file describes to a multiple of the file's size.

    An untrusted file says how wide and deep its model is, so building it must cost at most a small multiple of the
    file, over all tensors. Tensors on the device ``meta``, which have no memory, count only as operations.

    Args:
        file: the file.
        bytes_at_least: number of bytes that are always allowed.

    Raises:
        UsageError: the block exceeds the limit of bytes or operations.
    """
    most_bytes = max(bytes_at_least, _MOST_COPIES * file.bytes)
    with _CostBound(most_bytes, _LEAST_OPERATIONS + _MOST_OPERATIONS * len(file.shapes), str(file.path)):
        yield


class _CostBound(OperationMode):  # type: ignore[misc]
    _FACTORIES = frozenset(
        ("empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "new_empty", "new_zeros", "new_full")
    )

    def __init__(self, most_bytes: int, most_operations: int, where: str) -> None:
        super().__init__()
        self._bytes, self._operations = most_bytes, most_operations
        self._where = where

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "overloadpacket", func).__name__ in self._FACTORIES:
            integers = tuple(part for part in args if isinstance(part, int))
            sizes = next((part for part in args if isinstance(part, list | tuple)), integers)
            device = (kwargs or {}).get("device") or torch.get_default_device()
            if torch.device(device).type != "meta" and math.prod(sizes) > self._bytes:
                self._refuse(f"a tensor of the shape {tuple(sizes)}")
        given = _find_storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self._operations -= 1
        created = _find_storages(result)
        self._bytes -= sum(created[place] for place in created.keys() - given.keys())
        if self._bytes < 0 or self._operations < 0:
            self._refuse("more tensors" if self._operations < 0 else "larger tensors")
        return result

    __torch_function__ = __torch_dispatch__

    def _refuse(self, what: str) -> None:
        raise UsageError(
            f"{self._where} describes a model with {what}, many times the size of the whole file; it is damaged or "
            "forged."
        )


def _find_storages(tree: Any) -> dict[int, int]:
    """Map the address of each tensor's storage in a tree to its size in bytes."""
    real = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type != "meta")
    return {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in real}
