"""Side effects of a forward are discarded, and changes of Python state between calls are noticed."""

from __future__ import annotations

import copy
import logging
import random
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from metareg import Episodes, MetaLearner, Metric, UsageError, hookimpl
from metareg.engine.python_state import PythonState

INNER_LR = 0.3
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(3, 6, 4, 5, generator=DRAW, dtype=torch.float64)
Y = torch.randint(3, (3, 6), generator=DRAW)
BATCH = Episodes(X, Y, X.flip(1), Y.flip(1))


class Given:
    def episodes(self, indices: Any) -> Episodes:
        return Episodes(*(part[[index % 3 for index in indices]] for part in BATCH.parts))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(5, 1, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Flat(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.flatten(1)).relu())


class Stateful(nn.Module):
    """Computes with statistics, a counter, a history and a cache that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(20, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.calls, self.history, self.mask = 0, [1.0], None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(2.0)
        if self.mask is None:
            self.mask = torch.ones(8, dtype=x.dtype).cumsum(0)
        y = self.layer(x.flatten(1))
        self.mean.mul_(0.9).add_(0.1 * y.detach().mean(0))
        return self.head((y - self.mean) * self.mask * sum(self.history) / self.calls)


MODELS = {
    "gru": lambda: Recurrent(nn.GRU(5, 8, batch_first=True)),
    "rnn": lambda: Recurrent(nn.RNN(5, 8, batch_first=True)),
    "lstm": lambda: Recurrent(nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True)),
    "transformer": Attending,
    "transformer in evaluation mode": lambda: Attending().eval(),
    "spectral norm": lambda: Flat(spectral_norm(nn.Linear(20, 8))),
    "statistics": Stateful,
    "plain": lambda: Flat(nn.Linear(20, 8)),
    "compiled": lambda: torch.compile(Flat(nn.Linear(20, 8)), backend="eager"),
}


def build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().double()


def loop(model: nn.Module, params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the meta-gradient with `torch.autograd.grad`, on a fresh copy of the model for each of its calls."""

    def predict(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(copy.deepcopy(model), params, (x,))

    params = {name: value.clone().requires_grad_() for name, value in params.items()}
    total = torch.zeros((), dtype=torch.float64)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for task in range(len(BATCH)):
            x, y, query_x, query_y = BATCH.unstack(task)
            grads = torch.autograd.grad(
                F.cross_entropy(predict(params, x), y), list(params.values()), create_graph=True
            )
            adapted = {name: p - INNER_LR * grad for (name, p), grad in zip(params.items(), grads, strict=True)}
            total = total + F.cross_entropy(predict(adapted, query_x), query_y) / len(BATCH)
        grads = torch.autograd.grad(total, list(params.values()))
    torch.backends.mha.set_fastpath_enabled(fast)
    return total.detach(), dict(zip(params, grads, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", MODELS)
def test_auto_trains_whatever_a_plain_loop_trains(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "metareg")
    model = build(name)
    learner = MetaLearner(model, inner_lr=INNER_LR, head="head")
    model = getattr(model, "_orig_mod", model)
    start = learner.meta_parameters
    loss, expected = loop(model, start)
    buffers = {key: value.clone() for key, value in learner.model.constants().items()}
    for _ in range(3):  # the second call is traced
        found, grads = learner.meta_gradient(BATCH)
        torch.testing.assert_close(found, loss)
        for key, value in expected.items():
            torch.testing.assert_close(grads[key], value)
    learner.evaluate(Given(), 4, inner_steps=(1,))
    adapted = learner.adapt(X[0], Y[0])
    after = learner.model.constants()
    assert all(value.equal(after[key]) for key, value in buffers.items())
    if name == "statistics":
        module = learner.model.module
        assert (module.calls, module.history, module.mask) == (0, [1.0], None)
    outputs = functional_call(copy.deepcopy(model), dict(adapted.named_parameters()), (X[0],))
    for _ in range(2):
        torch.testing.assert_close(copy.deepcopy(adapted)(X[0]), outputs)
    said = [line for line in caplog.messages if "strategy traced instead of vectorized for training" in line]
    assert (
        len(said) == (name in ("gru", "rnn", "lstm", "spectral norm", "statistics")) == (learner.strategy == "traced")
    )
    writes = [line for line in caplog.messages if "are discarded after each call" in line]
    assert len(writes) == (name in ("spectral norm", "statistics"))
    if name == "statistics":
        assert all(word in writes[0] for word in ("mean", "calls", "history", "mask"))


def test_a_layer_that_writes_into_parameters_leaves_the_learners() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 4, max_norm=0.5), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).mean(1))

    x = torch.randint(10, (2, 6, 5), generator=DRAW)
    batch = Episodes(x, Y[:2], x, Y[:2])
    learners = [MetaLearner(Embedded(), inner_lr=0.1, head="head", strategy=each) for each in ("auto", "serial")]
    start = learners[0].meta_parameters
    learners[1].load_state(learners[0].state())
    before = {name: value.clone() for name, value in start.items()}
    (loss, grads), (other, others) = (learner.meta_gradient(batch) for learner in learners)
    assert all(value.equal(before[name]) for name, value in learners[1].meta_parameters.items())
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(grads, others)


