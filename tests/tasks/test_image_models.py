"""conv4 and resnet12: shapes, sizes, and conv4's meta-gradient against the CML authors' recipe written out."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metareg import Episodes, MetaLearner, TaskSpec, UsageError
from metareg_image import Conv4, ResNet12

Tensors = dict[str, Tensor]


def built(plugin: type, size: int, channels: int = 3, **options: Any) -> torch.nn.Module:
    return plugin(plugin.Config(**options)).build(TaskSpec((channels, size, size), (5,)))


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("size", "channels", "features", "count", "colearner"),
    [
        (84, 3, (64, 10, 10), 121_093, 82_117),
        (32, 3, (64, 4, 4), 114_373, 75_397),
        (28, 1, (64, 3, 3), 112_261, 74_437),
    ],
)
def test_conv4_has_the_published_sizes(
    size: int, channels: int, features: tuple[int, ...], count: int, colearner: int
) -> None:
    model = built(Conv4, size, channels)
    x = torch.rand(3, channels, size, size)
    assert model.body(x).shape[1:] == features
    assert model(x).shape == (3, 5)
    assert parameters(model) == count
    learner = MetaLearner(model, "maml", ["cml"])
    learner.initialize(x)
    assert sum(v.numel() for name, v in learner.meta_parameters.items() if name.startswith("cml.")) == colearner


def test_resnet12() -> None:
    model = built(ResNet12, 84)
    x = torch.rand(2, 3, 84, 84)
    assert model.body(x).shape[1:] == (512, 5, 5)
    assert model(x).shape == (2, 5)
    # Three 3×3 convolutions and a 1×1 one in the shortcut, without biases, each followed by BatchNorm.
    pairs = [(3, 64), (64, 128), (128, 256), (256, 512)]
    assert parameters(model.body) == sum(9 * (a * b + 2 * b * b) + a * b + 4 * 2 * b for a, b in pairs)


@pytest.mark.parametrize("plugin", [Conv4, ResNet12])
def test_norms_and_pools_train_with_cml(plugin: type) -> None:
    options: list[dict[str, Any]] = [{"norm_layer": norm} for norm in ("batch", "group", "none")]
    if plugin is Conv4:
        options = [each | {"width": 6} for each in [*options, {"pool": "average"}]]
    else:
        options = [each | {"widths": [4, 6, 8, 10]} for each in options]
    x, y = torch.rand(1, 10, 1, 20, 20), torch.arange(5).repeat(2)[None]
    for each in options:
        learner = MetaLearner(built(plugin, 20, 1, **each), "maml", ["cml"], inner_lr=0.1)
        _, grads = learner.meta_gradient(Episodes(x, y, x.flip(1), y.flip(1)))
        silent = {name for name, value in grads.items() if not value.abs().sum() > 0}
        assert not silent, each
        assert learner.bn_statistics == ("transductive" if each.get("norm_layer", "batch") == "batch" else "none")


def small(name: str, channels: int) -> nn.Module:
    """Create a small model in float64: ``conv4-batch``, ``resnet12-none``, …, or one with a few layers."""
    kind, _, norm = name.partition("-")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind in ("instance", "flat"):
            layers = [
                nn.Conv2d(channels, 4, 3, padding=1),
                nn.InstanceNorm2d(4, affine=True),
                nn.MaxPool2d(2),
                nn.Tanh(),
            ]
            if kind == "flat":  # BatchNorm, whose gradient has another memory layout than its inputs
                layers = [nn.MaxPool2d(2), nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4)]
            body = nn.Sequential(*layers)
            return nn.Sequential(OrderedDict(body=body, head=nn.Sequential(nn.Flatten(), nn.Linear(256, 5)))).double()
        width = {"width": 4} if kind == "conv4" else {"widths": [4, 4, 4, 4]}
        return built(Conv4 if kind == "conv4" else ResNet12, 16, channels, norm_layer=norm, **width).double()


def trained(strategy: str, name: str, channels: int) -> Tensors:
    """Return the meta-parameters after three second-order steps on channels-last images."""
    learner = MetaLearner(small(name, channels), "maml", inner_lr=0.2, strategy=strategy)
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(2).expand(3, 10)
    for _ in range(3):
        support, query = torch.rand(2, 3, 10, 16, 16, channels, dtype=torch.float64, generator=draw).movedim(-1, -3)
        learner.step(Episodes(support, labels, query, labels))
    return learner.meta_parameters


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("conv4-batch", 1), ("conv4-batch", 3), ("conv4-group", 1), ("conv4-group", 3), ("conv4-none", 1), ("conv4-none", 3),
        pytest.param("resnet12-group", 3, marks=pytest.mark.slow),
        pytest.param("resnet12-none", 3, marks=pytest.mark.slow), ("instance", 1), ("instance", 3), ("flat", 1), ("flat", 3),
    ],
)  # fmt: skip
def test_trainings_agree_between_strategies(name: str, channels: int) -> None:
    serial = trained("serial", name, channels)
    for strategy in ("traced", "vectorized"):
        torch.testing.assert_close(trained(strategy, name, channels), serial, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv4-group", "conv4-none", "instance"])
def test_compiled_trainings_are_the_serial_ones(name: str) -> None:
    torch.testing.assert_close(trained("compiled", name, 3), trained("serial", name, 3), rtol=0, atol=1e-7)


def test_too_small_images_are_one_sentence() -> None:
    for plugin in (Conv4, ResNet12):
        with pytest.raises(UsageError, match=r"16×16.*12×12"):
            built(plugin, 12)
        with pytest.raises(UsageError, match=r"takes images \[channels, height, width\]"):
            plugin(plugin.Config()).build(TaskSpec((4,), (5,)))


# --------------------------------------------------------------------------------------------------------------- parity


def block(x: Tensor, p: Tensors, name: str, norm: str) -> Tensor:
    """3×3 convolution, BatchNorm on the batch's statistics, ReLU."""
    x = F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=1)
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    x = (x - mean) / (variance + 1e-5).sqrt()
    return (x * p[f"{norm}.weight"].view(1, -1, 1, 1) + p[f"{norm}.bias"].view(1, -1, 1, 1)).relu()


