"""The cache of decoded images: complete, or rebuilt."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

metareg_image = pytest.importorskip("metareg_image.store")
from metareg import MetaregError  # noqa: E402
from metareg_image.store import ClassImages, ImageStore  # noqa: E402

pytestmark = pytest.mark.strangers

Tried = Callable[..., None]

_BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
from test_image_cache import load
load(slow=float(sys.argv[2]))
"""
_ROWS = np.arange(3)


def _images(number: int, slow: float) -> Iterator[np.ndarray]:
    for shade in range(3):
        time.sleep(slow)
        yield np.full((4, 4), 40 * number + shade, dtype=np.uint8)


def load(slow: float = 0.0) -> ImageStore:
    """Return a store with two classes of three images for each split."""
    splits = ("train", "train", "validation", "validation", "test", "test")
    return ImageStore.load_or_build(
        "shades",
        {},
        lambda: [ClassImages(split, f"class {n}", _images(n, slow)) for n, split in enumerate(splits)],
        (4, 4, 1),
        lambda image: np.asarray(image)[..., None],
        lambda _: None,
    )


def read_all(store: ImageStore) -> list[int]:
    """Return the grey level of every image."""
    return [
        int(store.read(index.starts[number] + _ROWS)[place, 0, 0, 0])
        for index in store.splits.values()
        for number in range(len(index.names))
        for place in _ROWS
    ]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAREG_CACHE", str(tmp_path))
    return tmp_path / "images"


def _the_store(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if not path.name.startswith("."))
    return folder


@pytest.mark.parametrize(
    "damage", ["index flipped", "index cut", "index lost", "pixels cut", "pixels lost", "pixels long", "pixel flipped"]
)
def test_a_damaged_store_is_built_anew(
    damage: str, cache: Path, caplog: pytest.LogCaptureFixture, tried: Tried
) -> None:
    whole = read_all(load())
    name, _, how = damage.partition(" ")
    path = _the_store(cache) / ("index.json" if name == "index" else "pixels.u8")
    content = bytearray(path.read_bytes())
    if how == "lost":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"flipped": content, "cut": content[:-9], "long": content + b"\0"}[how])
    assert read_all(load()) == whole
    assert "is damaged; rebuilding it" in caplog.text
    caplog.clear()
    assert read_all(load()) == whole
    assert not caplog.text
    assert [path.name for path in cache.iterdir()] == [_the_store(cache).name]
    tried("disks")


def test_damage_beneath_a_reader_costs_it_nothing(cache: Path, tried: Tried) -> None:
    whole = read_all(load())
    store = load()
    store.read(_ROWS)
    path = _the_store(cache) / "pixels.u8"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert read_all(store) == whole
    tried("disks")


def test_a_damaged_store_that_cannot_be_replaced_is_one_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    load()
    (_the_store(cache) / "index.json").write_text("{}")

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(MetaregError, match="choose another folder with METAREG_CACHE"):
        load()
    tried("disks")


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o755), (0o027, 0o750), (0o002, 0o775)])
def test_who_may_read_it_is_for_the_umask_to_say(mask: int, expected: int, cache: Path, tried: Tried) -> None:
    before = os.umask(mask)
    try:
        load()
    finally:
        os.umask(before)
    folder = _the_store(cache)
    assert stat.S_IMODE(folder.stat().st_mode) == expected
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == expected & 0o666
    assert {path.name for path in folder.iterdir()} == {"index.json", "pixels.u8"}
    tried("disks")


def _start(slow: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _BUILD, str(Path(__file__).parent), str(slow)])


@pytest.mark.slow
def test_what_a_killed_builder_left_is_swept(cache: Path, tried: Tried) -> None:
    killed, alive = _start(1000), _start(1000)
    try:
        deadline = time.monotonic() + 120
        while len(list(cache.glob(".shades*/pixels.u8"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        killed.kill()
        killed.wait()
        for path in cache.glob(".shades*"):
            os.utime(path, (0, 0))
        load()
        left = [path.name for path in cache.glob(".shades*")]
        assert len(left) == 1
        assert f".{alive.pid}-" in left[0]
    finally:
        alive.kill()
        alive.wait()
        killed.kill()
    tried("kills")


@pytest.mark.slow
def test_two_builders_at_once_make_one_store(cache: Path, tried: Tried) -> None:
    builders = [_start(0.1) for _ in range(2)]
    assert [each.wait(timeout=180) for each in builders] == [0, 0]
    assert [path.name for path in cache.iterdir()] == [_the_store(cache).name]
    assert len(read_all(load())) == 18
    shutil.rmtree(cache)
    tried("disks", 2)
