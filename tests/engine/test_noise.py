"""Noise belongs to a task's number, whichever tasks are drawn beside it, and comes as the parameters are."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from metareg import MetaLearner
from samples import MLP


def test_a_tasks_noise_depends_on_its_number_and_the_step() -> None:
    learner = MetaLearner(MLP(), augment=["dropgrad"], loss="mse")
    params = learner.plain_meta_parameters
    every, some, later = (
        [learner.stages.draw_noise("task", params, 2, 0, step, task) for task in tasks]
        for step, tasks in ((0, range(5)), (0, range(2, 4)), (1, range(5)))
    )
    flat = [
        [torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(each)]) for each in drawn] for drawn in (every, some)
    ]
    assert all(one.equal(other) for one, other in zip(flat[0][2:4], flat[1], strict=True))
    assert not flat[0][2].equal(flat[0][3])
    assert not torch.cat(flat[0]).equal(torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(later)]))


def test_noise_has_the_type_of_the_parameters() -> None:
    learner = MetaLearner(MLP(), augment=[("gradient-noise", {"where": "outer"})], loss="mse")
    for dtype in (torch.float32, torch.float64):
        params = {name: value.to(dtype) for name, value in learner.meta_parameters.items()}
        leaves = pytree.tree_leaves(learner.stages.draw_noise("batch", params, 1, 0, 0))
        assert leaves
        assert all(leaf.dtype == dtype for leaf in leaves)


def test_who_draws_nothing_has_none() -> None:
    stages = MetaLearner(MLP(), augment=["cml"], loss="mse").stages
    assert not stages.draws_noise
    assert stages.draw_noise("task", {}, 1, 0, 0, 0) == {}
