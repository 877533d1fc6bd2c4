"""The collector of cyclic garbage during imports."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from metareg.util.imports import own_collector, pause_collector


@pytest.fixture(autouse=True)
def _restore_collector() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_the_collector_of_a_users_program_is_left_alone() -> None:
    with pause_collector():
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_commands_own_process_collects_again_after_its_imports_and_exempts_them() -> None:
    def fail_to_import() -> None:
        assert not gc.isenabled()
        imported.extend([] for _ in range(1000))
        raise ImportError

    own_collector()
    before, imported = gc.get_freeze_count(), list[list[int]]()
    with pytest.raises(ImportError), pause_collector():
        fail_to_import()
    assert gc.isenabled()
    assert gc.get_freeze_count() - before >= len(imported)
