"""Models with a body and a head, and which weights are trained: named heads, tied, shared and frozen weights."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from learners import Plain, Source, TiedBody
from torch import Tensor, nn
from torch.func import functional_call

from metareg import Episodes, MetaLearner, UnknownNameError, UsageError
from reference import difference
from samples import MLP, episodes, tasks_of


@pytest.mark.parametrize("algo", ["anil", "boil"])
def test_head_by_name(algo: str) -> None:
    learner = MetaLearner(Plain().double(), algo, head="second", loss="cross_entropy", inner_lr=0.5)
    batch = episodes("mlp")
    x, y = batch.support_x[0], torch.arange(8) % 5
    before, after = (dict(learner.adapt(x, y, steps).named_parameters()) for steps in (0, 1))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {f"{'second' if algo == 'anil' else 'first'}.{part}" for part in ("weight", "bias")}


@pytest.mark.parametrize("algo", ["maml", "anil"])
@pytest.mark.parametrize(("model", "head"), [(Plain(last=False), "second"), (Plain(), "first")])
def test_a_head_that_is_not_the_last_is_found(model: nn.Module, head: str, algo: str) -> None:
    """Even if only the split depends on it: otherwise, another function would be trained than the user calls."""
    learner = MetaLearner(model.double(), algo, head=head, loss="mse")
    batch = episodes("mlp")
    assert learner.meta_parameters
    with pytest.raises(UsageError, match="does not compute head"):
        learner.step(Episodes(batch.support_x, batch.support_x, batch.query_x, batch.query_x))


class LastOfRecurrent(nn.Module):
    """A model whose head takes a part of the body's output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def test_a_head_that_takes_another_thing_than_the_body_returns_is_refused() -> None:
    learner = MetaLearner(LastOfRecurrent(), loss="mse")
    x, y = torch.randn(2, 3, 7, 2), torch.randn(2, 3, 1)
    with pytest.raises(UsageError, match="LastOfRecurrent does not compute head"):
        learner.step(Episodes(x, y, x, y))


class Rounded(nn.Module):
    """A model whose forward rounds the features to the 10 bits of TF32, like convolutions on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 5), nn.Linear(5, 2)
        with torch.no_grad():
            self.head.weight[1] = self.head.weight[0].roll(1) * torch.tensor([1.0, -1.0, 1.0, -1.0, 0.01])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x)
        return self.head((features.detach().view(torch.int32) & ~0x1FFF).view(torch.float32))


def test_rounding_is_no_other_function() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learner = MetaLearner(Rounded(), loss="mse")
    x = 100 * torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    whole, parts = learner.model.module(x), learner.model.forward(learner.meta_parameters, x)[1]
    assert not torch.allclose(whole, parts, rtol=1e-3, atol=1e-5)
    learner.initialize(x)


def test_sequential_is_split_before_its_last_layer() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 1)).double()
    learner = MetaLearner(model, "anil", ["cml"], loss="mse")
    assert learner.model.head_names == ("4.weight", "4.bias")
    x = episodes("mlp").query_x[0]
    learner.step(episodes("mlp"))
    adapted = learner.adapt(x, x[:, :1], steps=0)
    torch.testing.assert_close(
        adapted(x),
        torch.relu(torch.relu(x @ adapted[0].weight.T + adapted[0].bias) @ adapted[2].weight.T + adapted[2].bias)
        @ adapted[4].weight.T
        + adapted[4].bias,
    )


def test_subclass_of_sequential_with_its_own_constructor() -> None:
    class Net(nn.Sequential):
        def __init__(self, width: int) -> None:
            super().__init__(OrderedDict(a=nn.Linear(2, width), b=nn.ReLU(), c=nn.Linear(width, 1)))

    model = Net(7).double()
    learner = MetaLearner(model, "boil", loss="mse")
    assert learner.model.head_names == ("c.weight", "c.bias")
    learner.step(episodes("mlp"))
    assert type(learner.adapt(*tasks_of(episodes("mlp"))[0][:2])) is Net


@pytest.mark.parametrize(("algo", "augment"), [("anil", []), ("boil", []), ("maml", ["cml"])])
def test_plugins_that_need_a_head_say_so(algo: str, augment: list[str]) -> None:
    with pytest.raises(UsageError, match=r"Plain.*head="):
        MetaLearner(Plain(), algo, augment)


def test_maml_needs_no_head() -> None:
    loss, grads = MetaLearner(Plain().double(), loss="cross_entropy").meta_gradient(
        Episodes(
            episodes("mlp").support_x,
            torch.arange(8).expand(3, -1) % 5,
            episodes("mlp").query_x,
            torch.zeros(3, 12).long(),
        )
    )
    assert loss.item() > 0
    assert all(value.any() for value in grads.values())


def test_unknown_head() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'second'"):
        MetaLearner(Plain(), head="secnd")


def test_parameter_outside_body_and_head() -> None:
    model = MLP()
    model.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    with pytest.raises(UsageError, match="parameter 'scale' that is in neither body nor head"):
        MetaLearner(model)


def tied_loss(meta: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = x @ meta["body.weight"].T + meta["body.bias"]
    return ((hidden @ meta["body.weight"].T + meta["head.bias"] - x) ** 2).mean()


def test_weights_tied_between_body_and_head() -> None:
    class Auto(nn.Module):
        """A model whose head shares the body's weight."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
            self.head.weight = self.body.weight
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    batch = episodes("mlp")
    learner = MetaLearner(Auto(), loss="mse", inner_lr=0.1)
    assert set(learner.meta_parameters) == {"body.weight", "body.bias", "head.bias"}
    _, grads = learner.meta_gradient(Episodes(batch.support_x, batch.support_x, batch.query_x, batch.query_x))
    meta = {name: value.clone().requires_grad_() for name, value in learner.meta_parameters.items()}
    total = torch.zeros((), dtype=torch.float64)
    for support, _, query, _ in tasks_of(batch):
        inner = torch.autograd.grad(tied_loss(meta, support), list(meta.values()), create_graph=True)
        adapted = {name: meta[name] - 0.1 * g for name, g in zip(meta, inner, strict=True)}
        total = total + tied_loss(adapted, query) / len(batch)
    expected = dict(zip(meta, torch.autograd.grad(total, list(meta.values())), strict=True))
    assert difference(grads, expected) < 1e-6
    adapted_module = learner.adapt(batch.support_x[0], batch.support_x[0])
    assert adapted_module.head.weight is adapted_module.body.weight


