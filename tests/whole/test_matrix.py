"""The matrix of algorithms, augmenters and tasks: its cells, and the reasons below the table."""

from __future__ import annotations

import pytest

import matrix
import metareg


def test_cells_train_are_refused_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {
        ("maml", "cml", "sinusoid"): matrix.train("maml", "cml", "sinusoid"),
        ("protonet", "cml", "sinusoid"): matrix.train("protonet", "cml", "sinusoid"),
    }
    monkeypatch.setattr(metareg, "train", lambda *_, **__: 1 / 0)
    outcomes["maml", "none", "sinusoid"] = matrix.train("maml", "none", "sinusoid")
    outcomes["protonet", "none", "sinusoid"] = matrix.Outcome("refused", outcomes["protonet", "cml", "sinusoid"].reason)
    assert [outcome.result for outcome in outcomes.values()] == ["✓", "refused", "✗", "refused"]
    lines = matrix.format_table(outcomes, ["maml", "protonet"], ["none", "cml"], ["sinusoid"]).splitlines()
    assert [line.split() for line in lines[:3]] == [["none", "cml"], ["maml", "✗1", "✓"], ["protonet", "2", "2"]]
    assert "ZeroDivisionError" in lines[-2]
    assert "classes" in lines[-1]


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["maml", "nosuch"])
    assert "nosuch" in capsys.readouterr().err
