"""Checks of algorithms alone."""

from __future__ import annotations

import fnmatch

import torch

from metareg.contract.attributes import StepExample
from metareg.testing.benches import STEPS, Pair, functions_of
from metareg.testing.check import Subject, fail

__all__ = ["check_adapted", "check_step_examples"]


def check_adapted(subject: Subject) -> None:
    """The inner loop moves the parameters that the class says it does, and no other."""
    pair = Pair.of(subject)
    bench = pair.benches[0]
    learner = pair.learner(bench)
    declared = subject.attribute("adapts", "all")
    names = learner.model.names
    chosen = {"all": names, "body": learner.model.body_names, "head": learner.model.head_names}.get(declared) or [
        name for name in names if fnmatch.fnmatchcase(name, declared)
    ]
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
    examples: tuple[StepExample, ...] = tuple(subject.attribute("step_examples", ()))
    if not examples:
        fail(
            f"The {subject.label} states no worked example of an inner step, so that a wrong factor or sign would pass.",
            "work one step out by hand from the formula: step_examples = (StepExample(param=2.0, grad=3.0, after=1.7, "
            "config={'inner_lr': 0.1}),).",
        )
    for example in examples:
        pair = Pair.of(subject, **example.config)
        learner = pair.learner(pair.benches[0], inner_steps=max(STEPS, example.step + 1))
        functions, meta = functions_of(learner), learner.meta_parameters
        params = {name: torch.full_like(meta[name], example.param) for name in functions.adapted_names}
        grads = {name: torch.full_like(value, example.grad) for name, value in params.items()}
        after = learner.stages.inner_update(params, grads, meta, example.step)
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
