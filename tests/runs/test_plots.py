"""Plots that cannot be drawn, and when matplotlib is imported for them."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pictures
import pytest
import torch
from rich.console import Console

import metareg
from metareg import hookimpl
from metareg.cli.tables import create_evaluation_table
from metareg.runs.plots import plot_inner_steps
from metareg_regression import Sinusoid


def test_only_plots_import_matplotlib() -> None:
    modules = "metareg.runs.training, metareg_image, metareg_regression, metareg_table"
    code = f"import sys, {modules}; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


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
    options = {"steps": 2, "eval_tasks": 2, "test_tasks": 2, "test_inner_steps": [1], "strategy": "serial"}
    with pictures.drawn():
        run = metareg.train("maml", task=Unpictured(Sinusoid.Config()), out=tmp_path / "run", **options)
    assert run.evaluation is not None
    assert (tmp_path / "run" / "results.json").is_file()
    assert [path.name for path in run.plots] == ["inner-steps.png"]
    assert "no fonts" in caplog.text
    assert "no display" in caplog.text


def test_a_test_that_diverged_says_so_and_stays_in_the_plot() -> None:
    scores = torch.tensor([[1.0, 2.0, float("inf")], [1.5, 2.5, 3.0]])
    evaluation = metareg.Evaluation("mse", False, (0, 1, 5), scores, "none")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(create_evaluation_table(evaluation))
    table = console.export_text()
    assert "inf" not in table.replace("finite", "")
    assert "nan" not in table
    assert re.search(r"5 │ +diverged", table)
    assert "1 of 2 tasks" in table
    assert "5: diverged on 1 of 2 tasks" in str(evaluation)
    (axes,) = plot_inner_steps(evaluation, "a run").axes
    (crosses,) = [line for line in axes.lines if line.get_label() == "diverged"]
    assert list(crosses.get_xdata()) == [5]
    assert list(axes.get_xticks()) == [0, 1, 5]
