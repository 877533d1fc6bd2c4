"""Downloads are complete or absent, and data is looked up in one place."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from downloads import cut_off, serve
from metareg import Field, MetaregError, PathText, PluginConfig, UsageError, cache_folder, data_folder, download
from metareg.contract.config import validate

CONTENT = b"data" * 50_000


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    folder = tmp_path / "upstream"
    folder.mkdir()
    for name in ("file.bin", "broken.bin"):
        (folder / name).write_bytes(CONTENT)
    return folder


@pytest.mark.parametrize("algorithm", ["sha256", "md5", None])
def test_a_file_is_fetched_with_its_checksum(tmp_path: Path, upstream: Path, algorithm: str | None) -> None:
    checksum = algorithm and f"{algorithm}:{hashlib.new(algorithm, CONTENT).hexdigest()}"
    path = tmp_path / "new" / "target.bin"
    with serve(upstream) as address:
        download(f"{address}/file.bin", path, checksum)
    assert path.read_bytes() == CONTENT
    assert [each.name for each in path.parent.iterdir()] == ["target.bin"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_standard_error(
    tmp_path: Path, upstream: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with serve(upstream) as address:
        download(f"{address}/file.bin", tmp_path / "target.bin")
    shown = capsys.readouterr()
    assert "target.bin" in shown.err
    assert ("\r" in shown.err) is terminal
    assert not shown.out


def test_what_is_there_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch)
    path = tmp_path / "mine.bin"
    path.write_text("mine")
    download("http://host.invalid/file.bin", path, "md5:0")
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "checksum", "problem"),
    [
        ("file.bin", f"sha256:{'0' * 64}", "unexpected file.*sha256:000"),
        ("file.bin", f"md5:{'0' * 32}", "unexpected file.*md5:000"),
        ("broken.bin", None, "cannot be downloaded: the connection was lost"),
        ("nothing.bin", None, "cannot be downloaded: the server answered 404"),
    ],
)
def test_a_damaged_download_leaves_nothing(
    tmp_path: Path, upstream: Path, name: str, checksum: str | None, problem: str
) -> None:
    path = tmp_path / "new" / "target.bin"
    with serve(upstream) as address, pytest.raises(MetaregError, match=problem) as caught:
        download(f"{address}/{name}", path, checksum)
    assert "\n" not in str(caught.value)
    assert not list(path.parent.iterdir())


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch)
    with pytest.raises(MetaregError, match=r"host\.invalid.*target\.bin"):
        download("https://host.invalid/file.bin", tmp_path / "target.bin")
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(tmp_path: Path, upstream: Path) -> None:
    (tmp_path / "file").touch()
    with serve(upstream) as address, pytest.raises(MetaregError, match=r"cannot be created: .*METAREG_DATA"):
        download(f"{address}/file.bin", tmp_path / "file" / "target.bin")


def test_where_data_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAREG_CACHE", "~/cache")
    monkeypatch.delenv("METAREG_DATA", raising=False)
    assert (cache_folder(), data_folder()) == (tmp_path / "cache", tmp_path / "cache" / "data")
    for given in ("~/data", "data", str(tmp_path / "data")):
        monkeypatch.setenv("METAREG_DATA", given)
        assert data_folder() == tmp_path / "data"
    monkeypatch.setenv("METAREG_DATA", "~no-such-user/data")
    with pytest.raises(UsageError, match="home folder at the start of ~no-such-user/data is unknown"):
        data_folder()


def test_paths_among_options_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Config(PluginConfig):
        data: PathText | None = Field(None)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Config(data="~/a").data == Config(data="a").data == str(tmp_path / "a")
    with pytest.raises(UsageError, match=r"mine.*data.*'~no-such-user'"):
        validate(Config, {"data": "~no-such-user"}, "mine")
