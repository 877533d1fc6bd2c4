"""Trainings with every outer optimiser and schedule against loops over torch's own; options that are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
from learners import SignMAML
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR, StepLR

from metareg import Episodes, MetaLearner, UsageError, hookimpl
from metareg.util.native import find_compiler
from reference import NETS, difference, meta_gradient
from samples import MLP, episodes, tasks_of

STEPS, INNER_LR, GAMMA, LR = 7, 0.1, 0.5, 0.02
TENSORS = dict[str, Tensor]


class Case(NamedTuple):
    """The learner's options, and their equivalents in torch."""

    options: Mapping[str, Any]
    optimizer: Callable[..., Optimizer]
    schedule: Callable[[Optimizer], LRScheduler] | None = None


def cosine_after_warmup(optimizer: Optimizer) -> LRScheduler:
    parts = [LinearLR(optimizer, start_factor=1 / 3, total_iters=2), CosineAnnealingLR(optimizer, T_max=5)]
    return SequentialLR(optimizer, parts, milestones=[2])


CASES = {
    "adam": Case({"outer_betas": [0.7, 0.9]}, lambda groups: Adam(groups, betas=(0.7, 0.9))),
    "adam with decay": Case({"outer_weight_decay": 0.1}, lambda groups: Adam(groups, weight_decay=0.1)),
    "adamw, cosine": Case(
        {"outer_optimizer": "adamw", "lr_schedule": "cosine", "lr_schedule_steps": 7, "lr_warmup_steps": 2},
        AdamW, cosine_after_warmup,
    ),
    "radam, constant after warm-up": Case(
        {"outer_optimizer": "radam", "lr_warmup_steps": 3, "outer_weight_decay": 0.2},
        lambda groups: RAdam(groups, weight_decay=0.2),
        lambda optimizer: LinearLR(optimizer, start_factor=1 / 4, total_iters=3),
    ),
    "rmsprop, step": Case(
        {"outer_optimizer": "rmsprop", "outer_momentum": 0.8, "lr_schedule": "step", "lr_step_size": 3},
        lambda groups: RMSprop(groups, momentum=0.8), lambda optimizer: StepLR(optimizer, 3),
    ),
    "sgd, multistep": Case(
        {"outer_optimizer": "sgd", "outer_momentum": 0.9, "outer_nesterov": True, "outer_weight_decay": 0.3,
         "lr_schedule": "multistep", "lr_milestones": [2, 5], "lr_gamma": 0.5},
        lambda groups: SGD(groups, momentum=0.9, nesterov=True, weight_decay=0.3),
        lambda optimizer: MultiStepLR(optimizer, [2, 5], 0.5),
    ),
    "plain sgd, cosine": Case(
        {"outer_optimizer": "sgd", "lr_schedule": "cosine", "lr_schedule_steps": 8}, SGD,
        lambda optimizer: CosineAnnealingLR(optimizer, 8),
    ),
}  # fmt: skip
BATCHES = [episodes("mlp", 3, seed=number) for number in range(STEPS)]


def new_learner(case: Case, strategy: str = "serial") -> MetaLearner:
    return MetaLearner(
        MLP(), "metasgd", [("cml", {"gamma": GAMMA})], loss="mse", inner_lr=INNER_LR, inner_steps=2, outer_lr=LR,
        strategy=strategy, **case.options,
    )  # fmt: skip


def in_another_order(batch: Episodes) -> Episodes:
    """The same tasks, contiguous by example; a compiled program takes them in this layout."""
    return Episodes(*(part.transpose(0, 1).contiguous().transpose(0, 1) for part in batch.parts))


