"""The environment of a run: versions, machine, plugins."""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metareg._version import __version__
from metareg.contract.config import update_names, validate
from metareg.contract.hookspecs import CONTRACT_VERSION
from metareg.contract.splits import SPLITS, TRAIN, VALIDATION
from metareg.errors import UsageError
from metareg.learner.config import LearnerConfig
from metareg.runs.config import RunConfig
from metareg.runs.folder import ENVIRONMENT
from metareg.runs.options import update_option_names
from metareg.util.files import read_json, refuse_malformed, write_json
from metareg.util.native import find_compiler
from metareg.util.seeding import create_generator, use_seed
from metareg.util.torch_internals import tree_leaves

if TYPE_CHECKING:
    from metareg.runs.run import Run

__all__ = ["describe_machine", "find_version", "read_first_config", "refuse_other_data", "settle_strategy", "write"]

log = logging.getLogger("metareg")

_CONFIG = "config"
_FIRST_TASK = "first_task"
_OBJECTS = "objects"
_LIBRARIES = ("numpy", "pluggy", "pydantic", "safetensors", "torchvision", "timm", "dgl")


def describe_machine() -> dict[str, Any]:
    """Return versions and hardware, and the C++ compiler, without which image models run other kernels."""
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
        "compiler": find_compiler(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "libraries": {name: version for name in _LIBRARIES if (version := find_version(name))},
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
        _CONFIG: run.config.model_dump(mode="json"),
        _FIRST_TASK: _describe_first_task(run, TRAIN),
        **({_OBJECTS: objects} if (objects := _describe_objects(run)) else {}),
    }


def write(run: Run, strategy: str, reason: str, step: int) -> None:
    """Write environment.json; if a resumed run finds a different environment, add that to it."""
    path = run.path / ENVIRONMENT
    now = _describe_run(run, strategy, reason)
    if not path.is_file():
        write_json(path, now)
        return
    before, last = _read_environments(path)
    no_change = ("strategy_reason", _CONFIG, _FIRST_TASK, _OBJECTS)
    changed = {key: value for key, value in now.items() if last.get(key) != value and key not in no_change}
    if changed:
        log.warning(
            "The run continues in a different environment (%s); rounding can make its result differ from that of an "
            "uninterrupted run.",
            "; ".join(f"{key} was {last.get(key)}, now {value}" for key, value in changed.items()),
        )
        write_json(path, before | {"resumed": [*before["resumed"], {"step": step, "changed": changed}]})


def read_first_config(folder: Path) -> RunConfig | None:
    """Read the configuration with which a run began; None if the file is missing or of an earlier version."""
    path = folder / ENVIRONMENT
    content = read_json(path) if path.is_file() else {}
    with refuse_malformed(path, "a run's environment"):
        config = content.get(_CONFIG)
        return None if config is None else update_option_names(validate(RunConfig, config, str(path)))


def settle_strategy(run: Run) -> None:
    """Correct the strategy in environment.json if the first steps made ``auto`` choose another one."""
    path = run.path / ENVIRONMENT
    if run.config.strategy != "auto" or not path.is_file():
        return
    if _read_environments(path)[1].get("strategy") != run.learner.strategy:
        reason = "the first choice failed, or gave other results than one task after the other"
        write_json(path, read_json(path) | {"strategy": run.learner.strategy, "strategy_reason": reason})


def refuse_other_data(run: Run) -> None:
    """Compare the run's first tasks, and the user's own module, with what environment.json describes.

    Raises:
        UsageError: they differ, so the run would continue with other data or another model.
    """
    path = run.path / ENVIRONMENT
    tasks, model = _read_described(path) if path.is_file() else ({}, None)
    other = [split for split, means in tasks.items() if not _are_close(means, _describe_first_task(run, split))]
    same_model = model is None or _is_same_model(model, _describe_model(run))
    own = run.config.task.program
    if other:
        raise UsageError(
            f"The data of the {run.source.plugin.label} differs from the data that the run at {run.path} started with: "
            f"its first {other[0]} task is different. {'Pass the tasks' if own else 'Name the data'} that the run used "
            f"with {'task=…' if own else '--data'}."
        )
    if not same_model:
        raise UsageError(
            f"The module of class {_describe_model(run)['class']} differs from the one that the run at {run.path} "
            "started with, in its class, its shapes or its outputs. Pass the original one as model=…"
        )


