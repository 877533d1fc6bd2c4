"""metareg's conformance kit, one test for each check that applies, and that it trains beside CML."""

from pathlib import Path

import pytest

import metareg
from metareg.testing import Check, checks


@pytest.mark.parametrize("check", checks("algorithms", "reptile"), ids=str)
def test_conformance(check: Check) -> None:
    check()


def test_trains_with_cml(tmp_path: Path) -> None:
    run = metareg.train("reptile", "cml", "sinusoid", out=tmp_path / "run", steps=20, inner_steps=2, test_tasks=10)
    assert run.evaluation is not None
    assert run.evaluation.tasks == 10


def test_its_own_settings_stand_before_the_tasks(tmp_path: Path) -> None:
    run = metareg.train("reptile", task="sinusoid", out=tmp_path / "run", steps=2, test_tasks=10)
    assert (run.config.inner_steps, run.config.algo.config) == (10, {"inner_lr": 0.02})
