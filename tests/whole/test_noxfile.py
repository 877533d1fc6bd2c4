"""Parts of the noxfile that no default session runs."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def noxfile() -> ModuleType:
    pytest.importorskip("nox")
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lower_bounds_are_constraints_that_pip_takes(noxfile: ModuleType) -> None:
    """Each package has one version, the oldest that pyproject.toml allows; pip refuses constraints with extras."""
    bounds = [Requirement(line) for line in noxfile.lower_bounds()]
    exact = {bound.name: str(bound.specifier) for bound in bounds if bound.specifier}
    assert len(exact) == sum(bool(bound.specifier) for bound in bounds)
    assert not any(bound.extras for bound in bounds)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for line in project["dependencies"]:
        requirement = Requirement(line)
        (oldest,) = [each.version for each in requirement.specifier if each.operator == ">="]
        assert exact[requirement.name] == f"=={oldest}"
        assert requirement.specifier.contains(oldest)
