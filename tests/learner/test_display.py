"""The progress of a training in a notebook and a terminal, and the representations of its results."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pictures
import pytest
import torch
from torch import nn

from metareg import Episodes, Evaluation, MetaLearner, hookimpl, train


def lines(split: str, indices: Any, seed: int) -> Episodes:
    """Tasks y = 2x."""
    del split, seed
    x = torch.linspace(-1, 1, 8).reshape(1, 8, 1).repeat(len(indices), 1, 1)
    return Episodes(x[:, ::2], 2 * x[:, ::2], x[:, 1::2], 2 * x[:, 1::2])


def create_learner() -> MetaLearner:
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    return MetaLearner(model, augment=["cml"], loss="mse", inner_lr=0.01, strategy="serial")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect everything that this process displays as a notebook's kernel."""
    shown: list[Any] = []

    def display(content: Any, **_: Any) -> SimpleNamespace:
        shown.append(content)
        return SimpleNamespace(update=shown.append)

    its_display = ModuleType("IPython.display")
    its_display.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", its_display)
    monkeypatch.setattr("metareg.learner.display.is_notebook", lambda: True)
    return shown


def test_fit_shows_itself_in_a_notebook_where_that_is_asked_for(shown: list[Any]) -> None:
    learner = create_learner()
    learner.fit(lines, 4, meta_batch=2, log_every=2)
    assert not shown
    learner.fit(lines, 4, meta_batch=2, log_every=2, eval_every=2, eval_tasks=2, progress=True)
    assert repr(shown[0]) == "preparing …"
    assert repr(shown[-1]).startswith("trained 8/8 · ")
    page = shown[-1]._repr_html_()
    assert '<progress value="8" max="8"' in page
    assert "<td>6</td>" in page
    assert "validation mse" in page
    assert "data:image/png;base64," in page


def test_what_ended_a_training_is_no_end_of_it(shown: list[Any]) -> None:
    class Full:
        @hookimpl
        def on_step(self, step: int) -> None:
            raise OSError(f"no disk at {step}")

    with pytest.raises(Exception, match="no disk at 2"):
        create_learner().fit(lines, 4, meta_batch=2, log_every=2, observers=[Full()], progress=True)
    assert repr(shown[-1]).startswith("stopped after 2/4")


def test_a_run_shows_itself_in_a_notebook_and_has_its_table_and_curve(shown: list[Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 4, "log_every": 2, "test_tasks": 3, "eval_tasks": 2, "test_inner_steps": [0, 1]}
    with pictures.drawn():
        run = train(out=tmp_path / "run", strategy="serial", **options)
    assert repr(shown[-1]).startswith("trained 4/4")
    assert "maml on sinusoid, seed 0" in shown[-1]._repr_html_()
    assert run.evaluation is not None
    assert repr(run) == f"<Run at {run.path}: maml on sinusoid, seed 0; {run.evaluation}>"
    page = run._repr_html_()
    assert f"<td>{run.evaluation.mean(1):.4g} ±" in page
    assert "data:image/png;base64," in page


def test_fit_prints_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    create_learner().fit(lines, 4, meta_batch=2, log_every=2, eval_every=4, eval_tasks=2, progress=True)
    printed = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "step 2: loss " in printed
    assert "step 4: validation mse " in printed


def test_representations_are_a_line_each() -> None:
    learner = create_learner().fit(lines, 2, meta_batch=2)
    assert repr(learner) == (
        "<MetaLearner: maml + cml on Sequential (13 parameters), metric mse, 1 inner step, 2 training steps done>"
    )
    assert repr(lines("train", [0], 0)) == (
        "<Episodes: 1 task; support [4, 1] float32 → [4, 1] float32, query [4, 1] float32 → [4, 1] float32>"
    )
    evaluation = Evaluation("accuracy", True, (0, 5), torch.tensor([[0.25, 0.5], [0.25, 1.0]]), "none")
    assert repr(evaluation).startswith("<Evaluation: accuracy over 2 tasks after inner steps 0: 0.25 ± 0, 5: 0.75 ± ")
    assert "higher is better" in evaluation._repr_html_()
