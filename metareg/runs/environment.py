"""What a run was made with: versions, machine, plugins."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import platform
from typing import TYPE_CHECKING, Any

import torch

from metareg._version import __version__
from metareg.contract.config import update_names
from metareg.contract.hookspecs import CONTRACT_VERSION
from metareg.contract.splits import TRAIN
from metareg.errors import UsageError
from metareg.learner.config import LearnerConfig
from metareg.runs.folder import ENVIRONMENT
from metareg.util.files import read_json, write_json
from metareg.util.torch_internals import tree_leaves

if TYPE_CHECKING:
    from metareg.runs.run import Run

__all__ = ["describe_machine", "refuse_other_data", "write"]

log = logging.getLogger("metareg")

_FIRST_TASK = "first_task"
_LIBRARIES = ("numpy", "pluggy", "pydantic", "safetensors", "torchvision", "dgl")


def describe_machine() -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "metareg": __version__,
        "contract": CONTRACT_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "libraries": {name: version for name in _LIBRARIES if (version := _find_version(name))},
    }


def _describe_run(run: Run, strategy: str, reason: str) -> dict[str, Any]:
    learner = run.learner
    plugins = [learner.algorithm, *learner.augmenters, run.source.plugin]
    return describe_machine() | {
        "device": str(learner.device),
        "strategy": strategy,
        "strategy_reason": reason,
        "processes": learner.processes.size,
        "backend": learner.processes.backend(learner.device),
        "bn_statistics": learner.bn_statistics,
        "plugins": [
            {key: getattr(each, key) for key in ("kind", "name", "distribution", "version")} for each in plugins
        ],
        _FIRST_TASK: _describe_first_task(run),
    }


def write(run: Run, strategy: str, reason: str, step: int) -> None:
    """Write environment.json; where a run that goes on from a step finds another environment than before, add that to it."""
    path = run.path / ENVIRONMENT
    now = _describe_run(run, strategy, reason)
    if not path.is_file():
        write_json(path, now)
        return
    try:
        before = update_names(LearnerConfig, read_json(path))
        last = before | {key: value for each in before.get("resumed", []) for key, value in each["changed"].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is not what metareg wrote; remove it to go on.") from error
    no_change = ("strategy_reason", _FIRST_TASK)
    changed = {key: value for key, value in now.items() if last.get(key) != value and key not in no_change}
    if changed:
        log.warning(
            "The run goes on in another environment (%s): its result can differ in rounding from that of a run that never "
            "stopped.",
            "; ".join(f"{key} was {last.get(key)}, is {value}" for key, value in changed.items()),
        )
        write_json(path, before | {"resumed": [*before.get("resumed", []), {"step": step, "changed": changed}]})


def refuse_other_data(run: Run) -> None:
    """Compare the run's first training task with that which environment.json describes.

    Raises:
        UsageError: they differ, and the run would go on with other data than it began with.
    """
    path = run.path / ENVIRONMENT
    content = read_json(path) if path.is_file() else {}
    before = content.get(_FIRST_TASK) if isinstance(content, dict) else None
    if before is None:  # an earlier version's
        return
    now = _describe_first_task(run)
    try:
        same = len(before) == len(now) and all(map(_is_close, before, now))
    except TypeError as error:
        raise UsageError(f"{path} is not what metareg wrote; remove it to go on.") from error
    if not same:
        raise UsageError(
            f"The data of the {run.source.plugin.label} is not what the run at {run.path} began with: its first training "
            "task is another one. Name the data that the run had with --data."
        )


def _describe_first_task(run: Run) -> list[float | None]:
    """The means of what the first training task consists of; None where one is not finite."""
    batch = run.source.episodes(TRAIN, [0], run.config.seed)[0]
    means = [float(leaf.double().mean()) for leaf in tree_leaves(batch.parts)]
    return [mean if math.isfinite(mean) else None for mean in means]


def _is_close(a: float | None, b: float | None) -> bool:
    """Whether two means are the same but for rounding, which differs from machine to machine."""
    return a is b if a is None or b is None else math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)


def _find_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
