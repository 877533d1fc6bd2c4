"""The comparison of test_parity must be able to fail: it has to detect each of these broken algorithms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metareg import MetaLearner, hookimpl
from metareg_anil import ANIL
from metareg_boil import BOIL
from metareg_cml import CML
from metareg_maml import MAML
from metareg_metasgd import MetaSGD
from parity import GAMMA, INNER_LR, TOLERANCE
from reference import NETS, difference, meta_gradient
from samples import LOSSES, MODELS, episodes, tasks_of

Tensors = dict[str, Tensor]


class FirstOrder(MAML):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value - self.config.inner_lr * grads[name].detach() for name, value in params.items()}


class Halved(MAML):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value - self.config.inner_lr / 2 * grads[name] for name, value in params.items()}


class WrongSign(MAML):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value + self.config.inner_lr * grads[name] for name, value in params.items()}


class NoStep(MAML):
    @hookimpl
    def inner_update(self, params: Tensors) -> Tensors:
        return params


class LastStepMissing(MAML):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, step: int) -> Tensors:
        return params if step == 1 else super().inner_update(params, grads)


class CutOff(MAML):
    """Detaches the parameters, and keeps only the path through the gradient."""

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value.detach() - self.config.inner_lr * grads[name] for name, value in params.items()}


class BiasesStay(MAML):
    @hookimpl
    def adapted_parameters(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if not name.endswith("bias")]


class DetachedStepSize(MetaSGD):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, meta: Tensors) -> Tensors:
        return {name: value - meta[f"step_size.{name}"].detach() * grads[name] for name, value in params.items()}


class OneStepSize(MetaSGD):
    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, meta: Tensors) -> Tensors:
        return {name: value - meta[f"step_size.{name}"].mean() * grads[name] for name, value in params.items()}


class AnilMovesBody(ANIL):
    @hookimpl
    def adapted_parameters(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names


class BoilMovesHead(BOIL):
    @hookimpl
    def adapted_parameters(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names


class WithoutBody(CML):
    """Does not propagate the co-learner's loss to the body: no gradient augmentation."""

    @hookimpl
    def augment_outer_loss(self, features: Tensor, targets: Tensor, meta: Tensors, loss: Any, metric: Any) -> Any:
        return super().augment_outer_loss(features.detach(), targets, meta, loss, metric)


class FrozenCoLearner(CML):
    @hookimpl
    def augment_outer_loss(self, features: Tensor, targets: Tensor, meta: Tensors, loss: Any, metric: Any) -> Any:
        meta = {name: value.detach() for name, value in meta.items()}
        return super().augment_outer_loss(features, targets, meta, loss, metric)


class AdaptedCoLearner(CML):
    """Gives the co-learner its own gradient step before it is used."""

    @hookimpl
    def augment_outer_loss(self, features: Tensor, targets: Tensor, meta: Tensors, loss: Any, metric: Any) -> Any:
        def own(meta: Tensors) -> Tensor:
            return super(AdaptedCoLearner, self).augment_outer_loss(features, targets, meta, loss, metric)[0]

        grads = torch.func.grad(own)(meta)
        adapted = {name: value - 0.1 * grads[name] for name, value in meta.items()}
        return super().augment_outer_loss(features, targets, adapted, loss, metric)


def compare(net: str, algo: str, algorithm: type, augmenter: type | None, **options: Any) -> float:
    batch = episodes(net)
    config: dict[str, Any] = {"inner_lr": INNER_LR[net]}
    if algo == "metasgd":
        config["inner_lr_max"] = 2 * INNER_LR[net]
    # A plugin's name is the prefix of its meta-parameters.
    named: Any = type(algorithm.__name__, (algorithm,), {"name": algo})
    augment = [] if augmenter is None else [(type("CML", (augmenter,), {"name": "cml"}), {"gamma": GAMMA})]
    learner = MetaLearner(
        MODELS[net](), named, augment, loss=LOSSES[net], inner_steps=2, strategy="serial", algo_config=config, **options
    )
    learner.initialize(batch.support_x[0])
    _, expected = meta_gradient(
        NETS[net], learner.meta_parameters, tasks_of(batch), algo=algo, inner_lr=INNER_LR[net], inner_steps=2,
        gamma=None if augmenter is None else GAMMA,
    )  # fmt: skip
    return difference(learner.meta_gradient(batch)[1], expected)


SOUND = [("maml", MAML, CML), ("anil", ANIL, CML), ("boil", BOIL, CML), ("metasgd", MetaSGD, CML)]
BROKEN = [
    *(("maml", each, None) for each in (FirstOrder, Halved, WrongSign, NoStep, LastStepMissing, CutOff, BiasesStay)),
    *(("metasgd", each, None) for each in (DetachedStepSize, OneStepSize)),
    ("anil", AnilMovesBody, None),
    ("boil", BoilMovesHead, None),
    *(("maml", MAML, each) for each in (WithoutBody, FrozenCoLearner, AdaptedCoLearner)),
]


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize(("algo", "algorithm", "augmenter"), SOUND)
def test_sound_ones_pass(net: str, algo: str, algorithm: type, augmenter: type) -> None:
    assert compare(net, algo, algorithm, augmenter) < TOLERANCE


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize(("algo", "algorithm", "augmenter"), BROKEN)
def test_broken_ones_are_caught(net: str, algo: str, algorithm: type, augmenter: type | None) -> None:
    """The differences are large: no reasonable tolerance would hide them."""
    assert compare(net, algo, algorithm, augmenter) > 1000 * TOLERANCE


@pytest.mark.parametrize("option", [{"first_order": True}, {"bn_statistics": "support"}], ids=str)
def test_options_that_change_the_gradient_are_seen(option: dict[str, Any]) -> None:
    assert compare("conv", "maml", MAML, None, **option) > 1000 * TOLERANCE
