"""Checks of the hooks of algorithms and augmenters: purity, shapes, and agreement with the class's declarations."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from metareg.contract.attributes import StepExample
from metareg.contract.hookspecs import HOOKS
from metareg.errors import MetaregError
from metareg.learner.learner import MetaLearner
from metareg.testing.benches import STEPS, Bench, Pair, draw_noise
from metareg.testing.calls import StageCall, list_stage_calls
from metareg.testing.check import ROUNDING, Subject, are_equal, fail, refuse_global_randomness, snapshot
from metareg.util.torch_internals import tree_leaves

__all__ = [
    "check_adapted", "check_devices", "check_export", "check_inner_rule", "check_outer_terms", "check_purity",
    "check_shapes", "check_step_examples", "check_wrong_shapes",
]  # fmt: skip


def check_purity(subject: Subject) -> None:
    """Stage functions change nothing in place, use no global random numbers, and are repeatable."""
    for call in list_stage_calls(subject, torch.float64):
        arguments = call.arguments()
        before = snapshot(arguments)
        remedy = "draw random numbers in draw_noise, from the generator that it receives."
        with refuse_global_randomness(subject, remedy, f" in {call.hook}"):
            first = snapshot(call(arguments))
        if not are_equal(snapshot(arguments), before):
            changed = [name for name in arguments if not are_equal(snapshot(arguments[name]), before[name])]
            fail(
                f"The {subject.label} changes its argument {', '.join(changed)} in place in {call.hook}.",
                "return new tensors and dicts: no add_(), no mul_(), no +=, no assignment to items of an argument, and "
                "no additions to the model.",
            )
        if not are_equal(first, snapshot(call(call.arguments()))):
            fail(
                f"The {subject.label} returns a different result when {call.hook} is called again with the same "
                "arguments.",
                "do not store changing values on self, and draw random numbers only from the generator.",
            )


def check_shapes(subject: Subject) -> None:
    """Results have the names, shapes and types that the contract requires, in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        for call in list_stage_calls(subject, dtype):
            arguments = call.arguments()
            expected = arguments.get("params" if "params" in arguments else "grads")
            result = _drop_state(call(arguments))
            if not isinstance(expected, dict) or not isinstance(result, dict):
                continue
            for name, value in result.items():
                if name in expected and value.dtype != expected[name].dtype:
                    fail(
                        f"The {subject.label} returns '{name}' as {value.dtype} from {call.hook}; its arguments are "
                        f"{dtype}.",
                        "do not create tensors with a fixed dtype; use that of the arguments.",
                    )
        pair = Pair.of(subject)
        for bench in pair.benches:
            learner = pair.learner(bench, dtype=dtype)
            _, grads = learner.meta_gradient(bench.episodes)  # raises for wrong names and shapes
            meta = learner.meta_parameters
            wrong = [name for name, value in grads.items() if value.dtype != meta[name].dtype]
            if wrong:
                fail(
                    f"The meta-gradient of '{wrong[0]}' is {grads[wrong[0]].dtype}, but the parameter is {dtype}.",
                    "do not create tensors with a fixed dtype; use that of the arguments.",
                )
            learner.step(bench.episodes)
            for name, value in learner.meta_parameters.items():
                if value.shape != meta[name].shape or value.dtype != meta[name].dtype:
                    fail(
                        f"The outer step turned '{name}' from {_describe(meta[name])} into {_describe(value)}.",
                        "return each meta-parameter from outer_update with its own shape and dtype.",
                    )


def check_wrong_shapes(subject: Subject) -> None:
    """Mismatched shapes raise an error; they are never ignored."""
    for call in list_stage_calls(subject, torch.float64):
        for part in ("grads", "features"):
            # Features can have any shape unless a meta-parameter was created for a certain one.
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
                result = _drop_state(result)
                if isinstance(result, dict) and isinstance(given, dict) and not _fits(result, given):
                    continue  # the stages raise for this result
                fail(
                    f"The {subject.label} ignores {how} in {call.hook}.",
                    "access every tensor by name (grads[name]), without .get(), zip() or reshape(), so that a missing "
                    "or misshapen tensor raises an error.",
                )


def _wrong(value: Any) -> Iterator[tuple[Any, str]]:
    """Yield values that do not fit in place of a valid one, with their descriptions."""
    if isinstance(value, dict):
        first = next((name for name, each in value.items() if each.dim() > 0), None)
        if first is None:
            return
        yield {name: each for name, each in value.items() if name != first}, f"the missing gradient of '{first}'"
        longer = torch.cat([value[first], value[first][:1]])
        yield {**value, first: longer}, f"a gradient of '{first}' with the shape {tuple(longer.shape)}"
    elif isinstance(value, Tensor):
        wider = torch.cat([value, value[:, :1]], 1)
        yield wider, f"features of the shape {tuple(wider.shape)} instead of {tuple(value.shape)}"


