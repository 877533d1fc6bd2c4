"""`MetaLearner`: what it leaves alone, what it gives back, what it refuses."""

from __future__ import annotations

import json
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call

from metareg import (
    DivergenceError,
    Episodes,
    MetaLearner,
    MetaregError,
    Metric,
    PluginConfig,
    TaskSpec,
    UnknownNameError,
    UsageError,
    hookimpl,
)
from reference import NETS, difference, inner_loop
from samples import LOSSES, MLP, MODELS, ConvNet, episodes, tasks_of

AUGMENTERS = [("cml", {"gamma": 0.5}), "dropgrad", ("gradient-noise", {"where": "outer"})]


class Source:
    """Tasks for one of the sample nets."""

    def __init__(self, net: str = "mlp", tasks: int = 400) -> None:
        self.batch = episodes(net, tasks, seed=11)

    def episodes(self, split: str, indices: Sequence[int]) -> Episodes:
        offset = {"train": 0, "validation": 100, "test": 200}[split]
        numbers = [offset + index % 100 for index in indices]
        return Episodes(*(part[numbers] for part in self.batch.parts))


def state(model: nn.Module) -> dict[str, Any]:
    """All that could be changed of a module."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = {name: [len(m._forward_hooks), len(m._forward_pre_hooks)] for name, m in model.named_modules()}
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    modes = {name: (m.training, getattr(m, "track_running_stats", None)) for name, m in model.named_modules()}
    return {
        "tensors": tensors,
        "hooks": hooks,
        "flags": flags,
        "modes": modes,
        "identity": list(map(id, model.modules())),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# ------------------------------------------------------------------------------------------------- the user's own module


@pytest.mark.parametrize("net", MODELS)
@pytest.mark.parametrize("bn_statistics", ["transductive", "support"])
def test_the_users_module_never_changes(net: str, bn_statistics: str, tmp_path: Path) -> None:
    model = MODELS[net]()
    model.body[0].register_forward_hook(lambda *_: None)
    before = state(model)
    learner = MetaLearner(model, "maml", AUGMENTERS, loss=LOSSES[net], bn_statistics=bn_statistics, inner_lr=0.1)
    batch = episodes(net)
    learner.meta_gradient(batch)
    learner.step(batch)
    learner.evaluate(Source(net), 3, inner_steps=[1])
    learner.adapt(batch.support_x[0], batch.support_y[0])(batch.query_x[0]).sum().backward()
    learner.save(tmp_path / "learner.safetensors")
    MetaLearner.load(tmp_path / "learner.safetensors", model)
    after = state(model)
    assert same(after.pop("tensors"), before.pop("tensors"))
    assert after == before


def test_adapt_returns_an_ordinary_module() -> None:
    batch = episodes("mlp")
    learner = MetaLearner(MLP(), "maml", AUGMENTERS, loss="mse", inner_lr=0.1, inner_steps=2)
    learner.step(batch)
    meta = learner.meta_parameters
    adapted = learner.adapt(batch.support_x[0], batch.support_y[0], steps=3)
    assert type(adapted) is MLP
    assert not adapted.training
    assert all(p.requires_grad and p.is_leaf for p in adapted.parameters())
    expected = inner_loop(
        NETS["mlp"], {name: value.clone().requires_grad_() for name, value in meta.items()}, tasks_of(batch)[0],
        algo="maml", inner_lr=0.1, inner_steps=3,
    )  # fmt: skip
    assert difference(dict(adapted.named_parameters()), expected) < 1e-12
    assert pickle.loads(pickle.dumps(adapted.state_dict())).keys() == MLP().state_dict().keys()
    # The adapted module is the user's to change: nothing of it is shared with the learner or another task.
    other = learner.adapt(batch.support_x[0], batch.support_y[0], steps=0)
    adapted.head.weight.data.zero_()
    assert other.head.weight.equal(learner.meta_parameters["head.weight"])
    other.head.weight.data.zero_()
    assert learner.meta_parameters["head.weight"].any()


def test_adapt_takes_the_steps_of_training_by_default() -> None:
    batch = episodes("mlp")
    learner = MetaLearner(MLP(), loss="mse", inner_steps=2, inner_lr=0.1)
    x, y = batch.support_x[0], batch.support_y[0]
    assert same(learner.adapt(x, y).state_dict(), learner.adapt(x, y, steps=2).state_dict())


@pytest.mark.parametrize("bn_statistics", ["transductive", "support"])
def test_adapted_module_predicts_what_evaluation_scores(bn_statistics: str) -> None:
    learner = MetaLearner(ConvNet(), inner_lr=0.4, bn_statistics=bn_statistics)
    source = Source("conv")
    evaluation = learner.evaluate(source, 5, inner_steps=[0, 2])
    for number, (x, y, query_x, query_y) in enumerate(tasks_of(source.episodes("test", range(5)))):
        for column, steps in enumerate((0, 2)):
            adapted = learner.adapt(x, y, steps)
            accuracy = (adapted(query_x).argmax(-1) == query_y).double().mean()
            assert evaluation.scores[number, column].item() == pytest.approx(accuracy.item())


def test_support_statistics_do_not_depend_on_the_other_queries() -> None:
    batch = episodes("conv", tasks=1)
    adapted = MetaLearner(ConvNet(), inner_lr=0.4, bn_statistics="support").adapt(
        batch.support_x[0], batch.support_y[0]
    )
    together = adapted(batch.query_x[0])
    torch.testing.assert_close(adapted(batch.query_x[0][:1]), together[:1])
    transductive = MetaLearner(ConvNet(), inner_lr=0.4).adapt(batch.support_x[0], batch.support_y[0])
    assert (transductive(batch.query_x[0][:2]) - transductive(batch.query_x[0])[:2]).abs().max() > 1e-3


def test_running_statistics_do_not_leak_between_tasks() -> None:
    """A task's scores are the same whatever was trained or scored before it, without changing the weights."""
    model = ConvNet()
    model(episodes("conv").query_x.flatten(0, 1) * 3 + 1)  # running statistics that would show
    batch = episodes("conv", tasks=4)
    learner = MetaLearner(model, inner_lr=0.4)
    x, y, query_x, _ = tasks_of(batch)[3]
    alone = learner.adapt(x, y)(query_x)
    for other_x, other_y, other_query, _ in tasks_of(batch)[:3]:
        learner.adapt(other_x, other_y)(other_query)
    learner.meta_gradient(batch)
    assert learner.adapt(x, y)(query_x).equal(alone)
    assert not any("running" in name for name, _ in learner.adapt(x, y).named_buffers())
    assert learner.bn_statistics == "transductive"
    assert MetaLearner(MLP(), loss="mse").bn_statistics == "none"


