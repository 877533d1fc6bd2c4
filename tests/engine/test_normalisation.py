"""BatchNorm's derivatives against those of its formula in elementary operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from metareg import Episodes, MetaLearner, TaskSpec
from metareg.engine.normalisation import cheapen_second_derivative
from metareg.engine.split_model import SplitModel

Tensors = dict[str, Tensor]
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = [(7, 3), (6, 3, 5), (4, 3, 3, 5)]


def written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dims, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    centred = x - x.mean(dims, keepdim=True)
    normalised = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
    return normalised * weight.view(shape) + bias.view(shape)


def as_function(layer: nn.Module) -> Layer:
    return lambda x, weight, bias: functional_call(layer, {"weight": weight, "bias": bias}, (x,))


def layer_for(shape: tuple[int, ...]) -> nn.Module:
    return (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(3, track_running_stats=False).double()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(layer: Layer) -> Callable[[Tensors, Tensor], Tensor]:
    """The loss of two layers, each after a mixing of channels; all outputs differ."""

    def loss(params: Tensors, x: Tensor) -> Tensor:
        for nonlinear in (torch.tanh, torch.sin):
            x = nonlinear(layer(torch.einsum("nc...,cd->nd...", x, params["mix"]), params["weight"], params["bias"]))
        return (x * torch.arange(x.numel()).view(x.shape)).mean()

    return loss


def adapted_loss(loss: Callable[[Tensors, Tensor], Tensor], steps: int) -> Callable[[Tensors, Tensor, Tensor], Tensor]:
    def outer(params: Tensors, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(steps):
            gradient = grad(loss)(params, x)
            params = {name: value - 0.1 * gradient[name] for name, value in params.items()}
        return loss(params, y)

    return outer


def squared_gradient(function: Callable[[Tensors], Tensor]) -> Callable[[Tensors], Tensor]:
    return lambda params: torch.stack([g.square().sum() for g in grad(function)(params).values()]).sum()


PARAMS = {"weight": drawn(3).abs() + 0.5, "bias": drawn(3, seed=1), "mix": drawn(3, 3, seed=2)}


def assert_same(given: Tensors, expected: Tensors) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=1e-8, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shape", SHAPES)
def test_first_second_and_third_derivative(shape: tuple[int, ...]) -> None:
    layer = as_function(cheapen_second_derivative(layer_for(shape)))
    x, y = drawn(*shape, seed=3), drawn(*shape, seed=4)
    for steps in (0, 1, 2):
        given, expected = (grad(adapted_loss(loss_of(each), steps))(PARAMS, x, y) for each in (layer, written_out))
        assert_same(given, expected)
    third = [
        grad(squared_gradient(squared_gradient(lambda params, each=each: loss_of(each)(params, x))))(PARAMS)
        for each in (layer, written_out)
    ]
    assert_same(*third)


@pytest.mark.parametrize("shape", SHAPES)
def test_many_tasks_differentiated_inside_and_outside_the_map(shape: tuple[int, ...]) -> None:
    layer = as_function(cheapen_second_derivative(layer_for(shape)))
    x, y = drawn(2, *shape, seed=3), drawn(2, *shape, seed=4)
    outer, reference = adapted_loss(loss_of(layer), 1), adapted_loss(loss_of(written_out), 1)
    expected = grad(lambda params: (reference(params, x[0], y[0]) + reference(params, x[1], y[1])) / 2)(PARAMS)
    inside = vmap(grad(outer), (None, 0, 0))(PARAMS, x, y)
    assert_same({name: value.mean(0) for name, value in inside.items()}, expected)
    assert_same(grad(lambda params: vmap(outer, (None, 0, 0))(params, x, y).mean())(PARAMS), expected)


def second_derivative(layer: Layer) -> Callable[..., tuple[Tensor, ...]]:
    """Return the derivative of a function for x, weight, bias and the weights of the outputs."""

    def loss(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor) -> Tensor:
        return (torch.sin(layer(x, weight, bias)) * u).sum()

    def outer(*arguments: Tensor) -> Tensor:
        of_x, of_weight, of_bias = grad(loss, argnums=(0, 1, 2))(*arguments)
        return (of_x * torch.cos(of_x)).sum() + (of_weight * of_weight + of_weight * of_bias).sum()

    return grad(outer, argnums=(0, 1, 2, 3))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda x: torch.stack([x, x.sin()], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(7, 3), (1, 3, 5), (4, 3, 3, 5), (2, 3, 2, 3, 2), (5, 1), (3, 1, 2, 2), (5, 1, 1, 1)]
)
def test_any_layout_in_memory_and_any_part_of_a_map(shape: tuple[int, ...], layout: str) -> None:
    """Kernels read some of their arguments as if these were contiguous in memory."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    layer = as_function(cheapen_second_derivative(kind(shape[1], track_running_stats=False).double()))
    lay, channels = LAYOUTS[layout], shape[1]
    inputs = [
        lay(drawn(2, *shape, seed=3)), drawn(channels, 2, seed=4).abs().T + 0.5, drawn(channels, 2, seed=5).T,
        lay(drawn(2, *shape, seed=6)),
    ]  # fmt: skip
    for in_dims in ((None,) * 4, (0, None, None, 0), (0, 0, 0, 0), (None, 0, None, None), (0, None, 0, None)):
        chosen = [each if dim == 0 else each[1] for each, dim in zip(inputs, in_dims, strict=True)]
        given, expected = (
            (second if set(in_dims) == {None} else vmap(second, in_dims))(*chosen)
            for second in (second_derivative(layer), second_derivative(written_out))
        )
        for one, other in zip(given, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_keep_their_type(dtype: torch.dtype) -> None:
    layer = as_function(cheapen_second_derivative(layer_for((4, 3, 3, 5)).to(dtype)))
    inputs = [drawn(16, 3, 3, 5, seed=3), drawn(3).abs() + 0.5, drawn(3, seed=1), drawn(16, 3, 3, 5, seed=6)]
    given = second_derivative(layer)(*(each.to(dtype) for each in inputs))
    for one, other in zip(given, second_derivative(written_out)(*inputs), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < 20 * torch.finfo(dtype).eps * other.norm()


def test_the_second_derivative_takes_less_than_half_of_the_operations() -> None:
    plain = layer_for((4, 3, 3, 5))
    x, y = drawn(4, 3, 3, 5, seed=3), drawn(4, 3, 3, 5, seed=4)

    def operations(layer: nn.Module) -> int:
        graph = make_fx(grad(adapted_loss(loss_of(as_function(layer)), 1)), tracing_mode="fake")(PARAMS, x, y)
        return sum(1 for node in graph.graph.nodes if x.shape == getattr(node.meta.get("val"), "shape", None))

    assert operations(cheapen_second_derivative(plain)) < operations(plain) / 2


def test_images_that_lie_channels_last_are_normalised_precisely() -> None:
    """PyTorch's own kernel sums a channel sequentially, with an error of 1e-3 on these images, bright on dark."""
    generator = torch.Generator().manual_seed(0)
    ink = torch.rand(75, 1, 84, 84, generator=generator) - 0.85
    weight = torch.randn(8, 1, 3, 3, generator=generator)
    x = nn.functional.conv2d(ink.clamp(min=0) * 5, weight, torch.full((8,), 0.3), padding=1)
    layer = nn.BatchNorm2d(8, track_running_stats=False)
    expected = written_out(x.double(), torch.ones(8).double(), torch.zeros(8).double())
    found = cheapen_second_derivative(layer)(x.contiguous(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() < 2e-4


def test_one_number_a_channel_is_refused_as_ever() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        cheapen_second_derivative(layer_for((1, 3)))(torch.ones(1, 3, dtype=torch.float64))


class Doubled(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_users_own_layer_stays_as_it_is() -> None:
    model = nn.Sequential(Doubled(3), nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3), nn.Linear(3, 2))
    split = SplitModel(model)
    x = drawn(6, 3).float()
    params = split.initial_parameters()
    model.train()
    torch.testing.assert_close(split.head(params, split.body(params, x)), model(x))
    assert MetaLearner(model, "maml", spec=TaskSpec((3,), (2,))).bn_statistics == "transductive"


class NormThenActivation(nn.BatchNorm2d):
    """A layer like those of timm, which applies its activation itself."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.prelu(super().forward(x), self.slope.view(1))


@pytest.mark.parametrize("affine", [True, False])
def test_what_a_subclass_adds_stays_with_the_support_sets_statistics(affine: bool) -> None:
    def build(*norm: nn.Module) -> MetaLearner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), *norm, nn.Flatten(), nn.Linear(36, 2)).double()
        return MetaLearner(
            model, "maml", loss="cross_entropy", inner_lr=0.1, bn_statistics="support", strategy="serial"
        )

    layer = NormThenActivation(4)
    plain = nn.PReLU(init=0.3)
    if not affine:
        layer.weight = layer.bias = None
    subclass, separate = build(layer), build(nn.BatchNorm2d(4, affine=affine), plain)
    x, labels = drawn(2, 8, 3, 5, 5), torch.arange(8).remainder(2).expand(2, 8)
    episodes = Episodes(x, labels, 2 * x.flip(1) + 1, labels)
    (loss, grads), (expected_loss, expected) = (each.meta_gradient(episodes) for each in (subclass, separate))
    torch.testing.assert_close(loss, expected_loss)
    renamed = {"1.slope": "2.weight", "3.weight": "4.weight", "3.bias": "4.bias"}
    assert {renamed.get(name, name) for name in grads} == set(expected)
    for name, value in grads.items():
        torch.testing.assert_close(value.flatten(), expected[renamed.get(name, name)].flatten())
