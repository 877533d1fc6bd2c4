"""Checks of algorithms and augmenters."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from metareg.contract.attributes import StepExample
from metareg.contract.hookspecs import HOOKS
from metareg.engine.derivative import compute_meta_gradient
from metareg.errors import MetaregError
from metareg.learner.batch_runner import compute_outer_loss_weights
from metareg.learner.learner import MetaLearner
from metareg.learner.noise import draw_batch_noise, draw_task_noise
from metareg.registry.dispatch import Implementation, create_plugin_manager, find_implementations
from metareg.registry.plugins import Plugin, list_entries, resolve
from metareg.testing._bench import (
    STEPS,
    Bench,
    Descent,
    benches_for,
    difference,
    equal,
    generator,
    global_randomness,
    snapshot,
)
from metareg.testing._check import Subject, fail
from metareg.util.seeding import use_seed
from metareg.util.torch_internals import tree_leaves, tree_map

# Float64, and sums of a few hundred numbers: what rounding alone makes of two orders of summation stays below this.
ROUNDING = 1e-9
# Central differences of step 1e-5 in float64 err by about 1e-10 of the objective.
DIFFERENCE_STEP = 1e-5
DIFFERENCE_TOLERANCE = 1e-6

_STRATEGY_REMEDY = (
    "let control flow depend on shapes and the step's number only, never on the values of tensors; use operations that "
    "torch.func.vmap knows; keep no tensors on self."
)

LEARNING_STEPS, LEARNING_STEP, LEARNING_FACTOR = 50, 0.02, 0.7


@dataclass(frozen=True)
class Pair:
    """An algorithm with some augmenters: what is trained in a check."""

    algorithm: Plugin | type
    augmenters: tuple[Plugin, ...] = ()

    @classmethod
    def of(cls, subject: Subject, **config: Any) -> Pair:
        """The subject, beside plain gradient steps where it is an augmenter."""
        plugin = subject.resolved(**config)
        return cls(plugin) if subject.kind == "algorithms" else cls(Descent, (plugin,))

    @property
    def benches(self) -> list[Bench]:
        return benches_for(self.algorithm)

    def learner(self, bench: Bench, **options: Any) -> MetaLearner:
        return bench.learner(self.algorithm, self.augmenters, **options)

    @property
    def label(self) -> str:
        names = [getattr(self.algorithm, "name", None), *(each.name for each in self.augmenters)]
        return " with ".join(str(name) for name in names)


# ---------------------------------------------------------------------------------------------------- stage functions


def check_purity(subject: Subject) -> None:
    """Stage functions change nothing in place, use no global random numbers, and repeat their results."""
    for call in _stage_calls(subject, torch.float64):
        arguments = call.arguments()
        before = snapshot(arguments)
        with global_randomness() as moved:
            first = snapshot(call(arguments))
        if not equal(snapshot(arguments), before):
            changed = [name for name in arguments if not equal(snapshot(arguments[name]), before[name])]
            fail(
                f"The {subject.label} changes its argument {', '.join(changed)} in place in {call.hook}.",
                "return new tensors and dicts: no add_(), no mul_(), no +=, no assignment into a dict that was given, and "
                "nothing added to the model.",
            )
        if moved:
            fail(
                f"The {subject.label} moves the global random state of {' and '.join(moved)} in {call.hook}.",
                "draw random numbers in draw_noise, from the generator that it is given.",
            )
        if not equal(first, snapshot(call(call.arguments()))):
            fail(
                f"The {subject.label} gives another result when {call.hook} is called again with the same arguments.",
                "keep nothing on self that changes between calls, and draw random numbers from the generator only.",
            )


def check_shapes(subject: Subject) -> None:
    """Results have the names, shapes and types that the contract asks for, in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        for call in _stage_calls(subject, dtype):
            arguments = call.arguments()
            expected = arguments.get("params" if "params" in arguments else "grads")
            result = call(arguments)
            if not isinstance(expected, dict) or not isinstance(result, dict):
                continue
            for name, value in result.items():
                if name in expected and value.dtype != expected[name].dtype:
                    fail(
                        f"The {subject.label} returns '{name}' as {value.dtype} from {call.hook}; it came as {dtype}.",
                        "make no tensors of a fixed dtype; take it from the arguments.",
                    )
        pair = Pair.of(subject)
        for bench in pair.benches:
            learner = pair.learner(bench, dtype=dtype)
            _, grads = learner.meta_gradient(bench.episodes)  # the stages refuse wrong names and shapes
            meta = learner.meta_parameters
            wrong = [name for name, value in grads.items() if value.dtype != meta[name].dtype]
            if wrong:
                fail(
                    f"The meta-gradient of '{wrong[0]}' is {grads[wrong[0]].dtype} where the parameter is {dtype}.",
                    "make no tensors of a fixed dtype; take it from the arguments.",
                )
            learner.step(bench.episodes)
            for name, value in learner.meta_parameters.items():
                if value.shape != meta[name].shape or value.dtype != meta[name].dtype:
                    fail(
                        f"The outer step turned '{name}' from {_described(meta[name])} into {_described(value)}.",
                        "return each meta-parameter from outer_update with its own shape and dtype.",
                    )


