"""CAVIA and its models against a reference loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family import WAYS, WrittenOut, check_training
from torch import Tensor, nn

from metareg import MetaLearner, TaskSpec, UsageError
from metareg.learner.model_plugin import build_model
from metareg.registry.plugins import resolve
from reference import (
    Net,
    Task,
    Tensors,
    batch_norm,
    colearner_on_maps,
    colearner_on_vectors,
    cross_entropy,
    linear_head,
    mean_squared_error,
)
from samples import MODELS, episodes

LR = 0.5


def build(name: str, spec: TaskSpec, **config: Any) -> Callable[[], nn.Module]:
    return lambda: build_model(resolve("models", name, config), spec, seed=0).double()


def mlp_body(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    x = torch.cat([x, p["body.context"].repeat(len(x), 1)], 1)
    for layer in (0, 2):
        x = torch.relu(x @ p[f"body.layers.{layer}.weight"].T + p[f"body.layers.{layer}.bias"])
    return x


def build_for_small_images() -> nn.Module:
    """The model with upsampling first, because the images of `samples` have 8×8 pixels and it needs 16×16."""
    model = build("context-conv4", TaskSpec((1, 16, 16), (5,)), context=4, width=4)()
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if name.endswith("bias"):  # away from the kinks of ReLU
            value.data.copy_(torch.rand(value.shape, generator=generator))
    model.body = nn.Sequential(nn.Upsample(scale_factor=2), model.body)
    return model


def conv_body(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    for layer in ("body.1.before.0", "body.1.before.3", "body.1.before.6"):
        x = F.max_pool2d(block(p, layer, x), 2)
        if layer == "body.1.before.6":
            film = p["body.1.film.weight"] @ p["body.1.context"] + p["body.1.film.bias"]
            x = film[:4, None, None] * x + film[4:, None, None]
        x = torch.relu(x)
    return torch.relu(block(p, "body.1.after.1", x))


def block(p: Mapping[str, Tensor], layer: str, x: Tensor) -> Tensor:
    x = F.conv2d(x, p[f"{layer}.0.weight"], p[f"{layer}.0.bias"], padding=1)
    return batch_norm(x, p[f"{layer}.1.weight"], p[f"{layer}.1.bias"])


def conv_head(p: Mapping[str, Tensor], f: Tensor) -> Tensor:
    return F.max_pool2d(f, 2).flatten(1) @ p["head.2.weight"].T + p["head.2.bias"]


NETS = {
    "mlp": (
        build("context-mlp", TaskSpec((2,), (1,)), context=3, hidden=[6, 5]),
        Net(mlp_body, linear_head, colearner_on_vectors, mean_squared_error),
    ),
    "conv": (
        build_for_small_images,
        Net(conv_body, conv_head, colearner_on_maps, cross_entropy),
    ),
}


def adapt(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    (name,) = (name for name in meta if name.endswith("context"))
    context = torch.zeros_like(meta[name]).requires_grad_()
    for _ in range(steps):
        params = {**meta, name: context}
        loss = net.loss(net.head(params, net.body(params, task[0])), task[1])
        (grad,) = torch.autograd.grad(loss, context, create_graph=True)
        context = context - LR * grad
    return {**meta, name: context}


@pytest.mark.parametrize(("net", "cml", "options"), WAYS)
def test_training_equals_the_loop(net: str, cml: bool, options: dict[str, Any]) -> None:
    check_training(net, "cavia", WrittenOut(adapt), {"inner_lr": LR}, cml=cml, model=NETS[net], **options)


def test_a_model_without_context_is_refused() -> None:
    with pytest.raises(UsageError, match=r"context-mlp.*context-conv4"):
        MetaLearner(MODELS["mlp"](), "cavia", loss="mse").step(episodes("mlp"))


@pytest.mark.parametrize("shape", [(3,), (1, 8, 16)])
def test_context_conv4_takes_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="16×16"):
        build("context-conv4", TaskSpec(shape, (5,)))()


@pytest.mark.parametrize(("shape", "layer"), [((3,), nn.Linear), ((1, 16, 16), nn.Conv2d)])
def test_the_default_model_fits_the_task(shape: tuple[int, ...], layer: type[nn.Module]) -> None:
    """A perceptron on pixels stays at chance: a context of five numbers cannot distinguish classes."""
    model = build("context", TaskSpec(shape, (5,)))()
    assert any(isinstance(each, layer) for each in model.modules())
    assert [name for name, _ in model.named_parameters() if name.endswith("context")]
