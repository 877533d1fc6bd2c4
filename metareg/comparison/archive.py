"""The raw results of a comparison in one compressed file, for reports and for continuing on another machine.

The file is a tar archive compressed with xz. It contains what reports read: the comparison's configuration, and the
scores, curves, times, versions and options of every run and trial. It omits weights, checkpoints and plots.
"""

from __future__ import annotations

import io
import lzma
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

import numpy as np
import yaml

from metareg.comparison.config import is_location
from metareg.comparison.plan import CHOSEN_FILE, CONFIG_FILE, TRIAL_FILE, Plan
from metareg.comparison.pool import ERROR_FILE, cut_traceback
from metareg.errors import UsageError
from metareg.runs.folder import ANALYSIS, CONFIG, ENVIRONMENT, METRICS, RESULTS, TIMING
from metareg.util.files import (
    MALFORMED,
    format_json,
    parse_json,
    read_json,
    refuse_malformed,
    refuse_special_file,
    write_bytes,
)
from metareg.util.yaml_files import read_yaml

__all__ = ["ARCHIVE_SUFFIX", "add_archived_runs", "unpack_archive", "write_archive"]

ARCHIVE_SUFFIX = ".tar.xz"

_OF_A_RUN = (ANALYSIS, CONFIG, ENVIRONMENT, ERROR_FILE, METRICS, RESULTS, TIMING)
_OF_A_TRIAL = (CONFIG, ERROR_FILE, RESULTS)
_PATTERNS = (
    CONFIG_FILE,
    *(f"runs/*/*/seed-*/{name}" for name in _OF_A_RUN),
    f"tuning/*/*/{CHOSEN_FILE}",
    f"tuning/*/*/trial-*/{TRIAL_FILE}",
    *(f"tuning/*/*/trial-*/seed-*/{name}" for name in _OF_A_TRIAL),
)
_MEMBER = re.compile("|".join(re.escape(each).replace(r"\*", r"[^/\\:]*[^/\\:.][^/\\:]*") for each in _PATTERNS))
_LEAST_BYTES, _MOST_TIMES, _BLOCK = 1 << 28, 100, 1 << 20
_NARROW = "scores_are_float32"


def write_archive(folder: str | Path, file: Path) -> None:
    """Write the raw results of a comparison, which need not be finished; equal results give equal bytes.

    Raises:
        UsageError: there is no comparison in the folder.
    """
    folder = Plan.read(folder).folder
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()):
            content = _prepare(path, folder)
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    write_bytes(file, buffer.getvalue())


@contextmanager
def unpack_archive(file: Path) -> Iterator[Path]:
    """Unpack an archive of `write_archive` into a temporary folder.

    Raises:
        UsageError: the file cannot be read, is damaged, or was not written by metareg.
    """
    with TemporaryDirectory(prefix="metareg-") as name:
        folder = Path(name, file.name.removesuffix(ARCHIVE_SUFFIX))
        folder.mkdir()
        try:
            with _decompress(file) as plain, tarfile.open(fileobj=plain, mode="r:") as archive:
                for member in archive:
                    known = member.isfile() and _MEMBER.fullmatch(member.name)
                    content = archive.extractfile(member) if known else None
                    if content is None:
                        raise UsageError(f"{file} is not an archive of a comparison: it contains '{member.name}'.")
                    _restore(folder / member.name, content.read())
        except (OSError, tarfile.TarError, lzma.LZMAError, *MALFORMED) as error:
            raise UsageError(f"{file} cannot be read as results of a comparison: {error}.") from error
        if not (folder / CONFIG_FILE).is_file():
            raise UsageError(f"{file} is not an archive of a comparison: it has no {CONFIG_FILE}.")
        yield folder


@contextmanager
def _decompress(file: Path) -> Iterator[IO[bytes]]:
    """Decompress a file into a temporary one; raise a ValueError if it is far larger than results can be."""
    refuse_special_file(file)
    left = max(_LEAST_BYTES, _MOST_TIMES * file.stat().st_size)
    with TemporaryFile() as plain, lzma.open(file) as packed:
        while block := packed.read(_BLOCK):
            left -= len(block)
            if left < 0:
                raise ValueError(f"it unpacks to more than {_MOST_TIMES} times its size")
            plain.write(block)
        plain.seek(0)
        yield plain


