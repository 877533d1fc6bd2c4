"""Follow the tutorials for plugins: write their listings into files, and run their commands in a fresh environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted(path for path in (ROOT / "docs" / "plugins").glob("*.md") if path.stem != "index")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A new virtual environment that also sees the packages of this one, including metareg."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    paths = {key: sysconfig.get_path(key, vars={"base": str(folder / "venv")}) for key in ("purelib", "scripts")}
    here = sysconfig.get_path("purelib")
    Path(paths["purelib"], "inherited.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    for command in ("pip", "pytest", "metareg"):
        script = Path(paths["scripts"], command)
        script.write_text(f'#!/bin/sh\nexec "{paths["scripts"]}/python" -m {command} "$@"\n')
        script.chmod(0o755)
    return os.environ | {
        "PATH": f"{paths['scripts']}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        # Avoid downloads: an environment with metareg installed from a checkout has the build backend.
        **({"PIP_NO_BUILD_ISOLATION": "1"} if _has("hatchling") else {}),
    }


def _has(module: str) -> bool:
    command = [sys.executable, "-c", f"import {module}"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the commands are those of a POSIX shell")
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_as_written(tutorial: Path, environment: dict[str, str], tmp_path: Path) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", tutorial.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert {language for language, _ in blocks} == {"sh", "python"}
    for language, text in blocks:
        if language == "python":
            first, _, listing = text.partition("\n")
            path = tmp_path / first.removeprefix("# ")
            assert path.is_file(), f"{first} is no file that new-plugin wrote"
            path.write_text(listing, encoding="utf-8")
            continue
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{text}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        if "metareg plugins" in text:
            assert re.search(r"sign-maml", result.stdout)
