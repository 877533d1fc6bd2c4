"""Checks of trainings with an algorithm, an augmenter or both: gradients, strategies, repetition, composition."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metareg.contract.config import NO_PLUGIN
from metareg.engine.derivative import compute_meta_gradient
from metareg.errors import MetaregError
from metareg.learner.batch_runner import compute_outer_loss_weights
from metareg.learner.learner import MetaLearner
from metareg.registry.plugins import Plugin, list_entries, resolve
from metareg.testing.benches import STEPS, Bench, Descent, Pair, RepeatedTasks, draw_noise, new_generator
from metareg.testing.check import ROUNDING, CheckFailed, Subject, are_equal, difference, fail, snapshot
from metareg.testing.steps import compare_pair_steps
from metareg.util.seeding import use_seed
from metareg.util.torch_internals import tree_leaves

__all__ = [
    "NOT_APPLICABLE",
    "Combination",
    "check_composition",
    "check_determinism",
    "check_finite_differences",
    "check_frozen_layers",
    "check_learns",
    "check_meta_parameters",
    "check_model_unchanged",
    "check_more_steps",
    "check_outer_update",
    "check_reload",
    "check_resume",
    "check_strategies",
    "combinations",
]  # fmt: skip

NOT_APPLICABLE = "not applicable"
"""The result of a check that a plugin's declarations exclude."""

# Central differences with step 1e-5 in float64 have an error of about 1e-10 of the objective.
DIFFERENCE_STEP = 1e-5
DIFFERENCE_TOLERANCE = 1e-6

_STRATEGY_REMEDY = (
    "let control flow depend only on shapes and the step's number, never on values of tensors; use operations that "
    "torch.func.vmap supports; do not store tensors on self."
)

LEARNING_STEPS, LEARNING_STEP, LEARNING_FACTOR = 500, 0.02, 0.7


def check_model_unchanged(subject: Subject) -> None:
    """Training does not change the model's buffers or parameters: only the meta-parameters learn."""
    for bench in Pair.of(subject).benches:
        learner = Pair.of(subject).learner(bench)
        module = learner.model.module
        before, structure = snapshot(module), [name for name, _ in module.named_modules()]
        for _ in range(2):
            learner.step(bench.episodes)
        after = snapshot(module)
        if before.keys() != after.keys() or structure != [name for name, _ in module.named_modules()]:
            fail(
                f"Training with the {subject.label} added to the model.",
                "return learned tensors from init_meta instead.",
            )
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        if changed:
            fail(
                f"Training with the {subject.label} changed '{changed[0]}' of the model in place.",
                "do not keep a reference to the model, and do not write to its parameters and buffers.",
            )


def check_finite_differences(subject: Subject) -> None:
    """The meta-gradient is the derivative of the objective, for every meta-parameter, in float64."""
    compare_finite_differences(Pair.of(subject))


def compare_finite_differences(pair: Pair) -> None:
    """Compare a pair's meta-gradient with central differences of its objective."""
    bench = pair.benches[0]
    learner = pair.learner(bench)
    functions, task = learner.engine.training, bench.episodes.unstack(0)
    # Move away from the start, because meta-parameters that are zero would hide a missing factor.
    meta = {
        name: value
        + 0.05 * value.abs().mean() * torch.randn(value.shape, generator=new_generator(name), dtype=value.dtype)
        for name, value in learner.meta_parameters.items()
    }
    noise = draw_noise(learner, "task", functions.adapted_names, 0, 0)
    weights = compute_outer_loss_weights(learner.stages, STEPS, 0, next(iter(meta.values())))
    with torch.no_grad():
        grads, *_ = compute_meta_gradient(functions, meta, task, noise, weights)
        for name, value in meta.items():
            direction = torch.randn(value.shape, generator=new_generator("direction", name), dtype=value.dtype)
            direction = DIFFERENCE_STEP * direction / direction.norm()
            ahead, _ = functions.objective({**meta, name: value + direction}, task, noise, weights)
            behind, _ = functions.objective({**meta, name: value - direction}, task, noise, weights)
            measured = (ahead - behind).item() / (2 * DIFFERENCE_STEP)
            claimed = (grads[name] * direction).sum().item() / DIFFERENCE_STEP
            scale = max(abs(measured), grads[name].norm().item() / max(1.0, value.numel() ** 0.5))
            if not abs(measured - claimed) <= DIFFERENCE_TOLERANCE * scale + 1e-9:
                fail(
                    f"The meta-gradient of '{name}' with {pair.label} is {claimed:.6g} along a direction, but the "
                    f"objective's finite difference there is {measured:.6g}.",
                    "do not interrupt the derivative: no .detach(), no .data, no torch.no_grad(), no float() or "
                    ".item() in a stage; if a constant is intended, declare exact_gradient = False.",
                )