def add_archived_runs(source: Path, target: Path) -> tuple[int, int]:
    """Add the finished runs and chosen settings of one comparison's folder to another's.

    Does not change what `target` contains: runs that have begun, and trials of arms that have some.

    Returns:
        The number of final runs added, and the number of final runs kept in `target`.

    Raises:
        UsageError: `target` chose other settings for an arm; nothing is written.
    """
    for file in source.glob(f"tuning/*/*/{CHOSEN_FILE}"):
        own = target / file.relative_to(source)
        if own.is_file() and _read_options(own) != _read_options(file):
            raise UsageError(
                f"{own.parent} chose other settings than the results to add; choose another folder with --out."
            )
    for folder in sorted(source.glob("tuning/*/*")):
        own = target / folder.relative_to(source)
        if not own.exists():
            shutil.copytree(folder, own, ignore=_list_unfinished)
        elif (folder / CHOSEN_FILE).is_file() and not (own / CHOSEN_FILE).is_file():
            shutil.copyfile(folder / CHOSEN_FILE, own / CHOSEN_FILE)
    added = kept = 0
    for file in sorted(source.glob(f"runs/*/*/seed-*/{RESULTS}")):
        own = target / file.parent.relative_to(source)
        if (own / CONFIG).exists() or (own / RESULTS).exists():
            kept += 1
            continue
        shutil.copytree(file.parent, own, dirs_exist_ok=True)
        (own / ERROR_FILE).unlink(missing_ok=True)
        added += 1
    return added, kept


def _read_options(file: Path) -> Any:
    content = read_json(file)
    with refuse_malformed(file, "what tuning chose"):
        return content["options"]


def _prepare(path: Path, folder: Path) -> bytes:
    """Return a file's content for the archive."""
    if path.name == RESULTS:
        return _narrow_scores(path.read_bytes())
    if path.name in (CONFIG_FILE, CONFIG, ENVIRONMENT):
        return _shorten_locations(path)
    if path.name in (ERROR_FILE, CHOSEN_FILE):
        text = path.read_text("utf-8", errors="replace")
        text = cut_traceback(text) if path.name == ERROR_FILE else text
        # Published results should not contain paths of the machine.
        return text.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "").encode()
    return path.read_bytes()


def _shorten_locations(path: Path) -> bytes:
    """Return a configuration in which the locations of data are only names, which published results may contain."""
    try:
        content = read_json(path) if path.suffix == ".json" else read_yaml(path)
    except (*MALFORMED, UsageError):
        return path.read_bytes()
    shortened = _keep_names(content)
    if shortened == content:
        return path.read_bytes()
    if path.suffix == ".json":
        return format_json(shortened).encode()
    return yaml.safe_dump(shortened, sort_keys=False, allow_unicode=True).encode()


def _keep_names(content: Any) -> Any:
    if isinstance(content, list):
        return [_keep_names(each) for each in content]
    if not isinstance(content, dict):
        return content
    return {
        key: Path(value).name if is_location(str(key)) and isinstance(value, str) else _keep_names(value)
        for key, value in content.items()
    }


def _restore(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_widen_scores(content) if path.name == RESULTS else content)


def _list_unfinished(folder: str, names: list[str]) -> list[str]:
    """List a trial's runs that must restart because the archive has no checkpoints."""
    files = RESULTS, ERROR_FILE
    return [
        each
        for each in names
        if each.startswith("seed-") and not any(Path(folder, each, file).is_file() for file in files)
    ]


def _narrow_scores(content: bytes) -> bytes:
    """Shorten the scores in a results.json: nearly all are float32, which need 9 digits instead of 17."""
    try:
        results = parse_json(content.decode())
        for step in results["steps"]:
            scores = np.array(step["scores"], dtype=np.float64)
            narrow = scores.astype(np.float32)
            if np.array_equal(scores, narrow, equal_nan=True):
                step |= {"scores": [float(str(score)) for score in narrow], _NARROW: True}
    except MALFORMED:
        return content  # reports name damaged files
    return format_json(results).encode()


def _widen_scores(content: bytes) -> bytes:
    """Restore the results.json that `_narrow_scores` shortened."""
    try:
        results: dict[str, Any] = parse_json(content.decode())
        for step in results["steps"]:
            if step.pop(_NARROW, False):
                step["scores"] = np.array(step["scores"], dtype=np.float32).astype(np.float64).tolist()
    except MALFORMED:
        return content
    return format_json(results).encode()