def check_wrong_shapes(subject: Subject) -> None:
    """What does not fit together is an error, never passed over in silence."""
    for call in _stage_calls(subject, torch.float64):
        for part in ("grads", "features"):
            # Features of any shape are fine where no meta-parameter was made for a certain one.
            sized = part == "grads" or "init_meta" in subject.hooks
            if part not in call.implementation.arguments or call.hook == "init_meta" or not sized:
                continue
            for wrong, how in _wrong(call.arguments()[part]):
                arguments = call.arguments() | {part: wrong}
                try:
                    result = call(arguments)
                except (MetaregError, KeyError, RuntimeError, ValueError, IndexError):
                    continue
                given = arguments.get("params", call.arguments().get("grads"))
                if isinstance(result, dict) and isinstance(given, dict) and not _fits(result, given):
                    continue  # the stages refuse this result
                fail(
                    f"The {subject.label} passes over {how} in {call.hook}.",
                    "take every tensor by its name (grads[name]), without .get(), zip() or reshape(), so that what is "
                    "missing or misshapen raises.",
                )


# ----------------------------------------------------------------------------------------------------------- algorithms


def check_adapted(subject: Subject) -> None:
    """The inner loop moves the parameters that the class says it does, and no other."""
    pair = Pair.of(subject)
    bench = pair.benches[0]
    learner = pair.learner(bench)
    declared = subject.declared("adapts", "all")
    names = learner.model.names
    chosen = {
        "all": names,
        "body": learner.model.body_names,
        "head": learner.model.head_names,
    }.get(declared) or [name for name in names if fnmatch.fnmatchcase(name, declared)]
    if not chosen:
        fail(
            f"The {subject.label} says adapts = {declared!r}, which fits no parameter of {', '.join(names)}.",
            "declare 'all', 'body', 'head' or a shell pattern for parameter names.",
        )
    before = {name: learner.meta_parameters[name].clone() for name in names}
    support_x, support_y, *_ = bench.episodes.parts
    adapted = dict(learner.adapt(support_x[0], support_y[0], steps=2).named_parameters())
    moved = [name for name in names if not torch.equal(adapted[name], before[name])]
    stray = [name for name in moved if name not in chosen]
    still = [name for name in chosen if name not in moved]
    if stray:
        fail(
            f"The inner loop of the {subject.label} moves '{stray[0]}', and adapts = {declared!r} says that it does not.",
            "return the right names from adapted_parameters, or declare what the inner loop adapts.",
        )
    if still:
        fail(
            f"The inner loop of the {subject.label} leaves '{still[0]}' as it was, and adapts = {declared!r} says that it "
            "moves.",
            "look at inner_update and adapted_parameters, or declare what the inner loop adapts.",
        )


