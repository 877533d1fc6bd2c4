"""The engine beyond the plain meta-gradient: first order, normalisation, noise, sizes, chunks, outer stages."""

from __future__ import annotations

from itertools import cycle, permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metareg import Episodes, MetaLearner, PluginConfig, hookimpl
from metareg.engine import tracing
from metareg.engine.strategies import choose_strategy
from metareg_image.glyphs import Glyphs
from parity import ALGORITHMS, GAMMA, INNER_LR, TOLERANCE, check, initialized, learner_of
from reference import NETS, difference, inner_loop, meta_gradient
from samples import episodes, tasks_of

CML = ("cml", {"gamma": GAMMA})
STRATEGIES = ("serial", "traced", "vectorized")


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("augment", ["none", "cml"])
@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_first_order(net: str, algo: str, augment: str, memory: str) -> None:
    strategy = "traced" if net == "conv" else "vectorized"
    check(net, algo, augment, 3, memory=memory, strategy=strategy, first_order=True)


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_support_statistics(algo: str, memory: str) -> None:
    check("conv", algo, "cml", 2, memory=memory, strategy="serial", bn_statistics="support")


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 8, 8]),
        nn.RMSNorm([8]),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_normalisation_layers_agree_between_strategies(layer: nn.Module) -> None:
    """The batched backward of some of them is wrong if the map is differentiated from outside."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), layer, nn.Flatten(), nn.ReLU(), nn.Linear(256, 5)).double()
    first, *others = [
        MetaLearner(model, inner_lr=0.4, strategy=strategy).meta_gradient(episodes("conv"))[1]
        for strategy in STRATEGIES
    ]
    assert all(difference(first, other) < TOLERANCE for other in others)


@pytest.mark.parametrize("strategy", ["traced", "vectorized"])
def test_a_graph_is_for_one_layout_of_grey_images(strategy: str) -> None:
    """PyTorch calls one-channel images contiguous in both memory layouts."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)).double()
    first = episodes("conv", 2)
    x = first.support_x.movedim(-3, -1)
    last = Episodes(x.clone(memory_format=torch.contiguous_format).movedim(-1, -3), *first.parts[1:])
    assert last.support_x.is_contiguous()
    assert last.support_x.stride() != first.support_x.stride()
    learner = MetaLearner(model, inner_lr=0.4, strategy=strategy)
    grads = [learner.meta_gradient(batch)[1] for batch in (first, first, last, last, first)]
    assert all(difference(each, grads[0]) < TOLERANCE for each in grads)


class Decay:
    """An algorithm whose meta-gradient is the meta-parameters themselves."""

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - 0.1 * grads[name] for name, value in params.items()}

    @hookimpl
    def outer_gradient(self, meta: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: meta[name] for name in meta}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_does_not_change_the_gradients_before_it(strategy: str) -> None:
    learner = MetaLearner(nn.Linear(2, 1).double(), Decay, loss="mse", strategy=strategy)
    for _ in range(3):
        _, grads = learner.meta_gradient(episodes("mlp", 1))
        kept = {name: value.clone() for name, value in grads.items()}
        learner.step(episodes("mlp", 1))
        assert all(value.equal(kept[name]) for name, value in grads.items())


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_finite_differences(algo: str) -> None:
    """The meta-gradient is the derivative of the reported objective, in a random direction of all meta-parameters."""
    batch = episodes("mlp")
    learner = learner_of("mlp", algo, [CML], inner_steps=2)
    meta = initialized(learner, batch)
    _, grads = learner.meta_gradient(batch)
    generator = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in meta.items()}

    def objective(offset: float) -> float:
        for name, value in meta.items():
            value += offset * direction[name]
        loss = learner.meta_gradient(batch)[0].item()
        for name, value in meta.items():
            value -= offset * direction[name]
        return loss

    numeric = (objective(1e-6) - objective(-1e-6)) / 2e-6
    exact = sum((grads[name] * direction[name]).sum().item() for name in meta)
    assert numeric == pytest.approx(exact, rel=1e-6)