def test_buffers_of_the_model_are_used_and_kept() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 5)
            self.register_buffer("scale", torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.linear(x)

    model = nn.Sequential(Body(), nn.Linear(5, 1)).double()
    adapted = MetaLearner(model, loss="mse").adapt(*tasks_of(episodes("mlp"))[0][:2], steps=0)
    x = episodes("mlp").query_x[0]
    assert adapted(x).equal(model(x))
    assert adapted[0].scale.item() == 3


# ------------------------------------------------------------------------------------------------------- random numbers


def trained(seed: int = 0, steps: int = 3, **options: Any) -> dict[str, Tensor]:
    learner = MetaLearner(
        MLP(), "metasgd", AUGMENTERS, loss="mse", seed=seed, inner_lr=0.1, inner_lr_max=0.2, **options
    )
    learner.fit(Source(), steps, meta_batch=3)
    return learner.meta_parameters


@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_training_is_a_function_of_the_seed(strategy: str) -> None:
    first = trained(strategy=strategy)
    torch.manual_seed(99)
    np.random.seed(99)
    torch.rand(7)
    assert same(first, trained(strategy=strategy))
    other = trained(seed=1, strategy=strategy)
    assert not any(first[name].equal(other[name]) for name in first)


def test_global_generators_are_left_untouched(tmp_path: Path) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    trained()
    learner = MetaLearner("mlp", augment=["cml"], loss="mse", spec=TaskSpec((1,), (1,)))
    learner.fit("sinusoid", 2)
    learner.evaluate("sinusoid", 3)
    learner.save(tmp_path / "x")
    MetaLearner.load(tmp_path / "x")
    assert torch.get_rng_state().equal(torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_training_in_pieces_equals_training_at_once() -> None:
    whole = MetaLearner(MLP(), "maml", AUGMENTERS, loss="mse").fit(Source(), 7, meta_batch=3)
    pieces = MetaLearner(MLP(), "maml", AUGMENTERS, loss="mse")
    for steps in (1, 4, 2):
        pieces.fit(Source(), steps, meta_batch=3)
        pieces.evaluate(Source(), 3)
    assert pieces.steps_done == 7
    assert same(whole.meta_parameters, pieces.meta_parameters)


def test_model_plugin_is_built_from_the_seed() -> None:
    spec = TaskSpec((1,), (1,))
    first, again, other = (MetaLearner("mlp", loss="mse", spec=spec, seed=seed).meta_parameters for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


# ------------------------------------------------------------------------------------------------------ saving, loading


@pytest.mark.parametrize("algo", ["maml", "anil", "boil", "metasgd"])
def test_save_and_load(algo: str, tmp_path: Path) -> None:
    path = tmp_path / "learner.safetensors"
    learner = MetaLearner(ConvNet(), algo, AUGMENTERS, inner_lr=0.3, inner_steps=2, bn_statistics="support", seed=4)
    learner.fit(Source("conv"), 2, meta_batch=2)
    learner.save(path)
    loaded = MetaLearner.load(path, ConvNet(seed=9))
    own = {name: value for name, value in learner.meta_parameters.items() if not name.startswith("cml.")}
    assert same(loaded.meta_parameters, own)
    assert loaded.config == learner.config.model_copy(update={"strategy": loaded.config.strategy})
    assert (loaded.steps_done, loaded.algorithm.config, loaded.augmenters) == (2, learner.algorithm.config, [])
    scores = [each.evaluate(Source("conv"), 4).scores for each in (learner, loaded)]
    assert scores[0].equal(scores[1])
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert b"colearner" not in path.read_bytes()


def test_load_builds_a_model_plugin_again(tmp_path: Path) -> None:
    learner = MetaLearner("mlp", loss="mse", spec=TaskSpec((1,), (1,)), model_options={"hidden": [7]})
    learner.fit("sinusoid", 2)
    learner.save(tmp_path / "x")
    loaded = MetaLearner.load(tmp_path / "x")
    assert same(loaded.meta_parameters, learner.meta_parameters)
    assert loaded.evaluate("sinusoid", 3).scores.equal(learner.evaluate("sinusoid", 3).scores)


class SignMAML:
    """An algorithm that is not installed."""

    class Config(PluginConfig):
        inner_lr: float = 0.01

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - self.config.inner_lr * grads[name].sign() for name, value in params.items()}


def test_algorithm_and_loss_that_are_not_installed(tmp_path: Path) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()

    learner = MetaLearner(MLP(), SignMAML, loss=loss, metric="mse", inner_lr=0.05)
    learner.save(tmp_path / "x")
    with pytest.raises(UsageError, match="'signmaml', which no package installs; pass algo="):
        MetaLearner.load(tmp_path / "x", MLP(), loss=loss)
    with pytest.raises(UsageError, match="loss of its own; pass it as loss="):
        MetaLearner.load(tmp_path / "x", MLP(), algo=SignMAML)
    loaded = MetaLearner.load(tmp_path / "x", MLP(), algo=SignMAML, loss=loss, metric="mse")
    assert loaded.algorithm.config.inner_lr == 0.05
    assert loaded.metric.name == "mse"


def test_frozen_and_tied_parameters_are_saved(tmp_path: Path) -> None:
    def model(value: float) -> nn.Module:
        frozen = nn.Linear(2, 2)
        for p in frozen.parameters():
            nn.init.constant_(p, value).requires_grad_(False)
        return nn.Sequential(frozen, nn.ReLU(), frozen, nn.Linear(2, 1)).double()

    learner = MetaLearner(model(0.3), loss="mse", inner_lr=0.1)
    batch = episodes("mlp")
    learner.step(batch)
    learner.save(tmp_path / "x")
    loaded = MetaLearner.load(tmp_path / "x", model(0.7))
    assert loaded.meta_gradient(batch)[0].equal(learner.meta_gradient(batch)[0])


def damaged_files() -> dict[str, Callable[[Path], object]]:
    def header(**changes: Any) -> Callable[[Path], object]:
        def write(path: Path) -> None:
            MetaLearner(MLP(), loss="mse").save(path)
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                content = json.loads(file.metadata()["metareg"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            content |= changes
            content = {key: value for key, value in content.items() if value != "REMOVE"}
            save_file(tensors, path, metadata={"metareg": json.dumps(content)})

        return write

    def cut(path: Path) -> None:
        MetaLearner(MLP(), loss="mse").save(path)
        path.write_bytes(path.read_bytes()[:-9])

    def bit(path: Path) -> None:
        MetaLearner(MLP(), loss="mse").save(path)
        content = bytearray(path.read_bytes())
        content[40] ^= 0xFF
        path.write_bytes(bytes(content))

    return {
        "missing": lambda path: path.unlink(missing_ok=True),
        "folder": lambda path: path.mkdir(),
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("nothing of the kind, but long enough to be read as a header"),
        "pickle": lambda path: torch.save({"a": torch.ones(2)}, path),
        "cut off": cut,
        "damaged header": bit,
        "another program's": lambda path: save_file({"a": torch.ones(2)}, path),
        "header no JSON": lambda path: save_file({"a": torch.ones(2)}, path, metadata={"metareg": "{"}),
        "header a list": lambda path: save_file({"a": torch.ones(2)}, path, metadata={"metareg": "[]"}),
        "header empty": lambda path: save_file({"a": torch.ones(2)}, path, metadata={"metareg": "{}"}),
        "newer format": header(format=99),
        "no algorithm": header(algo="REMOVE"),
        "algorithm a number": header(algo=3),
        "unknown algorithm": header(algo={"name": "nosuch", "config": {}}),
        "impossible option": header(inner_steps=-1),
        "unknown option of the algorithm": header(algo={"name": "maml", "config": {"innerlr": 1}}),
        "unknown loss": header(loss="nosuch"),
        "unknown metric": header(metric="nosuch"),
        "steps a word": header(steps_done="many"),
        "model a word": header(model="mlp"),
        "head elsewhere": header(head="nosuch"),
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_damaged_files_are_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "learner.safetensors"
    damaged_files()[kind](path)
    with pytest.raises(UsageError) as error:
        MetaLearner.load(path, MLP())
    assert "\n" not in str(error.value)


def test_another_models_file(tmp_path: Path) -> None:
    MetaLearner(MLP(), loss="mse").save(tmp_path / "x")
    with pytest.raises(
        UsageError, match=r"does not fit the model: 'body\.0\.weight' has the shape \(6, 2\) instead of"
    ):
        MetaLearner.load(tmp_path / "x", ConvNet())


@pytest.mark.parametrize("model", ["of ones own", "tied", "frozen"])
def test_a_class_that_the_file_cannot_name_is_asked_for(model: str, tmp_path: Path) -> None:
    module = {"of ones own": lambda: Plain(), "tied": TiedBody, "frozen": MLP}[model]()
    if model == "frozen":
        module.body[0].weight.requires_grad_(False)
    MetaLearner(module, loss="mse").save(tmp_path / "x")
    with pytest.raises(
        UsageError, match=f"holds the weights of a {type(module).__name__}; pass such a module as model="
    ):
        MetaLearner.load(tmp_path / "x")


@pytest.mark.parametrize("target", ["a-file/below", "a-folder"])
def test_save_that_cannot_write_leaves_nothing(target: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("kept")
    (tmp_path / "a-folder").mkdir()
    with pytest.raises(MetaregError, match="cannot be written"):
        MetaLearner(MLP(), loss="mse").save(tmp_path / target)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["a-file", "a-folder"]


# ------------------------------------------------------------------------------------------------------- body and head


class Plain(nn.Module):
    """Neither body nor head by name."""

    def __init__(self, last: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 5), nn.Linear(5, 5), last

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.second(hidden) if self.last else self.second(hidden).tanh()


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
    """Also where nothing but the split itself depends on it: another function would be trained than the user calls."""
    learner = MetaLearner(model.double(), algo, head=head, loss="mse")
    batch = episodes("mlp")
    assert learner.meta_parameters
    with pytest.raises(UsageError, match="computes something else than head"):
        learner.step(Episodes(batch.support_x, batch.support_x, batch.query_x, batch.query_x))


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
    with pytest.raises(
        UsageError, match="needs to know which part of Plain is its head: name the submodule with head="
    ):
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
    with pytest.raises(UsageError, match="parameter 'scale' in neither body nor head"):
        MetaLearner(model)


class TiedBody(nn.Module):
    """The body uses one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        self.head = nn.Linear(2, 1)
        self.body[2].weight = self.body[0].weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def tied_loss(meta: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = x @ meta["body.weight"].T + meta["body.bias"]
    return ((hidden @ meta["body.weight"].T + meta["head.bias"] - x) ** 2).mean()


def test_weights_tied_between_body_and_head() -> None:
    class Auto(nn.Module):
        """The head's weight is the body's."""

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
    """The body uses one layer twice, and the head is built around the same one."""

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
    adapted_module = learner.adapt(batch.support_x[0], batch.support_x[0])
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


# ------------------------------------------------------------------------------------------------------------- refusals


def test_parameters_of_several_types() -> None:
    model = MLP()
    model.head.float()
    with pytest.raises(UsageError, match=r"'head.weight' is torch.float32, while 'body.0.weight' is torch.float64"):
        MetaLearner(model)
    model.head.weight.requires_grad_(False)
    model.head.bias = None
    MetaLearner(model)
    with pytest.raises(UsageError, match=r"parameter '0.weight' is torch.complex64; all"):
        MetaLearner(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)))


@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_autocast(strategy: str) -> None:
    learner, batch = MetaLearner(MLP(), loss="mse", strategy=strategy), episodes("mlp")
    with torch.autocast("cpu", torch.bfloat16):
        for call in (
            lambda: learner.step(batch),
            lambda: learner.evaluate(Source(), 2),
            lambda: learner.adapt(batch.support_x[0], batch.support_y[0]),
        ):
            with pytest.raises(UsageError, match="precision='bf16'"):
                call()


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.1), nn.Dropout2d(0.3), nn.LSTM(2, 2, 2, dropout=0.2), nn.MultiheadAttention(2, 1, 0.1)],
    ids=str,
)
def test_dropout_is_refused(layer: nn.Module) -> None:
    with pytest.raises(UsageError, match="would draw random numbers"):
        MetaLearner(nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 1)))


def test_dropout_of_zero_is_not() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.Linear(2, 1)).double()
    MetaLearner(model, loss="mse").step(episodes("mlp"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"algo": "mamll"}, "no algorithm named 'mamll'; did you mean 'maml'"),
        ({"augment": ["cmll"]}, "no augmenter named 'cmll'; did you mean 'cml'"),
        ({"augment": ["maml"]}, "no augmenter named 'maml'"),
        ({"augment": ("cml", {"gamma": 1})}, r"An augmenter is a name, a class or a pair \(name, config\)"),
        ({"augment": SignMAML}, "A list of plugins was expected"),
        ({"augment": [("cml", 3)]}, r"a pair \(name, config\)"),
        ({"augment": [("cml", {"gama": 1})]}, "no option of augmenter 'cml' named 'gama'; did you mean 'gamma'"),
        ({"augment": [("cml", {"gamma": -1})]}, "gamma = -1 cannot be used: it should be greater than or equal to 0"),
        ({"augment": [object()]}, "implements no hook"),
        ({"loss": "mes"}, "no loss named 'mes'; did you mean 'mse'"),
        ({"metric": "accurcy"}, "no metric named 'accurcy'; did you mean 'accuracy'"),
        ({"inner_steps": 0}, "inner_steps = 0 cannot be used"),
        ({"inner_steps": 1.5}, "inner_steps = 1.5 cannot be used"),
        ({"inner_lr": -1}, "inner_lr = -1 cannot be used: it should be greater than 0"),
        ({"inner_lr": math.nan}, "inner_lr = nan cannot be used"),
        ({"inner_lr": "fast"}, "inner_lr = 'fast' cannot be used"),
        ({"algo_config": {"inner_lrr": 1}}, "named 'inner_lrr'; did you mean 'inner_lr'"),
        ({"outer_lr": math.inf}, "outer_lr = inf cannot be used"),
        ({"strategy": "parallel"}, "strategy = 'parallel' cannot be used"),
        ({"memory": "none"}, "memory = 'none' cannot be used"),
        ({"norm": "support"}, "named 'norm' any more: it is 'bn_statistics' now"),
        ({"bn_statistics": "batch"}, "bn_statistics = 'batch' cannot be used"),
        ({"chunk": 0}, "chunk = 0 cannot be used"),
        ({"seed": -1}, "seed = -1 cannot be used"),
        ({"first_ordr": True}, "did you mean 'first_order'"),
        ({"los": "mse"}, "did you mean 'loss'"),
        ({"device": "gpu"}, "no device 'gpu' here; there is cpu"),
        ({"device": "cuda:77"}, "no device 'cuda:77' here"),
        ({"algo": "metasgd", "inner_lr": 1, "inner_lr_max": 0.5}, "inner_lr_max = 0.5 must not be below inner_lr = 1"),
        ({"algo": SignMAML(SignMAML.Config()), "inner_lr": 1}, "is an object already; pass its class to configure it"),
    ],
)  # fmt: skip
def test_bad_options_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as error:
        MetaLearner(MLP(), **options)
    text = str(error.value)
    assert "\n" not in text
    assert "  " not in text


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("mlpp", "no model named 'mlpp'; did you mean 'mlp'"),
        ("mlp", r"needs spec=TaskSpec"),
        (nn.ReLU(), "no trainable parameter"),
        (nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)), "has no shape yet"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_bad_models(model: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        MetaLearner(model, loss="mse")


def test_name_of_a_plugin_in_the_model() -> None:
    model = nn.Sequential(OrderedDict(maml=nn.Linear(2, 2), out=nn.Linear(2, 1)))
    with pytest.raises(UsageError, match=r"'maml\.weight' has the name of a plugin in front"):
        _ = MetaLearner(model, "maml").meta_parameters


def test_loss_that_is_no_scalar() -> None:
    learner = MetaLearner(MLP(), loss=lambda outputs, targets: (outputs - targets) ** 2)
    with pytest.raises((UsageError, RuntimeError), match="scalar"):
        learner.meta_gradient(episodes("mlp"))


def test_mse_does_not_broadcast() -> None:
    batch = episodes("mlp")
    flat = Episodes(batch.support_x, batch.support_y.squeeze(-1), batch.query_x, batch.query_y.squeeze(-1))
    with pytest.raises(UsageError, match=r"outputs and targets of one shape; the model gives \(8, 1\)"):
        MetaLearner(MLP(), loss="mse").step(flat)


def test_no_task_at_all() -> None:
    with pytest.raises(UsageError, match="no task in the batch"):
        MetaLearner(MLP()).step([])


def test_negative_steps() -> None:
    x, y = tasks_of(episodes("mlp"))[0][:2]
    with pytest.raises(UsageError, match="cannot be negative; got -1"):
        MetaLearner(MLP(), loss="mse").adapt(x, y, steps=-1)


@pytest.mark.parametrize(
    "options", [{"tasks": 1}, {"tasks": 5, "inner_steps": []}, {"tasks": 5, "inner_steps": [-1, 2]}]
)
def test_bad_evaluations(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least 2 tasks and numbers of inner steps of 0 or more"):
        MetaLearner(MLP(), loss="mse").evaluate(Source(), **options)


# ---------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_divergence_leaves_the_learner_as_it_was(strategy: str) -> None:
    batch = episodes("mlp")
    learner = MetaLearner(MLP(), "maml", AUGMENTERS, loss="mse", strategy=strategy)
    learner.step(batch)
    before = {name: value.clone() for name, value in learner.meta_parameters.items()}
    bad = Episodes(batch.support_x, batch.support_y, batch.query_x, batch.query_y * math.nan)
    with pytest.raises(
        DivergenceError, match=r"diverged at step 2: the objective is not finite.*after step 1"
    ) as error:
        learner.step(bad)
    assert error.value.exit_code == 1
    assert same(before, learner.meta_parameters)
    assert learner.steps_done == 1
    learner.step(batch)
    untouched = MetaLearner(MLP(), "maml", AUGMENTERS, loss="mse", strategy=strategy)
    untouched.step(batch)
    untouched.step(batch)
    assert same(untouched.meta_parameters, learner.meta_parameters)


def test_an_augmenter_that_returns_nan_is_found_before_the_update() -> None:
    class Broken:
        @hookimpl
        def augment_outer_gradient(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value * math.nan for name, value in grads.items()}

    learner = MetaLearner(MLP(), "maml", [Broken], loss="mse")
    with pytest.raises(DivergenceError, match=r"the meta-gradient is not finite, first in 'body\.0\.weight'"):
        learner.step(episodes("mlp"))
    assert all(value.isfinite().all() for value in learner.meta_parameters.values())


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_the_interval_is_students_over_tasks() -> None:
    evaluation = MetaLearner(MLP(), loss="mse", inner_lr=0.1).evaluate(Source(), 30, inner_steps=[3, 0, 1, 1])
    assert evaluation.inner_steps == (0, 1, 3)
    assert evaluation.scores.shape == (30, 3)
    scores = evaluation.scores[:, 2].numpy()
    assert evaluation.mean(3) == pytest.approx(scores.mean(), rel=1e-12)
    assert evaluation.ci95(3) == pytest.approx(stats.t.interval(0.95, 29, 0, stats.sem(scores))[1], rel=1e-12)
    assert "after inner steps 0: " in str(evaluation)
    with pytest.raises(UsageError, match="no scores after 2 inner steps; there are some after 0, 1, 3"):
        evaluation.mean(2)


@pytest.mark.parametrize("algo", ["maml", "anil"])
@pytest.mark.parametrize("net", MODELS)
def test_evaluation_does_not_depend_on_how_it_is_run(net: str, algo: str) -> None:
    def scores(**options: Any) -> Tensor:
        learner = MetaLearner(MODELS[net](), algo, loss=LOSSES[net], inner_lr=0.1, **options)
        return learner.evaluate(Source(net), 12).scores

    serial = scores(strategy="serial")
    assert scores(strategy="traced").equal(serial)
    for options in ({"strategy": "vectorized"}, {"strategy": "vectorized", "chunk": 5}):
        torch.testing.assert_close(scores(**options), serial, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bn_statistics", ["transductive", "support"])
def test_the_features_that_stay_are_computed_once_in_an_evaluation(bn_statistics: str) -> None:
    model, seen = ConvNet(), []
    learner = MetaLearner(model, "anil", strategy="serial", bn_statistics=bn_statistics)
    learner.evaluate(Source("conv"), 3, inner_steps=[0])
    next(model.children()).register_forward_hook(lambda *_: seen.append(1))
    learner.evaluate(Source("conv"), 3, inner_steps=[0])
    alone = len(seen)
    learner.evaluate(Source("conv"), 3, inner_steps=[0, 1, 2, 5])
    assert len(seen) == 2 * alone


def test_evaluation_uses_no_augmenter() -> None:
    scores = [
        MetaLearner(MLP(), "maml", augment, loss="mse", inner_lr=0.1).evaluate(Source(), 5).scores
        for augment in ([], AUGMENTERS)
    ]
    assert scores[0].equal(scores[1])


def test_more_tasks_begin_with_the_same_tasks() -> None:
    learner = MetaLearner(MLP(), loss="mse", inner_lr=0.1)
    few, many = (learner.evaluate(Source(), tasks).scores for tasks in (7, 130))
    torch.testing.assert_close(many[:7], few, rtol=1e-9, atol=0)


class OfSeveralSizes:
    """Every third task has fewer queries; they come in stacks as `arrange` makes them of the single tasks."""

    def __init__(self, arrange: Callable[[list[Any]], list[Episodes]]) -> None:
        self.arrange = arrange

    def episodes(self, indices: Sequence[int]) -> list[Episodes]:
        drawn = (episodes("mlp", 1, query=1 + (index % 3 > 0), seed=index) for index in indices)
        return self.arrange([tasks_of(one)[0] for one in drawn])


def backwards_and_silent(tasks: list[Any]) -> list[Episodes]:
    return [Episodes(*stack.parts) for stack in Episodes.group(tasks)[::-1]]


def in_two_groups(tasks: list[Any]) -> list[Episodes]:
    """Positions that count from 0 in each half say nothing of the whole."""
    return Episodes.group(tasks[: len(tasks) // 2]) + Episodes.group(tasks[len(tasks) // 2 :])


def placed(tasks: list[Any]) -> list[Episodes]:
    """One stack of each task, the last in front."""
    alone = [Episodes(*(part[None] for part in task)).placed([place]) for place, task in enumerate(tasks)]
    return alone[::-1]


def cut(tasks: list[Any]) -> list[Episodes]:
    return [part for stack in Episodes.group(tasks) for part in (stack[1:], stack[:1])]


@pytest.mark.parametrize("arrange", [Episodes.group, backwards_and_silent, in_two_groups, placed, cut])
@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_scores_are_in_the_order_of_the_tasks(arrange: Any, strategy: str) -> None:
    source = OfSeveralSizes(arrange)
    learner = MetaLearner(MLP(), loss="mse", inner_lr=0.1, strategy=strategy)
    scores = learner.evaluate(source, 130, inner_steps=[0, 2]).scores
    for number in (*range(12), 99, 100, 101, 102, 129):
        (task,) = (one for stack in source.episodes([number]) for one in tasks_of(stack))
        for column, steps in enumerate((0, 2)):
            outputs = learner.adapt(task[0], task[1], steps)(task[2])
            assert scores[number, column].item() == pytest.approx(nn.functional.mse_loss(outputs, task[3]).item())


def test_stacks_keep_the_positions_of_their_tasks() -> None:
    stack = episodes("mlp", 5).placed([4, 2, 0, 1, 3])
    assert stack.to("cpu").contiguous()[1:4].positions == (2, 0, 1)
    assert [part.positions for part in stack.chunks(2)] == [(4, 2), (0, 1), (3,)]
    assert episodes("mlp", 2)[:1].positions is None
    with pytest.raises(UsageError, match="2 positions are given for 5 tasks"):
        stack.placed([0, 1])


def test_metric_of_ones_own() -> None:
    worst = Metric("worst", lambda outputs, targets: (outputs - targets).abs().max(), higher_is_better=False)
    learner = MetaLearner(MLP(), loss="mse", metric=worst)
    learner.step(episodes("mlp"))
    assert "worst" in learner.logs
    assert learner.evaluate(Source(), 3).metric == "worst"


# ------------------------------------------------------------------------------------------------------------------ fit


def test_fit_takes_the_training_tasks_in_order() -> None:
    class Recording(Source):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[int] = []

        def episodes(self, split: str, indices: Sequence[int]) -> Episodes:
            assert split == "train"
            self.asked += indices
            return super().episodes(split, indices)

    source = Recording()
    MetaLearner(MLP(), loss="mse").fit(source, 5, meta_batch=3)
    assert list(dict.fromkeys(source.asked)) == list(range(15))


def test_fit_on_tasks_of_unequal_sizes_equals_single_steps() -> None:
    class Ragged(Source):
        stackable = False

        def episodes(self, split: str, indices: Sequence[int]) -> list[Episodes]:
            tasks = []
            for index, (x, y, *query) in zip(indices, tasks_of(super().episodes(split, indices)), strict=True):
                size = 3 + index % 3
                tasks.append((x[:size], y[:size], *query))
            return Episodes.group(tasks)

    source = Ragged()
    fitted = MetaLearner(MLP(), loss="mse").fit(source, 4, meta_batch=3)
    single = MetaLearner(MLP(), loss="mse", strategy="serial")
    for step in range(4):
        single.step(source.episodes("train", range(3 * step, 3 * step + 3)))
    assert difference(fitted.meta_parameters, single.meta_parameters) < 1e-12


def test_observers_hear_of_steps_and_validations() -> None:
    class Observer:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.validations: list[tuple[int, str]] = []

        @hookimpl
        def on_step(self, step: int, logs: dict[str, float]) -> None:
            assert {"loss", "query_loss", "mse", "grad_norm", "steps_per_second", "cml.colearner_metric"} == set(logs)
            assert all(math.isfinite(value) for value in logs.values())
            self.steps.append(step)

        @hookimpl
        def on_evaluation(self, step: int, split: str) -> None:
            self.validations.append((step, split))

    observer = Observer()
    learner = MetaLearner(MLP(), augment=["cml"], loss="mse")
    learner.fit(Source(), 7, log_every=3, eval_every=4, eval_tasks=2, observers=[observer])
    assert observer.steps == [3, 6, 7]
    assert observer.validations == [(4, "validation"), (7, "validation")]


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 3, "meta_batch": 0}, {"steps": 3, "eval_tasks": 1}])
def test_impossible_schedules(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        MetaLearner(MLP(), loss="mse").fit(Source(), **options)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (object(), r"needs a method episodes\(split, indices\)"),
        ("sinusoidd", "no task named 'sinusoidd'; did you mean 'sinusoid'"),
    ],
)
def test_bad_sources(source: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        MetaLearner(MLP(), loss="mse").fit(source, 2)


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (None, "it returned a NoneType"),
        (tuple(episodes("mlp").parts), "it returned a tuple"),
        (episodes("mlp", tasks=2), "returned 2 tasks where 4 were asked for"),
    ],
)
def test_sources_that_break_their_contract(returned: Any, sentence: str) -> None:
    class Broken:
        def episodes(self, split: str, indices: Sequence[int]) -> Any:  # noqa: ARG002
            return returned

    with pytest.raises(UsageError, match=sentence):
        MetaLearner(MLP(), loss="mse").fit(Broken(), 2)
