"""metareg: the registry of gradient-based meta-learning.

Everything public is imported on first use, so that ``import metareg`` loads neither torch nor a plugin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metareg._version import __version__

if TYPE_CHECKING:
    from metareg.config import Field, PluginConfig, RunConfig
    from metareg.declarations import StepExample
    from metareg.episodes import Episodes
    from metareg.errors import DivergenceError, Interrupted, MetaregError, PluginError, UnknownNameError, UsageError
    from metareg.evaluation import Evaluation
    from metareg.files import cache_folder
    from metareg.hookspecs import hookimpl, hookspec
    from metareg.learner import MetaLearner
    from metareg.losses import Metric
    from metareg.randomness import derive_seed, task_uniform
    from metareg.runs import Run, resume, train
    from metareg.tasks import Dataset, Task, TaskSpec

_WHERE = {
    "Field": "config",
    "PluginConfig": "config",
    "RunConfig": "config",
    "StepExample": "declarations",
    "Episodes": "episodes",
    "DivergenceError": "errors",
    "Interrupted": "errors",
    "MetaregError": "errors",
    "PluginError": "errors",
    "UnknownNameError": "errors",
    "UsageError": "errors",
    "Evaluation": "evaluation",
    "hookimpl": "hookspecs",
    "hookspec": "hookspecs",
    "MetaLearner": "learner",
    "Metric": "losses",
    "cache_folder": "files",
    "derive_seed": "randomness",
    "task_uniform": "randomness",
    "Run": "runs",
    "resume": "runs",
    "train": "runs",
    "Dataset": "tasks",
    "Task": "tasks",
    "TaskSpec": "tasks",
}

__all__ = [
    "Dataset",
    "DivergenceError",
    "Episodes",
    "Evaluation",
    "Field",
    "Interrupted",
    "MetaLearner",
    "MetaregError",
    "Metric",
    "PluginConfig",
    "PluginError",
    "Run",
    "RunConfig",
    "StepExample",
    "Task",
    "TaskSpec",
    "UnknownNameError",
    "UsageError",
    "__version__",
    "cache_folder",
    "derive_seed",
    "hookimpl",
    "hookspec",
    "resume",
    "task_uniform",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'metareg' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"metareg.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
