"""What a run was made with: versions, machine, plugins."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any

import torch

from metareg._version import __version__
from metareg.hookspecs import CONTRACT_VERSION

if TYPE_CHECKING:
    from metareg.runs import Run

__all__ = ["of_machine", "of_run"]

_LIBRARIES = ("numpy", "pluggy", "pydantic", "safetensors", "torchvision", "dgl")


def of_machine() -> dict[str, Any]:
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
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def of_run(run: Run, strategy: str, reason: str) -> dict[str, Any]:
    """What environment.json holds."""
    learner = run.learner
    plugins = [learner.algorithm, *learner.augmenters, run.source.plugin]
    return of_machine() | {
        "device": str(learner.device),
        "strategy": strategy,
        "strategy_reason": reason,
        "norm": learner.norm,
        "plugins": [
            {"kind": plugin.kind, "name": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
            for plugin in plugins
        ],
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
