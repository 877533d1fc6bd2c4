"""Clipping against a reference loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from augmented import Augmenter, adapt_plainly, check_augmenter, norm
from family import support_gradient

from reference import Net, Task, Tensors

INNER, OUTER = 0.3, 0.05
"""Norms that some gradients of the trainings exceed and others do not."""


def clip(grads: Tensors, largest: float) -> Tensors:
    scale = torch.minimum(torch.ones((), dtype=torch.float64), largest / norm(grads))
    return {name: value * scale for name, value in grads.items()}


def clipped_gradient(net: Net, params: Tensors, names: list[str], task: Task) -> Tensors:
    return clip(support_gradient(net, params, names, task), INNER)


def change(_meta: Tensors, grads: Tensors, _gradient_at: Any) -> Tensors:
    return clip(grads, OUTER)


@pytest.mark.parametrize(("net", "cml"), [("mlp", True), ("conv", False)])
def test_inner_gradients_are_clipped_in_evaluation_too(net: str, cml: bool) -> None:
    written = Augmenter(adapt=partial(adapt_plainly, gradient=clipped_gradient), stays=True)
    check_augmenter(net, "clip", {"max_norm": INNER, "where": "inner"}, written, cml=cml)


@pytest.mark.parametrize(("net", "strategy"), [("mlp", "vectorized"), ("mlp", "serial"), ("conv", "vectorized")])
def test_meta_gradients_are_clipped(net: str, strategy: str) -> None:
    config = {"max_norm": OUTER, "where": "outer"}
    check_augmenter(net, "clip", config, Augmenter(change=change), cml=net == "mlp", strategy=strategy)