def _read_environments(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a run's first environment, with its list of changes, and its last one."""
    content = read_json(path)
    with refuse_malformed(path, "a run's environment"):
        began = {"resumed": [], **update_names(LearnerConfig, content)}
        last = began | {key: value for each in list(began["resumed"]) for key, value in each["changed"].items()}
        return began, last


def _read_described(path: Path) -> tuple[dict[str, list[float | None]], dict[str, Any] | None]:
    """Read the facts in environment.json about each split's first task and about the user's own module."""
    content = read_json(path)
    with refuse_malformed(path, "a run's environment"):
        own = content.get(_OBJECTS, {})
        first = content.get(_FIRST_TASK)  # missing in files of earlier versions
        tasks = ({} if first is None else {TRAIN: first}) | dict(own.get("tasks", {}))
        model = own.get("model")
        if not tasks.keys() <= set(SPLITS):
            raise ValueError(f"it has the splits {', '.join(tasks)}")
        if model is not None:
            model = {**{key: model[key] for key in ("class", "shapes")}, "outputs": _convert_means(model["outputs"])}
        return {split: _convert_means(means) for split, means in tasks.items()}, model


def _convert_means(stored: Any) -> list[float | None]:
    return [None if each is None else float(each) for each in stored]


def _describe_objects(run: Run) -> dict[str, Any]:
    """Return facts that identify the user's own objects when the run is resumed."""
    own: dict[str, Any] = {}
    if run.config.task.program:
        own["tasks"] = {split: _describe_first_task(run, split) for split in (VALIDATION, run.config.test_split)}
    if run.config.model is not None and run.config.model.program:
        own["model"] = _describe_model(run)
    return own


def _describe_first_task(run: Run, split: str) -> list[float | None]:
    """Return the mean of each tensor of a split's first task; None if it is not finite."""
    batch = run.source.episodes(split, [0], run.config.seed)[0]
    return _measure_means(tree_leaves(batch.parts))


def _describe_model(run: Run) -> dict[str, Any]:
    """Return a module's class, its shapes, and its outputs for the first training task with fixed weights.

    Training sets its weights. Its other parts (frozen parameters, buffers, code) show in the outputs.
    """
    learner = run.learner
    module = copy.deepcopy(learner.model.module).eval()
    for name, value in module.named_parameters():
        if value.requires_grad:
            noise = torch.randn(value.shape, generator=create_generator(0, "fingerprint", name), dtype=torch.float64)
            value.data = (noise / max(1, value[0].numel() if value.dim() else 1) ** 0.5).to(value)
    x = (
        run.source.episodes(TRAIN, [0], run.config.seed)[0]
        .to(learner.device, next(module.parameters()).dtype)
        .unstack(0)[0]
    )
    with torch.no_grad(), use_seed(0, "fingerprint"):
        outputs = module(x)
    return {
        "class": type(learner.model.module).__qualname__,
        "shapes": {name: list(value.shape) for name, value in module.state_dict().items()},
        "outputs": _measure_means([outputs, outputs.square()]),
    }


def _is_same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return (a["class"], a["shapes"]) == (b["class"], b["shapes"]) and _are_close(a["outputs"], b["outputs"])


def _measure_means(leaves: Sequence[torch.Tensor]) -> list[float | None]:
    means = [float(leaf.double().mean()) for leaf in leaves]
    return [mean if math.isfinite(mean) else None for mean in means]


def _are_close(a: Sequence[float | None], b: Sequence[float | None]) -> bool:
    return len(a) == len(b) and all(map(_is_close, a, b))


def _is_close(a: float | None, b: float | None) -> bool:
    """Return whether two means are equal up to rounding, which differs between machines."""
    return a is b if a is None or b is None else math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)


def find_version(distribution: str) -> str | None:
    """Find the version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
