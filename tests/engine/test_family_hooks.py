"""The hooks for further methods: small algorithms against reference loops.

`family` compares whole trainings and evaluations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import TASKS, WrittenOut, check_training, model_parameters, support_gradient
from torch import Tensor

from metareg import Field, MetaLearner, PluginConfig, PluginError, TaskView, UsageError, hookimpl
from reference import NETS, Net, Task, Tensors, difference
from samples import LOSSES, MODELS, ConvNet, episodes

LR = 0.1
WAYS = [
    ("serial", "recompute"), ("traced", "store"), ("vectorized", "store"), ("vectorized", "recompute"),
]  # fmt: skip
CONFIG = {"inner_lr": LR}


class Base:
    """Gradient descent; the others differ from it in one hook."""

    class Config(PluginConfig):
        inner_lr: float = Field(0.01, gt=0, description="Step size.")

    def __init__(self, config: Any) -> None:
        self.config = config

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value - self.config.inner_lr * grads[name] for name, value in params.items()}


class Momentum(Base):
    """State from step to step, and the start: each step also moves a tenth of the way back to it."""

    @hookimpl
    def start_task(self, params: Tensors) -> Any:
        return params, {"velocity": {name: torch.zeros_like(value) for name, value in params.items()}}

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, state: Any, start: Tensors) -> Any:
        velocity = {name: 0.9 * state["velocity"][name] + grads[name] for name in params}
        new = {name: value - LR * velocity[name] + 0.1 * (start[name] - value) for name, value in params.items()}
        return new, {"velocity": velocity}


def adapt_by_momentum(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    start = model_parameters(meta)
    params, velocity = start, {name: torch.zeros_like(value) for name, value in start.items()}
    for _ in range(steps):
        grads = support_gradient(net, params, list(params), task)
        velocity = {name: 0.9 * velocity[name] + grads[name] for name in params}
        params = {name: params[name] - LR * velocity[name] + 0.1 * (start[name] - params[name]) for name in params}
    return params


class Sharp(Base):
    """Takes a second gradient in each step."""

    @hookimpl
    def inner_gradient(self, params: Tensors, task: TaskView) -> Tensors:
        grads = task.gradient(params)
        return task.gradient({name: value + 0.05 * grads[name] for name, value in params.items()})


def adapt_sharply(net: Net, meta: Tensors, task: Task, steps: int, first_order: bool = False) -> Tensors:
    params = model_parameters(meta)
    for _ in range(steps):
        grads = support_gradient(net, params, list(params), task)
        grads = {name: value.detach() if first_order else value for name, value in grads.items()}
        there = {name: value + 0.05 * grads[name] for name, value in params.items()}
        if first_order:
            there = {name: value.detach().requires_grad_() for name, value in there.items()}
        grads = support_gradient(net, there, list(there), task, graph=not first_order)
        params = {name: value - LR * grads[name] for name, value in params.items()}
    return params


class LearnedLoss(Base):
    """The inner loss is a learned multiple of the task's loss plus a learned multiple of the squared outputs."""

    @hookimpl
    def init_meta(self, outputs: Tensor, adapted: tuple[str, ...], head: tuple[str, ...]) -> Tensors:
        assert set(head) < set(adapted)
        return {"factor": outputs.new_tensor(0.8), "decay": outputs.new_full((outputs.shape[-1],), 0.3)}

    @hookimpl
    def inner_loss(self, outputs: Tensor, targets: Tensor, meta: Tensors, step: int, loss: Any) -> Tensor:
        return meta["factor"] * loss(outputs, targets) + (step + 1) * (meta["decay"] * outputs**2).mean()


def adapt_by_learned_loss(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    params = model_parameters(meta)
    for step in range(steps):
        outputs = net.head(params, net.body(params, task[0]))
        loss = meta["learnedloss.factor"] * net.loss(outputs, task[1])
        loss = loss + (step + 1) * (meta["learnedloss.decay"] * outputs**2).mean()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: value - LR * grad for (name, value), grad in zip(params.items(), grads, strict=True)}
    return params


