"""Runs: a folder that holds all of a training, from its configuration to its results and pictures."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from metareg import environment, plots
from metareg.config import LearnerConfig, RunConfig, read_yaml, validated
from metareg.errors import DivergenceError, MetaregError, UsageError
from metareg.evaluation import Evaluation
from metareg.files import read_json, write_json, write_text
from metareg.hookspecs import hookimpl
from metareg.learner import MetaLearner
from metareg.options import Selection, assemble
from metareg.registry import resolve
from metareg.sources import TaskSource
from metareg.training import Schedule, fit, observed

__all__ = ["Run", "find_device", "train"]

log = logging.getLogger("metareg")

FINAL = Path("checkpoints", "final.safetensors")
LAST_GOOD = Path("checkpoints", "last-good.safetensors")


class Run:
    """A run and its folder.

    ======================  ================================================================================
    config.yaml             the complete configuration; ``metareg train --config`` takes it
    environment.json        versions, device, strategy, plugins and their distributions
    metrics.jsonl           a line per report of the training and per validation
    checkpoints/            the learner's weights (safetensors)
    results.json            the test: mean, interval and every task's score after each number of inner steps
    plots/                  pictures (PNG)
    ======================  ================================================================================

    Args:
        path: the folder.
        config: the complete configuration.
        learner: what is trained.
        source: where its tasks come from.
    """

    def __init__(self, path: Path, config: RunConfig, learner: MetaLearner, source: TaskSource) -> None:
        self.path = path
        self.config = config
        self.learner = learner
        self.source = source
        self.evaluation: Evaluation | None = None
        """The test at the end; None until then."""
        self.plots: list[Path] = []
        """The pictures that were drawn."""

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> Run:
        """A finished run from its folder, its learner included.

        Raises:
            UsageError: the folder holds no run, or the run is not finished or damaged.
        """
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise UsageError(f"There is no run at {path}: it has no config.yaml.")
        config = validated(RunConfig, read_yaml(path / "config.yaml"), str(path / "config.yaml"))
        if not (path / FINAL).is_file():
            raise UsageError(f"The run at {path} has not ended: it has no {FINAL}.")
        source = TaskSource(resolve("tasks", config.task.name, config.task.config))
        run = cls(path, config, MetaLearner.load(path / FINAL, device=find_device(device or config.device)), source)
        if (path / "results.json").is_file():
            run.evaluation = Evaluation.from_dict(read_json(path / "results.json"))
        return run

    def evaluate(self, tasks: int, inner_steps: Sequence[int], task: str | None = None) -> Evaluation:
        """Test the run's learner anew.

        Args:
            tasks: how many test tasks.
            inner_steps: numbers of inner steps.
            task: another task plugin to test on, with its default options; the run's own where it is None.
        """
        source = self.source
        if task:
            source = TaskSource.of(task)
            _check_fit(self.learner, source, "test")
        return self.learner.evaluate(source, tasks, inner_steps=inner_steps, seed=self.config.seed)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def train(
    algo: Any = None,
    augment: Any = None,
    task: Any = None,
    *,
    model: Any = None,
    out: str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    observers: Sequence[Any] = (),
    **options: Any,
) -> Run:
    """Train, test and draw, as ``metareg train`` does.

    Args:
        algo: the algorithm: a name, a class, an object, or a pair ``(name or class, config)``; ``"maml"`` by default.
        augment: the augmenters, each given in the same way.
        task: the task plugin, given in the same way; ``"sinusoid"`` by default.
        model: the model plugin; the task's own by default.
        out: the run's folder, which must not exist or be empty; a new one under ``runs/`` by default.
        config: a configuration, or the path of a YAML file with one; what is said beside it stands before it.
        observers: objects with observer hooks, beside those that the configuration names.
        options: fields of `RunConfig` and options of the plugins, by name.

    Returns:
        The finished run.

    Raises:
        UsageError: something was asked for that cannot be; nothing was written.
        DivergenceError: training produced a number that is not finite; the last good weights are in the folder.
    """
    base = dict(config) if isinstance(config, Mapping) else read_yaml(Path(config)) if config else {}
    given = {"algo": algo, "augment": augment, "task": task, "model": model}
    base |= {name: value for name, value in given.items() if value is not None}
    selection = assemble(base, options)
    out = Path(out) if out is not None else None
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already and is not an empty folder; name another one for the run.")
    learner, source = _prepared(selection)
    run = Run(_created(out, selection.config), selection.config, learner, source)
    _carry_out(run, [_MetricsFile(run.path), *observers, *selection.observers])
    return run


def _prepared(selection: Selection) -> tuple[MetaLearner, TaskSource]:
    """The learner and its tasks; all that can go wrong before training goes wrong here, with nothing written."""
    config, task = selection.config, selection.task.instance
    learner = MetaLearner(
        selection.model,
        selection.algorithm,
        selection.augmenters,
        spec=task.spec,
        loss=task.loss,
        metric=getattr(task, "metric", None),
        device=find_device(config.device),
        **config.model_dump(include=set(LearnerConfig.model_fields) - {"device"}),
    )
    source = TaskSource(selection.task)
    _check_fit(learner, source, "train")
    return learner, source


def _check_fit(learner: MetaLearner, source: TaskSource, split: str) -> None:
    """Run the model on the first tasks, so that one that does not fit them is found before anything else."""
    try:
        learner.evaluate(source, 2, split=split, inner_steps=(0,))
    except (RuntimeError, IndexError) as error:
        raise UsageError(
            f"The model cannot be run on the {source.plugin.label}: {str(error).splitlines()[0]}."
        ) from error


def _created(out: Path | None, config: RunConfig) -> Path:
    """The run's folder, new."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        augmenters = "".join(f"+{choice.name}" for choice in config.augment)
        name = f"{config.task.name}-{config.algo.name}{augmenters}-seed{config.seed}".replace(":", "-")
        for number in itertools.count(1):
            path = Path("runs", name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):
                path.mkdir(parents=True)
                return path
    except OSError as error:
        raise MetaregError(f"The run's folder cannot be made: {error.strerror}: {error.filename}.") from error
    raise AssertionError("unreachable")


