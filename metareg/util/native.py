"""Shared libraries of the package's own C++, built once on each machine by its compiler."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from threading import RLock

__all__ = ["create_cache_folder", "describe_processor", "find_compiler", "load_library"]

log = logging.getLogger("metareg")

_PROCESSOR = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_FLAGS = ("-std=c++17", "-O3", _PROCESSOR, "-shared", "-fPIC", "-pthread", "-Wno-psabi")
_SECONDS = 120
_LOCK = RLock()


def find_compiler() -> str | None:
    """Return the C++ compiler that torch.compile would use on a CPU; None if there is none."""
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def load_library(source: Path) -> ctypes.CDLL | None:
    """Build a C++ file for this processor, unless that was done before, and load it.

    Returns:
        The library; None without a compiler for it, which one line of the log says.
    """
    with _LOCK:
        return _load(source)


@cache
def _load(source: Path) -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None or sys.platform == "win32":
        log.info("Without a C++ compiler (g++ or clang++), image models train more slowly.")
        return None
    library = create_cache_folder("native") / f"{source.stem}-{_describe_build(source, compiler)}.so"
    try:
        if not library.is_file():
            _build(source, compiler, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning(
            "%s does not compile %s, so image models train more slowly: %s", compiler, source.name, reason.strip()
        )
        return None


def _build(source: Path, compiler: str, library: Path) -> None:
    """Compile into a file beside the library, and rename it, so that other processes never see half of it."""
    handle, unfinished = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, "-o", unfinished, str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        Path(unfinished).replace(library)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _describe_build(source: Path, compiler: str) -> str:
    """Return a digest of everything that the library depends on: source, compiler, flags and processor."""
    found = Path(compiler).resolve()
    parts = [source.read_text(encoding="utf-8"), str(found), str(found.stat().st_mtime), *_FLAGS, *describe_processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def describe_processor() -> list[str]:
    """Describe the processor and its instructions."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text(errors="replace").splitlines() if processor.is_file() else []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return [platform.machine(), *sorted(known)]


def create_cache_folder(name: str) -> Path:
    """Create a folder in the user's own cache for files that are loaded as code, which no one else may write.

    If the home folder is read-only, the folder lasts only for this process.
    """
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("metareg", appauthor=False), name)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix=f"metareg-{name}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