def check_strategies(subject: Subject) -> None:
    """Serial, vectorized, traced and chunked, with stored and recomputed graphs, the gradient is the same."""
    compare_strategies(Pair.of(subject))


def compare_strategies(pair: Pair) -> None:
    """Compare a pair's gradient in every strategy and `memory` with the serial, stored one."""
    for bench in pair.benches:
        expected = _gradient(pair, bench)
        for options in (
            {"strategy": "vectorized"},
            {"strategy": "vectorized", "memory": "recompute"},
            {"strategy": "serial", "memory": "recompute"},
        ):
            traced = bench.name == "vectors" and options["strategy"] == "vectorized"
            _compare_gradient(pair, bench, expected, options, traced=traced)
    bench = pair.benches[0]
    _compare_gradient(pair, bench, _gradient(pair, bench), {"strategy": "vectorized", "chunk": 2})
    first_order = _gradient(pair, bench, first_order=True)
    recompute: dict[str, Any] = {"strategy": "vectorized", "memory": "recompute", "first_order": True}
    _compare_gradient(pair, bench, first_order, recompute, traced=True)


def check_determinism(subject: Subject) -> None:
    """Only the seed matters: two trainings are equal to the last bit."""
    compare_trainings(Pair.of(subject), Pair.of(subject))


def compare_trainings(pair: Pair, again: Pair) -> None:
    """Train twice with the same seed and different global random states."""
    bench = pair.benches[0]
    results = []
    for number, each in enumerate((pair, again)):
        with use_seed(number, "testing", "global"):
            learner = each.learner(bench, strategy="vectorized")
            for _ in range(3):
                learner.step(bench.episodes)
            results.append(learner.meta_parameters)
    if not are_equal(*results):
        name = next(name for name in results[0] if not torch.equal(results[0][name], results[1][name]))
        fail(
            f"Two trainings with {pair.label} with the same seed end with different values of '{name}'.",
            "draw only from the generators that init_meta and draw_noise receive.",
        )


def check_resume(subject: Subject) -> None:
    """A training resumed in a new process ends with the same bits: nothing is kept outside its state."""
    pair, again = Pair.of(subject), Pair.of(subject)
    bench = pair.benches[0]
    through, resumed = pair.learner(bench), again.learner(bench)
    for _ in range(2):
        through.step(bench.episodes)
    state = snapshot(through.state())
    odd = [
        leaf for leaf in tree_leaves(state["outer_state"]) if not isinstance(leaf, Tensor | int | float | str | None)
    ]
    if odd:
        fail(
            f"The state that outer_update of the {subject.label} returns contains a {type(odd[0]).__name__}.",
            "use only tensors, numbers, strings and dicts of them, which a checkpoint can store.",
        )
    resumed.load_state(state)
    for learner in (through, through, resumed, resumed):
        learner.step(bench.episodes)
    if not are_equal(through.meta_parameters, resumed.meta_parameters):
        fail(
            f"A training with the {subject.label} that resumes from a checkpoint ends with different values than an "
            "uninterrupted one.",
            "do not store anything on self between steps; return what outer_update needs later as its state.",
        )


def check_learns(subject: Subject) -> None:
    """Training lowers the query loss after adaptation, on three related linear tasks."""
    pair = Pair.of(subject)
    bench = pair.benches[0]
    options = {} if "outer_update" in subject.hooks else {"outer_lr": LEARNING_STEP}
    learner = pair.learner(bench, strategy="vectorized", **options)
    losses: list[float] = []
    # Small step sizes need more steps.
    while len(losses) < LEARNING_STEPS and not (losses and losses[-1] < LEARNING_FACTOR * losses[0]):
        learner.step(bench.episodes)
        losses.append(learner.logs["query_loss"])
    if not losses[-1] < LEARNING_FACTOR * losses[0]:
        fail(
            f"After {LEARNING_STEPS} training steps with {pair.label} the query loss is {losses[-1]:.3g}; it was "
            f"{losses[0]:.3g} at the start.",
            "check the sign of the result of outer_gradient or augment_outer_gradient (a gradient points uphill), and "
            "outer_update.",
        )


