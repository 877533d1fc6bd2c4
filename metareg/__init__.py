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
    from metareg.hookspecs import hookimpl, hookspec
    from metareg.learner import MetaLearner
    from metareg.losses import Metric
    from metareg.runs import Run, resume, train
    from metareg.tasks import Dataset, Task, TaskSpec
    from metareg.util.files import cache_folder
    from metareg.util.seeding import derive_seed, task_uniform

_WHERE = {
    "Field": "metareg.config",
    "PluginConfig": "metareg.config",
    "RunConfig": "metareg.config",
    "StepExample": "metareg.declarations",
    "Episodes": "metareg.episodes",
    "DivergenceError": "metareg.errors",
    "Interrupted": "metareg.errors",
    "MetaregError": "metareg.errors",
    "PluginError": "metareg.errors",
    "UnknownNameError": "metareg.errors",
    "UsageError": "metareg.errors",
    "Evaluation": "metareg.evaluation",
    "hookimpl": "metareg.hookspecs",
    "hookspec": "metareg.hookspecs",
    "MetaLearner": "metareg.learner",
    "Metric": "metareg.losses",
    "Run": "metareg.runs",
    "resume": "metareg.runs",
    "train": "metareg.runs",
    "Dataset": "metareg.tasks",
    "Task": "metareg.tasks",
    "TaskSpec": "metareg.tasks",
    "cache_folder": "metareg.util.files",
    "derive_seed": "metareg.util.seeding",
    "task_uniform": "metareg.util.seeding",
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
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
