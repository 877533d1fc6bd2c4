"""Every function that reads files, with damaged files: each problem is reported in one sentence."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("dgl")
from metareg import MetaregError, parse_in_child
from readers import CHILDREN, OWN, READERS, Reader, find_functions

pytestmark = pytest.mark.strangers

Tried = Callable[..., None]

_TOKENS = st.sampled_from(
    [b"", b"\0", b"\xff\xfe", b"[]", b"{}", b"null", b"NaN", b"1e999", b"-1", b"9" * 4000, b"[" * 3000, b'"', b"\n", b",",
     b"&a [*a]", b"PK\x03\x04", b"\x80\x04", b"\x1f\x8b", b"0", b"true", b"\xed\xa0\x80", b"\xef\xbb\xbf", b": ", b"- "]
)  # fmt: skip


@st.composite
def _damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Change a file's bytes: remove, repeat or replace a part."""
    start, length = draw(st.floats(0, 1)), draw(st.integers(0, 40) | st.integers(0, 1 << 20))
    other = draw(_TOKENS | st.binary(max_size=12))
    how = draw(st.sampled_from(["replace", "repeat", "flip", "all"]))

    def change(good: bytes) -> bytes:
        at = int(start * len(good))
        end = min(len(good), at + length)
        if how == "flip" and at < len(good):
            return good[:at] + bytes([good[at] ^ (1 << length % 8)]) + good[at + 1 :]
        middle = {"replace": other, "repeat": good[at:end] * 2}.get(how, b"")
        return other if how == "all" else good[:at] + middle + good[end:]

    return change


def test_every_function_that_reads_files_is_in_the_list() -> None:
    found = set(find_functions())
    listed = {name for each in (*READERS, *CHILDREN) for name in each.functions}
    assert found - listed - OWN.keys() == set(), "put these into tests/helpers/readers.py"
    assert (listed | OWN.keys()) - found == set(), "these are gone"


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_files_are_one_sentence(reader: Reader, tmp_path: Path, tried: Tried) -> None:
    path = _write(reader, tmp_path)
    good = path.read_bytes()

    @settings(suppress_health_check=list(HealthCheck))
    @given(_damage())
    def try_one(change: Callable[[bytes], bytes]) -> None:
        path.write_bytes(change(good))
        with suppress(MetaregError):
            reader.read(path)
        tried(reader.group)

    if path.suffix != ".zip":  # only the authors' own zip file is read
        reader.read(path)
    try_one()


class _Hung(BaseException):
    """An exception that no handler catches."""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("reader", [*READERS, CHILDREN[0]], ids=lambda reader: reader.name)
def test_a_named_pipe_is_no_file(reader: Reader, tmp_path: Path, tried: Tried) -> None:
    if reader.name in ("set.txt", "baselines.json"):
        pytest.skip("the one is read by the test, the other measured anew where there is no file")

    def stop(*_: object) -> None:
        raise _Hung

    path = _write(reader, tmp_path)
    path.unlink()
    os.mkfifo(path)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        with suppress(MetaregError):
            reader.read(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    tried(reader.group)


def _write(reader: Reader, folder: Path) -> Path:
    try:
        reader.write(folder)
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    return folder / reader.name


@pytest.mark.slow
@pytest.mark.parametrize("reader", CHILDREN, ids=lambda reader: reader.name)
def test_damaged_files_crash_a_child_alone(reader: Reader, tmp_path: Path, tried: Tried) -> None:
    good = _write(reader, tmp_path).read_bytes()
    paths = []
    for flip in range(0, 8 * len(good), max(1, len(good) // 2)):
        paths.append(tmp_path / f"{flip}{Path(reader.name).suffix}")
        damaged = bytearray(good)
        damaged[flip // 8] ^= 1 << flip % 8
        paths[-1].write_bytes(damaged)
    for path in paths:
        with suppress(MetaregError):
            reader.read(path) if path.suffix == ".bin" else parse_in_child(reader.read, [path], "MATLAB's")
        tried(reader.group)
