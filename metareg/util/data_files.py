"""The folders for data, and downloads into them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from metareg.errors import MetaregError, UsageError
from metareg.printable import show_controls

__all__ = ["absolute_path", "cache_folder", "data_folder", "download"]

_BLOCK = 1 << 16
_SECONDS = 60


def absolute_path(path: str | Path) -> Path:
    """Make a path absolute, with ``~`` or ``~NAME`` replaced by a home folder.

    Raises:
        UsageError: there is no user NAME.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(f"The home folder at the start of {path} is unknown.") from error


def cache_folder() -> Path:
    """The folder for derived data: METAREG_CACHE, or the user's cache folder of the system."""
    import platformdirs

    given = os.environ.get("METAREG_CACHE")
    return absolute_path(given) if given else Path(platformdirs.user_cache_dir("metareg", appauthor=False))


def data_folder() -> Path:
    """The folder for data and downloads, with one folder per data set: METAREG_DATA, or a folder in the cache."""
    given = os.environ.get("METAREG_DATA")
    return absolute_path(given) if given else cache_folder() / "data"


def download(url: str, path: Path, checksum: str | None = None) -> None:
    """Download a file unless it exists; standard error shows the progress.

    Args:
        url: its address, http or https.
        path: the target; folders are created.
        checksum: ``"sha256:"`` or ``"md5:"`` and the digits; None if none is known.

    Raises:
        MetaregError: it cannot be downloaded, or does not match the checksum. Nothing is kept.
    """
    if path.is_file():
        return
    import pooch
    from tqdm import tqdm

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"The folder {path.parent} cannot be created: {error.strerror}"
        raise MetaregError(f"{problem}; choose other folders with METAREG_DATA and METAREG_CACHE.") from error
    pooch.get_logger().setLevel("WARNING")
    # The bar needs control characters, so it bypasses the stream that replaces them.
    screen = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    # pooch sets the total later but first evaluates bool(bar), which fails without a total.
    with tqdm(desc=show_controls(path.name), total=1, unit="B", unit_scale=True, disable=None, file=screen) as bar:
        if bar.disable:  # not a terminal: print a line instead of a bar
            print(f"Downloading {path.name} from {url}", file=sys.stderr)
        fetch = pooch.HTTPDownloader(progressbar=bar, chunk_size=_BLOCK, timeout=_SECONDS)
        try:
            pooch.retrieve(url, checksum, path.name, path.parent, downloader=fetch)
        except OSError as error:
            raise MetaregError(
                f"{url} cannot be downloaded: {_explain(error, url)}; try again, or put the file at {path} yourself."
            ) from error
        except ValueError as error:
            raise MetaregError(
                f"{url} returned an unexpected file, whose checksum is not {checksum}; nothing was kept."
            ) from error


def _explain(error: OSError, url: str) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        error.response.close()  # pooch leaves the connection open
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return f"there was no response within {_SECONDS} seconds"
    if isinstance(error, requests.ConnectionError):
        return f"there is no connection to {urlsplit(url).hostname}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was lost"
    return error.strerror or str(error)