# ------------------------------------------------------------------------------------------------------ sizes, chunks


@pytest.mark.parametrize("chunk", [1, 2, 4, 9])
def test_chunks_change_nothing(chunk: int) -> None:
    batch = episodes("mlp", tasks=5)
    augment = [CML, "dropgrad", ("gradient-noise", {"where": "outer"})]
    loss, grads = learner_of("mlp", "metasgd", augment).meta_gradient(batch)
    learner = learner_of("mlp", "metasgd", augment, chunk=chunk)
    chunked_loss, chunked = learner.meta_gradient(batch)
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-12, atol=0)
    assert difference(chunked, grads) < 1e-12
    whole = learner_of("mlp", "metasgd", augment)
    whole.meta_gradient(batch)
    assert learner.logs == pytest.approx(whole.logs, rel=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tasks_of_unequal_sizes_equal_one_by_one(strategy: str) -> None:
    batches = [
        episodes("mlp", tasks=2, shots=shots, query=query, seed=shots) for shots, query in ((1, 3), (2, 3), (2, 1))
    ]
    tasks = [task for group in zip(*map(tasks_of, batches), strict=True) for task in group]
    learner = learner_of("mlp", "maml", [CML], inner_steps=2, strategy=strategy)
    loss, grads = learner.meta_gradient(Episodes.group(tasks))
    expected_loss, expected = meta_gradient(
        NETS["mlp"], learner.meta_parameters, tasks, algo="maml", inner_lr=INNER_LR["mlp"], inner_steps=2, gamma=GAMMA
    )
    torch.testing.assert_close(loss, expected_loss, rtol=TOLERANCE, atol=0)
    assert difference(grads, expected) < TOLERANCE


def test_traced_graph_follows_shapes_and_values() -> None:
    """The second call with a shape runs a traced graph; other shapes and values do not get stale results."""
    learner = learner_of("mlp", "maml", [CML])
    for tasks, seed in ((3, 1), (3, 2), (2, 3), (3, 4), (2, 5), (3, 1)):
        batch = episodes("mlp", tasks, seed=seed)
        learner.step(batch)
        serial = learner_of("mlp", "maml", [CML], strategy="serial")
        initialized(serial, batch)
        serial.load_state(learner.state())
        assert difference(learner.meta_gradient(batch)[1], serial.meta_gradient(batch)[1]) < 1e-12


def test_strides_do_not_matter() -> None:
    batch = episodes("conv")
    strided = Episodes(*(part.transpose(0, -1).contiguous().transpose(0, -1) for part in batch.parts))
    assert strided.support_x.stride() != batch.support_x.stride()
    learner = learner_of("conv", "anil")
    learner.meta_gradient(batch)
    _, grads = learner.meta_gradient(batch)
    assert difference(learner.meta_gradient(strided)[1], grads) < 1e-12


def test_a_traced_graph_gives_the_bits_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    # A resumed run traces at other calls, because the first calls with a shape run the function itself.
    monkeypatch.setattr("metareg.engine.engine._STACKS_BEFORE_TRACING", 1)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 1))
    learner = MetaLearner(model, algo="maml", loss="mse", inner_lr=0.01, strategy="vectorized")
    x = torch.rand(64, 20, 1, generator=torch.Generator().manual_seed(1))
    source = Given(Episodes(x[:, :10], x[:, :10].sin(), x[:, 10:], x[:, 10:].sin()))
    first, second = (learner.evaluate(source, 64, inner_steps=(1,)) for _ in range(2))
    assert [bool(program._graphs) for program in learner.engine._programs.values()] == [True]
    assert torch.equal(first.scores, second.scores)


