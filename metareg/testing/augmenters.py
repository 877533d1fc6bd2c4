"""Checks of augmenters alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

from metareg.contract.hookspecs import HOOKS
from metareg.learner.learner import MetaLearner
from metareg.testing.benches import Bench, Pair
from metareg.testing.calls import StageCall, list_stage_calls
from metareg.testing.check import Subject, fail
from metareg.testing.compare import ROUNDING, are_equal, snapshot

__all__ = ["check_export", "check_inner_rule", "check_outer_terms"]


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
        extra = sorted(_list_exported_names(learner, bench) - _list_exported_names(plain, bench))
        if extra:
            fail(
                f"The exported learner holds '{extra[0]}', which comes from the {subject.label}.",
                "keep an augmenter's parameters in the dict that init_meta returns; add nothing to the model.",
            )
        if not are_equal(snapshot(bench.model), state):
            fail(f"The {subject.label} changed the user's model.", "treat the model that init_meta gets as read-only.")


def _list_exported_names(learner: MetaLearner, bench: Bench) -> set[str]:
    """What a saved learner and an adapted module hold."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "learner.safetensors")
        learner.save(path)
        with safe_open(path, framework="pt") as file:
            saved = set(file.keys())
    support_x, support_y, *_ = bench.episodes.parts
    return saved | set(learner.adapt(support_x[0], support_y[0]).state_dict())