def _drop_state(result: Any) -> Any:
    """Return a hook's result without its state."""
    return result[0] if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], dict) else result


def _fits(result: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return result.keys() == expected.keys() and all(result[name].shape == expected[name].shape for name in result)


def _describe(value: Tensor) -> str:
    return f"a {value.dtype} of shape {tuple(value.shape)}"


def check_adapted(subject: Subject) -> None:
    """The inner loop changes the parameters that the class declares, and no others."""
    pair = Pair.of(subject)
    bench = pair.benches[0]
    learner = pair.learner(bench)
    declared = subject.attribute("adapts", "all")
    names = learner.model.names
    known = {"all": names, "body": learner.model.body_names, "head": learner.model.head_names, "none": ()}
    chosen = known.get(declared, [name for name in names if fnmatch.fnmatchcase(name, declared)])
    if not chosen and declared != "none":
        fail(
            f"The {subject.label} declares adapts = {declared!r}, which matches none of the parameters "
            f"{', '.join(names)}.",
            "declare 'all', 'body', 'head', 'none' or a shell pattern for parameter names.",
        )
    before = {name: learner.meta_parameters[name].clone() for name in names}
    support_x, support_y, *_ = bench.episodes.parts
    adapted = dict(learner.adapt(support_x[0], support_y[0], steps=2).named_parameters())
    moved = [name for name in names if not torch.equal(adapted[name], before[name])]
    stray = [name for name in moved if name not in chosen]
    still = [name for name in chosen if name not in moved]
    if stray:
        fail(
            f"The inner loop of the {subject.label} changes '{stray[0]}', which adapts = {declared!r} excludes.",
            "return the right names from adapted_parameters, or declare what the inner loop adapts.",
        )
    if still:
        fail(
            f"The inner loop of the {subject.label} does not change '{still[0]}', which adapts = {declared!r} "
            "includes.",
            "check inner_update and adapted_parameters, or declare what the inner loop adapts.",
        )


def check_step_examples(subject: Subject) -> None:
    """One inner step gives the numbers of the class's worked examples."""
    examples: tuple[StepExample, ...] = tuple(subject.attribute("step_examples", ()))
    if not examples:
        fail(
            f"The {subject.label} declares no worked example of an inner step, so a wrong factor or sign would not be "
            "detected.",
            "compute one step by hand from the formula: step_examples = (StepExample(param=2.0, grad=3.0, after=1.7, "
            "config={'inner_lr': 0.1}),).",
        )
    for example in examples:
        pair = Pair.of(subject, **example.config)
        learner = pair.learner(pair.benches[0], inner_steps=max(STEPS, example.step + 1))
        names = learner.engine.training.adapted_names
        entries = sum(learner.meta_parameters[name].numel() for name in names)
        expected = example.after(entries) if callable(example.after) else example.after
        after = _take_inner_step(learner, pair.benches[0], example, every=1)
        if not callable(example.after):
            # Use different entries too: a rule that mixes up entries is correct if all are equal.
            mixed = _take_inner_step(learner, pair.benches[0], example, every=2)
            after |= {f"{name}, every second entry": value for name, value in mixed.items()}
        for name, value in after.items():
            wanted = torch.full_like(value, expected)
            if not torch.allclose(value, wanted, rtol=1e-6, atol=1e-9):
                got = value[(value - wanted).abs().argmax()].item()
                fail(
                    f"One inner step of the {subject.label} takes '{name}' from {example.param:g} with gradient "
                    f"{example.grad:g} to {got:g}; its worked example says {expected:g} (step {example.step}, "
                    f"{dict(example.config) or 'default options'}).",
                    "compare inner_update with the formula: the sign, the factor, the step size, and which entry's "
                    "gradient it uses.",
                )


def _take_inner_step(learner: MetaLearner, bench: Bench, example: StepExample, every: int) -> dict[str, Tensor]:
    """Take an example's step with `inner_update`, on all entries, or on every second one with others between them."""
    functions, meta = learner.engine.training, learner.meta_parameters
    params = {name: _fill(meta[name], example.param, every) for name in functions.adapted_names}
    grads = {name: _fill(value, example.grad, every) for name, value in params.items()}
    context = functions.prepare(meta, bench.episodes.unstack(0), draw_noise(learner, "task", params, 0, 0))
    with torch.no_grad():
        _, state = learner.stages.start_task(params, meta, context.noise, functions.view(context, 0))
        given = params, meta, example.step, state, context.noise, functions.view(context, example.step)
        after, _ = learner.stages.inner_update(grads, params, *given)
    return {name: value.flatten()[::every] for name, value in after.items()}


def _fill(like: Tensor, value: float, every: int) -> Tensor:
    """Create a tensor with `value` in every n-th entry and other values between them."""
    filled = torch.full_like(like, value).flatten()
    between = torch.arange(filled.numel()) % every != 0
    filled[between] = 0.5 * value + torch.arange(int(between.sum()), dtype=like.dtype)
    return filled.view(like.shape)


def check_devices(subject: Subject) -> None:
    """Stage functions create tensors on the device of their arguments."""
    for call in list_stage_calls(subject, torch.float32, device="meta"):
        # Initial values and noise are drawn on the CPU and moved; tasks are changed on the device of their source.
        if call.hook in ("init_meta", "draw_noise", "augment_episodes"):
            continue
        remedy = "create tensors with zeros_like(), new_ones(), or device=x.device."
        try:
            result = call(call.arguments())
        except (MetaregError, RuntimeError, NotImplementedError) as error:
            # Tensors on this device have no values, so operations that need values cannot be tried.
            if "same device" in str(error) or "devices" in str(error):
                fail(f"The {subject.label} mixes devices in {call.hook}: {error}.", remedy)
            continue
        if any(isinstance(leaf, Tensor) and leaf.device.type != "meta" for leaf in tree_leaves(result)):
            fail(
                f"The {subject.label} returns a CPU tensor from {call.hook}, but its arguments are on another device.",
                remedy,
            )


def check_inner_rule(subject: Subject) -> None:
    """An augmenter does not change what is adapted, or how: it is absent after training."""
    taken = [hook for hook in subject.hooks if HOOKS[hook].part == "inner"]
    if taken and subject.attribute("training_only", True):
        fail(
            f"The {subject.label} implements {', '.join(taken)}: evaluation and the exported learner, which do not "
            "contain it, would adapt differently from training.",
            "change inner gradients in augment_inner_gradient; the rule of the inner step belongs to an algorithm, or "
            "to an augmenter that declares training_only = False.",
        )


def check_outer_terms(subject: Subject) -> None:
    """A term of the outer loss is a weighted sum of losses; computing it adapts nothing."""
    for call in list_stage_calls(subject, torch.float64):
        if call.hook != "augment_outer_loss":
            continue

        def term(factor: float, call: StageCall = call) -> float:
            arguments = call.arguments()
            loss = arguments["loss"]
            arguments["loss"] = lambda outputs, targets: factor * loss(outputs, targets)
            result = call(arguments)
            return float(result[0] if isinstance(result, tuple) else result)

        one, two, three = term(1.0), term(2.0), term(3.0)
        if abs((three - two) - (two - one)) > ROUNDING * max(1.0, abs(three)):
            fail(
                f"The term that the {subject.label} adds to the outer loss is not affine in the loss ({one:g}, "
                f"{two:g}, {three:g} for 1, 2 and 3 times the loss), which means that computing it adapts parameters.",
                "compute the term from the given parameters; if adaptation is intended, declare affine_in_loss = "
                "False.",
            )


def check_export(subject: Subject) -> None:
    """The saved learner, adapted modules and the user's model contain nothing of an augmenter."""
    for bench in Pair.of(subject).benches:
        pair = Pair.of(subject)
        state = snapshot(bench.model)
        learner, plain = pair.learner(bench), bench.learner(pair.algorithm)
        learner.step(bench.episodes)
        extra = sorted(_list_exported_names(learner, bench) - _list_exported_names(plain, bench))
        if extra:
            fail(
                f"The exported learner contains '{extra[0]}', which belongs to the {subject.label}.",
                "keep an augmenter's parameters in the dict that init_meta returns; add nothing to the model.",
            )
        if not are_equal(snapshot(bench.model), state):
            fail(
                f"The {subject.label} changed the user's model.",
                "treat the model that init_meta receives as read-only.",
            )


def _list_exported_names(learner: MetaLearner, bench: Bench) -> set[str]:
    """List the names in a saved learner and an adapted module."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "learner.safetensors")
        learner.save(path)
        with safe_open(path, framework="pt") as file:
            saved = set(file.keys())
    support_x, support_y, *_ = bench.episodes.parts
    return saved | set(learner.adapt(support_x[0], support_y[0]).state_dict())