def test_the_check_of_a_run_traces_nothing() -> None:
    learner = learner_of("mlp", "maml", strategy="traced")
    source = Given(Episodes(*(part[[0, 1, 0, 1]] for part in episodes("mlp").parts)))
    for tasks, traced in ((2, False), (4, True)):
        learner.evaluate(source, tasks, inner_steps=(0, 1))
        assert [bool(program._graphs) for program in learner.engine._programs.values()] == [traced]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_traced_training_has_no_idle_operations_and_the_bits_of_the_function(
    monkeypatch: pytest.MonkeyPatch, net: str, inner_steps: int
) -> None:
    kept: list[torch.fx.Graph] = []
    pruned = tracing.remove_idle_operations

    def noted(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        graph = pruned(graph)
        kept.append(graph.graph)
        return graph

    monkeypatch.setattr(tracing, "remove_idle_operations", noted)
    batch = episodes(net)
    learner = learner_of(net, "maml", inner_steps=inner_steps)
    (_, plain), (_, traced) = (learner.meta_gradient(batch) for _ in range(2))
    assert all(torch.equal(plain[name], traced[name]) for name in plain)
    (graph,) = kept
    operations = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert not any(operation._schema.is_mutable for operation in operations)
    assert torch.ops.aten.detach.default not in operations


class Given:
    """Records the tasks that it was given."""

    def __init__(self, tasks: Episodes) -> None:
        self.tasks = tasks

    def episodes(self, indices: range) -> Episodes:
        return self.tasks[indices.start : indices.stop]


# --------------------------------------------------------------------------------------------------------- augmenters


@pytest.mark.parametrize(
    ("algo", "order"),
    list(zip(cycle(ALGORITHMS), permutations([CML, "dropgrad", "gradient-noise"]), strict=False)),
    ids=str,
)
def test_any_order_of_augmenters(algo: str, order: Any) -> None:
    batch = episodes("mlp")
    first, *others = [
        learner_of("mlp", algo, order, inner_steps=2, strategy=strategy).meta_gradient(batch)[1]
        for strategy in STRATEGIES
    ]
    assert all(difference(first, other) < 1e-12 for other in others)


def test_the_order_of_augmenters_counts() -> None:
    """Dropping entries after adding noise differs from adding noise afterwards: the list is a chain, not a set."""
    batch = episodes("mlp")
    first, second = (
        learner_of("mlp", "maml", order).meta_gradient(batch)[1]
        for order in (["dropgrad", "gradient-noise"], ["gradient-noise", "dropgrad"])
    )
    assert difference(first, second) > 1e-3


def noise_of(learner: MetaLearner, step: int, tasks: int) -> list[dict[str, Any]]:
    """Draw again the noise that a training step draws for each of its tasks."""
    adapted = learner.stages.adapted_parameters(learner.model)
    params = {name: learner.meta_parameters[name] for name in adapted}
    like, draws = next(iter(params.values())), [(step, task) for task in range(tasks)]
    config = learner.config
    return learner.stages.draw_noise("task", params, like, config.inner_steps, config.seed, draws, step)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("algo", ["maml", "anil"])
@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_dropgrad_equals_a_loop_with_the_same_noise(kind: str, algo: str, strategy: str) -> None:
    batch = episodes("mlp")
    learner = learner_of("mlp", algo, [("dropgrad", {"rate": 0.3, "kind": kind})], inner_steps=3, strategy=strategy)
    meta = initialized(learner, batch)
    drawn = noise_of(learner, 0, len(batch))

    def change(task: int, step: int, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        factors = {}
        for name, value in drawn[task]["dropgrad"][step].items():
            factors[name] = value.double() / 0.7 if kind == "bernoulli" else 1 + (0.3 / 0.7) ** 0.5 * value
        return {name: value * factors[name] for name, value in grads.items()}

    _, expected = meta_gradient(
        NETS["mlp"], meta, tasks_of(batch), algo=algo, inner_lr=INNER_LR["mlp"], inner_steps=3, change=change
    )
    assert difference(learner.meta_gradient(batch)[1], expected) < TOLERANCE


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("relative", [True, False])
def test_gradient_noise_equals_a_loop_with_the_same_noise(relative: bool, strategy: str) -> None:
    batch = episodes("mlp")
    options = {"sigma": 0.2, "relative": relative}
    learner = learner_of("mlp", "maml", [("gradient-noise", options)], inner_steps=2, strategy=strategy)
    meta = initialized(learner, batch)
    drawn = noise_of(learner, 0, len(batch))

    def change(task: int, step: int, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = torch.cat([value.flatten() for value in grads.values()]).detach()
        scale = 0.2 * (flat.norm() / len(flat) ** 0.5 if relative else 1.0)
        noise = drawn[task]["gradient-noise"][step]
        return {name: value + scale * noise[name].double() for name, value in grads.items()}

    _, expected = meta_gradient(
        NETS["mlp"], meta, tasks_of(batch), algo="maml", inner_lr=INNER_LR["mlp"], inner_steps=2, change=change
    )
    assert difference(learner.meta_gradient(batch)[1], expected) < TOLERANCE


def test_noise_is_new_for_every_task_inner_step_and_training_step() -> None:
    batch = episodes("mlp")
    learner = learner_of("mlp", "maml", [("dropgrad", {"kind": "gaussian"})], inner_steps=2)
    initialized(learner, batch)
    draws = [
        noise["dropgrad"][inner]["body.0.weight"]
        for step in (0, 1)
        for noise in noise_of(learner, step, 2)
        for inner in (0, 1)
    ]
    assert len(draws) == 8
    assert not any(a.equal(b) for a, b in permutations(draws, 2))


def test_outer_noise_reaches_every_meta_parameter() -> None:
    batch = episodes("mlp")
    noisy = learner_of("mlp", "metasgd", [CML, ("gradient-noise", {"where": "outer"})]).meta_gradient(batch)[1]
    plain = learner_of("mlp", "metasgd", [CML]).meta_gradient(batch)[1]
    assert all((noisy[name] - plain[name]).abs().min() > 0 for name in plain)
    total = torch.stack([value.square().sum() for value in plain.values()]).sum().sqrt()
    noise = torch.stack([(noisy[name] - plain[name]).square().sum() for name in plain]).sum().sqrt()
    assert (noise / total).item() == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_co_learner_without_weight_changes_nothing_else(algo: str) -> None:
    batch = episodes("mlp")
    loss, plain = learner_of("mlp", algo).meta_gradient(batch)
    zero_loss, zero = learner_of("mlp", algo, [("cml", {"gamma": 0})]).meta_gradient(batch)
    torch.testing.assert_close(zero_loss, loss, rtol=1e-14, atol=0)
    assert difference({name: zero[name] for name in plain}, plain) < 1e-14
    assert all(not value.any() for name, value in zero.items() if name.startswith("cml."))


def test_co_learner_stands_outside_the_inner_loop() -> None:
    """The adapted parameters do not depend on ψ, either through the update or in evaluation."""
    batch = episodes("mlp")
    plain, with_cml = learner_of("mlp", "maml"), learner_of("mlp", "maml", [CML])
    x, y = batch.support_x[0], batch.support_y[0]
    for actual, expected in zip(with_cml.adapt(x, y, 3).parameters(), plain.adapt(x, y, 3).parameters(), strict=True):
        assert actual.equal(expected)


def test_co_learner_logs_its_metric() -> None:
    learner = learner_of("conv", "anil", [CML])
    learner.step(episodes("conv"))
    assert 0 <= learner.logs["cml.colearner_metric"] <= 1
    assert learner.logs.keys() == {"query_loss", "accuracy", "cml.colearner_metric", "grad_norm"}


# --------------------------------------------------------------------------------------------------------- outer stages


class Reptile:
    """Nichol, Achiam and Schulman (2018): the meta-gradient points from the adapted parameters to the initial ones."""

    class Config(PluginConfig):
        inner_lr: float = 0.1

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - self.config.inner_lr * grads[name] for name, value in params.items()}

    @hookimpl
    def outer_gradient(self, meta: dict[str, Tensor], adapted: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: meta[name] - value for name, value in adapted.items()}


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("augment", ["none", "cml"])
def test_outer_gradient_of_a_plugin(augment: str, strategy: str, memory: str) -> None:
    """Reptile's own gradient, plus the derivative of the co-learner's term with CML."""
    batch = episodes("mlp")
    learner = MetaLearner(
        learner_of("mlp", "maml").model.module, Reptile, [CML] if augment == "cml" else [], loss="mse", inner_steps=2,
        strategy=strategy, memory=memory,
    )  # fmt: skip
    meta = initialized(learner, batch)
    tasks = tasks_of(batch)
    common: Any = {"algo": "maml", "inner_lr": 0.1, "inner_steps": 2}
    expected = {name: torch.zeros_like(value) for name, value in meta.items()}
    for task in tasks:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in meta.items()}
        for name, value in inner_loop(NETS["mlp"], leaves, task, **common).items():
            expected[name] += (leaves[name] - value).detach() / len(tasks)
    if augment == "cml":
        _, with_term = meta_gradient(NETS["mlp"], meta, tasks, gamma=GAMMA, **common)
        _, without = meta_gradient(NETS["mlp"], {k: v for k, v in meta.items() if "cml" not in k}, tasks, **common)
        expected = {name: expected[name] + with_term[name] - without.get(name, 0) for name in meta}
    for _ in range(2):
        _, grads = learner.meta_gradient(batch)
        assert difference(grads, expected) < TOLERANCE


class SGD:
    """A stateful outer optimiser: gradient descent with momentum 0.9."""

    @hookimpl
    def outer_update(
        self, meta: dict[str, Tensor], grads: dict[str, Tensor], state: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = {name: 0.9 * state.get(name, torch.zeros_like(value)) + value for name, value in grads.items()}
        return {name: value - 0.05 * state[name] for name, value in meta.items()}, state


def test_outer_update_of_a_plugin() -> None:
    learner = learner_of("mlp", "maml", [CML, SGD])
    batches = [episodes("mlp", seed=seed) for seed in range(4)]
    meta = {name: value.clone() for name, value in initialized(learner, batches[0]).items()}
    momentum = {name: torch.zeros_like(value) for name, value in meta.items()}
    for batch in batches:
        _, grads = meta_gradient(
            NETS["mlp"], meta, tasks_of(batch), algo="maml", inner_lr=INNER_LR["mlp"], inner_steps=1, gamma=GAMMA
        )
        momentum = {name: 0.9 * momentum[name] + grads[name] for name in meta}
        meta = {name: value - 0.05 * momentum[name] for name, value in meta.items()}
        learner.step(batch)
    assert difference(learner.meta_parameters, meta) < TOLERANCE


def test_default_outer_update_is_adam() -> None:
    learner = learner_of("mlp", "maml", outer_lr=0.02)
    batches = [episodes("mlp", seed=seed) for seed in range(4)]
    meta = {name: value.clone() for name, value in initialized(learner, batches[0]).items()}
    optimizer = torch.optim.Adam(meta.values(), lr=0.02)
    for batch in batches:
        _, grads = meta_gradient(
            NETS["mlp"], meta, tasks_of(batch), algo="maml", inner_lr=INNER_LR["mlp"], inner_steps=1
        )
        for name, value in meta.items():
            value.grad = grads[name]
        optimizer.step()
        learner.step(batch)
    assert difference(learner.meta_parameters, meta) < TOLERANCE


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_entry_is_moved_by_its_own_gradient(algo: str, strategy: str) -> None:
    """On channels-last images like those of task plugins, the gradients of convolutions are channels last too."""
    task = Glyphs(Glyphs.Config(query=5))
    learner = MetaLearner(
        "conv4", algo, ["cml"], spec=task.spec, model_options={"width": 8}, inner_lr=0.4, strategy=strategy
    )
    batch = task.episodes("train", range(1), 0)
    _, grads = learner.meta_gradient(batch)
    meta = {name: value.clone() for name, value in learner.meta_parameters.items()}
    assert [grads[name].stride() for name in grads] == [value.stride() for value in meta.values()]
    for name, value in meta.items():
        value.grad = grads[name]
    torch.optim.Adam(meta.values(), foreach=False, fused=False).step()
    learner.step(batch)
    torch.testing.assert_close(learner.meta_parameters, meta, rtol=0, atol=2e-5)


def test_reset_optimizer_every_forgets_the_moments() -> None:
    """The first step of a fresh Adam is outer_lr in every entry, whatever happened before."""
    learner = learner_of("mlp", "maml", outer_lr=0.01, reset_optimizer_every=2)
    moved = []
    for seed in range(3):
        batch = episodes("mlp", seed=seed)
        before = {name: value.clone() for name, value in initialized(learner, batch).items()}
        learner.step(batch)
        moved.append((learner.meta_parameters["head.weight"] - before["head.weight"]).abs())
    full = torch.full_like(moved[0], 0.01)
    torch.testing.assert_close(moved[0], full, rtol=1e-3, atol=0)
    torch.testing.assert_close(moved[2], full, rtol=1e-3, atol=0)
    assert (moved[1] - full).abs().max() > 1e-4


# ----------------------------------------------------------------------------------------------------- head only, auto


def test_body_runs_once_per_support_set_where_only_the_head_adapts() -> None:
    batch = episodes("mlp", tasks=1, shots=1, query=2)
    counts = {}
    for algo in ("anil", "maml"):
        learner = learner_of("mlp", algo, inner_steps=5, strategy="serial")
        learner.initialize(batch.support_x[0])
        examples: list[int] = []
        learner.model.module.body.register_forward_hook(
            lambda _, inputs, outputs, examples=examples: examples.append(len(inputs[0]))
        )
        learner.meta_gradient(batch)
        counts[algo] = examples.count(4)
    assert counts == {"anil": 1, "maml": 5}


@pytest.mark.parametrize(
    ("net", "algo", "tasks", "steps", "stackable", "expected"),
    [
        ("mlp", "maml", 25, 10, True, "vectorized"),
        ("mlp", "maml", 25, 4_999, True, "vectorized"),
        ("mlp", "maml", 25, 5_000, True, "compiled"),
        ("mlp", "maml", 25, 10**6, False, "serial"),
        ("mlp", "maml", 1, 10**6, True, "vectorized"),
        ("conv", "maml", 4, 10**6, True, "traced"),
        ("conv", "anil", 4, 10**6, True, "traced"),
    ],
)
def test_auto_says_what_it_chose_and_why(
    net: str, algo: str, tasks: int, steps: int, stackable: bool, expected: str
) -> None:
    strategy, reason = learner_of(net, algo, strategy="auto").choose_strategy(tasks, steps, stackable)
    assert strategy == expected
    assert len(reason) > 20


@pytest.mark.parametrize(
    ("net", "steps", "expected"),
    [("mlp", 10**6, "compiled"), ("mlp", 10**5, "vectorized"), ("conv", 10**6, "vectorized")],
)
def test_auto_rarely_compiles_on_a_gpu(net: str, steps: int, expected: str) -> None:
    functions = learner_of(net, "maml").engine.training
    assert choose_strategy(functions, torch.device("cuda"), 4, steps, stackable=True)[0] == expected


def test_images_stay_channels_last() -> None:
    """Pooling is several times faster in this layout on a CPU; a graph traced for one layout is not used for the other."""
    images = torch.rand(2, 3, 6, 6, 4, dtype=torch.float64).movedim(-1, 2)
    labels = torch.arange(3).expand(2, -1)
    last = Episodes(images, labels, images + 0.1, labels)
    first = Episodes(*(part.clone(memory_format=torch.contiguous_format) for part in last.parts))
    assert last.contiguous().support_x.data_ptr() == images.data_ptr()
    assert last[1:].contiguous().support_x.stride() == images.stride()
    assert first.contiguous().support_x.is_contiguous()
    assert Episodes(images[:, ::2], labels[:, ::2], images, labels).contiguous().support_x.is_contiguous()

    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 3)).double()
    learner = MetaLearner(model, inner_lr=0.1, strategy="traced")
    for _ in range(2):  # the second call with a shape traces
        expected = learner.meta_gradient(first)[1]
    for _ in range(2):
        found = learner.meta_gradient(last)[1]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)