class Transductive(Base):
    """The inner gradient is that of the support loss plus the squared outputs of the unlabelled query examples."""

    transductive = True

    @hookimpl
    def inner_gradient(self, params: Tensors, task: TaskView) -> Tensors:
        def loss(params: Tensors) -> Tensor:
            return task.support_loss(params) + 0.1 * (task.outputs(params, task.query_x) ** 2).mean()

        return torch.func.grad(loss)(params)


def adapt_transductively(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    params = model_parameters(meta)
    for _ in range(steps):
        loss = net.loss(net.head(params, net.body(params, task[0])), task[1])
        loss = loss + 0.1 * (net.head(params, net.body(params, task[2])) ** 2).mean()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: value - LR * grad for (name, value), grad in zip(params.items(), grads, strict=True)}
    return params


class Bootstrapped(Base):
    """The outer objective is the distance to the parameters after two more steps and one on the query set."""

    exact_gradient = False

    @hookimpl
    def outer_objective(self, adapted: Tensors, start: Tensors, state: Any, inner_steps: int, task: TaskView) -> Tensor:
        target, _ = task.adapt(adapted, state, inner_steps, 2)
        grads = task.query_gradient(target)
        target = {name: (value - LR * grads[name]).detach() for name, value in target.items()}
        pull = sum((value - start[name]).square().sum() for name, value in adapted.items())
        return sum((value - target[name]).square().sum() for name, value in adapted.items()) + 0.1 * pull


