"""The representation of a learner in Python and notebooks."""

from __future__ import annotations

from typing import Any

from metareg.printable import format_count

__all__ = ["describe_learner"]


def describe_learner(learner: Any) -> str:
    """Describe a `metareg.MetaLearner` in one line: its method, its model and its training steps."""
    module = learner.model.module
    method = " + ".join(each.name for each in (learner.algorithm, *learner.augmenters))
    weights = format_count(sum(each.numel() for each in module.parameters()), "parameter")
    return (
        f"<MetaLearner: {method} on {type(module).__name__} ({weights}), metric {learner.metric.name}, "
        f"{format_count(learner.config.inner_steps, 'inner step')}, "
        f"{format_count(learner.steps_done, 'training step')} done>"
    )
