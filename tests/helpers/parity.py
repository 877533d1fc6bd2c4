"""Compares meta-gradients of MAML and its variants with reference loops, on small networks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from metareg import Episodes, MetaLearner
from reference import NETS, difference, meta_gradient
from samples import LOSSES, MODELS, episodes, tasks_of

TOLERANCE = 1e-6
INNER_LR = {"mlp": 0.1, "conv": 0.4}
GAMMA = 0.7
ALGORITHMS = ("maml", "anil", "boil", "metasgd")


def learner_of(net: str, algo: str, augment: Any = (), **options: Any) -> MetaLearner:
    """Create a learner; Meta-SGD's step sizes are random, so that they all differ."""
    algo_options: dict[str, Any] = {"inner_lr": INNER_LR[net]}
    if algo == "metasgd":
        algo_options["inner_lr_max"] = 2 * INNER_LR[net]
    options = {"strategy": "vectorized", "loss": LOSSES[net], "seed": 5} | options
    return MetaLearner(MODELS[net](), algo, augment, algo_config=algo_options, **options)


def initialized(learner: MetaLearner, batch: Episodes) -> dict[str, Tensor]:
    learner.initialize(batch.support_x[0])
    return learner.meta_parameters


@cache
def expected(
    net: str, algo: str, augment: str, inner_steps: int, first_order: bool = False, bn_statistics: str = "transductive"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the reference loop's result, computed once for all strategies."""
    batch = episodes(net)
    learner = learner_of(net, algo, [("cml", {"gamma": GAMMA})] if augment == "cml" else [])
    return meta_gradient(
        NETS[net],
        initialized(learner, batch),
        tasks_of(batch),
        algo=algo,
        inner_lr=INNER_LR[net],
        inner_steps=inner_steps,
        gamma=GAMMA if augment == "cml" else None,
        first_order=first_order,
        bn_statistics=bn_statistics,
    )


def check(net: str, algo: str, augment: str, inner_steps: int, calls: int = 1, **options: Any) -> None:
    """Compare metareg with the loop; if vectorized, a second call runs the traced graph."""
    batch = episodes(net)
    learner = learner_of(
        net, algo, [("cml", {"gamma": GAMMA})] if augment == "cml" else [], inner_steps=inner_steps, **options
    )
    policy = {name: value for name, value in options.items() if name in ("first_order", "bn_statistics")}
    expected_loss, expected_grads = expected(net, algo, augment, inner_steps, **policy)
    for _ in range(calls):
        loss, grads = learner.meta_gradient(batch)
        torch.testing.assert_close(loss, expected_loss, rtol=TOLERANCE, atol=0)
        assert difference(grads, expected_grads) < TOLERANCE
