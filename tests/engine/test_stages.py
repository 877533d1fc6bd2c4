"""Hooks of plugins: validation, checks of their results, duplicates, prefixes, noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from metareg import Episodes, MetaLearner, PluginError, hookimpl
from metareg.contract import hookspecs
from metareg.util.seeding import create_generator
from metareg.util.torch_internals import tree_leaves
from reference import NETS
from samples import MLP, episodes, tasks_of

Tensors = dict[str, Tensor]


class Sound:
    """Gradient descent with step size 0.1."""

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors) -> Tensors:
        return {name: value - 0.1 * grads[name] for name, value in params.items()}


def run(algo: Any = Sound, *augment: Any, strategy: str = "serial") -> MetaLearner:
    learner = MetaLearner(MLP(), algo, augment, loss="mse", strategy=strategy)
    learner.step(episodes("mlp"))
    return learner


def assert_same_step(actual: MetaLearner, expected: MetaLearner) -> None:
    torch.testing.assert_close(actual.meta_parameters, expected.meta_parameters, rtol=1e-9, atol=0)


def plugin(hook: str, returned: Any) -> type:
    """Create an augmenter whose only hook returns a given value, or a function of its first argument."""
    first = {
        "inner_update": "params", "augment_inner_gradient": "grads", "augment_outer_gradient": "grads",
        "outer_gradient": "meta", "outer_update": "meta", "augment_outer_loss": "features",
        "init_meta": "model", "adapted_parameters": "names", "draw_noise": "shapes",
    }[hook]  # fmt: skip
    namespace: dict[str, Any] = {"returned": returned}
    exec(f"def {hook}(self, {first}):\n    return returned({first}) if callable(returned) else returned", namespace)
    methods = {hook: hookimpl(namespace[hook])}
    if hook == "draw_noise":
        methods["augment_inner_gradient"] = hookimpl(lambda self, grads, noise: grads)
    return type("Mine", (), {**methods, "training_only": False})


@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
def test_a_plugin_is_as_long_as_its_mathematics(strategy: str) -> None:
    maml = MetaLearner(MLP(), "maml", loss="mse", inner_lr=0.1)
    maml.step(episodes("mlp"))
    assert_same_step(run(strategy=strategy), maml)


# ----------------------------------------------------------------------------------------------------------- validation


def test_misspelt_hook() -> None:
    class Typo(Sound):
        @hookimpl
        def augment_outer_los(self, features: Tensor) -> Tensor:
            return features.sum()

    with pytest.raises(PluginError, match=r"'augment_outer_los'.*'augment_outer_"):
        run(Typo)


def test_hook_unlike_any_other() -> None:
    class Typo(Sound):
        @hookimpl
        def zzz(self) -> None:
            """Nothing."""

    with pytest.raises(PluginError, match=r"'zzz'.*inner_update"):
        run(Typo)


def test_wrong_argument() -> None:
    class Typo:
        @hookimpl
        def inner_update(self, params: Tensors, gradients: Tensors) -> Tensors:  # noqa: ARG002
            return params

    with pytest.raises(PluginError, match=r"'gradients' in inner_update.*'grads'"):
        run(Typo)


@pytest.mark.parametrize("options", [{"wrapper": True}, {"hookwrapper": True}], ids=str)
def test_wrappers_are_refused(options: dict[str, bool]) -> None:
    class Wrapper(Sound):
        @hookimpl(**options)
        def inner_update(self) -> Any:
            return (yield)

    with pytest.raises(PluginError, match=r"inner_update.*wrapper"):
        run(Wrapper)


def test_another_name_for_a_hook() -> None:
    class Renamed:
        @hookimpl(specname="inner_update")
        def descend(self, params: Tensors, grads: Tensors) -> Tensors:
            return {name: value - 0.1 * grads[name] for name, value in params.items()}

    assert_same_step(run(Renamed), run(Sound))


def test_an_algorithm_without_an_inner_update() -> None:
    with pytest.raises(PluginError, match="implements no inner_update"):
        run(plugin("augment_outer_gradient", lambda grads: grads))


@pytest.mark.parametrize("augmenter", [object, {"gamma": 1}])
def test_an_augmenter_without_hooks(augmenter: Any) -> None:
    with pytest.raises(Exception, match=r"implements no hook|An augmenter is a name"):
        run(Sound, augmenter)


class Undecorated(Sound):
    """Overrides a hook without the decorator."""

    def inner_update(self, params: Tensors) -> Tensors:
        return params


class Unmarked:
    """Has a hook, and a static method that was meant to be one."""

    @hookimpl
    def augment_inner_gradient(self, grads: Tensors) -> Tensors:
        return grads

    @staticmethod
    def augment_outer_loss(features: Tensor) -> Tensor:
        return features.sum()


@pytest.mark.parametrize(
    ("plugins", "sentence"),
    [
        ([Undecorated], "algorithm 'undecorated' has a method inner_update without @metareg.hookimpl"),
        ([Sound, Unmarked], "augmenter 'unmarked' has a method augment_outer_loss without @metareg.hookimpl"),
    ],
)
def test_a_forgotten_decorator(plugins: list[type], sentence: str) -> None:
    with pytest.raises(PluginError, match=sentence):
        run(*plugins)


@pytest.mark.parametrize("hook", ["adapted_parameters", "start_task", "inner_loss", "inner_gradient", "inner_update"])
def test_an_augmenter_of_training_cannot_adapt_otherwise_than_evaluation(hook: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def {hook}(self):\n    return None", namespace)
    adapting = type("Adapting", (), {hook: hookimpl(namespace[hook])})
    with pytest.raises(PluginError, match=f"'adapting' implements {hook}.*training_only = False") as error:
        run(Sound, adapting)
    assert error.value.exit_code == 2
    run(Sound, type("Adapting", (adapting,), {"training_only": False}))


def test_a_static_method_as_a_hook() -> None:
    class Static:
        @staticmethod
        @hookimpl
        def inner_update(params: Tensors, grads: Tensors) -> Tensors:
            return {name: value - 0.1 * grads[name] for name, value in params.items()}

    assert_same_step(run(Static), run(Sound))


def test_properties_of_a_plugin_are_not_run() -> None:
    class Careful(Sound):
        @property
        def costly(self) -> None:
            raise AssertionError("read")

    run(Careful)


# ------------------------------------------------------------------------------------------------- contracts of results


@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
@pytest.mark.parametrize(
    ("hook", "returned", "sentence"),
    [
        ("inner_update", 3, "must return a dict of tensors, not a int"),
        ("inner_update", lambda params: {"head.bias": params["head.bias"]}, "its result misses body"),
        ("inner_update", lambda params: params | {"more": torch.ones(1)}, "its result adds more"),
        ("inner_update", lambda params: params | {"head.bias": torch.ones(7)}, r"must be a tensor of shape \(1,\)"),
        ("inner_update", lambda params: params | {"head.bias": None}, "not a NoneType"),
        ("augment_inner_gradient", None, "must return a dict of tensors, not a NoneType"),
        ("augment_inner_gradient", lambda grads: {}, "its result misses"),
        ("augment_outer_gradient", lambda grads: [*grads.values()], "must return a dict of tensors, not a list"),
        ("augment_outer_gradient", lambda grads: {name: value.sum() for name, value in grads.items()}, "of shape"),
        ("augment_outer_loss", lambda features: features, "must return a scalar"),
        ("augment_outer_loss", lambda features: 1.0, "must return a scalar tensor, not a float"),
        ("augment_outer_loss", lambda features: features.sum().float(), "torch.float64, not torch.float32"),
        ("augment_outer_loss", lambda features: (features.sum(), {"x": 1.0}), "must be a dict of scalar"),
        ("augment_outer_loss", lambda features: (features.sum(), 1), "must be a dict of scalar"),
        ("augment_outer_loss", lambda features: (features.sum(), {"x": features}), "must be a dict of scalar"),
        ("augment_outer_loss", lambda features: (features.sum(), {}, 3), "must return a scalar"),
        ("outer_gradient", 3, "must return a dict of tensors, not a int"),
        ("outer_gradient", lambda meta: {"nosuch": torch.ones(1)}, "adds nosuch"),
        ("outer_update", lambda meta: meta, "the new meta-parameters and the new state, a dict"),
        ("outer_update", lambda meta: (meta, None), "the new meta-parameters and the new state, a dict"),
        ("outer_update", lambda meta: ({}, {}), "misses"),
        ("init_meta", lambda model: torch.ones(3), "dict of floating-point tensors by name"),
        ("init_meta", lambda model: {"a": 1.0}, "dict of floating-point tensors by name"),
        ("init_meta", lambda model: {"a": torch.ones(3, dtype=torch.long)}, "dict of floating-point tensors by name"),
        ("adapted_parameters", lambda names: ["nosuch"], r"it named \['nosuch'\]; the model has body"),

        ("adapted_parameters", lambda names: "head.bias", "a sequence of names, not a str"),
        ("adapted_parameters", lambda names: 3, "a sequence of names, not a int"),
        ("draw_noise", lambda shapes: [1.0], "must return a pytree of tensors, without a float"),
        ("draw_noise", lambda shapes: {"a": torch.ones(1), "b": None}, "without a NoneType"),
    ],
)  # fmt: skip
def test_results_that_break_the_contract(hook: str, returned: Any, sentence: str, strategy: str) -> None:
    with pytest.raises(PluginError, match=f"'mine' broke the contract of {hook}: .*{sentence}") as error:
        run(Sound, plugin(hook, returned), strategy=strategy)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("strategy", ["serial", "vectorized"])
@pytest.mark.parametrize("hook", ["inner_update", "augment_inner_gradient", "augment_outer_loss", "init_meta"])
def test_a_hook_that_raises(hook: str, strategy: str) -> None:
    def fail(_: Any) -> None:
        raise ZeroDivisionError("no such luck")

    with pytest.raises(PluginError, match=rf"'mine'.*{hook}.*no such luck"):
        run(Sound, plugin(hook, fail), strategy=strategy)


def test_the_order_of_names_does_not_matter() -> None:
    reverse = plugin("augment_inner_gradient", lambda grads: dict(reversed(grads.items())))
    backward = plugin("augment_outer_gradient", lambda grads: dict(reversed(grads.items())))
    for name, value in run().meta_parameters.items():
        assert value.equal(run(Sound, reverse, backward).meta_parameters[name])


def test_none_means_that_the_default_stands() -> None:
    silent = [plugin(hook, None) for hook in ("adapted_parameters", "inner_update", "outer_update", "init_meta")]
    for name, value in run().meta_parameters.items():
        assert value.equal(run(Sound, *silent[:2], silent[3]).meta_parameters[name])


# ---------------------------------------------------------------------------------------------------- names and prefixes


class Scale:
    """Learns a factor for the inner gradient."""

    @hookimpl
    def init_meta(self, model: nn.Module) -> Tensors:  # noqa: ARG002
        return {"log": torch.tensor(0.1)}

    @hookimpl
    def augment_inner_gradient(self, grads: Tensors, meta: Tensors) -> Tensors:
        assert list(meta) == ["log"]
        return {name: value * meta["log"].exp() for name, value in grads.items()}


def test_meta_parameters_of_a_plugin_have_its_prefix() -> None:
    learner = run(Sound, Scale)
    assert learner.meta_parameters["scale.log"].dtype == torch.float64
    assert learner.meta_parameters["scale.log"].item() != pytest.approx(0.1, abs=1e-9)


def test_one_plugin_twice_in_a_run() -> None:
    learner = run(Sound, Scale, Scale, ("dropgrad", {"rate": 0.5}), ("dropgrad", {"rate": 0.1}))
    assert {"scale.log", "scale-2.log"} <= set(learner.meta_parameters)
    assert set(learner.stages.plugins) == {"sound", "scale", "scale-2", "dropgrad", "dropgrad-2"}
    _, grads = learner.meta_gradient(episodes("mlp"))
    assert grads["scale.log"].item() == pytest.approx(grads["scale-2.log"].item())
    (noise,) = learner.stages.draw_noise("task", {"head.bias": torch.zeros(50)}, torch.zeros(()), 1, 0, [(0, 0)])
    assert not noise["dropgrad"][0]["head.bias"].equal(noise["dropgrad-2"][0]["head.bias"])


def test_one_object_twice_in_a_run() -> None:
    scale = Scale()
    with pytest.raises(PluginError, match=r"twice.*class"):
        run(Sound, scale, scale)


def test_augmenter_named_like_the_algorithm(tmp_path: Path) -> None:
    namesake = type("Sound", (Scale,), {})
    learner = run(Sound, namesake)
    assert "sound-2.log" in learner.meta_parameters
    learner.save(tmp_path / "learner")
    with safe_open(tmp_path / "learner", framework="pt") as saved:
        assert set(saved.keys()) == set(learner.meta_parameters) - {"sound-2.log"}


def test_the_plugin_given_last_decides_first() -> None:
    class Stays:
        training_only = False

        @hookimpl
        def inner_update(self, params: Tensors) -> Tensors:
            return params

    learner = run(Sound, Stays)
    x, y = (part[0] for part in (episodes("mlp").support_x, episodes("mlp").support_y))
    loss, _ = learner.meta_gradient(episodes("mlp"))
    zero = learner.evaluate(Repeated(), 3, inner_steps=[0]).mean(0)
    assert loss.item() == pytest.approx(zero)
    assert learner.adapt(x, y).head.bias.equal(learner.meta_parameters["head.bias"])


@pytest.mark.parametrize(("order", "asked"), [({}, False), ({"tryfirst": True}, True)], ids=["as given", "tryfirst"])
def test_an_implementation_that_asks_to_be_first_decides(order: dict[str, bool], asked: bool) -> None:
    class Eager:
        training_only = False

        @hookimpl(**order)
        def inner_update(self, params: Tensors) -> Tensors:
            return params

    class Again(Sound):
        training_only = False

    still = [run(Sound, *augmenters).meta_parameters for augmenters in ([Eager, Again], [Eager])]
    assert all(still[0][name].equal(value) for name, value in still[1].items()) is asked


def test_every_hook_says_how_results_become_one() -> None:
    signatures = {name for name, value in vars(hookspecs).items() if hasattr(value, "metareg_spec")}
    assert set(hookspecs.HOOKS) == signatures


class Repeated:
    """Repeat the three sample tasks; every multiple of three has the same mean."""

    def episodes(self, split: str, indices: Any) -> Any:  # noqa: ARG002
        rows = torch.arange(len(indices)) % 3
        return Episodes(*(part[rows] for part in episodes("mlp").parts))


def test_a_tasks_noise_depends_on_its_number_and_the_step() -> None:
    learner = MetaLearner(MLP(), augment=["dropgrad"], loss="mse")
    params = learner.plain_meta_parameters
    every, some, later = (
        learner.stages.draw_noise("task", params, torch.zeros(()), 2, 0, [(step, task) for task in tasks])
        for step, tasks in ((0, range(5)), (0, range(2, 4)), (1, range(5)))
    )
    flat = [[torch.cat([leaf.flatten() for leaf in tree_leaves(each)]) for each in drawn] for drawn in (every, some)]
    assert all(one.equal(other) for one, other in zip(flat[0][2:4], flat[1], strict=True))
    assert not flat[0][2].equal(flat[0][3])
    assert not torch.cat(flat[0]).equal(torch.cat([leaf.flatten() for leaf in tree_leaves(later)]))


def test_noise_has_the_type_of_the_parameters() -> None:
    learner = MetaLearner(MLP(), augment=[("gradient-noise", {"where": "outer"})], loss="mse")
    for dtype in (torch.float32, torch.float64):
        like = torch.zeros((), dtype=dtype)
        leaves = tree_leaves(learner.stages.draw_noise("batch", learner.meta_parameters, like, 1, 0, [(0,)]))
        assert leaves
        assert all(leaf.dtype == dtype for leaf in leaves)


def test_who_draws_nothing_has_none() -> None:
    stages = MetaLearner(MLP(), augment=["cml"], loss="mse").stages
    assert stages.draw_noise("task", {}, torch.zeros(()), 1, 0, [(0, 0), (0, 1)]) == []


class Jitter(Sound):
    """Draws noise in every stage that allows it, and uses it to start, to descend and to weight."""

    steps: ClassVar[dict[str, int | None]] = {}

    @hookimpl
    def draw_noise(self, generator: torch.Generator, stage: str, inner_steps: int, training_step: int | None) -> Tensor:
        self.steps[stage] = training_step
        schedule = 0 if training_step is None else training_step
        return schedule + torch.rand(1 if stage == "batch" else inner_steps + 1, generator=generator)

    @hookimpl
    def start_task(self, params: Tensors, noise: Tensor) -> Tensors:
        return {name: value + 0.1 * noise[-1] for name, value in params.items()}

    @hookimpl
    def inner_update(self, params: Tensors, grads: Tensors, step: int, noise: Tensor) -> Tensors:
        return {name: value - 0.1 * noise[step] * grads[name] for name, value in params.items()}

    @hookimpl
    def augment_outer_gradient(self, grads: Tensors, noise: Tensor) -> Tensors:
        return {name: value * noise for name, value in grads.items()}


def adapt_with_draws(meta: Tensors, task: Any, drawn: Tensor, steps: int) -> Tensors:
    """A reference inner loop of `Jitter`."""
    params = {name: value + 0.1 * drawn[-1] for name, value in meta.items()}
    for step in range(steps):
        loss = NETS["mlp"].loss(linear(params, task[0]), task[1])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {
            name: value - 0.1 * drawn[step] * grad for (name, value), grad in zip(params.items(), grads, strict=True)
        }
    return params


def linear(params: Tensors, x: Tensor) -> Tensor:
    return NETS["mlp"].head(params, NETS["mlp"].body(params, x))


def draw(steps: int, *labels: str | int) -> Tensor:
    """Return the noise that `Jitter` draws for a learner with seed 3."""
    return torch.rand(steps + 1, generator=create_generator(3, "noise", *labels)).double()


@pytest.mark.parametrize("strategy", ["serial", "vectorized", "traced"])
def test_an_algorithm_draws_for_training_evaluation_and_adaptation(strategy: str) -> None:
    learner = MetaLearner(MLP(), Jitter, loss="mse", strategy=strategy, inner_steps=2, seed=3, chunk=2)
    learner.step(episodes("mlp"))
    meta = {name: value.clone().requires_grad_() for name, value in learner.meta_parameters.items()}
    tasks = tasks_of(episodes("mlp"))

    total = torch.zeros((), dtype=torch.float64)
    for number, task in enumerate(tasks):
        params = adapt_with_draws(meta, task, 1 + draw(2, "task", "jitter", 1, number), 2)
        total = total + NETS["mlp"].loss(linear(params, task[2]), task[3]) / len(tasks)
    factor = 1 + torch.rand(1, generator=create_generator(3, "noise", "batch", "jitter", 1)).item()
    expected = [factor * value for value in torch.autograd.grad(total, list(meta.values()))]
    _, grads = learner.meta_gradient(episodes("mlp"))
    torch.testing.assert_close(list(grads.values()), expected, rtol=1e-6, atol=1e-8)

    scores = learner.evaluate(Mixed(), 5, inner_steps=(0, 3), split="validation", seed=3).scores
    for index, row in enumerate(scores):
        x, y, query_x, query_y = Mixed().task(index)
        for score, steps in zip(row, (0, 3), strict=True):
            drawn = draw(3, "adapt", "jitter", "validation", index)
            params = adapt_with_draws(meta, (x, y), drawn, steps)
            assert score.item() == pytest.approx(NETS["mlp"].loss(linear(params, query_x), query_y).item(), rel=1e-6)

    x, y, query_x, _ = tasks[0]
    params = adapt_with_draws(meta, (x, y), draw(4, "adapt", "jitter"), 4)
    torch.testing.assert_close(learner.adapt(x, y, steps=4)(query_x), linear(params, query_x), rtol=1e-6, atol=1e-8)
    assert Jitter.steps == {"task": 1, "batch": 1, "adapt": None}


class Mixed:
    """Tasks of two sizes as a function of their numbers, with 8 support examples."""

    def task(self, index: int) -> Any:
        return tasks_of(episodes("mlp", 1, query=2 + index % 2, seed=index))[0]

    def episodes(self, split: str, indices: Any) -> Any:  # noqa: ARG002
        return Episodes.group([self.task(index) for index in indices])


def test_an_augmenter_of_training_draws_for_training_alone() -> None:
    class Seen:
        stages: ClassVar[set[str]] = set()

        @hookimpl
        def draw_noise(self, stage: str) -> Tensor:
            self.stages.add(stage)
            return torch.ones(())

        @hookimpl
        def augment_outer_loss(self, features: Tensor, noise: Tensor) -> Tensor:
            return noise * features.sum()

    learner = run(Sound, Seen)
    learner.evaluate(Repeated(), 2)
    assert Seen.stages == {"task"}


def test_noise_that_nobody_takes_is_refused() -> None:
    class Unheard:
        @hookimpl
        def draw_noise(self) -> Tensor:
            return torch.ones(())

        @hookimpl
        def augment_inner_gradient(self, grads: Tensors) -> Tensors:
            return grads

    with pytest.raises(PluginError, match=r"'unheard' draws noise but does not use it"):
        run(Sound, Unheard)


def test_the_noise_of_a_parameterless_inner_loop_has_the_learners_type() -> None:
    class Still(Sound):
        @hookimpl
        def adapted_parameters(self) -> list[str]:
            return []

        @hookimpl
        def draw_noise(self, shapes: dict[str, Any]) -> Tensor:
            assert shapes == {}
            return torch.ones(())

        @hookimpl
        def inner_update(self, params: Tensors, noise: Tensor) -> Tensors:
            assert noise.dtype == torch.float64
            return params

    run(Still)


# --------------------------------------------------------------------------------------------------------------- episodes


class Shift:
    """Shifts the support inputs of each task at random, and omits one more example in each step."""

    @hookimpl
    def augment_episodes(self, episodes: Episodes, generator: torch.Generator, training_step: int) -> Episodes:
        x, y, query_x, query_y = episodes.parts
        kept = len(y[0]) - training_step
        return Episodes(x[:, :kept] + torch.rand(len(x), 1, 1, generator=generator), y[:, :kept], query_x, query_y)


class Double:
    """Doubles the support inputs; its order relative to `Shift` matters."""

    @hookimpl
    def augment_episodes(self, episodes: Episodes) -> Episodes:
        x, *others = episodes.parts
        return Episodes(2 * x, *others)


@pytest.mark.parametrize("strategy", ["serial", "vectorized", "traced"])
def test_augmenters_change_the_tasks_of_training_alone(strategy: str) -> None:
    stacks = Mixed().episodes("train", range(5))
    learner, plain = (
        MetaLearner(MLP(), Sound, augment, loss="mse", strategy=strategy, seed=3) for augment in ([Shift, Double], [])
    )
    for step in range(2):
        changed = []
        for number, stack in enumerate(stacks):
            x, y, *query = stack.parts
            generator = create_generator(3, "episodes", "shift", step, number)
            moved = 2 * (x[:, : 8 - step] + torch.rand(len(x), 1, 1, generator=generator))
            changed.append(Episodes(moved, y[:, : 8 - step], *query))
        expected = plain.step(changed)
        torch.testing.assert_close(learner.step(stacks), expected)
    assert_same_step(learner, plain)
    assert learner.evaluate(Mixed(), 4).scores.equal(plain.evaluate(Mixed(), 4).scores)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda batch: batch[:2], "the same number of tasks, 3, not 2"),
        (lambda batch: batch.parts, "must return Episodes, not a tuple"),
    ],
    ids=["fewer", "parts"],
)
def test_tasks_that_get_lost_are_refused(change: Any, sentence: str) -> None:
    class Losing:
        @hookimpl
        def augment_episodes(self, episodes: Episodes) -> Any:
            return change(episodes)

    with pytest.raises(PluginError, match=f"'losing' broke the contract of augment_episodes: .*{sentence}"):
        run(Sound, Losing)


# ---------------------------------------------------------------------------------------------- what stays, and what is idle


def test_an_algorithms_own_augmentation_stays_in_evaluation() -> None:
    class Steeper(Sound):
        @hookimpl
        def augment_inner_gradient(self, grads: Tensors) -> Tensors:
            return {name: 3 * value for name, value in grads.items()}

    steeper, plain = run(Steeper), MetaLearner(MLP(), "maml", loss="mse", inner_lr=0.3)
    plain.step(episodes("mlp"))
    assert_same_step(steeper, plain)
    scores = [learner.evaluate(Repeated(), 3, inner_steps=[2]).scores for learner in (steeper, plain)]
    torch.testing.assert_close(*scores, rtol=1e-9, atol=0)


class Own(Sound):
    """Has an outer optimiser, weights, an objective and a learned inner loss at once."""

    @hookimpl
    def outer_update(self, meta: Tensors, state: dict[str, Any]) -> Any:
        return {name: value + 0 for name, value in meta.items()}, state

    @hookimpl
    def outer_loss_weights(self, inner_steps: int) -> list[float]:
        return [1.0] * inner_steps

    @hookimpl
    def outer_objective(self, adapted: Tensors) -> Tensor:
        return adapted["head.bias"].square().sum()

    @hookimpl
    def inner_loss(self, outputs: Tensor) -> Tensor:
        return outputs.square().mean()


class First:
    @hookimpl
    def combine_tasks(self, grads: Tensors) -> Tensors:
        return {name: value[0] for name, value in grads.items()}


class Reptilian:
    @hookimpl
    def outer_gradient(self, meta: Tensors) -> Tensors:
        return {name: value * 1.0 for name, value in meta.items()}


def test_what_has_no_effect_is_said_in_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    MetaLearner(MLP(), Own, [First, "pcgrad", Reptilian], loss="mse", outer_lr=0.5, first_order=True, inner_steps=2)
    assert caplog.messages == [
        "outer_lr = 0.5 has no effect: the algorithm 'own' has its own outer update.",
        "With first_order, what the algorithm 'own' learns for its inner_loss gets no gradient.",
        "The outer_objective of the algorithm 'own' has no effect: the outer_gradient of the augmenter 'reptilian' "
        "replaces it.",
        "The outer_loss_weights of the algorithm 'own' have no effect: the outer_gradient of the augmenter 'reptilian' "
        "replaces them.",
        "The combine_tasks of the augmenter 'first' has no effect where that of the augmenter 'pcgrad' returns a result.",
    ]
    caplog.clear()
    MetaLearner(MLP(), Own, loss="mse")
    assert [message.partition("no effect: ")[2] for message in caplog.messages] == [
        "the outer_objective of the algorithm 'own' replaces them."
    ]
    caplog.clear()
    MetaLearner(MLP(), "mamlpp", ["cml"], loss="mse", outer_lr=0.5, first_order=True)
    assert caplog.messages == []


def test_plugins_that_learn_nothing_are_said_at_the_first_step_alone(caplog: pytest.LogCaptureFixture) -> None:
    # Reptile's gradient is not a derivative: it would not include what another plugin learns.
    learner = MetaLearner(MLP(), "reptile", ["metacurvature"], loss="mse", inner_steps=2)
    before = {name: value.clone() for name, value in learner.meta_parameters.items()}
    for _ in range(2):
        learner.step(episodes("mlp"))
    assert [message for message in caplog.messages if "'metacurvature'" in message] == caplog.messages[:1] != []
    assert [name for name, value in learner.meta_parameters.items() if value.equal(before[name])] == [
        name for name in before if name.startswith("metacurvature.")
    ]
    caplog.clear()
    MetaLearner(MLP(), "maml", ["metacurvature"], loss="mse").step(episodes("mlp"))
    assert caplog.messages == []


def test_weights_have_no_effect_beside_an_objective() -> None:
    class Weighted(Own):
        @hookimpl
        def outer_loss_weights(self, inner_steps: int) -> list[float]:
            return [1000.0] * inner_steps

    (one, _), (other, _) = (
        MetaLearner(MLP(), algo, loss="mse", inner_steps=2).meta_gradient(episodes("mlp")) for algo in (Own, Weighted)
    )
    assert one.equal(other)
