"""metareg's conformance kit, one test for each check that applies, and short trainings."""

from pathlib import Path

import pytest
import torch
from metareg_signmaml import SignMAML
from torch import nn

import metareg
from metareg import Episodes, MetaLearner
from metareg.testing import Check, checks


@pytest.mark.parametrize("check", checks("algorithms", "signmaml"), ids=str)
def test_conformance(check: Check) -> None:
    check()


def test_meta_gradient_is_that_of_the_query_loss_at_the_adapted_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    tasks = Episodes(*(torch.randn(1, 5, size).double() for size in (2, 1, 2, 1)))
    learner = MetaLearner(model, SignMAML, loss="mse", inner_steps=3, inner_lr=0.1)
    adapted = learner.adapt(tasks.support_x[0], tasks.support_y[0])
    loss = nn.functional.mse_loss(adapted(tasks.query_x[0]), tasks.query_y[0])
    expected = torch.autograd.grad(loss, list(adapted.parameters()))
    _, grads = learner.meta_gradient(tasks)
    for (name, _), gradient in zip(adapted.named_parameters(), expected, strict=True):
        torch.testing.assert_close(grads[name], gradient)


def test_trains_with_cml(tmp_path: Path) -> None:
    run = metareg.train("signmaml", "cml", "sinusoid", out=tmp_path / "run", steps=20, inner_steps=2, test_tasks=10)
    assert run.evaluation is not None
    assert run.evaluation.tasks == 10
