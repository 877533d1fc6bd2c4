"""BatchNorm together with activation and pooling, against the layers one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from metareg import Episodes, MetaLearner
from metareg.engine import blocks
from metareg.engine.blocks import fuse_blocks
from metareg.engine.normalisation import SupportNorm, cheapen_second_derivative
from metareg.util.native import find_compiler, load_library

Function = Callable[..., Tensor]
LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "pooling, ReLU": lambda: [nn.MaxPool2d(2), nn.ReLU()],
    "ReLU, pooling": lambda: [nn.ReLU(), nn.MaxPool2d(2)],
    "leaky ReLU, pooling": lambda: [nn.LeakyReLU(0.1), nn.MaxPool2d(2)],
    "pooling": lambda: [nn.MaxPool2d(2)],
    "ReLU": lambda: [nn.ReLU()],
    "leaky ReLU": lambda: [nn.LeakyReLU(0.3)],
}

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channels_last(images: Tensor) -> Tensor:
    return images.movedim(-3, -1).contiguous().movedim(-1, -3)


def norm(channels: int) -> nn.Module:
    return cheapen_second_derivative(nn.BatchNorm2d(channels, track_running_stats=False).double())


def loss_of(layers: nn.Module) -> Function:
    def loss(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor) -> Tensor:
        y = functional_call(layers, {"0.weight": weight, "0.bias": bias}, (x,))
        return (torch.sin(y) * u[..., : y.shape[-2], : y.shape[-1]]).sum()

    return loss


def derivative(function: Function) -> Function:
    """A function whose gradient is a derivative of the next order, with a weight for each entry."""

    def outer(*arguments: Tensor) -> Tensor:
        parts = grad(function, argnums=(0, 1, 2, 3))(*arguments)
        return sum(((each * torch.cos(each)).sum() for each in parts), torch.zeros(()))

    return outer


def arguments(channels: int, *sizes: int) -> list[Tensor]:
    images = (4, channels, *sizes)
    weight = drawn(channels, seed=1)  # of both signs
    return [channels_last(drawn(*images)), weight, drawn(channels, seed=2), channels_last(drawn(*images, seed=3))]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that ran."""
    names: list[str] = []
    run = blocks._run
    monkeypatch.setattr(
        blocks, "_run", lambda name, *rest, **options: (names.append(name), run(name, *rest, **options))
    )
    return names


@pytest.mark.parametrize("channels", [3, 19])
@pytest.mark.parametrize("followers", LAYERS)
def test_values_and_three_derivatives(followers: str, channels: int, used: list[str]) -> None:
    """Odd sizes, weights of both signs, and channels that do not fill a vector."""
    plain = nn.Sequential(norm(channels), *LAYERS[followers]())
    fused = fuse_blocks(plain)
    given = arguments(channels, 5, 7)
    torch.testing.assert_close(fused(given[0]), plain(given[0]))
    functions = loss_of(fused), loss_of(plain)
    for _ in range(3):
        found, expected = (grad(each, argnums=(0, 1, 2, 3))(*given) for each in functions)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
        functions = tuple(derivative(each) for each in functions)
    assert {"forward", "backward", "sums", "gather", "scatter"} == set(used)


@pytest.mark.parametrize("followers", LAYERS)
def test_statistics_of_the_first_images(followers: str, used: list[str]) -> None:
    layer = norm(3)
    plain = nn.Sequential(SupportNorm(layer, 3), *LAYERS[followers]())
    block = fuse_blocks(nn.Sequential(layer, *LAYERS[followers]()))[0]
    fused = nn.Sequential(block.use_support_statistics(3))
    given = arguments(3, 5, 7)
    found, expected = (grad(loss_of(each), argnums=(0, 1, 2, 3))(*given) for each in (fused, plain))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert used == ["forward"]


def test_many_tasks_at_once_lie_otherwise_and_give_the_same() -> None:
    plain = nn.Sequential(norm(3), nn.MaxPool2d(2), nn.ReLU())
    one, other = arguments(3, 6, 4), arguments(3, 6, 4)
    stacked = [torch.stack([a, 2 * b]) for a, b in zip(one, other, strict=True)]
    for in_dims in ((0, 0, 0, 0), (0, None, None, 0), (None, 0, None, None)):
        chosen = [each if dim == 0 else each[0] for each, dim in zip(stacked, in_dims, strict=True)]
        found, expected = (
            vmap(grad(derivative(loss_of(each)), argnums=(0, 1)), in_dims)(*chosen)
            for each in (fuse_blocks(plain), plain)
        )
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_precise_in_float32_and_the_same_bits_with_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    x = channels_last(torch.rand(40, 8, 60, 60, generator=generator).square() + 30)
    layers = nn.Sequential(norm(8).float(), nn.MaxPool2d(2), nn.ReLU())
    fused, before = fuse_blocks(layers), torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        x.requires_grad_()
        y = fused(x)
        results += [y, torch.autograd.grad(y.square().sum(), [x, fused[0].weight])]
    torch.set_num_threads(before)
    exact = x.detach().double()
    exact = (exact - exact.mean([0, 2, 3], keepdim=True)) / (
        exact.var([0, 2, 3], keepdim=True, correction=0) + 1e-5
    ).sqrt()
    torch.testing.assert_close(results[0].double(), nn.functional.max_pool2d(exact, 2).relu(), rtol=0, atol=2e-5)
    assert torch.equal(results[0], results[2])
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[3], strict=True))


