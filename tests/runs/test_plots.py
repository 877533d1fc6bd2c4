"""Pictures of a run that cannot be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

import metareg
from metareg import hookimpl
from metareg_regression import Sinusoid


def test_a_picture_that_fails_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    class Unpictured(Sinusoid):
        @hookimpl
        def figures(self) -> None:
            raise OSError("no display")

    monkeypatch.setattr("metareg.runs.plots.plot_learning_curve", fail)
    options = {"steps": 2, "eval_tasks": 2, "test_tasks": 2, "test_inner_steps": [1]}
    run = metareg.train("maml", task=Unpictured(Sinusoid.Config()), out=tmp_path / "run", **options)
    assert run.evaluation is not None
    assert (tmp_path / "run" / "results.json").is_file()
    assert [path.name for path in run.plots] == ["inner-steps.png"]
    assert "no fonts" in caplog.text
    assert "no display" in caplog.text