def adapt_plainly(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    params = model_parameters(meta)
    for _ in range(steps):
        grads = support_gradient(net, params, list(params), task)
        params = {name: value - LR * grads[name] for name, value in params.items()}
    return params


def measure_distance(net: Net, meta: Tensors, task: Task, steps: int) -> Tensor:
    adapted, target = adapt_plainly(net, meta, task, steps), adapt_plainly(net, meta, task, steps + 2)
    grads = support_gradient(net, target, list(target), (task[2], task[3], *task[2:]))
    pull = sum((adapted[name] - value).square().sum() for name, value in model_parameters(meta).items())
    return 0.1 * pull + sum(
        (value - (target[name] - LR * grads[name]).detach()).square().sum() for name, value in adapted.items()
    )


class Implicit(Base):
    """The meta-gradient is the query gradient, a Hessian-vector product with it, and the inner loop's change."""

    exact_gradient = False

    @hookimpl
    def outer_gradient(self, adapted: Tensors, start: Tensors, task: TaskView) -> Tensors:
        grads = task.query_gradient(adapted)
        product = task.hessian_product(adapted, grads)
        return {name: grads[name] - 0.1 * product[name] + 0.01 * (start[name] - adapted[name]) for name in adapted}


def differentiate_implicitly(net: Net, meta: Tensors, task: Task, steps: int) -> Tensors:
    start = model_parameters(meta)
    adapted = {name: value.detach().requires_grad_() for name, value in adapt_plainly(net, meta, task, steps).items()}
    names = list(adapted)
    query = net.loss(net.head(adapted, net.body(adapted, task[2])), task[3])
    grads = torch.autograd.grad(query, list(adapted.values()))
    of_support = support_gradient(net, adapted, names, task)
    dot = sum((of_support[name] * grad).sum() for name, grad in zip(names, grads, strict=True))
    products = torch.autograd.grad(dot, list(adapted.values()))
    return {
        name: grad - 0.1 * product + 0.01 * (start[name] - adapted[name])
        for name, grad, product in zip(names, grads, products, strict=True)
    }


class Prototypes(Base):
    """Computes the head's last layer from the support set; the inner loop changes nothing else."""

    targets = "classes"

    @hookimpl
    def adapted_parameters(self, head: tuple[str, ...]) -> tuple[str, ...]:
        return head

    @hookimpl
    def start_task(self, params: Tensors, task: TaskView) -> Tensors:
        weight, bias = task.output_layer
        assert bias is not None
        x, y = task.embed(params, task.support_features(params)), task.support_y
        one_hot = (y[:, None] == torch.arange(params[weight].shape[0], device=y.device)).to(x)
        means = (one_hot.T @ x) / one_hot.sum(0)[:, None]
        return params | {weight: 2 * means, bias: -means.square().sum(1)}

    @hookimpl
    def inner_update(self, params: Tensors) -> Tensors:
        return dict(params)


def take_prototypes(net: Net, meta: Tensors, task: Task, _: int) -> Tensors:
    params = model_parameters(meta)
    x = torch.nn.functional.max_pool2d(net.body(params, task[0]), 2).flatten(1)
    means = torch.stack([x[task[1] == label].mean(0) for label in range(5)])
    return params | {"head.2.weight": 2 * means, "head.2.bias": -(means**2).sum(1)}


class Fixed(Base):
    """Adapts nothing: the outer loop trains an ordinary model."""

    @hookimpl
    def adapted_parameters(self) -> tuple[str, ...]:
        return ()


@pytest.mark.parametrize(
    ("strategy", "memory", "cml"),
    [(*way, cml) for way, cml in zip(WAYS, (False, True, True, False), strict=True)],
)
@pytest.mark.parametrize(
    ("net", "algo", "written"),
    [
        ("mlp", Momentum, WrittenOut(adapt_by_momentum)),
        ("conv", Momentum, WrittenOut(adapt_by_momentum)),
        ("mlp", Sharp, WrittenOut(adapt_sharply)),
        ("conv", LearnedLoss, WrittenOut(adapt_by_learned_loss)),
        ("mlp", Transductive, WrittenOut(adapt_transductively)),
        ("mlp", Bootstrapped, WrittenOut(adapt_plainly, objective=measure_distance)),
        ("conv", Implicit, WrittenOut(adapt_plainly, gradient=differentiate_implicitly)),
        ("conv", Prototypes, WrittenOut(take_prototypes)),
        ("mlp", Fixed, WrittenOut(lambda net, meta, task, steps: model_parameters(meta))),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_training_equals_the_loop(
    net: str, algo: type, written: WrittenOut, strategy: str, memory: str, cml: bool
) -> None:
    check_training(net, algo, written, CONFIG, cml=cml, strategy=strategy, memory=memory)


@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_gradients_that_a_plugin_takes_are_constants_of_first_order(memory: str) -> None:
    check_training(
        "mlp", Sharp, WrittenOut(lambda *args: adapt_sharply(*args, first_order=True)), CONFIG, cml=True,
        first_order=True, memory=memory,
    )  # fmt: skip


class Decay:
    """An augmenter with a term in each inner loss, and one in the outer loss."""

    class Config(PluginConfig):
        weight: float = 0.2

    def __init__(self, config: Any) -> None:
        self.config = config

    @hookimpl
    def augment_inner_loss(self, outputs: Tensor, params: Tensors, step: int, task: TaskView) -> Tensor:
        again = task.outputs(params, task.support_x)
        return self.config.weight * (step + 1) * (outputs * again).mean()

    @hookimpl
    def augment_outer_loss(self, adapted: Tensors, task: TaskView) -> Tensor:
        return self.config.weight * task.query_loss({name: 0.5 * value for name, value in adapted.items()})


@pytest.mark.parametrize(("strategy", "memory"), WAYS)
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_terms_of_augmenters_are_in_the_meta_gradient(net: str, strategy: str, memory: str) -> None:
    batch, two = episodes(net, TASKS), {"weight": 0.1}
    learner = MetaLearner(
        MODELS[net](),
        "maml",
        [Decay, (Decay, two)],
        loss=LOSSES[net],
        inner_lr=LR,
        inner_steps=2,
        strategy=strategy,
        memory=memory,
    )
    loss, grads = learner.meta_gradient(batch)
    meta = {name: value.clone().requires_grad_() for name, value in learner.meta_parameters.items()}
    total = torch.zeros((), dtype=torch.float64)
    for number in range(TASKS):
        x, y, query_x, query_y = batch.unstack(number)
        params = dict(meta)
        for step in range(2):
            outputs = NETS[net].head(params, NETS[net].body(params, x))
            inner = NETS[net].loss(outputs, y) + (0.2 + 0.1) * (step + 1) * (outputs**2).mean()
            steps = torch.autograd.grad(inner, list(params.values()), create_graph=True)
            params = {name: value - LR * grad for (name, value), grad in zip(params.items(), steps, strict=True)}
        half = {name: 0.5 * value for name, value in params.items()}
        for weight, at in ((1.0, params), (0.3, half)):
            total = total + weight * NETS[net].loss(NETS[net].head(at, NETS[net].body(at, query_x)), query_y) / TASKS
    expected = dict(zip(meta, torch.autograd.grad(total, list(meta.values())), strict=True))
    torch.testing.assert_close(loss, total.detach())
    assert difference(grads, expected) < 1e-9


@pytest.mark.parametrize("asked", ["query_x", "query_y", "query_loss", "query_gradient", "adapt"])
def test_no_inner_stage_sees_the_query_set(asked: str) -> None:
    class Peeking(Base):
        @hookimpl
        def inner_gradient(self, params: Tensors, task: TaskView) -> Tensors:
            value = getattr(task, asked)
            return task.gradient(params) if not callable(value) else value(params, *[0] * 3)  # type: ignore[no-any-return]

    with pytest.raises(PluginError, match=asked if asked != "query_x" else "transductive"):
        MetaLearner(MODELS["mlp"](), Peeking, loss="mse", **CONFIG).meta_gradient(episodes("mlp"))


def test_adapt_hands_on_query_inputs() -> None:
    learner = MetaLearner(MODELS["mlp"](), Transductive, loss="mse", inner_steps=1, **CONFIG)
    x, y, query_x, _ = task = episodes("mlp").unstack(0)
    expected = adapt_transductively(NETS["mlp"], _with_grad(learner), task, 3)
    adapted = learner.adapt(x, y, steps=3, query_x=query_x)
    assert difference(dict(adapted.named_parameters()), expected) < 1e-9
    with pytest.raises(PluginError, match="transductive"):
        learner.adapt(x, y)


def _with_grad(learner: MetaLearner) -> Tensors:
    return {name: value.clone().requires_grad_() for name, value in learner.meta_parameters.items()}


def test_a_state_keeps_its_structure() -> None:
    class Growing(Momentum):
        @hookimpl
        def inner_update(self, params: Tensors, state: Any) -> Any:
            return dict(params), {**state, "more": next(iter(params.values()))}

    with pytest.raises(PluginError, match="structure"):
        MetaLearner(MODELS["mlp"](), Growing, loss="mse", **CONFIG).meta_gradient(episodes("mlp"))


@pytest.mark.parametrize(("net", "targets"), [("mlp", "classes"), ("conv", "numbers")])
def test_targets_that_a_plugin_is_not_for_are_refused(net: str, targets: str) -> None:
    algo = type("Picky", (Base,), {"targets": targets})
    with pytest.raises(UsageError, match=targets):
        MetaLearner(MODELS[net](), algo, loss=LOSSES[net], **CONFIG).meta_gradient(episodes(net))


def test_an_output_layer_is_the_last_linear_one() -> None:
    model = ConvNet()
    model.head = torch.nn.Sequential(model.head, torch.nn.Tanh())
    with pytest.raises(UsageError, match="ends in one"):
        MetaLearner(model, Prototypes, **CONFIG).meta_gradient(episodes("conv"))


class Alternating:
    """An augmenter that weights the query losses after both inner steps in every second training step."""

    @hookimpl
    def outer_loss_weights(self, training_step: int) -> list[float] | None:
        return [0.4, 0.6] if training_step % 2 else None


def test_weights_can_come_and_go_between_steps() -> None:
    """What the parts of a recomputed gradient return depends on them."""
    trained = []
    for strategy, memory in (("serial", "store"), ("vectorized", "recompute")):
        options = {"inner_lr": LR, "inner_steps": 2, "strategy": strategy, "memory": memory}
        learner = MetaLearner(MODELS["mlp"](), "maml", [Alternating], loss=LOSSES["mlp"], **options)
        for _ in range(7):
            learner.step(episodes("mlp", TASKS))
        trained.append(learner.meta_parameters)
    assert difference(*trained) < 1e-9
