"""Files that are written atomically: under a temporary name, flushed to disk, then renamed.

Files that are read can be untrusted. Reading one costs a small multiple of its size, and any defect raises a
`UsageError`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from metareg.errors import MetaregError, UsageError

__all__ = [
    "MALFORMED", "LinesFile", "TimedLinesFile", "format_json", "is_leftover", "lock_folder", "open_to_append", "parse_json",
    "read_json", "read_text", "refuse_malformed", "refuse_special_file", "refuse_twice", "remove_leftovers", "replace_file",
    "sync_folder", "write_bytes", "write_json", "write_text",
]  # fmt: skip

log = logging.getLogger("metareg")

MALFORMED = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RuntimeError, EOFError, MemoryError,
)  # fmt: skip
"""Exceptions that Python and torch raise for unexpected file content."""

_LOCK, _OWNER = ".lock", ".owner.json"
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_MOST_DIGITS = 20
"""The number of digits of 64-bit integers."""
_LONGEST_REASON = 200


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block ends without an error.

    Raises:
        UsageError: it is a pipe or a device, such as /dev/null, which root could replace by a file.
        MetaregError: it cannot be written; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path} is a pipe or a device; name a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        # O_EXCL: create a new file, and never follow a link with this name.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise MetaregError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | bytearray) -> None:
    """Write a file; its folder must exist."""
    if not path.parent.is_dir():
        raise MetaregError(f"{path} cannot be written: there is no folder {path.parent}.")
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, with lists of numbers on one line."""
    write_text(path, format_json(content))


def format_json(content: Any) -> str:
    """Format content as `write_json` does."""
    return _json(content, "") + "\n"