def check_meta_parameters(subject: Subject) -> None:
    """Every meta-parameter of the plugin learns: the outer loop has a gradient for it."""
    unused: set[str] | None = None
    for bench in Pair.of(subject).benches:
        pair = Pair.of(subject)
        learner = pair.learner(bench)
        state = snapshot(learner.state())
        # Move away from the start, because a layer of zeros would block the gradients of earlier layers.
        state["meta"] = _move_away(state["meta"])
        learner.load_state(state)
        _, grads = learner.meta_gradient(bench.episodes)
        names = {name for name, value in grads.items() if learner.stages.owner(name) and not value.any()}
        unused = names if unused is None else unused & names
    if unused:
        fail(
            f"The gradient of the meta-parameter '{min(unused)}' of the {subject.label} is zero: it never learns.",
            "use it in a stage, or remove it from init_meta; a constant belongs in the configuration.",
        )


def check_outer_update(subject: Subject) -> None:
    """A step of the plugin's outer optimiser changes every parameter that has a gradient."""
    for bench in Pair.of(subject).benches:
        learner = Pair.of(subject).learner(bench)
        meta = learner.meta_parameters
        grads = {
            name: torch.randn(value.shape, generator=new_generator(name), dtype=value.dtype)
            for name, value in meta.items()
        }
        updated, _ = learner.stages.outer_update(meta, grads, {})
        still = [name for name, value in meta.items() if torch.equal(value, updated[name])]
        if still:
            fail(
                f"The outer_update of the {subject.label} does not change '{still[0]}', although its gradient is not "
                "zero.",
                "update every meta-parameter in `meta`, including those of the body, the head and other plugins.",
            )


def check_frozen_layers(subject: Subject) -> None:
    """It works with a model that has a frozen layer."""
    pair = Pair.of(subject)
    bench = pair.frozen_bench
    for strategy in ("serial", "vectorized"):
        try:
            learner = pair.learner(bench, strategy=strategy)
            learner.step(bench.episodes)
            learner.evaluate(RepeatedTasks(bench.episodes), 2, inner_steps=(0, STEPS))
        except (MetaregError, RuntimeError) as error:
            fail(
                f"The {subject.label} fails with a frozen layer in the model: {error}",
                "use the parameter names that the hooks receive, not positions or model.parameters().",
            )
        pair = Pair.of(subject)


def check_more_steps(subject: Subject) -> None:
    """An evaluation can take more inner steps than training, or none."""
    for bench in Pair.of(subject).benches:
        pair = Pair.of(subject)
        learner = pair.learner(bench)
        wanted = (0, STEPS, 2 * STEPS + 1)
        try:
            scores = learner.evaluate(RepeatedTasks(bench.episodes), 2, inner_steps=wanted).scores
        except (MetaregError, RuntimeError) as error:
            fail(
                f"The {subject.label} fails in an evaluation with {wanted[-1]} inner steps after training with "
                f"{STEPS}: {error}",
                "let inner_update accept any step number: for steps beyond training, use the values of the last "
                "training step.",
            )
        if not bool(torch.isfinite(scores).all()):
            fail(
                f"Scores with the {subject.label} are not finite.",
                "look for divisions by zero at step 0 and at late steps.",
            )


def check_reload(subject: Subject) -> None:
    """A saved learner can be loaded from its file alone, and adapts like the original."""
    for bench in Pair.of(subject).benches:
        pair = Pair.of(subject)
        learner = pair.learner(bench)
        learner.step(bench.episodes)
        support_x, support_y, *_ = bench.episodes.unstack(0)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "learner.safetensors")
            learner.save(path)
            again = Pair.of(subject)
            # A plugin that is not installed is passed on, and keeps its name.
            model, staying = copy.deepcopy(bench.model).double(), _list_staying(again)
            loaded = MetaLearner.load(path, model, algo=again.algorithm, augment=staying)
        given = support_x, support_y, 2 * STEPS, support_x
        expected, found = (dict(each.adapt(*given).named_parameters()) for each in (learner, loaded))
        off, name = difference(expected, found)
        if not off <= ROUNDING:
            fail(
                f"A learner with the {subject.label} adapts differently after saving and loading: '{name}' differs by "
                f"{off:.1e}.",
                "return learned tensors from init_meta, and do not store anything on self.",
            )


def _list_staying(pair: Pair) -> list[Plugin]:
    """List the augmenters that a saved learner contains."""
    return [each for each in pair.augmenters if not getattr(each.instance, "training_only", True)]