TEMPERATURE = 1.0
HELPERS = ModuleType("helpers")


class Settings:
    scale = 1.0


class Weighted:
    def __init__(self) -> None:
        self.weight = 1.0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.weight * F.cross_entropy(outputs, targets)


class Indirect:
    """A loss whose method reads a global name."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale(F.cross_entropy(outputs, targets))

    def scale(self, value: Tensor) -> Tensor:
        return TEMPERATURE * value


def make_closure() -> tuple[Any, Any]:
    weights = [1.0]
    return (lambda outputs, targets: weights[0] * F.cross_entropy(outputs, targets)), (
        lambda value: weights.__setitem__(0, value)
    )


def make_global() -> tuple[Any, Any]:
    def change(value: float) -> None:
        global TEMPERATURE
        TEMPERATURE = value

    change(1.0)
    return (lambda outputs, targets: TEMPERATURE * F.cross_entropy(outputs, targets)), change


def make_class_attribute() -> tuple[Any, Any]:
    Settings.scale = 1.0
    return (lambda outputs, targets: Settings.scale * F.cross_entropy(outputs, targets)), (
        lambda value: setattr(Settings, "scale", value)
    )


def make_function_of_module() -> tuple[Any, Any]:
    """What a function reads that is called by the name of its module."""
    exec("SCALE = 1.0\ndef scale(value): return SCALE * value", vars(HELPERS))
    return (lambda outputs, targets: HELPERS.scale(F.cross_entropy(outputs, targets))), (
        lambda value: setattr(HELPERS, "SCALE", value)
    )


def make_called_method() -> tuple[Any, Any]:
    """What a method reads that the loss calls."""
    _, change = make_global()
    return Indirect(), change


def make_object() -> tuple[Any, Any]:
    loss = Weighted()
    return loss, lambda value: setattr(loss, "weight", value)


def make_method() -> tuple[Any, Any]:
    loss = Weighted()
    return loss.__call__, lambda value: setattr(loss, "weight", value)


def make_module(attribute: str, convert: Any = float) -> Any:
    def make() -> tuple[Any, Any]:
        loss = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float64))
        return loss, lambda value: setattr(loss, attribute, convert(value))

    return make


@pytest.mark.parametrize(
    "make",
    [
        make_closure, make_global, make_class_attribute, make_function_of_module, make_called_method, make_object,
        make_method, make_module("label_smoothing"),
        make_module("weight", lambda value: torch.tensor([1.0, 5 * value, 0.1], dtype=torch.float64)),
    ],
)  # fmt: skip
def test_a_variable_of_the_loss_counts_with_the_value_that_it_has(make: Any) -> None:
    losses: dict[str, list[float]] = {}
    strategies = ("serial", "traced", "vectorized") if make is make_closure else ("serial", "vectorized")
    for each in strategies:
        loss, change = make()
        learner = MetaLearner(build("plain"), strategy=each, inner_lr=INNER_LR, loss=loss, metric="accuracy")
        losses[each] = []
        for value in (None, None, 0.7, 0.5, 0.5, 0.5, 0.5, 0.2):
            if value is not None:
                change(value)
            losses[each].append(learner.meta_gradient(BATCH)[0].item())
    assert all(losses[each] == pytest.approx(losses["serial"]) for each in strategies)
    assert len(set(losses["serial"])) == 4


def test_a_variable_that_changes_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Recomputed gradients consist of several graphs, all of which are traced with the old value."""
    loss, change = make_closure()
    options = {"strategy": "vectorized", "memory": "recompute", "inner_steps": 3}
    learner = MetaLearner(build("plain"), inner_lr=INNER_LR, loss=loss, metric="accuracy", **options)
    for _ in range(3):
        before = learner.meta_gradient(BATCH)[0]
    change(0.5)
    assert not torch.allclose(learner.meta_gradient(BATCH)[0], before)
    (message,) = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert "weights[0]" in message


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_a_loss_with_random_numbers_draws_them_in_every_step(memory: str, caplog: pytest.LogCaptureFixture) -> None:
    """A graph would repeat the first draws, which in one inner step change the parameters very little."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return random.uniform(0.9, 1.1) * F.cross_entropy(outputs, targets)

    def count_draws() -> int:
        """The random numbers that a meta-gradient draws."""
        random.seed(0)
        learner.meta_gradient(BATCH)
        again = random.Random(0)
        for number in range(100):
            if again.getstate() == random.getstate():
                return number
            again.random()
        raise AssertionError("more than 100")

    learner = MetaLearner(build("plain"), inner_lr=1e-3, inner_steps=3, strategy="traced", memory=memory, loss=loss)
    counts = [count_draws() for _ in range(8)]
    assert counts[-1] == len(BATCH) * {"store": 4, "recompute": 7}[memory]
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) == 1


class Telling:
    """An augmenter that logs more if a query set is large."""

    @hookimpl
    def augment_outer_loss(self, adapted: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        term = torch.stack([value.square().mean() for value in adapted.values()]).sum()
        return term, {"term": term} if len(targets) < 5 else {"larger": 2 * term, "term": term}


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_logs_can_depend_on_the_number_of_examples(memory: str) -> None:
    learner = MetaLearner(build("plain"), "maml", [Telling], inner_lr=INNER_LR, strategy="vectorized", memory=memory)
    smaller = Episodes(*(part if number < 2 else part[:, :4] for number, part in enumerate(BATCH.parts)))
    seen: list[set[str]] = []

    class Recorder:
        @hookimpl
        def on_step(self, logs: dict[str, float]) -> None:
            seen.append({name for name in logs if name.startswith("telling")})

    learner.fit([BATCH, smaller] * 3, 6, meta_batch=3, log_every=1, observers=[Recorder()])
    assert seen == [{"telling.larger", "telling.term"}, {"telling.term"}] * 3


def test_changes_are_noticed_and_named() -> None:
    seen = {"a": [1, {"b": 2}], "c": {3}}

    def read() -> Any:
        return seen

    state = PythonState(read)
    assert not list(state.find_changes())
    seen["a"][1]["b"] = 5
    seen["c"].add(4)
    assert sorted(state.find_changes()) == ["seen['a'][1]['b']", "seen['c'][4]"]
    state.restore()
    assert seen == {"a": [1, {"b": 2}], "c": {3}}


@pytest.mark.parametrize("strategy", ["serial", "traced", "vectorized", "auto"])
@pytest.mark.parametrize(
    "draw", [lambda x: F.dropout(x, 0.5), lambda x: x + torch.rand_like(x), lambda x: x * torch.randn(())]
)
def test_a_forward_that_draws_is_refused(draw: Any, strategy: str) -> None:
    class Drawing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return draw(super().forward(x.flatten(1)))

    learner = MetaLearner(Drawing(20, 3, dtype=torch.float64), strategy=strategy)
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match="Drawing draws random numbers"):
        learner.step(BATCH)
    assert torch.get_rng_state().equal(before)


def test_a_loss_that_cannot_be_traced_runs_untraced() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = F.cross_entropy(outputs, targets)
        return value * 2 if float(value.detach()) > 0 else value

    model = build("plain")
    values = {}
    for strategy in ("serial", "traced"):
        learner = MetaLearner(model, strategy=strategy, loss=loss, metric="accuracy", inner_lr=INNER_LR)
        values[strategy] = [learner.meta_gradient(BATCH)[0].item() for _ in range(3)]
    assert values["traced"] == values["serial"]


def test_a_metric_that_counts_its_calls_is_not_frozen_within_an_evaluation() -> None:
    counter = [0]

    def count(outputs: Tensor, targets: Tensor) -> Tensor:
        counter[0] += 1
        return 0 * F.cross_entropy(outputs, targets) + (1.0 if counter[0] <= 20 else 2.0)

    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 3)).double()
    learner = MetaLearner(model, metric=Metric("count", count, higher_is_better=True), strategy="vectorized", chunk=1)
    for number in range(4):
        counter[0] = 0
        scores = learner.evaluate(Given(), 36, inner_steps=(1,)).scores.flatten().tolist()
        assert set(scores) == {1.0, 2.0}
        if number > 1:  # tracing, which the first evaluations try, counts too
            assert scores == [1.0] * 20 + [2.0] * 16


def test_a_variable_that_an_untraced_part_changes_reaches_the_traced_parts() -> None:
    """With ``memory="recompute"``, parts of a gradient are traced one by one; here one of them cannot be."""

    def gradients(strategy: str) -> list[Tensor]:
        scale = [1.0]

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            if len(outputs) == 4:  # the query set
                scale[0] = 3.0 if float(outputs.detach().sum()) > 50 else 1.0
            return scale[0] * F.cross_entropy(outputs, targets)

        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(20, 3)).double()
        learner = MetaLearner(model, loss=loss, metric="accuracy", inner_lr=0.1, strategy=strategy, memory="recompute")
        found = []
        for step in range(8):
            query = X[:1, :4] + 100.0 * (step >= 5)
            _, grads = learner.meta_gradient(Episodes(X[:1], Y[:1], query, Y[:1, :4]))
            found += grads.values()
        return found

    for one, other in zip(gradients("serial"), gradients("traced"), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("strategy", ["traced", "vectorized"])
def test_logs_are_those_before_the_step(strategy: str) -> None:
    """A log that is a meta-parameter times one is no meta-parameter, which the optimiser changes in place."""

    class Scale:
        training_only = True

        @hookimpl
        def init_meta(self) -> dict[str, Tensor]:
            return {"scale": torch.tensor(0.5, dtype=torch.float64)}

        @hookimpl
        def augment_outer_loss(self, meta: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            (scale,) = (value for name, value in meta.items() if name.endswith("scale"))
            return 0.1 * scale.square(), {"value": scale * 1.0}

    def logs(strategy: str) -> list[dict[str, float]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(20, 3)).double()
        learner = MetaLearner(model, "maml", [Scale], inner_lr=0.1, outer_lr=0.1, strategy=strategy)
        found = []
        for _ in range(4):
            learner.step(BATCH[:1])
            found.append(dict(learner.logs))
        return found

    for one, other in zip(logs("serial"), logs(strategy), strict=True):
        assert one == pytest.approx(other)