def train_by_torch(case: Case, start: TENSORS) -> TENSORS:
    """Run a loop over torch's optimiser and scheduler, with decay for the model's own parameters only."""
    meta = {name: value.clone() for name, value in start.items()}
    own = [value for name, value in meta.items() if name.startswith(("body", "head"))]
    learned = [value for name, value in meta.items() if not name.startswith(("body", "head"))]
    assert own
    assert learned
    optimizer = case.optimizer([{"params": own, "lr": LR}, {"params": learned, "lr": LR, "weight_decay": 0}])
    schedule = case.schedule(optimizer) if case.schedule else None
    for batch in BATCHES:
        _, grads = meta_gradient(
            NETS["mlp"], meta, tasks_of(batch), algo="metasgd", inner_lr=INNER_LR, inner_steps=2, gamma=GAMMA
        )
        for name, value in meta.items():
            value.grad = grads[name]
        optimizer.step()
        if schedule:
            schedule.step()
    return meta


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        *((name, "vectorized") for name in CASES),
        *(("sgd, multistep", each) for each in ("serial", "traced", "compiled")),
    ],
)
def test_a_training_ends_where_torch_ends(name: str, strategy: str) -> None:
    if strategy == "compiled" and find_compiler() is None:
        pytest.skip("there is no compiler")
    learner = new_learner(CASES[name], strategy)
    start = copy.deepcopy(learner.meta_parameters)
    for number, batch in enumerate(BATCHES):
        learner.step(in_another_order(batch) if strategy == "compiled" and number % 2 else batch)
    assert difference(learner.meta_parameters, train_by_torch(CASES[name], start)) < 1e-9


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, "state") for name in CASES), *(("sgd, multistep", each) for each in ("deepcopy", "pickle"))],
)
def test_a_training_that_goes_on_has_the_same_bits(name: str, way: str) -> None:
    whole, part = new_learner(CASES[name]), new_learner(CASES[name])
    for batch in BATCHES:
        whole.step(batch)
    for batch in BATCHES[:4]:
        part.step(batch)
    if way == "state":
        again = new_learner(CASES[name])
        again.load_state(copy.deepcopy(part.state()))
    else:
        again = copy.deepcopy(part) if way == "deepcopy" else pickle.loads(pickle.dumps(part))
    for batch in BATCHES[4:]:
        again.step(batch)
    assert all(value.equal(whole.meta_parameters[name]) for name, value in again.meta_parameters.items())
    assert all(value.grad is None for value in again.meta_parameters.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"outer_optimizer": "adamV"}, ["adamV", "'adamw'"]),
        ({"outer_momentum": 0.9}, ["outer_momentum", "rmsprop or sgd", "adam"]),
        ({"outer_optimizer": "sgd", "outer_betas": [0.9, 0.9]}, ["outer_betas", "sgd", "adamw"]),
        ({"outer_optimizer": "sgd", "outer_nesterov": True}, ["outer_nesterov", "outer_momentum"]),
        ({"outer_optimizer": "sgd", "outer_momentum": 1.0}, ["outer_momentum", "less than 1"]),
        ({"outer_weight_decay": -1}, ["outer_weight_decay"]),
        ({"outer_wieght_decay": 1}, ["outer_wieght_decay", "'outer_weight_decay'"]),
        ({"lr_schedule": "cosin"}, ["cosin", "'cosine'"]),
        ({"lr_schedule": "cosine"}, ["lr_schedule_steps"]),
        ({"lr_schedule": "step"}, ["lr_step_size"]),
        ({"lr_schedule": "multistep", "lr_milestones": [5, 2]}, ["lr_milestones", "ascend"]),
        ({"lr_gamma": 0.5}, ["lr_gamma", "step or multistep", "constant"]),
        (
            {"lr_schedule": "cosine", "lr_schedule_steps": 5, "lr_warmup_steps": 5},
            ["lr_warmup_steps", "lr_schedule_steps"],
        ),
        ({"lr_schedule": "step", "lr_step_size": 5, "lr_warmup_steps": 5}, ["lr_warmup_steps", "lr_step_size"]),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        MetaLearner(MLP(), **options)
    assert [word for word in words if word not in str(caught.value)] == []


def test_more_steps_than_the_schedule_has_are_refused() -> None:
    learner = MetaLearner(MLP(), loss="mse", lr_schedule="cosine", lr_schedule_steps=4)
    with pytest.raises(UsageError, match="ends at step 4"):
        learner.fit("sinusoid", steps=5)
    assert learner.steps_done == 0


class OwnUpdate(SignMAML):
    """An algorithm with its own outer update."""

    @hookimpl
    def outer_update(self, meta: TENSORS, grads: TENSORS, state: TENSORS) -> tuple[TENSORS, TENSORS]:
        return {name: value - grads[name] for name, value in meta.items()}, state


def test_options_beside_an_outer_update_are_said_to_be_idle(caplog: pytest.LogCaptureFixture) -> None:
    MetaLearner(MLP(), OwnUpdate, loss="mse", outer_optimizer="sgd", lr_warmup_steps=3)
    assert "outer_optimizer = sgd has no effect" in caplog.text
    assert "lr_warmup_steps = 3 has no effect" in caplog.text
    caplog.clear()
    MetaLearner(MLP(), SignMAML, loss="mse", outer_optimizer="sgd", lr_warmup_steps=3)
    assert "no effect" not in caplog.text