def _move_away(meta: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move values away from the initial ones: by some percent, or slightly if they are zero."""
    return {
        name: value
        + (0.05 * value.abs().mean() + 0.01)
        * torch.randn(value.shape, generator=new_generator(name), dtype=value.dtype)
        for name, value in meta.items()
    }


def check_composition(subject: Subject) -> None:
    """It works with every installed augmenter or algorithm that works by itself."""
    other = "augmenters" if subject.kind == "algorithms" else "algorithms"
    for entry in list_entries(other):
        try:
            plugin = resolve(other, entry.qualified)
            partner = Pair(plugin) if other == "algorithms" else Pair(Descent, (plugin,))
            _gradient(partner, partner.benches[0], strategy="vectorized")
        except Exception:  # a plugin that does not work by itself is not this one's fault
            continue
        own = subject.resolve()
        pair = Pair(own, (plugin,)) if other == "augmenters" else Pair(plugin, (own,))
        bench = pair.benches[0]
        try:
            _compare_gradient(pair, bench, _gradient(pair, bench), {"strategy": "vectorized", "memory": "recompute"})
        except MetaregError as error:
            fail(
                f"The {subject.label} does not work with '{entry.name}' of {entry.distribution}: {error}",
                "rely only on the arguments: other plugins can change the names, shapes and number of parameters.",
            )


def _gradient(pair: Pair, bench: Bench, **options: Any) -> dict[str, Tensor]:
    loss, grads = pair.learner(bench, **options).meta_gradient(bench.episodes)
    bad = [name for name, value in {"the objective": loss, **grads}.items() if not bool(torch.isfinite(value).all())]
    if bad:
        fail(f"With {pair.label}, {bad[0]} is not finite on the kit's {bench.name}.", "look for divisions by zero.")
    return {"the objective": loss} | grads


def _compare_gradient(
    pair: Pair, bench: Bench, expected: dict[str, Tensor], options: dict[str, Any], *, traced: bool = False
) -> None:
    described = ", ".join(f"{key}={value}" for key, value in options.items())
    learner = pair.learner(bench, **options)
    # The first call runs the plugin's Python code, the second its traced operations.
    for _ in range(2 if traced else 1):
        try:
            loss, grads = learner.meta_gradient(bench.episodes)
        except (MetaregError, RuntimeError) as error:
            fail(f"{pair.label} fails on the kit's {bench.name} with {described}: {error}.", _STRATEGY_REMEDY)
        off, name = difference(expected, {"the objective": loss} | grads)
        if not off <= ROUNDING:
            fail(
                f"With {pair.label} on the kit's {bench.name}, {described} returns a different meta-gradient from "
                f"serial: '{name}' differs by {off:.1e} of the largest entry.",
                _STRATEGY_REMEDY,
            )


@dataclass(frozen=True)
class Combination:
    """The names of an algorithm and an augmenter, or none."""

    algorithm: str
    augmenter: str = NO_PLUGIN

    def __str__(self) -> str:
        return f"{self.algorithm}, {self.augmenter}"

    def pair(self) -> Pair:
        """Build both plugins."""
        augmenters = () if self.augmenter == NO_PLUGIN else (resolve("augmenters", self.augmenter),)
        return Pair(resolve("algorithms", self.algorithm), augmenters)

    def check(self) -> dict[str, str | None]:
        """Run the checks of the combination, and return for each None or the problem.

        The checks: all strategies and `memory` options agree, in one gradient and over whole steps; the meta-gradient
        is the objective's derivative; training is repeatable. The result is `NOT_APPLICABLE` if a plugin declares
        otherwise.
        """
        pair = self.pair()
        plugins = [resolve("algorithms", self.algorithm), *pair.augmenters]
        exact = all(getattr(each.instance, "exact_gradient", True) for each in plugins) and not (
            pair.learner(pair.benches[0]).stages.implements("outer_gradient")
        )
        found: dict[str, str | None] = {}
        for name, run in (
            ("strategies", lambda: compare_strategies(pair)),
            ("whole steps", lambda: compare_pair_steps(self.pair)),
            ("finite differences", lambda: compare_finite_differences(pair) if exact else None),
            ("determinism", lambda: compare_trainings(pair, self.pair())),
        ):
            try:
                run()
                found[name] = None if exact or name != "finite differences" else NOT_APPLICABLE
            except (CheckFailed, MetaregError) as error:
                found[name] = str(error)
        return found


def combinations() -> list[Combination]:
    """List all combinations, each algorithm alone first, from entry points without importing plugins."""
    augmenters = [NO_PLUGIN, *_names("augmenters")]
    return [Combination(algorithm, augmenter) for algorithm in _names("algorithms") for augmenter in augmenters]


def _names(kind: str) -> list[str]:
    """Return the names that users must write, prefixed with the distribution if two plugins share a name."""
    installed = list_entries(kind)
    names = [entry.name for entry in installed]
    return [entry.qualified if names.count(entry.name) > 1 else entry.name for entry in installed]