def _carry_out(run: Run, observers: Sequence[Any]) -> None:
    config, learner = run.config, run.learner
    write_text(run.path / "config.yaml", config.to_yaml())
    strategy, reason = learner.choose_strategy(config.meta_batch, config.steps, run.source.stackable)
    log.info("Strategy %s: %s.", strategy, reason)
    write_json(run.path / "environment.json", environment.of_run(run, strategy, reason))

    hooks = observed(observers)
    hooks.on_run_start(run=run)
    schedule = Schedule(
        steps=config.steps,
        meta_batch=config.meta_batch,
        log_every=config.log_every,
        eval_every=config.eval_every or max(1, config.steps // 10),
        eval_tasks=config.eval_tasks,
    )
    try:
        fit(learner, run.source, schedule, observers)
    except DivergenceError as error:
        learner.save(run.path / LAST_GOOD)
        raise DivergenceError(f"{error} They are kept in {run.path / LAST_GOOD}.") from error
    learner.save(run.path / FINAL)
    run.evaluation = run.evaluate(config.test_tasks, config.test_inner_steps)
    write_json(run.path / "results.json", run.evaluation.to_dict())
    hooks.on_evaluation(step=learner.steps_done, split="test", evaluation=run.evaluation)
    run.plots = plots.draw(run)
    hooks.on_run_end(run=run)


class _MetricsFile:
    """Appends to metrics.jsonl, a whole line at a time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        self._append({"step": step, "split": "train"} | logs)

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        for inner_steps in evaluation.inner_steps:
            self._append(
                {
                    "step": step,
                    "split": split,
                    "inner_steps": inner_steps,
                    evaluation.metric: evaluation.mean(inner_steps),
                    "ci95": evaluation.ci95(inner_steps),
                }
            )

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise MetaregError(f"{self._path} cannot be written: {error.strerror}.") from error


def find_device(name: str) -> torch.device:
    """The device that a user named; ``auto`` is a CUDA GPU where there is one.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise UsageError(f"There is no device '{name}' here; there is {', '.join(available)}.") from error
    return device
