"""What a plugin class can say about itself beside its hooks; the registry and the conformance kit read it.

All are plain class attributes:

=================  ==========  ==================================================================================
attribute          of          meaning, and what holds where it is not given
=================  ==========  ==================================================================================
contract           all         the number of the contract that the plugin was written for (`CONTRACT_VERSION`)
adapts             algorithms  what the inner loop changes: ``"all"`` (default), ``"body"``, ``"head"``, ``"none"``, or
                               a shell pattern for parameter names, as ``"*context*"``
step_examples      algorithms  worked examples of one inner step (`StepExample`); None where a step depends on drawn
                               values, so that none can be worked out
default_model      algorithms  the model that it needs, where any model will not do
recommended        algorithms  options of the run and of its plugins that suit it, where neither the user nor a file says
                               anything, each with its owner, as ``"algo.inner_lr"``; `metareg.Task` has the rule
                   tasks
                   models
exact_gradient     algorithms  False where the meta-gradient treats as a constant what is none; True by default
                   augmenters
transductive       algorithms  whether it reads the query inputs to adapt, which results then say; False by default
                   augmenters
training_only      augmenters  False where it stays in evaluation, adaptation and the saved learner; True by default
targets            algorithms  ``"classes"`` or ``"numbers"`` where it is for these targets alone
                   augmenters
affine_in_loss     augmenters  False where a term of the outer loss is no sum of weighted losses; True by default
example_spec       models      the `TaskSpec` that the kit builds the model for; vectors by default
example_task       models      a task plugin that the kit runs it on, where its inputs are no plain tensors
=================  ==========  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["StepExample"]


@dataclass(frozen=True)
class StepExample:
    """One inner step in numbers, worked out by hand from the formula and never by running the code.

    The kit applies it to models whose adapted parameters are all `param` and whose gradients are all `grad`, and expects
    `after` in every place. Meta-parameters are those that `init_meta` makes under `config`.

    Args:
        param: the value before the step.
        grad: its gradient.
        after: the value after it; where the step depends on the whole gradient, as a normalised one does, a function of the
            number of adapted entries.
        config: the options under which it holds.
        step: the number of the inner step, from 0.

    Example:
        >>> StepExample(param=2.0, grad=3.0, after=1.7, config={"inner_lr": 0.1})  # 2 − 0.1 · 3
    """

    param: float
    grad: float
    after: float | Callable[[int], float]
    config: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
