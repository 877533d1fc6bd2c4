"""Sharp-MAML against a reference loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from augmented import Augmenter, adapt_plainly, check_augmenter, norm
from family import support_gradient

from metareg import Episodes, MetaLearner
from reference import Net, Task, Tensors
from samples import MODELS

RHO = 0.3


def climb(params: Tensors, grads: Tensors) -> Tensors:
    return {name: value + RHO * grads[name] / norm(grads) for name, value in params.items()}


def sharp_gradient(net: Net, params: Tensors, names: list[str], task: Task) -> Tensors:
    return support_gradient(net, climb(params, support_gradient(net, params, names, task)), names, task)


adapt_sharply = partial(adapt_plainly, gradient=sharp_gradient)


def change(meta: Tensors, grads: Tensors, gradient_at: Callable[[Tensors], Tensors]) -> Tensors:
    return gradient_at(climb(meta, grads))


WRITTEN = {
    "lower": Augmenter(adapt=adapt_sharply, stays=True),
    "upper": Augmenter(change=change),
    "both": Augmenter(adapt=adapt_sharply, change=change, stays=True),
}


@pytest.mark.parametrize("where", WRITTEN)
@pytest.mark.parametrize(("net", "cml"), [("mlp", True), ("conv", False)])
def test_trainings_equal_the_loop(net: str, cml: bool, where: str) -> None:
    check_augmenter(net, "sharp", {"rho": RHO, "where": where}, WRITTEN[where], cml=cml)


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "serial", "memory": "recompute"},
        {"strategy": "traced"},
        pytest.param({"strategy": "compiled"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_strategy(options: dict[str, Any]) -> None:
    check_augmenter("mlp", "sharp", {"rho": RHO}, WRITTEN["both"], cml=True, **options)


def test_a_gradient_of_zero_has_nowhere_to_climb() -> None:
    """If the derivative of the norm were infinite there, the meta-gradient would be NaN."""
    learner = MetaLearner(MODELS["mlp"](), "maml", ["sharp"], loss=lambda outputs, _: 0 * outputs.mean())
    x, y = torch.ones(4, 2, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)
    _, grads = learner.meta_gradient(Episodes(x[None], y[None], x[None], y[None]))
    assert all(value.eq(0).all() for value in grads.values())