def check_step_examples(subject: Subject) -> None:
    """One inner step gives the numbers that the class's worked examples say."""
    examples: tuple[StepExample, ...] = tuple(subject.declared("step_examples", ()))
    if not examples:
        fail(
            f"The {subject.label} states no worked example of an inner step, so that a wrong factor or sign would pass.",
            "work one step out by hand from the formula: step_examples = (StepExample(param=2.0, grad=3.0, after=1.7, "
            "config={'inner_lr': 0.1}),).",
        )
    for example in examples:
        pair = Pair.of(subject, **example.config)
        learner = pair.learner(pair.benches[0], inner_steps=max(STEPS, example.step + 1))
        functions, meta = learner.engine.plain, learner.meta_parameters
        params = {name: torch.full_like(meta[name], example.param) for name in functions.adapted_names}
        grads = {name: torch.full_like(value, example.grad) for name, value in params.items()}
        after = functions.stages.inner_update(params, grads, meta, example.step)
        for name, value in after.items():
            expected = torch.full_like(value, example.after)
            if not torch.allclose(value, expected, rtol=1e-6, atol=1e-9):
                got = value.flatten()[(value - expected).abs().argmax()].item()
                fail(
                    f"One inner step of the {subject.label} takes '{name}' from {example.param:g} with gradient "
                    f"{example.grad:g} to {got:g}; its worked example says {example.after:g} (step {example.step}, "
                    f"{dict(example.config) or 'default options'}).",
                    "compare inner_update with the formula: its sign, its factor, the step size that it uses.",
                )


# ------------------------------------------------------------------------------------------------------------ augmenters


def check_inner_rule(subject: Subject) -> None:
    """An augmenter leaves to the algorithm what is adapted, and how: it is not there after training."""
    taken = [hook for hook in subject.hooks if HOOKS[hook].part == "inner"]
    if taken:
        fail(
            f"The {subject.label} implements {', '.join(taken)}: evaluation and the exported learner, which are without "
            "it, would adapt otherwise than training did.",
            "change inner gradients in augment_inner_gradient; what decides the inner step belongs to an algorithm.",
        )


def check_outer_terms(subject: Subject) -> None:
    """A term of the outer loss is a sum of weighted losses: nothing is adapted on the way to it."""
    for call in _stage_calls(subject, torch.float64):
        if call.hook != "augment_outer_loss":
            continue

        def term(factor: float, call: _StageCall = call) -> float:
            arguments = call.arguments()
            loss = arguments["loss"]
            arguments["loss"] = lambda outputs, targets: factor * loss(outputs, targets)
            result = call(arguments)
            return float(result[0] if isinstance(result, tuple) else result)

        one, two, three = term(1.0), term(2.0), term(3.0)
        if abs((three - two) - (two - one)) > ROUNDING * max(1.0, abs(three)):
            fail(
                f"The term that the {subject.label} adds to the outer loss does not grow in step with the loss "
                f"({one:g}, {two:g}, {three:g} for 1, 2 and 3 times the loss): something is adapted on the way to it.",
                "compute the term from the parameters as they are given; if adapting is meant, declare "
                "affine_in_loss = False.",
            )


def check_export(subject: Subject) -> None:
    """Nothing of an augmenter is in the saved learner, in adapted modules, or in the user's model."""
    for bench in Pair.of(subject).benches:
        pair = Pair.of(subject)
        state = snapshot(bench.model)
        learner, plain = pair.learner(bench), bench.learner(pair.algorithm)
        learner.step(bench.episodes)
        extra = sorted(_exported_names(learner, bench) - _exported_names(plain, bench))
        if extra:
            fail(
                f"The exported learner holds '{extra[0]}', which comes from the {subject.label}.",
                "keep an augmenter's parameters in the dict that init_meta returns; add nothing to the model.",
            )
        if not equal(snapshot(bench.model), state):
            fail(f"The {subject.label} changed the user's model.", "treat the model that init_meta gets as read-only.")