def refuse_special_file(path: Path) -> None:
    """Raise an OSError for a pipe or a device, which may block or never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")


def read_text(path: Path, errors: str = "strict") -> str:
    """Read a UTF-8 text file; raise an OSError for a pipe or a device."""
    refuse_special_file(path)
    return path.read_text(encoding="utf-8", errors=errors)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UsageError: the file cannot be read, or is not JSON.
    """
    try:
        return parse_json(read_text(path).removeprefix("\ufeff"))
    except (OSError, ValueError, MemoryError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {_shorten(error)}.") from error


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: it is not JSON, repeats a key, is nested too deeply, or contains an integer of more than 64 bits.
    """
    try:
        return json.loads(text, parse_int=_parse_int, object_pairs_hook=refuse_twice)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def refuse_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict and refuse repeated keys; an `object_pairs_hook` for `json.loads`.

    Raises:
        ValueError: a key occurs twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key '{key}' occurs twice")
        found[key] = value
    return found


def _parse_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


@contextmanager
def refuse_malformed(path: Path, what: str) -> Iterator[None]:
    """Turn errors of a block that reads a file's content as `what` into one sentence.

    Raises:
        UsageError: the block raised an error in `MALFORMED`.
    """
    try:
        yield
    except MALFORMED as error:
        problem = f"{type(error).__name__}: {_shorten(error)}"
        raise UsageError(f"{path} does not contain {what} as metareg writes it ({problem}).") from error


def _shorten(error: Exception) -> str:
    """Shorten an error's message, which may quote the whole file."""
    text = str(error)
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"


def open_to_append(path: Path) -> BinaryIO:
    """Open a file for appending; raise an OSError if it is a link."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_LINKS, 0o666), "ab")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder for this process. The system releases the lock of a dead process.

    Raises:
        UsageError: another process holds the lock (the message names it), or a link in the folder leads outside.
        MetaregError: the folder cannot be written.
    """
    _refuse_links_out(folder)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = ""
        with suppress(UsageError, KeyError, TypeError):
            known = read_json(folder / _OWNER)
            owner = f" (process {known['process']} on {known['host']})"
        raise UsageError(
            f"Another process{owner} is working on {folder}; wait until it has finished, or stop it first."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise MetaregError(f"{folder} cannot be locked: {getattr(error, 'strerror', None) or error}.") from error
    try:
        write_json(folder / _OWNER, {"process": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        with suppress(OSError):
            (folder / _OWNER).unlink(missing_ok=True)
        lock.release()


def _refuse_links_out(folder: Path) -> None:
    """Refuse a folder that contains, at any depth, a link to the outside, a pipe or a device.

    Writing there would change files elsewhere, or block.
    """
    inside = folder.resolve()
    waiting = [folder]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(inside):
                    raise UsageError(
                        f"{entry.path} is a link out of {folder}, and nothing may be written outside: replace it by "
                        "its target, or remove it."
                    )
                elif not entry.is_symlink() and not entry.is_file(follow_symlinks=False):
                    raise UsageError(f"{entry.path} is a pipe or a device, not a file; remove it.")


def is_leftover(path: Path) -> bool:
    """Return whether a file is left over from a killed process: a lock or an unfinished file."""
    return path.name in (_LOCK, _OWNER) or (path.name.startswith(".") and path.name.endswith(".tmp"))


def remove_leftovers(*folders: Path) -> None:
    """Remove unfinished files; call it only while you hold the lock."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            with suppress(OSError):
                path.unlink()


class LinesFile:
    """A file of JSON lines that can be appended to, and truncated to its state at a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = 0
        self._digest = hashlib.sha256()

    def append(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            MetaregError: it cannot be written.
        """
        content = (json.dumps(line) + "\n").encode()
        try:
            with open_to_append(self.path) as file:
                file.write(content)
        except OSError as error:
            raise MetaregError(f"{self.path} cannot be written: {error.strerror}.") from error
        self._bytes += len(content)
        self._digest.update(content)

    def mark(self) -> dict[str, Any]:
        """Flush the file to disk, and return a mark of its current end."""
        if self._bytes:
            try:
                with self.path.open("rb") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise MetaregError(f"{self.path} cannot be written: {error.strerror}.") from error
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def cut(self, mark: dict[str, Any] | None, step: int = 0) -> None:
        """Remove the lines after a mark, or all lines if it is None.

        If the file was changed since, its readable lines up to `step` are kept, and a warning is logged.
        """
        try:
            if self.path.exists():
                refuse_special_file(self.path)
            content = self.path.read_bytes() if mark is not None and self.path.exists() else b""
            expected = 0 if mark is None else int(mark["bytes"])
            kept = content[:expected]
            if mark is not None and hashlib.sha256(kept).hexdigest() != mark["sha256"]:
                kept = _legible(content, step)
                self._put_aside(step)
                write_bytes(self.path, kept)
            elif self.path.exists() and self.path.stat().st_nlink > 1:
                write_bytes(self.path, kept)  # do not change the file under its other names
            elif self.path.exists():
                with open_to_append(self.path) as file:
                    file.truncate(expected)
        except OSError as error:
            raise MetaregError(f"{self.path} cannot be cut back: {error.strerror}.") from error
        self._bytes = len(kept)
        self._digest = hashlib.sha256(kept)

    def _put_aside(self, step: int) -> None:
        """Rename a file whose lines up to `step` were changed, and log a warning."""
        if not self.path.exists():
            log.warning("%s is missing; its lines up to step %d are lost.", self.path, step)
            return
        aside = self.path.with_name(f"{self.path.name}.damaged")
        log.warning(
            "%s is not what this run wrote; its readable lines up to step %d are kept, and the file itself as %s.",
            self.path, step, aside.name,
        )  # fmt: skip
        self.path.replace(aside)


class TimedLinesFile(LinesFile):
    """A `LinesFile` with times, which differ between runs, so a checkpoint does not contain its checksum."""

    def mark(self) -> dict[str, Any]:
        """Flush the file to disk; return an empty mark."""
        super().mark()
        return {}

    def cut(self, mark: dict[str, Any] | None, step: int = 0) -> None:
        """Remove the lines of later steps, or all lines if `mark` is None."""
        if mark is None or not self.path.exists():
            super().cut(None)
            return
        try:
            refuse_special_file(self.path)
            write_bytes(self.path, _legible(self.path.read_bytes(), step))
        except OSError as error:
            raise MetaregError(f"{self.path} cannot be cut back: {error.strerror}.") from error


def _legible(content: bytes, step: int) -> bytes:
    """Return the lines that are JSON objects with steps up to `step`, without duplicates."""
    kept: dict[bytes, None] = {}
    for line in content.splitlines(keepends=True):
        with suppress(*MALFORMED):
            if line.endswith(b"\n") and parse_json(line.decode())["step"] <= step:
                kept[line] = None
    return b"".join(kept)


def _json(value: Any, indent: str) -> str:
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        rows = [f"{deeper}{json.dumps(str(key))}: {_json(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(f"{deeper}{_json(item, deeper)}" for item in value) + f"\n{indent}]"
    return json.dumps(value)


def sync_folder(folder: Path) -> None:
    """Make a rename durable, on systems that can open a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
