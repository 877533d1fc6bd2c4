"""metareg: the registry of gradient-based meta-learning.

Public names are imported on first use, so ``import metareg`` loads neither torch nor plugins.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metareg._version import __version__
from metareg.printable import format_count, guard_logs

if TYPE_CHECKING:
    from metareg.comparison.reproduction import reproduce
    from metareg.comparison.runner import compare
    from metareg.contract.attributes import StepExample
    from metareg.contract.columns import Columns
    from metareg.contract.config import Field, PathText, PluginConfig
    from metareg.contract.episodes import Episodes
    from metareg.contract.evaluation import Evaluation
    from metareg.contract.hookspecs import CONTRACT_VERSION, hookimpl, hookspec
    from metareg.contract.losses import Metric, find_metric
    from metareg.contract.named import NamedExamples
    from metareg.contract.split_files import read_name_lists, read_split_file
    from metareg.contract.splits import find_split
    from metareg.contract.tasks import Dataset, Task, TaskSpec
    from metareg.contract.tracker import Tracker
    from metareg.contract.views import TaskView
    from metareg.errors import DivergenceError, Interrupted, MetaregError, PluginError, UnknownNameError, UsageError
    from metareg.learner.learner import MetaLearner
    from metareg.learner.processes import join_processes
    from metareg.reporting import report
    from metareg.runs.analysis import analyse
    from metareg.runs.config import RunConfig
    from metareg.runs.run import Run
    from metareg.runs.training import resume, train
    from metareg.util.arrays import open_arrays
    from metareg.util.child_process import parse_in_child
    from metareg.util.data_files import cache_folder, data_folder, download
    from metareg.util.files import read_json, sync_folder
    from metareg.util.images import ImageFiles, UnreadableImageError, find_images, load_image
    from metareg.util.malloc import keep_freed_memory
    from metareg.util.seeding import derive_seed, draw_distinct, task_uniform
    from metareg.util.tables import Table, read_table

_NAMES = {
    "comparison.reproduction": "reproduce",
    "comparison.runner": "compare",
    "contract.attributes": "StepExample",
    "contract.columns": "Columns",
    "contract.config": "Field PathText PluginConfig",
    "contract.episodes": "Episodes",
    "contract.evaluation": "Evaluation",
    "contract.hookspecs": "CONTRACT_VERSION hookimpl hookspec",
    "contract.losses": "Metric find_metric",
    "contract.named": "NamedExamples",
    "contract.split_files": "read_name_lists read_split_file",
    "contract.splits": "find_split",
    "contract.tasks": "Dataset Task TaskSpec",
    "contract.tracker": "Tracker",
    "contract.views": "TaskView",
    "errors": "DivergenceError Interrupted MetaregError PluginError UnknownNameError UsageError",
    "learner.learner": "MetaLearner",
    "learner.processes": "join_processes",
    "reporting": "report",
    "runs.analysis": "analyse",
    "runs.config": "RunConfig",
    "runs.run": "Run",
    "runs.training": "resume train",
    "util.arrays": "open_arrays",
    "util.child_process": "parse_in_child",
    "util.data_files": "cache_folder data_folder download",
    "util.files": "read_json sync_folder",
    "util.images": "ImageFiles UnreadableImageError find_images load_image",
    "util.malloc": "keep_freed_memory",
    "util.seeding": "derive_seed draw_distinct task_uniform",
    "util.tables": "Table read_table",
}
_MODULES = {name: f"metareg.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "CONTRACT_VERSION", "Columns", "Dataset", "DivergenceError", "Episodes", "Evaluation", "Field", "ImageFiles",
    "Interrupted", "MetaLearner", "MetaregError", "Metric", "NamedExamples", "PathText", "PluginConfig",
    "PluginError", "Run", "RunConfig", "StepExample", "Table", "Task", "TaskSpec", "TaskView", "Tracker", "UnknownNameError",
    "UnreadableImageError", "UsageError", "__version__", "analyse", "cache_folder", "compare", "data_folder",
    "derive_seed", "download", "draw_distinct", "find_images", "find_metric", "find_split", "format_count",
    "hookimpl", "hookspec", "join_processes", "keep_freed_memory", "load_image", "open_arrays", "parse_in_child",
    "read_json", "read_name_lists", "read_split_file", "read_table", "report", "reproduce", "resume", "sync_folder",
    "task_uniform", "train",
]  # fmt: skip

guard_logs("metareg", "metareg.tuning")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'metareg' has no attribute '{name}'")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