def _exported_names(learner: MetaLearner, bench: Bench) -> set[str]:
    """What a saved learner and an adapted module hold."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "learner.safetensors")
        learner.save(path)
        with safe_open(path, framework="pt") as file:
            saved = set(file.keys())
    support_x, support_y, *_ = bench.episodes.parts
    return saved | set(learner.adapt(support_x[0], support_y[0]).state_dict())


# -------------------------------------------------------------------------------------------------------------- gradient


def check_model_unchanged(subject: Subject) -> None:
    """Training leaves the model's buffers and its own parameters alone: all that learns are the meta-parameters."""
    for bench in Pair.of(subject).benches:
        learner = Pair.of(subject).learner(bench)
        before = snapshot(learner.model.module)
        structure = [name for name, _ in learner.model.module.named_modules()]
        for _ in range(2):
            learner.step(bench.episodes)
        after = snapshot(learner.model.module)
        if before.keys() != after.keys() or structure != [name for name, _ in learner.model.module.named_modules()]:
            fail(f"Training with the {subject.label} added to the model.", "keep what learns in init_meta's dict.")
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        if changed:
            fail(
                f"Training with the {subject.label} changed '{changed[0]}' of the model in place.",
                "keep no reference to the model, and write to none of its parameters and buffers.",
            )


def check_finite_differences(subject: Subject) -> None:
    """The meta-gradient is the derivative of the objective, for every meta-parameter, in float64."""
    finite_differences(Pair.of(subject))


def finite_differences(pair: Pair) -> None:
    """Compare the meta-gradient of a pair with central differences of its objective."""
    bench = pair.benches[0]
    learner = pair.learner(bench)
    functions = learner.engine.training
    task = tuple(tree_map(lambda leaf: leaf[0], part) for part in bench.episodes.parts)
    # Away from the start, where meta-parameters that begin at zero would hide a missing factor.
    meta = {
        name: value + 0.05 * value.abs().mean() * torch.randn(value.shape, generator=generator(name), dtype=value.dtype)
        for name, value in learner.meta_parameters.items()
    }
    adapted = {name: meta[name] for name in functions.adapted_names}
    noise = next(iter(draw_task_noise(learner.stages, learner.config, adapted, 0, range(1))), {})
    weights = compute_outer_loss_weights(learner.stages, STEPS, 0, next(iter(meta.values())))
    with torch.no_grad():
        grads, *_ = compute_meta_gradient(functions, meta, task, noise, weights)
        for name, value in meta.items():
            direction = torch.randn(value.shape, generator=generator("direction", name), dtype=value.dtype)
            direction = DIFFERENCE_STEP * direction / direction.norm()
            ahead, _ = functions.objective({**meta, name: value + direction}, task, noise, weights)
            behind, _ = functions.objective({**meta, name: value - direction}, task, noise, weights)
            measured = (ahead - behind).item() / (2 * DIFFERENCE_STEP)
            claimed = (grads[name] * direction).sum().item() / DIFFERENCE_STEP
            scale = max(abs(measured), grads[name].norm().item() / max(1.0, value.numel() ** 0.5))
            if not abs(measured - claimed) <= DIFFERENCE_TOLERANCE * scale + 1e-9:
                fail(
                    f"The meta-gradient of '{name}' with {pair.label} is {claimed:.6g} along a direction in which the "
                    f"objective's finite difference is {measured:.6g}.",
                    "let the derivative through: no .detach(), no .data, no torch.no_grad(), no float() or .item() in a "
                    "stage; where a constant is meant, declare exact_gradient = False.",
                )


