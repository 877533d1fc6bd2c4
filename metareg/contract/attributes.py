"""What a plugin class can declare about itself; the registry and the conformance kit read it.

All are plain class attributes:

=================  ==========  ==================================================================================
attribute          of          meaning and default
=================  ==========  ==================================================================================
contract           all         the contract version that the plugin was written for (`CONTRACT_VERSION`)
adapts             algorithms  what the inner loop changes: ``"all"`` (default), ``"body"``, ``"head"``, ``"none"``, or
                               a shell pattern for parameter names, such as ``"*context*"``
step_examples      algorithms  worked examples of one inner step (`StepExample`); None if a step depends on random
                               draws, so that no example can be worked out
default_model      algorithms  the model to use, if the algorithm needs a particular one
recommended        algorithms  options of the run and its plugins that apply unless the user or a file sets them, each
                               with its owner, such as ``"algo.inner_lr"``; see `metareg.Task` for the rule
                   tasks
                   models
exact_gradient     algorithms  False if the meta-gradient treats a variable as a constant; True by default
                   augmenters
transductive       algorithms  whether it reads the query inputs to adapt (results then say so); False by default
                   augmenters
training_only      augmenters  False if it stays in evaluation, adaptation and the saved learner; True by default
targets            algorithms  ``"classes"`` or ``"numbers"`` if it supports only these targets
                   augmenters
affine_in_loss     augmenters  False if a term of the outer loss is not a sum of weighted losses; True by default
example_spec       models      the `TaskSpec` that the kit builds the model for; vectors by default
example_task       models      a task plugin that the kit runs it on, if its inputs are not plain tensors
=================  ==========  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["StepExample"]


@dataclass(frozen=True)
class StepExample:
    """One inner step in numbers. Work it out by hand from the formula, never by running the code.

    The kit applies it to models whose adapted parameters are all `param` and whose gradients are all `grad`, and expects
    `after` in every entry. Meta-parameters are those that `init_meta` creates under `config`.

    Args:
        param: the value before the step.
        grad: its gradient.
        after: the value after it; if the step depends on the whole gradient, as a normalised step does, a function of the
            number of adapted entries.
        config: the options that it applies to.
        step: the number of the inner step, starting at 0.

    Example:
        >>> StepExample(param=2.0, grad=3.0, after=1.7, config={"inner_lr": 0.1})  # 2 − 0.1 · 3
    """

    param: float
    grad: float
    after: float | Callable[[int], float]
    config: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
