"""metareg: the registry of gradient-based meta-learning.

Everything public is imported on first use, so that ``import metareg`` loads neither torch nor a plugin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metareg._version import __version__

if TYPE_CHECKING:
    from metareg.comparison.reproduction import reproduce
    from metareg.comparison.runner import compare
    from metareg.contract.attributes import StepExample
    from metareg.contract.config import Field, PathText, PluginConfig
    from metareg.contract.episodes import Episodes
    from metareg.contract.evaluation import Evaluation
    from metareg.contract.hookspecs import CONTRACT_VERSION, hookimpl, hookspec
    from metareg.contract.losses import Metric
    from metareg.contract.tasks import Dataset, Task, TaskSpec
    from metareg.errors import DivergenceError, Interrupted, MetaregError, PluginError, UnknownNameError, UsageError
    from metareg.learner.learner import MetaLearner
    from metareg.learner.processes import join_processes
    from metareg.reporting import report
    from metareg.runs.config import RunConfig
    from metareg.runs.run import Run
    from metareg.runs.training import resume, train
    from metareg.util.data_files import cache_folder, data_folder, download
    from metareg.util.seeding import derive_seed, task_uniform

_WHERE = {
    "reproduce": "metareg.comparison.reproduction",
    "compare": "metareg.comparison.runner",
    "StepExample": "metareg.contract.attributes",
    "Field": "metareg.contract.config",
    "PathText": "metareg.contract.config",
    "PluginConfig": "metareg.contract.config",
    "Episodes": "metareg.contract.episodes",
    "Evaluation": "metareg.contract.evaluation",
    "CONTRACT_VERSION": "metareg.contract.hookspecs",
    "hookimpl": "metareg.contract.hookspecs",
    "hookspec": "metareg.contract.hookspecs",
    "Metric": "metareg.contract.losses",
    "Dataset": "metareg.contract.tasks",
    "Task": "metareg.contract.tasks",
    "TaskSpec": "metareg.contract.tasks",
    "DivergenceError": "metareg.errors",
    "Interrupted": "metareg.errors",
    "MetaregError": "metareg.errors",
    "PluginError": "metareg.errors",
    "UnknownNameError": "metareg.errors",
    "UsageError": "metareg.errors",
    "MetaLearner": "metareg.learner.learner",
    "join_processes": "metareg.learner.processes",
    "report": "metareg.reporting",
    "RunConfig": "metareg.runs.config",
    "Run": "metareg.runs.run",
    "resume": "metareg.runs.training",
    "train": "metareg.runs.training",
    "cache_folder": "metareg.util.data_files",
    "data_folder": "metareg.util.data_files",
    "download": "metareg.util.data_files",
    "derive_seed": "metareg.util.seeding",
    "task_uniform": "metareg.util.seeding",
}

__all__ = [
    "CONTRACT_VERSION",
    "Dataset",
    "DivergenceError",
    "Episodes",
    "Evaluation",
    "Field",
    "Interrupted",
    "MetaLearner",
    "MetaregError",
    "Metric",
    "PathText",
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
    "compare",
    "data_folder",
    "derive_seed",
    "download",
    "hookimpl",
    "hookspec",
    "join_processes",
    "report",
    "reproduce",
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
