"""Every shipped plugin passes the conformance kit, and so does every installed one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from metareg.errors import MetaregError
from metareg.registry.plugins import Entry, list_entries, resolve
from metareg.testing import NOT_APPLICABLE, Check, Combination, checks, combinations
from metareg.util.native import find_compiler

# The parity tests compare the strategies for the shipped plugins, the matrix for all plugins.
_SLOW = pytest.mark.slow


def _is_slow(check: Check) -> bool:
    return check.name in ("strategies", "whole-steps", "determinism") or (check.subject.kind, check.name) == (
        "models",
        "trains",
    )


def _marks(check: Check) -> list[pytest.MarkDecorator]:
    # mlflow uses deprecated parts of its own dependencies.
    ignored = (
        [pytest.mark.filterwarnings("ignore::DeprecationWarning")]
        if str(check.subject.plugin).endswith(":mlflow")
        else []
    )
    return [*ignored, _SLOW] if _is_slow(check) else ignored


def _needs_data(entry: Entry) -> bool:
    return entry.kind == "tasks" and "data" in entry.load().Config.model_fields


def _lacks_package(entry: Entry) -> bool:
    """Return whether an observer's tracker is missing; its package has the observer's name."""
    return entry.kind == "observers" and entry.name in ("mlflow", "wandb") and find_spec(entry.name) is None


def _checks(*, with_data: bool) -> list[object]:
    return [
        pytest.param(check, id=f"{entry.kind}-{entry.name}-{check}", marks=_marks(check))
        for entry in list_entries()
        if _needs_data(entry) == with_data and not _lacks_package(entry)
        for check in checks(entry.kind, entry.qualified)
        if check.name != "composition"  # the combinations below
    ]


@pytest.mark.parametrize("check", _checks(with_data=False))
def test_plugin(check: Check) -> None:
    check()


@pytest.mark.slow
@pytest.mark.parametrize("check", _checks(with_data=True))
def test_task_with_data(check: Check, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREG_DATA", str(data_folder))
    try:
        check.subject.resolve().instance.episodes("train", [0], 0)
    except MetaregError as error:
        pytest.skip(str(error))
    check()


@pytest.mark.slow
@pytest.mark.parametrize("combination", combinations(), ids=str)
def test_combination(combination: Combination) -> None:
    found = combination.check()
    assert [problem for problem in found.values() if problem not in (None, NOT_APPLICABLE)] == []


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_compiled() -> None:
    name = list_entries("algorithms")[0].name
    (check,) = [each for each in checks("algorithms", name, compiled=True) if each.name == "compiled"]
    check()


def test_every_shipped_plugin_states_its_contract() -> None:
    shipped = [entry for entry in list_entries() if entry.distribution == "metareg"]
    assert shipped
    assert [entry.name for entry in shipped if not hasattr(entry.load(), "contract")] == []


def test_config_reaches_the_checks() -> None:
    assert resolve("augmenters", "dropgrad", {"rate": 0.5}).config.rate == 0.5
    assert checks("augmenters", "dropgrad", {"rate": 0.5})[0].subject.resolve().config.rate == 0.5
