"""PCGrad and CVaR against reference loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from augmented import Augmenter, check_augmenter
from torch import Tensor

from metareg import MetaLearner
from metareg_cvar import CVaR
from metareg_pcgrad import PCGrad
from reference import Tensors, difference
from samples import LOSSES, MODELS, episodes


def project(grads: Sequence[Tensors], _: Tensor) -> Tensors:
    """Algorithm 1: each task in turn against the others."""
    flat = [torch.cat([value.flatten() for value in each.values()]) for each in grads]
    total = torch.zeros_like(flat[0])
    for i, own in enumerate(flat):
        for j in (*range(i + 1, len(flat)), *range(i)):
            product = own @ flat[j]
            if product < 0:
                own = own - product / (flat[j] @ flat[j]) * flat[j]
        total = total + own / len(flat)
    shapes = {name: value.shape for name, value in grads[0].items()}
    parts = total.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def take_two_worst(grads: Sequence[Tensors], losses: Tensor) -> Tensors:
    _, *worst = sorted(range(3), key=lambda task: losses[task].item())
    return {name: (grads[worst[0]][name] + grads[worst[1]][name]) / 2 for name in grads[0]}


@pytest.mark.parametrize(
    ("name", "config", "combine"), [("pcgrad", {}, project), ("cvar", {"level": 0.4}, take_two_worst)]
)
@pytest.mark.parametrize(
    ("net", "options"),
    [
        ("mlp", {"cml": True}),
        ("mlp", {"cml": True, "strategy": "serial"}),
        ("mlp", {"strategy": "vectorized", "chunk": 2}),
        ("conv", {}),
    ],
)
def test_trainings_equal_the_loop(
    name: str, config: dict[str, Any], combine: Callable[..., Tensors], net: str, options: dict[str, Any]
) -> None:
    check_augmenter(net, name, config, Augmenter(combine=combine), **options)


def test_only_gradients_that_conflict_are_changed() -> None:
    """Copies of one task do not conflict; random tasks do."""
    one, drawn = episodes("mlp", 1), episodes("mlp", 3, seed=20)
    copies = type(one)(*(part.repeat(3, *[1] * (part.dim() - 1)) for part in one.parts))
    for batch, conflict in ((copies, False), (drawn, True)):
        plain, surgery = (
            MetaLearner(MODELS["mlp"](), "maml", augment, loss=LOSSES["mlp"]).meta_gradient(batch)[1]
            for augment in ([], ["pcgrad"])
        )
        assert (difference(surgery, plain) > 1e-3) == conflict


def test_projections_in_numbers() -> None:
    """(1, 0) and (−1, 1) conflict: each loses its part along the other. Scalar meta-parameters also count."""
    grads = {"scalar": torch.tensor([1.0, -1.0]), "vector": torch.tensor([[0.0], [1.0]])}
    combined = PCGrad(PCGrad.Config()).combine_tasks(grads)
    assert combined["scalar"].item() == pytest.approx((0.5 + 0) / 2)
    assert combined["vector"].tolist() == pytest.approx([(0.5 + 1) / 2])


@pytest.mark.parametrize(("level", "tasks", "kept"), [(0.7, 10, 3), (0.5, 5, 3), (0.99, 4, 1), (0, 4, 4)])
def test_cvar_keeps_the_worst_share(level: float, tasks: int, kept: int) -> None:
    losses = torch.arange(float(tasks)).flip(0)
    combined = CVaR(CVaR.Config(level=level)).combine_tasks({"w": losses[:, None]}, losses)
    assert combined["w"].item() == pytest.approx(losses[:kept].mean().item())
