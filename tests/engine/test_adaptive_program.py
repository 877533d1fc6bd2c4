"""A whole adaptation as one torch.export program, against reference loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metareg import MetaLearner, UsageError, hookimpl
from metareg.engine.adaptive_program import AdaptiveProgram, create_adaptive_program

SIZES = (5, 4)


class Descent:
    """Gradient descent that also reads the examples directly."""

    def __init__(self, look: Any) -> None:
        self._look = look

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor], task: Any) -> dict[str, Tensor]:
        rate = 0.1 * self._look(task.support_y)
        return {name: value - rate * grads[name] for name, value in params.items()}


def _export(learner: MetaLearner) -> AdaptiveProgram:
    meta = learner.plain_meta_parameters

    def predict(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        return learner.engine.predict(meta, (support_x, support_y, query_x, None), {}, 2, "support")

    return create_adaptive_program(predict, _draw, lambda: SIZES)


def _draw(support: int, query: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(support + 100 * query)
    x, y, query_x = (torch.randn(count, 2, generator=generator) for count in (support, support, query))
    return x, y[:, :1], query_x


def _learner(algorithm: Any, **options: Any) -> MetaLearner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    return MetaLearner(model, algorithm, loss="mse", inner_steps=2, **options)


def _descend_by_hand(learner: MetaLearner, x: Tensor, y: Tensor, query_x: Tensor, rate: float = 0.1) -> Tensor:
    w1, b1, w2, b2 = (value.clone().requires_grad_() for value in learner.plain_meta_parameters.values())

    def forward(x: Tensor) -> Tensor:
        return (x @ w1.T + b1).tanh() @ w2.T + b2

    for _ in range(2):
        grads = torch.autograd.grad((forward(x) - y).square().mean(), [w1, b1, w2, b2])
        w1, b1, w2, b2 = (value - rate * g for value, g in zip((w1, b1, w2, b2), grads, strict=True))
    return forward(query_x).detach()


def test_program_of_maml_is_the_loop_written_out() -> None:
    learner = _learner("maml", inner_lr=0.1)
    made = _export(learner)
    assert (made.support, made.query) == (None, None)
    run = made.program.module()
    for sizes in ((3, 8), (20, 1), (1, 1)):
        task = _draw(*sizes)
        torch.testing.assert_close(run(*task), _descend_by_hand(learner, *task), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(lambda y: sum(1.0 for _ in range(len(y))) / len(y), id="Python loop"),
        pytest.param(lambda y: 1.0 if len(y) < 40 else 3.0, id="course by size"),
    ],
)
def test_sizes_on_which_the_operations_depend_are_fixed(look: Any) -> None:
    learner = _learner(Descent(look))
    made = _export(learner)
    assert made.support == SIZES[0]
    task = _draw(SIZES[0], 9 if made.query is None else SIZES[1])
    torch.testing.assert_close(made.program.module()(*task), _descend_by_hand(learner, *task), rtol=0, atol=1e-5)


def test_course_that_depends_on_values_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be exported as one program") as refused:
        _export(_learner(Descent(lambda y: 1.0 if y.sum().item() > 0 else 2.0)))
    assert "\n" not in str(refused.value)
