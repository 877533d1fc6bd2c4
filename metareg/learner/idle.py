"""Options and hooks of a learner that have no effect: each is reported in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from torch import Tensor

from metareg.engine.split_model import SplitModel
from metareg.engine.stages import Stages
from metareg.learner.config import LearnerConfig, is_outer_option

__all__ = ["report_idle", "report_unlearned"]

log = logging.getLogger("metareg")

_OUTER = ("combine_tasks", "outer_gradient", "outer_objective", "outer_update")


def report_idle(stages: Stages, config: LearnerConfig, model: SplitModel) -> None:
    """Log a warning for each option and hook that the learner's plugins make idle, and for an idle inner loop."""
    for sentence in _find_idle(stages, config):
        log.warning(sentence)
    if model.has_head and not (model.body_names and model.head_names) and not stages.adapted_parameters(model):
        log.warning(
            "The %s adapts no parameter: the %s has none that is trainable (requires_grad).",
            stages.algorithm.label,
            "head" if model.body_names else "body",
        )


def report_unlearned(stages: Stages, grads: Mapping[str, Tensor]) -> None:
    """Log a warning for each plugin whose meta-parameters all have a gradient of exactly zero."""
    learns: dict[str, bool] = {}
    for name, grad in grads.items():
        owner = stages.owner(name)
        if owner is not None:
            learns[owner] = learns.get(owner, False) or bool(grad.any())
    for owner in (owner for owner, moved in learns.items() if not moved):
        log.warning(
            "The gradient of the meta-parameters of '%s' was exactly zero in the first step; with this algorithm, "
            "they may not learn anything.",
            owner,
        )


def _find_idle(stages: Stages, config: LearnerConfig) -> Iterator[str]:
    owners = {hook: stages.list_owners(hook) for hook in (*_OUTER, "inner_loss", "outer_loss_weights")}
    owner = {hook: listed[0] for hook, listed in owners.items() if listed}
    if "outer_update" in owner:
        for option, field in LearnerConfig.model_fields.items():
            if is_outer_option(option) and (value := getattr(config, option)) != field.default:
                yield f"{option} = {value} has no effect: the {owner['outer_update']} has its own outer update."
    if "inner_loss" in owner and config.first_order:
        yield f"With first_order, what the {owner['inner_loss']} learns for its inner_loss gets no gradient."
    if "outer_gradient" in owner and "outer_objective" in owner:
        yield (
            f"The outer_objective of the {owner['outer_objective']} has no effect: the outer_gradient of the "
            f"{owner['outer_gradient']} replaces it."
        )
    instead = next((hook for hook in ("outer_gradient", "outer_objective") if hook in owner), None)
    if instead and stages.outer_loss_weights(config.inner_steps, 0) is not None:
        yield (
            f"The outer_loss_weights of the {owner['outer_loss_weights']} have no effect: the {instead} of the "
            f"{owner[instead]} replaces them."
        )
    for hook in _OUTER:
        for other in owners[hook][1:]:
            yield f"The {hook} of the {other} has no effect where that of the {owner[hook]} returns a result."
