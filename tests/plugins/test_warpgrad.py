"""Warped gradients against a reference T-Net, with the matrices T in the forward pass and the inner loop on W."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family import WAYS, WrittenOut, check_training, model_parameters
from torch import Tensor, nn

from metareg import MetaLearner
from reference import NETS, Net, Task, Tensors, batch_norm
from samples import episodes

LR = 0.1


def warped_mlp(w: Mapping[str, Tensor], t: Mapping[str, Tensor], x: Tensor) -> Tensor:
    for layer in ("body.0", "body.2"):
        x = torch.relu((x @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]) @ t[layer].T)
    return (x @ w["head.weight"].T + w["head.bias"]) @ t["head"].T


def warped_conv(w: Mapping[str, Tensor], t: Mapping[str, Tensor], x: Tensor) -> Tensor:
    for layer, norm in (("body.0", "body.1"), ("body.4", "body.5")):
        x = F.conv2d(x, w[f"{layer}.weight"], w[f"{layer}.bias"], padding=1)
        x = F.conv2d(x, t[layer][:, :, None, None])
        x = F.max_pool2d(torch.relu(batch_norm(x, w[f"{norm}.weight"], w[f"{norm}.bias"])), 2)
    return (x.flatten(1) @ w["head.2.weight"].T + w["head.2.bias"]) @ t["head.2"].T


def adapt(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    """Return the weights TW after steps on W."""
    forward = warped_mlp if net is NETS["mlp"] else warped_conv
    t = {name.removeprefix("warpgrad.warp."): value for name, value in meta.items() if name.startswith("warpgrad.")}
    w = model_parameters(meta)
    for _ in range(steps):
        loss = net.loss(forward(w, t, task[0]), task[1])
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        w = {name: value - LR * grad for (name, value), grad in zip(w.items(), grads, strict=True)}
    params = {}
    for name, value in w.items():
        layer = name.rpartition(".")[0]
        params[name] = torch.einsum("ij,j...->i...", t[layer], value) if layer in t else value
    return params


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
def test_training_equals_t_nets(net: str, cml: bool, options: dict[str, Any]) -> None:
    learner = check_training(net, "warpgrad", WrittenOut(adapt), {"inner_lr": LR}, cml=cml, **options)
    warps = {name for name in learner.meta_parameters if name.startswith("warpgrad.")}
    layers = {"mlp": ("body.0", "body.2", "head"), "conv": ("body.0", "body.4", "head.2")}[net]
    assert warps == {f"warpgrad.warp.{layer}" for layer in layers}


def test_warp_layers_of_a_model_are_not_adapted_and_learn() -> None:
    torch.manual_seed(0)
    body = nn.Sequential()
    body.add_module("task", nn.Linear(2, 6))
    body.add_module("warp", nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh()))
    model = nn.Sequential()
    model.add_module("body", body)
    model.add_module("head", nn.Linear(6, 1))
    learner = MetaLearner(model.double(), "warpgrad", loss="mse", inner_lr=LR)
    batch = episodes("mlp")
    before = {name: value.clone() for name, value in learner.meta_parameters.items()}
    adapted = dict(learner.adapt(batch.support_x[0], batch.support_y[0]).named_parameters())
    moved = {name for name, value in adapted.items() if not value.equal(before[name])}
    assert moved == {"body.task.weight", "body.task.bias", "head.weight", "head.bias"}
    learner.step(batch)
    assert learner.meta_parameters.keys() == before.keys()
    assert not any(value.equal(before[name]) for name, value in learner.meta_parameters.items())