def check_strategies(subject: Subject) -> None:
    """Task after task, vectorized, traced and in chunks, with stored and recomputed graphs: one gradient."""
    strategies(Pair.of(subject))


def strategies(pair: Pair) -> None:
    """Compare every strategy and memory of a pair with the serial, stored one."""
    for bench in pair.benches:
        expected = _gradient(pair, bench)
        for options in (
            {"strategy": "vectorized"},
            {"strategy": "vectorized", "memory": "recompute"},
            {"strategy": "serial", "memory": "recompute"},
        ):
            _agree(
                pair, bench, expected, options, traced=bench.name == "vectors" and options["strategy"] == "vectorized"
            )
    bench = pair.benches[0]
    _agree(pair, bench, _gradient(pair, bench), {"strategy": "vectorized", "chunk": 2})
    first_order = _gradient(pair, bench, first_order=True)
    _agree(
        pair, bench, first_order, {"strategy": "vectorized", "memory": "recompute", "first_order": True}, traced=True
    )


def check_determinism(subject: Subject) -> None:
    """The seed alone decides: two trainings are equal to the last bit."""
    determinism(Pair.of(subject), Pair.of(subject))


def determinism(pair: Pair, again: Pair) -> None:
    """Train twice from one seed, with other global random states."""
    bench = pair.benches[0]
    results = []
    for number, each in enumerate((pair, again)):
        with use_seed(number, "testing", "global"):
            learner = each.learner(bench, strategy="vectorized")
            for _ in range(3):
                learner.step(bench.episodes)
            results.append(learner.meta_parameters)
    if not equal(*results):
        name = next(name for name in results[0] if not torch.equal(results[0][name], results[1][name]))
        fail(
            f"Two trainings with {pair.label} from one seed end in different values of '{name}'.",
            "draw from the generators that init_meta and draw_noise are given, and from nothing else.",
        )


def check_resume(subject: Subject) -> None:
    """A training that stops and goes on in a new process ends in the same bits: nothing is kept outside of its state."""
    pair, again = Pair.of(subject), Pair.of(subject)
    bench = pair.benches[0]
    through, resumed = pair.learner(bench), again.learner(bench)
    state: dict[str, Any] = {}
    for step in range(4):
        if step == 2:
            state = snapshot(through.state())
            kept = tree_leaves(state["outer_state"])
            odd = [leaf for leaf in kept if not isinstance(leaf, Tensor | int | float | str | None)]
            if odd:
                fail(
                    f"The state that outer_update of the {subject.label} returns holds a {type(odd[0]).__name__}.",
                    "keep tensors, numbers, texts and dicts of them in it, which a checkpoint can hold.",
                )
        through.step(bench.episodes)
    resumed.load_state(state)
    for _ in range(2):
        resumed.step(bench.episodes)
    if not equal(through.meta_parameters, resumed.meta_parameters):
        fail(
            f"A training with the {subject.label} that goes on from a checkpoint ends in other values than one that was "
            "not interrupted.",
            "keep nothing on self from step to step; what outer_update must remember belongs into the state that it "
            "returns.",
        )


def check_learns(subject: Subject) -> None:
    """Training lowers the query loss after adaptation, on three related linear tasks."""
    pair = Pair.of(subject)
    bench = pair.benches[0]
    learner = pair.learner(bench, strategy="vectorized", outer_lr=LEARNING_STEP)
    losses = []
    for _ in range(LEARNING_STEPS):
        learner.step(bench.episodes)
        losses.append(learner.logs["query_loss"])
    if not losses[-1] < LEARNING_FACTOR * losses[0]:
        fail(
            f"After {LEARNING_STEPS} training steps with {pair.label} the query loss is {losses[-1]:.3g}; it began at "
            f"{losses[0]:.3g}.",
            "look at the sign of what outer_gradient or augment_outer_gradient returns, and at outer_update; a gradient "
            "points uphill.",
        )