@pytest.mark.parametrize("lay", [channels_last, torch.clone], ids=["channels last", "channels first"])
def test_training_steps_use_it_and_equal_those_of_a_plain_loop(lay: Function, used: list[str]) -> None:
    """Conv4 with ReLU first, one by one on the CPU; the loop runs the layers."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for number, channels in enumerate((3, 5)):
        block = nn.Conv2d(channels, 5, 3, padding=1), nn.BatchNorm2d(5, track_running_stats=False), nn.ReLU()
        model.add_module(str(number), nn.Sequential(*block, nn.MaxPool2d(2)))
    model.add_module("out", nn.Sequential(nn.Flatten(), nn.Linear(20, 3)))
    tasks = [lay(drawn(2, 6, 3, 8, 8, seed=seed).float()) for seed in (1, 2)]
    episodes = Episodes(tasks[0], torch.arange(6).expand(2, -1) % 3, tasks[1], torch.arange(6).expand(2, -1) % 3)
    learner = MetaLearner(model, "maml", inner_lr=0.1, inner_steps=2, outer_lr=0.01)
    assert learner.choose_strategy(2, steps=9)[0] == "traced"
    params = dict(copy.deepcopy(model).double().named_parameters())
    adam = torch.optim.Adam(params.values(), lr=0.01)
    for _ in range(3):
        learner.step(episodes)
        losses = []
        for task in range(2):
            x, y, query_x, query_y = (part[task] for part in episodes.to("cpu", torch.float64).parts)
            own = params
            for _ in range(2):
                loss = nn.functional.cross_entropy(functional_call(model, own, (x.contiguous(),)), y)
                grads = torch.autograd.grad(loss, list(own.values()), create_graph=True)
                own = {name: value - 0.1 * each for (name, value), each in zip(own.items(), grads, strict=True)}
            losses.append(nn.functional.cross_entropy(functional_call(model, own, (query_x.contiguous(),)), query_y))
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        adam.step()
    assert set(used) >= {"forward", "backward", "gather", "scatter"}
    start = dict(model.named_parameters())
    for name, value in learner.meta_parameters.items():
        if not name.endswith("0.bias"):  # before BatchNorm, its gradient is only rounding
            assert (value - params[name]).norm() < 1e-3 * (params[name] - start[name]).norm()


class Flattening(nn.Module):
    """A model with a forward pass of its own."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Linear(36, 3)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.classifier(self.flatten(self.features(x)))
        return outputs


@pytest.mark.parametrize("lay", [channels_last, torch.clone], ids=["channels last", "channels first"])
@pytest.mark.parametrize("head", [None, "classifier"])
def test_models_that_need_the_channels_first_get_them(head: str | None, lay: Function, used: list[str]) -> None:
    images = lay(drawn(2, 6, 1, 8, 8).float())
    episodes = Episodes(images, torch.arange(6).expand(2, -1) % 3, images + 1, torch.arange(6).expand(2, -1) % 3)
    after = {}
    for name, flatten in (("view", lambda x: x.view(len(x), -1)), ("flatten", lambda x: x.flatten(1))):
        torch.manual_seed(0)
        learner = MetaLearner(Flattening(flatten), "maml", inner_lr=0.1, head=head)
        used.clear()
        for _ in range(3):
            learner.step(episodes)
        assert ("backward" in used) == (name == "flatten")
        assert learner.adapt(episodes.support_x[0], episodes.support_y[0])(episodes.query_x[0]).shape == (6, 3)
        after[name] = learner.meta_parameters
    assert after["view"].keys() == after["flatten"].keys()
    for name, value in after["view"].items():
        if name != "features.0.bias":  # before BatchNorm, its gradient is only rounding
            torch.testing.assert_close(after["flatten"][name], value, rtol=0, atol=1e-5)


class ViewedGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad.view(len(grad), -1).view(grad.shape)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Standardised(nn.Conv2d):
    """A convolution that views its weight."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.view(len(self.weight), -1)
        weight = (rows - rows.mean(1, keepdim=True)).view(self.weight.shape)
        return nn.functional.conv2d(x, weight, self.bias)


def network(first: nn.Module, *between: nn.Module, last: nn.Module | None = None) -> nn.Module:
    last = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)) if last is None else last
    model = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), *between, last)
    model(torch.zeros(2, 2, 6, 6))
    return model


VIEWS: dict[str, Callable[[], nn.Module]] = {
    "of a single support image": lambda: nn.Sequential(
        Apply(lambda x: x.view(-1, 1, 6, 6).view(x.shape)), network(nn.Conv2d(2, 4, 3))
    ),
    "in the backward pass": lambda: network(nn.Conv2d(2, 4, 3), Apply(ViewedGradient.apply)),
    "of a weight": lambda: network(Standardised(2, 4, 3)),
    "of targets and outputs": lambda: network(nn.Conv2d(2, 4, 3), last=nn.Conv2d(4, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("place", VIEWS)
def test_views_in_other_places_still_work(place: str, memory: str) -> None:
    torch.manual_seed(0)
    model = VIEWS[place]()
    support = 1 if place == "of a single support image" else 4
    maps = place == "of targets and outputs"
    x = [drawn(2, examples, 2, 6, 6, seed=examples).float() for examples in (support, 5)]
    y = [
        drawn(2, len(each[0]), 1, 4, 4).float() if maps else torch.arange(len(each[0])).expand(2, -1) % 3 for each in x
    ]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.view(len(outputs), -1) - targets.view(len(targets), -1)).square().mean()

    given = {"loss": loss, "metric": "mse"} if maps else {}
    after = []
    for strategy in ("serial", "traced"):
        learner = MetaLearner(model, "maml", inner_lr=0.1, memory=memory, strategy=strategy, **given)
        for _ in range(3):
            learner.step(Episodes(x[0], y[0], x[1], y[1]))
        # The gradient of a bias before BatchNorm is only rounding.
        after.append({name: value for name, value in learner.meta_parameters.items() if not name.endswith("0.bias")})
    torch.testing.assert_close(*after)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("channels", [3, 19, 48])
@pytest.mark.parametrize("followers", LAYERS)
def test_bfloat16_with_sums_in_float32(followers: str, channels: int, used: list[str]) -> None:
    """Values and two derivatives, against float64."""
    exact = nn.Sequential(norm(channels), *LAYERS[followers]())
    fused = fuse_blocks(copy.deepcopy(exact)).bfloat16()
    *rounded, weights = [each.bfloat16() for each in arguments(channels, 5, 7)]
    given = [each.double() for each in rounded]
    assert fused(rounded[0]).dtype == torch.bfloat16
    assert error(fused(rounded[0]), exact(given[0])) < 3e-3
    functions = [loss_of(each) for each in (fused, exact)]
    for limit in (8e-3, 1.2e-2):  # a number has 8 bits
        found, expected = (
            grad(each, argnums=(0, 1, 2))(*values, weights.double())
            for each, values in zip(functions, (rounded, given), strict=True)
        )
        assert {each.dtype for each in found} == {torch.bfloat16}
        assert error(*(torch.cat([part.flatten() for part in each]) for each in (found, expected))) < limit
        functions = [derivative_of_three(each) for each in functions]
    assert {"forward", "backward", "sums", "gather", "scatter"} == set(used)


def derivative_of_three(function: Function) -> Function:
    def outer(*arguments: Tensor) -> Tensor:
        parts = grad(function, argnums=(0, 1, 2))(*arguments)
        weights = (torch.linspace(-1, 1, each.numel(), dtype=torch.float64).view(each.shape) for each in parts)
        return sum(
            ((each.double() * weight).sum() for each, weight in zip(parts, weights, strict=True)), torch.zeros(())
        )

    return outer


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_shows(value: float) -> None:
    x = arguments(3, 4, 4)[0]
    x[1, 1, 3, 3] = value
    y = fuse_blocks(nn.Sequential(norm(3), nn.MaxPool2d(2), nn.ReLU()))(x)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


class Doubled(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_is_fused() -> None:
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 3, 1).double(), norm(3)), nn.Sequential(pool, relu),  # across inner sequences
        norm(3), relu, relu,  # a layer that is used several times; only one activation
        norm(3), nn.MaxPool2d(3), norm(3), nn.AvgPool2d(1), norm(3), Doubled(), norm(3), hooked,
    )  # fmt: skip
    fused = fuse_blocks(model)
    found = [name for name, each in fused.named_modules(remove_duplicate=False) if isinstance(each, blocks.Block)]
    assert found == ["0.1", "2"]
    assert [type(fused[number]) for number in (3, 4)] == [nn.Identity, nn.ReLU]
    assert dict(fused.named_parameters()).keys() == dict(model.named_parameters()).keys()
    x = channels_last(drawn(5, 3, 24, 24))
    torch.testing.assert_close(fused(x), model(x))
    assert not any(isinstance(each, blocks.Block) for each in model.modules())


def test_without_a_compiler_and_in_other_cases_the_layers_run(monkeypatch: pytest.MonkeyPatch, used: list[str]) -> None:
    plain = nn.Sequential(norm(3), nn.MaxPool2d(2), nn.ReLU())
    fused, x = fuse_blocks(plain), arguments(3, 4, 4)[0]
    assert torch.equal(fused(x.contiguous()), plain(x.contiguous()))
    monkeypatch.setattr(blocks, "load_library", lambda _: None)
    assert torch.equal(fused(x), plain(x))
    assert not used
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fuse_blocks(nn.Sequential(norm(3), nn.ReLU()))(channels_last(drawn(1, 3, 1, 1)))


def test_a_file_that_does_not_compile_is_told_once(
    tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int f( {")
    assert load_library(source) is None
    assert load_library(source) is None
    assert len(caplog.records) == 1
    assert "does not compile broken.cpp" in caplog.text
    assert not list((tmp_path / "metareg" / "native").iterdir())
