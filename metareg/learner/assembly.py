"""What `MetaLearner` is given: resolved, checked and put together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from metareg.contract.config import unknown_option_error, validate
from metareg.contract.losses import Loss, Metric
from metareg.engine.engine import Engine
from metareg.engine.objective import TaskFunctions
from metareg.engine.split_model import SplitModel
from metareg.engine.stages import Stages
from metareg.errors import UsageError
from metareg.learner.config import LearnerConfig
from metareg.registry.plugins import Plugin, find_entry, get_config_class, resolve

__all__ = ["check_head", "create_config", "create_engine", "resolve_augmenter"]


def resolve_augmenter(given: Any) -> Plugin:
    """The augmenter that a name, a class, an object or a pair ``(name or class, config)`` stands for.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[1], Mapping):
        return resolve("augmenters", given[0], given[1])
    if isinstance(given, tuple | list | Mapping):
        raise UsageError(f"An augmenter is a name, a class or a pair (name, config); got {given!r}.")
    return resolve("augmenters", given)


def create_config(parameters: Mapping[str, Any]) -> LearnerConfig:
    """The options among the parameters of `MetaLearner`, which are all of `LearnerConfig`'s but the device.

    Args:
        parameters: their values by name, `algo` and `algo_options` among them.

    Raises:
        UsageError: an option is unknown or has an impossible value.
    """
    own = parameters.keys() - {"self", "algo_options"}
    _check_algorithm_options(parameters["algo"], parameters["algo_options"], own)
    options = [name for name in LearnerConfig.model_fields if name != "device"]
    return validate(LearnerConfig, {name: parameters[name] for name in options}, "MetaLearner")


def _check_algorithm_options(algo: str | type | object, options: Collection[str], own: Collection[str]) -> None:
    """Refuse an unknown keyword; it may be meant for the learner or for the algorithm, so look for the nearest in both."""
    if not options or not isinstance(algo, str | type):
        return
    cls = find_entry("algorithms", algo).load() if isinstance(algo, str) else algo
    known = get_config_class(cls).model_fields
    for name in options:
        if name not in known:
            present = [LearnerConfig.former_names[name]] if name in LearnerConfig.former_names else []
            raise unknown_option_error("option of MetaLearner or its algorithm", name, [*known, *own], present)


def check_head(stages: Stages, split: SplitModel, model: nn.Module) -> None:
    """Refuse a model of which nobody knows the head, where a plugin needs to know it.

    Raises:
        UsageError: the head's name is missing.
    """
    if split.has_head or not (plugin := stages.find_asking("features", "outputs", "head", "body")):
        return
    children = ", ".join(name for name, _ in model.named_children()) or "no submodule"
    raise UsageError(
        f"The {plugin.label} needs to know which part of {type(model).__name__} is its head: name the submodule with "
        f"head=… (it has {children}), or give the model a body and a head."
    )


def create_engine(model: SplitModel, stages: Stages, loss: Loss, metric: Metric, config: LearnerConfig) -> Engine:
    """The engine that computes a learner's gradients with all stages, and its scores with the algorithm's alone."""
    training, plain = (
        TaskFunctions(model, each, loss, metric, config) for each in (stages, stages.without_augmenters())
    )
    return Engine(training, plain)
