"""`MetaLearner`: what it does not change, what it draws at random, and its state after a divergence."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import AUGMENTERS, Source, same
from torch import Tensor, nn

from metareg import DivergenceError, Episodes, MetaLearner, TaskSpec, UsageError, hookimpl
from metareg.learner.config import LearnerConfig
from samples import LOSSES, MLP, MODELS, ConvNet, episodes


def state(model: nn.Module) -> dict[str, Any]:
    """Return everything of a module that could change."""
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


@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_divergence_leaves_the_learner_as_it_was(strategy: str) -> None:
    batch = episodes("mlp")
    learner = MetaLearner(MLP(), "maml", AUGMENTERS, loss="mse", strategy=strategy)
    learner.step(batch)
    before = {name: value.clone() for name, value in learner.meta_parameters.items()}
    bad = Episodes(batch.support_x, batch.support_y, batch.query_x, batch.query_y * 1e200)
    with pytest.raises(DivergenceError, match=r"step 2.*objective.*after step 1") as error:
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
    with pytest.raises(DivergenceError, match=r"meta-gradient.*'body\.0\.weight'"):
        learner.step(episodes("mlp"))
    assert all(value.isfinite().all() for value in learner.meta_parameters.values())


@pytest.mark.parametrize("name", sorted(LearnerConfig.model_fields.keys() - {"device"}))
def test_the_constructor_and_its_help_have_every_option(name: str) -> None:
    parameter = inspect.signature(MetaLearner).parameters[name]
    assert parameter.default == LearnerConfig.model_fields[name].default
    assert parameter.kind is parameter.KEYWORD_ONLY
    assert f"{name}: {LearnerConfig.model_fields[name].description}" in (MetaLearner.__doc__ or "")


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))], ids=["copy", "pickle"]
)
def test_a_copy_learns_on_by_itself(make: Any) -> None:
    learner = MetaLearner(ConvNet(), "anil", ["cml"], strategy="vectorized", bn_statistics="support", inner_lr=0.3)
    batch = episodes("conv")
    for _ in range(2):
        learner.step(batch)
    twin = make(learner)
    before = {name: value.clone() for name, value in learner.meta_parameters.items()}
    (loss, grads), (other_loss, other_grads) = learner.meta_gradient(batch), twin.meta_gradient(batch)
    assert loss.equal(other_loss)
    assert same(grads, other_grads)
    twin.step(batch)
    assert same(learner.meta_parameters, before)
    learner.step(batch)
    assert same(learner.meta_parameters, twin.meta_parameters)


def test_several_threads_use_one_learner() -> None:
    learner = MetaLearner(ConvNet(), inner_lr=0.3, inner_steps=3, strategy="serial")
    learner.step(episodes("conv"))
    x, y, query_x, _ = episodes("conv", 16).parts

    def predict(task: int) -> Tensor:
        return learner.adapt(x[task], y[task])(query_x[task]).detach()

    expected = [predict(task) for task in range(16)]
    before, scores = learner.state()["meta"], learner.evaluate(Source("conv"), 3).scores
    with ThreadPoolExecutor(4) as pool:
        evaluations = [pool.submit(learner.evaluate, Source("conv"), 3) for _ in range(2)]
        found = list(pool.map(predict, range(16)))
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
    assert all(each.result().scores.equal(scores) for each in evaluations)
    assert same(learner.state()["meta"], before)
    assert learner.model.initial_parameters().keys() == before.keys()


def _train_on(learner: MetaLearner, results: Any) -> None:
    learner.step(episodes("conv"))
    results.put({name: value.tolist() for name, value in learner.meta_parameters.items()})


def test_a_learner_in_another_process_is_a_copy() -> None:
    learner = MetaLearner(ConvNet(), inner_lr=0.3, strategy="serial")
    learner.step(episodes("conv"))
    before = {name: value.clone() for name, value in learner.meta_parameters.items()}
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_train_on, args=(learner, results))
    process.start()
    found = results.get(timeout=300)
    process.join()
    assert same(before, learner.meta_parameters)
    learner.step(episodes("conv"))
    assert {name: value.tolist() for name, value in learner.meta_parameters.items()} == found


def test_several_learners_are_traced_in_several_threads() -> None:
    def train(model: MLP) -> list[float]:
        learner = MetaLearner(model, loss="mse", strategy="vectorized")
        return [learner.step(episodes("mlp")).item() for _ in range(3)]

    models = [MLP() for _ in range(5)]  # in one thread, because they draw from torch's global generator
    with ThreadPoolExecutor(4) as pool:
        losses = list(pool.map(train, models[1:]))
    assert losses == [train(models[0])] * 4


def test_learners_built_in_several_threads_begin_alike() -> None:
    def build(model: MLP) -> list[float]:
        learner = MetaLearner(model, augment="cml", loss="mse")
        return torch.cat([value.flatten() for value in learner.meta_parameters.values()]).tolist()

    models = [MLP() for _ in range(33)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            starts = list(pool.map(build, models[1:]))
    finally:
        sys.setswitchinterval(interval)
    assert starts == [build(models[0])] * 32


@pytest.mark.parametrize(("algo", "part"), [("anil", "head"), ("boil", "body")])
def test_what_is_frozen_is_not_adapted_and_a_line_says_so(
    algo: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = MLP()
    getattr(model, part).requires_grad_(False)
    learner = MetaLearner(model, algo, loss="mse")
    assert f"The algorithm '{algo}' adapts no parameter: the {part} has none that is trainable" in caplog.text
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y, query_x, _ = episodes("mlp").unstack(0)
    learner.step(episodes("mlp"))
    assert all(value.equal(before[name]) for name, value in learner.model.constants().items())
    assert torch.equal(learner.adapt(x, y, steps=0)(query_x), learner.adapt(x, y, steps=3)(query_x))


def test_an_algorithm_that_computes_the_last_layer_needs_it_to_be_trainable() -> None:
    model = ConvNet()
    model.head.requires_grad_(False)
    with pytest.raises(UsageError, match="last layer of the head of ConvNet is frozen"):
        MetaLearner(model, "protonet").step(episodes("conv"))