def extract(x: Tensor, p: Tensors) -> Tensor:
    """Four blocks, pooling after the first three."""
    for number, layer in enumerate((0, 2, 4, 6)):
        x = block(x, p, f"body.{layer}.0", f"body.{layer}.1")
        x = F.max_pool2d(x, 2) if number < 3 else x
    return x


def meta_learner(f: Tensor, p: Tensors) -> Tensor:
    return F.linear(F.max_pool2d(f, 2).flatten(1), p["head.2.weight"], p["head.2.bias"])


def co_learner(f: Tensor, p: Tensors) -> Tensor:
    f = block(f, p, "cml.colearner.0", "cml.colearner.1")
    f = F.max_pool2d(block(f, p, "cml.colearner.3", "cml.colearner.4"), 2)
    return F.linear(f.flatten(1), p["cml.colearner.8.weight"], p["cml.colearner.8.bias"])


def authors_gradient(meta: Tensors, batch: Episodes, inner_lr: float, cml: bool) -> Tensors:
    """The recipe: one inner step on extractor and meta-learner, both losses on the adapted features, γ = 1."""
    meta = {name: value.clone().requires_grad_() for name, value in meta.items()}
    adapted_names = [name for name in meta if not name.startswith("cml.")]
    total = torch.zeros((), dtype=torch.float64)
    for support_x, support_y, query_x, query_y in zip(*batch.parts, strict=True):
        loss = F.cross_entropy(meta_learner(extract(support_x, meta), meta), support_y)
        grads = torch.autograd.grad(loss, [meta[name] for name in adapted_names], create_graph=True)
        theta = meta | {name: meta[name] - inner_lr * g for name, g in zip(adapted_names, grads, strict=True)}
        features = extract(query_x, theta)
        total = total + F.cross_entropy(meta_learner(features, theta), query_y)
        if cml:
            total = total + F.cross_entropy(co_learner(features, meta), query_y)
    grads = torch.autograd.grad(total / len(batch), list(meta.values()))
    return dict(zip(meta, grads, strict=True))


@pytest.mark.parametrize("width", [12, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("augment", [[], ["cml"]])
def test_meta_gradient_equals_the_authors_recipe(width: int, augment: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = 3 if width < 64 else 15
    shape = (3, 84, 84)
    labels = torch.arange(5).expand(2, 5)
    batch = Episodes(
        torch.rand(2, 25, *shape, dtype=torch.float64, generator=generator),
        labels.repeat_interleave(5, 1),
        torch.rand(2, 5 * queries, *shape, dtype=torch.float64, generator=generator),
        labels.repeat_interleave(queries, 1),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = built(Conv4, 84, width=width).double()
    learner = MetaLearner(model, "maml", augment, inner_lr=0.5)
    _, grads = learner.meta_gradient(batch)
    expected = authors_gradient(learner.meta_parameters, batch, 0.5, bool(augment))
    assert grads.keys() == expected.keys()
    # BatchNorm cancels the biases before it: their gradients are only rounding errors.
    biases = {f"body.{layer}.0.bias" for layer in (0, 2, 4, 6)} | {f"cml.colearner.{layer}.bias" for layer in (0, 3)}
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        error = (grads[name] - value).norm()
        assert error <= (1e-10 * scale if name in biases else 1e-6 * value.norm()), name
