"""Normalisation layers under second derivatives: every strategy against serial, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metareg import Episodes, MetaLearner

LAYERS = {
    "batch": lambda: nn.BatchNorm2d(3),
    "instance": lambda: nn.InstanceNorm2d(3, affine=True),
    "layer": lambda: nn.LayerNorm(4),
    "group": lambda: nn.GroupNorm(1, 3),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_vectorized_gradient_is_the_serial_one(layer: str) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), LAYERS[layer](), nn.Tanh())
    model = nn.Sequential(body, nn.Sequential(nn.Flatten(), nn.Linear(48, 2))).double()
    x = torch.randn(2, 3, 4, 1, 4, 4, dtype=torch.float64)
    y = torch.arange(4).remainder(2).expand(3, 4)
    episodes = Episodes(x[0], y, x[1], y)

    def gradient(strategy: str) -> torch.Tensor:
        learner = MetaLearner(model, inner_lr=0.1, inner_steps=2, strategy=strategy)
        _, grads = learner.meta_gradient(episodes)
        return torch.cat([value.flatten() for value in grads.values()])

    torch.testing.assert_close(gradient("vectorized"), gradient("serial"), rtol=1e-9, atol=1e-12)