def test_weights_tied_within_the_body(tmp_path: Path) -> None:
    learner = MetaLearner(TiedBody(), "boil", loss="mse", inner_lr=0.1)
    batch = episodes("mlp")
    before = learner.meta_parameters["body.0.weight"].clone()
    learner.step(batch)
    assert "body.2.weight" not in learner.meta_parameters
    assert not before.equal(learner.meta_parameters["body.0.weight"])
    learner.save(tmp_path / "x")
    loaded = MetaLearner.load(tmp_path / "x", TiedBody())
    assert loaded.evaluate(Source(), 3).scores.equal(learner.evaluate(Source(), 3).scores)


class Again(nn.Module):
    """A model whose body uses one layer twice and whose head contains the same layer."""

    def __init__(self, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        layer = nn.Sequential(nn.Linear(2, 2), norm(2))
        self.body = nn.Sequential(layer, nn.Tanh(), layer)
        self.head = nn.Sequential(nn.Tanh(), layer)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
@pytest.mark.parametrize("strategy", ["serial", "traced", "vectorized"])
def test_a_layer_that_stands_in_several_places(strategy: str, norm: type[nn.Module]) -> None:
    model = Again(norm)
    drawn = episodes("mlp")
    batch = Episodes(drawn.support_x, drawn.support_x, drawn.query_x, drawn.query_x)
    learner = MetaLearner(model, loss="mse", inner_lr=0.1, strategy=strategy)
    places = {name: id(p) for name, p in learner.model.module.named_parameters(remove_duplicate=False)}
    expected = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    adam = torch.optim.Adam(list(expected.values()))
    for _ in range(3):
        learner.step(batch)
        adam.zero_grad()
        for support, _, query, _ in tasks_of(batch):
            inner = nn.functional.mse_loss(functional_call(model, expected, (support,)), support)
            grads = torch.autograd.grad(inner, list(expected.values()), create_graph=True)
            adapted = {name: p - 0.1 * g for (name, p), g in zip(expected.items(), grads, strict=True)}
            (nn.functional.mse_loss(functional_call(model, adapted, (query,)), query) / len(batch)).backward()
        adam.step()
    for name, value in expected.items():
        torch.testing.assert_close(learner.meta_parameters[name], value.detach(), rtol=0, atol=1e-8)
    adapted_module = learner.adapt(batch.support_x[0], batch.support_x[0], bn_statistics="transductive")
    assert adapted_module.head[1] is adapted_module.body[0]
    assert {name: id(p) for name, p in learner.model.module.named_parameters(remove_duplicate=False)} == places


def test_frozen_parameters_stay() -> None:
    model = MLP()
    model.body[0].weight.requires_grad_(False)
    learner = MetaLearner(model, "metasgd", ["cml"], loss="mse")
    learner.step(episodes("mlp"))
    assert "body.0.weight" not in learner.meta_parameters
    assert "metasgd.step_size.body.0.weight" not in learner.meta_parameters
    assert learner.adapt(*tasks_of(episodes("mlp"))[0][:2]).body[0].weight.equal(model.body[0].weight)