def check_composition(subject: Subject) -> None:
    """It works with every other installed augmenter, or algorithm, that works alone."""
    other = "augmenters" if subject.kind == "algorithms" else "algorithms"
    for entry in list_entries(other):
        try:
            plugin = resolve(other, entry.qualified)
            partner = Pair(plugin) if other == "algorithms" else Pair(Descent, (plugin,))
            _gradient(partner, partner.benches[0], strategy="vectorized")
        except Exception:  # a plugin that does not work alone says nothing about this one
            continue
        own = subject.resolved()
        pair = Pair(own, (plugin,)) if other == "augmenters" else Pair(plugin, (own,))
        bench = pair.benches[0]
        try:
            expected = _gradient(pair, bench)
            _agree(pair, bench, expected, {"strategy": "vectorized", "memory": "recompute"})
        except MetaregError as error:
            fail(
                f"The {subject.label} does not work with '{entry.name}' of {entry.distribution}: {error}",
                "rely on nothing but the arguments: names, shapes and numbers of parameters are other plugins' too.",
            )


def _gradient(pair: Pair, bench: Bench, **options: Any) -> dict[str, Tensor]:
    loss, grads = pair.learner(bench, **options).meta_gradient(bench.episodes)
    bad = [name for name, value in {"the objective": loss, **grads}.items() if not bool(torch.isfinite(value).all())]
    if bad:
        fail(f"With {pair.label}, {bad[0]} is not finite on the kit's {bench.name}.", "look for divisions by zero.")
    return {"the objective": loss} | grads


def _agree(
    pair: Pair,
    bench: Bench,
    expected: dict[str, Tensor],
    options: dict[str, Any],
    *,
    traced: bool = False,
) -> None:
    described = ", ".join(f"{key}={value}" for key, value in options.items())
    learner = pair.learner(bench, **options)
    # The first call runs the Python of the plugin, the second one its traced operations.
    for _ in range(2 if traced else 1):
        try:
            loss, grads = learner.meta_gradient(bench.episodes)
        except (MetaregError, RuntimeError) as error:
            fail(f"{pair.label} fails on the kit's {bench.name} with {described}: {error}.", _STRATEGY_REMEDY)
        off, name = difference(expected, {"the objective": loss} | grads)
        if not off <= ROUNDING:
            fail(
                f"With {pair.label} on the kit's {bench.name}, {described} gives another meta-gradient than serial: "
                f"'{name}' differs by {off:.1e} of the largest entry.",
                _STRATEGY_REMEDY,
            )


# ------------------------------------------------------------------------------------------------------------ stage calls


@dataclass(frozen=True)
class _StageCall:
    """One implementation of a hook and the arguments that a training would give it."""

    implementation: Implementation
    arguments: Callable[[], dict[str, Any]]

    @property
    def hook(self) -> str:
        return self.implementation.hook

    def __call__(self, arguments: dict[str, Any]) -> Any:
        # torch's default initialisers draw from the global generator: init_meta may use them, and is seeded as in a run.
        around = use_seed(0, "testing", "call") if self.hook == "init_meta" else nullcontext()
        with torch.no_grad(), around:
            return self.implementation(**arguments)


def _stage_calls(subject: Subject, dtype: torch.dtype) -> Iterator[_StageCall]:
    """Every implementation of the plugin, with arguments as they come in a training."""
    for bench in Pair.of(subject).benches:
        pair = Pair.of(subject)
        learner = pair.learner(bench, dtype=dtype)
        plugin = pair.augmenters[0] if pair.augmenters else pair.algorithm
        assert isinstance(plugin, Plugin)
        manager, named = create_plugin_manager([plugin])
        every = _arguments(learner, bench, next(iter(named)))
        for hook, variants in every.items():
            for implementation in find_implementations(manager, named, hook):
                for variant in variants:
                    yield _StageCall(implementation, variant)


def _arguments(learner: MetaLearner, bench: Bench, name: str) -> dict[str, list[Callable[[], dict[str, Any]]]]:
    """For each hook the arguments of some calls, made anew each time that they are asked for."""
    model, functions = learner.model, learner.engine.training
    meta = learner.meta_parameters
    episodes = bench.episodes.to(learner.device, next(iter(meta.values())).dtype)
    task = tuple(tree_map(lambda leaf: leaf[0], part) for part in episodes.parts)
    adapted = {each: meta[each] for each in functions.adapted_names}
    shapes = {each: tuple(value.shape) for each, value in adapted.items()}
    every_shape = {each: tuple(value.shape) for each, value in meta.items()}
    own = {each[len(name) + 1 :]: value for each, value in meta.items() if each.startswith(f"{name}.")}
    with torch.no_grad():
        support_features, support_outputs = model.forward(meta, task[0])
        features, outputs = model.forward(meta, task[2])
    task_noise = draw_task_noise(learner.stages, learner.config, adapted, 0, range(1))
    noise = task_noise[0].get(name) if task_noise else None
    batch_noise = draw_batch_noise(learner.stages, learner.config, meta, 0).get(name)

    def random_like(values: dict[str, Tensor]) -> dict[str, Tensor]:
        draw = generator("arguments")
        return {each: torch.randn(value.shape, generator=draw, dtype=value.dtype) for each, value in values.items()}

    def made(**arguments: Any) -> Callable[[], dict[str, Any]]:
        def make() -> dict[str, Any]:
            copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)
            return copied | ({"generator": generator("call")} if "generator" in arguments else {})

        return make

    inner = [made(params=adapted, grads=random_like(adapted), meta=own, noise=noise, step=k) for k in range(STEPS)]
    return {
        "adapted_parameters": [made(names=model.names, body=model.body_names, head=model.head_names)],
        "start_task": [made(params=adapted, meta=own)],
        "inner_update": inner,
        "draw_noise": [
            made(shapes=shapes, generator=None, inner_steps=STEPS, stage="task"),
            made(shapes=every_shape, generator=None, inner_steps=STEPS, stage="batch"),
        ],
        "augment_inner_gradient": inner,
        "augment_outer_loss": [
            made(
                features=features, outputs=outputs, targets=task[3], meta=own, loss=learner.loss, metric=learner.metric,
                noise=noise,
            )
        ],
        "augment_outer_gradient": [made(grads=random_like(meta), meta=own, noise=batch_noise)],
        "outer_loss_weights": [made(inner_steps=STEPS, training_step=step) for step in (0, 1000)],
        "outer_gradient": [made(meta=meta, adapted=random_like(adapted), inner_steps=STEPS)],
        "outer_update": [made(meta=meta, grads=random_like(meta), state={})],
        "init_meta": [
            made(
                model=model.module, example=task[0], features=support_features, outputs=support_outputs,
                inner_steps=STEPS, generator=None,
            )
        ],
    }  # fmt: skip


def _wrong(value: Any) -> Iterator[tuple[Any, str]]:
    """Values that do not fit in the place of one that does."""
    if isinstance(value, dict):
        first = next(name for name, each in value.items() if each.dim() > 0)
        yield {name: each for name, each in value.items() if name != first}, f"the missing gradient of '{first}'"
        longer = torch.cat([value[first], value[first][:1]])
        yield {**value, first: longer}, f"a gradient of '{first}' with the shape {tuple(longer.shape)}"
    elif isinstance(value, Tensor):
        wider = torch.cat([value, value[:, :1]], 1)
        yield wider, f"features of the shape {tuple(wider.shape)} where they were {tuple(value.shape)}"


def _fits(result: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return result.keys() == expected.keys() and all(result[name].shape == expected[name].shape for name in result)


def _described(value: Tensor) -> str:
    return f"a {value.dtype} of shape {tuple(value.shape)}"
