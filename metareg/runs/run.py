"""A run: a folder with everything about a training, from its configuration to its results and plots."""

from __future__ import annotations

import base64
import html
import logging
import shlex
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metareg.contract.config import validate
from metareg.contract.evaluation import Evaluation
from metareg.contract.losses import Loss, Metric
from metareg.contract.splits import TEST
from metareg.errors import ExamplesError, UnknownNameError, UsageError
from metareg.learner.learner import MetaLearner
from metareg.learner.model_plugin import build_model
from metareg.printable import format_count
from metareg.registry.plugins import Plugin, find_entry, resolve
from metareg.registry.task_source import TaskSource
from metareg.runs import exports
from metareg.runs.baselines import Baseline, measure_baselines
from metareg.runs.config import PLUGIN_FIELDS, RunConfig
from metareg.runs.folder import BASELINES, CONFIG, FINAL, METRICS, PLOTS, RESULTS
from metareg.runs.options import update_option_names
from metareg.runs.own import OwnFacts, adopt_objects, list_own
from metareg.util.devices import find_device
from metareg.util.files import MALFORMED, parse_json, read_json, read_text, refuse_malformed, write_json
from metareg.util.seeding import seed_global_generators
from metareg.util.tables import Table, read_frame
from metareg.util.yaml_files import read_yaml

__all__ = [
    "Run", "check_fit", "format_resume_command", "has_stopped_early", "read_config", "read_evaluations",
    "read_planned_steps", "refuse_missing",
]  # fmt: skip

log = logging.getLogger("metareg")


class Run:
    """A run and its folder.

    ======================  ================================================================================
    config.yaml             the complete configuration; ``metareg train --config`` accepts it
    environment.json        versions, device, strategy, plugins and their distributions
    metrics.jsonl           a line per training report and per validation; a resumed run has the same bits
    timing.jsonl            a line per report with the speed, the peak memory so far and the time
    checkpoints/            ``step-….safetensors``, from which `resume` continues, and the learner as ``final.safetensors``
    plots/                  plots (PNG)
    results.json            the test: mean, interval and every task's score after each number of inner steps
    analysis.json           where the learner adapts, if requested (``metareg analyse``)
    baselines.json          simpler baselines on the test tasks, if requested (`evaluate_baselines`)
    ======================  ================================================================================

    Args:
        path: the folder.
        config: the complete configuration.
        learner: the learner being trained.
        source: the source of its tasks.
        model: the model plugin; None if it is not known.
    """

    def __init__(
        self, path: Path, config: RunConfig, learner: MetaLearner, source: TaskSource, model: Plugin | None = None
    ) -> None:
        self.path = path
        self.config = config
        self.learner = learner
        self.source = source
        self._model = model
        self.evaluation: Evaluation | None = None
        """The final test; None before it."""
        self.evaluation_one_by_one: Evaluation | None = None
        """The same test with predictions that do not depend on a task's other queries; None if the test's do not."""
        self.plots: list[Path] = []
        """The files of the plots."""

    def __repr__(self) -> str:
        state = str(self.evaluation or format_count(self.learner.steps_done, "training step") + " done, not tested")
        return f"<Run at {self.path}: {self.config.title}; {state}>"

    def _repr_html_(self) -> str:
        """Return the test's table and the learning curve."""
        curve = self.path / PLOTS / "learning-curve.png"
        table = "" if self.evaluation is None else self.evaluation._repr_html_()
        image = ""
        if curve.is_file():
            data = base64.b64encode(curve.read_bytes()).decode()
            image = f'<img alt="learning curve" width="560" src="data:image/png;base64,{data}">'
        return f"<div>{html.escape(f'{self.config.title} at {self.path}')}</div>{table}{image}"

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        loss: Loss | None = None,
        metric: Metric | None = None,
        **objects: Any,
    ) -> Run:
        """Load a finished run from its folder, including its learner.

        Args:
            path: the folder.
            device: where to load the learner; by default, the run's device.
            loss: the callable that you passed to `metareg.train` as the loss of your own tasks.
            metric: the metric, in the same way.
            objects: your own objects that you passed to `metareg.train`: ``algo``, ``augment``, ``task`` and ``model``
                (you can omit a module that consists only of `torch.nn` layers).

        Raises:
            UsageError: the folder contains no run, the run is unfinished or damaged, or an object is missing.
        """
        path = Path(path)
        config = read_config(path)
        if not (path / FINAL).is_file():
            raise UsageError(f"The run at {path} has not finished; {format_resume_command(path)} continues it.")
        run = cls._restore(path, config, find_device(device or config.device), OwnFacts(loss, metric), objects)
        if (path / RESULTS).is_file():
            run.evaluation, run.evaluation_one_by_one = read_evaluations(path)
            if (done := read_planned_steps(path, config)) != config.steps:
                log.warning(
                    "The run at %s is configured for %d steps; its learner and results are from step %s.",
                    path, config.steps, done,
                )  # fmt: skip
        run.plots = sorted((path / PLOTS).glob("*.png"))
        return run

    @classmethod
    def _restore(
        cls, path: Path, config: RunConfig, device: torch.device, facts: OwnFacts, objects: Mapping[str, Any]
    ) -> Run:
        """Restore the run with its saved learner and the user's own objects."""
        unknown = [name for name in objects if name not in PLUGIN_FIELDS]
        if unknown:
            raise UnknownNameError("argument of Run.load", unknown[0], PLUGIN_FIELDS)
        refuse_missing(path, config, objects, "metareg.Run.load", only=("task",))
        given, _ = adopt_objects(config.model_dump(), objects, facts, config.seed)
        stored = (config.task.name, config.task.config)
        task = _resolve("tasks", given.get("task", stored))
        model = _resolve("models", given["model"]) if "model" in given else None
        loss, metric = (getattr(task.instance, name, None) for name in ("loss", "metric"))
        learner = MetaLearner.load(
            path / FINAL,
            None if model is None else build_model(model, task.instance.spec, config.seed),
            algo=objects.get("algo"),
            augment=objects.get("augment", ()),
            loss=None if isinstance(loss, str) else loss,
            metric=metric if isinstance(metric, Metric) else None,
            device=device,
        )
        return cls(path, config, learner, TaskSource(task), model)

    def evaluate(
        self,
        tasks: int,
        inner_steps: Sequence[int],
        task: str | None = None,
        task_options: Mapping[str, Any] | None = None,
        *,
        split: str = TEST,
        bn_statistics: str | None = None,
    ) -> Evaluation:
        """Test the run's learner again.

        Args:
            tasks: the number of tasks.
            inner_steps: numbers of inner steps.
            task: another task plugin to test on; the run's own if None. It inherits the options in its
                `Task.inherited_options` from the run's task.
            task_options: further options of the task.
            split: the tasks' split.
            bn_statistics: as for the run; by default, the run's own.
        """
        policies = [bn_statistics or self.learner.config.bn_statistics]
        return self._evaluate(policies, tasks, inner_steps, task, task_options, split)[0]

    def evaluate_one_by_one(
        self,
        tasks: int,
        inner_steps: Sequence[int],
        task: str | None = None,
        task_options: Mapping[str, Any] | None = None,
        *,
        split: str = TEST,
    ) -> tuple[Evaluation, Evaluation | None]:
        """Return `evaluate`'s result, and the same test with predictions that do not depend on a task's other queries.

        The second adds little time, because each task is adapted to once. It is None if the first is already such a
        test.
        """
        policies = [self.learner.config.bn_statistics, "support"]
        first, *others = self._evaluate(policies, tasks, inner_steps, task, task_options, split)
        return first, others[0] if others else None

    def _evaluate(
        self,
        bn_statistics: Sequence[str],
        tasks: int,
        inner_steps: Sequence[int],
        task: str | None,
        task_options: Mapping[str, Any] | None,
        split: str,
    ) -> list[Evaluation]:
        """Test with each choice of BatchNorm statistics; arguments as in `evaluate`."""
        source = self.source
        if task or task_options:
            own = self.config.task.config
            if task:
                inherited = getattr(find_entry("tasks", task).load(), "inherited_options", ())
                own = {name: own[name] for name in inherited if name in own}
            source = TaskSource(resolve("tasks", task or self.config.task.name, {**own, **(task_options or {})}))
            try:
                check_fit(self.learner, source, split)
            except ExamplesError as error:
                raise UsageError(f"The run's learner is not for the {source.plugin.label}: {error}") from error
        with seed_global_generators(self.config.seed, "evaluation"):
            return self.learner.evaluate_policies(bn_statistics, source, tasks, split, inner_steps, self.config.seed)

    def read_data_from(self, data: str | Path) -> None:
        """Read the task's data from another place from now on, for example because it has moved."""
        task = self.config.task
        options = {**task.config, "data": str(data)}
        self.source = TaskSource(resolve("tasks", task.name, options))
        self.config = self.config.model_copy(update={"task": task.model_copy(update={"config": options})})

    def evaluate_baselines(self) -> list[Baseline]:
        """Evaluate simpler baselines on the run's test tasks; computed once, which may take longer than training.

        Returns:
            A model trained from scratch on each support set, and one trained on all training tasks and fine-tuned on
            each support set.

        Raises:
            UsageError: the run's model is not an installed plugin, or a baseline has no finite scores.
        """
        path = self.path / BASELINES
        if path.is_file():
            content = read_json(path)
            with refuse_malformed(path, "baselines"):
                return [Baseline.from_dict(each) for each in content]
        found = measure_baselines(self.config, self._get_model(), self.source, self.learner.device)
        write_json(path, [each.to_dict() for each in found])
        return found

    def _get_model(self) -> Plugin:
        """Return the model plugin.

        Raises:
            UsageError: it is not known.
        """
        if self._model is None:
            chosen = self.config.model
            if chosen is None:
                raise UsageError(f"The configuration of the run at {self.path} does not name a model.")
            refuse_missing(self.path, self.config, {}, "metareg.Run.load", only=("model",))
            self._model = resolve("models", chosen.name, chosen.config)
        return self._model

    def predict(
        self,
        support: Any,
        query: Any,
        *,
        inner_steps: int | None = None,
        bn_statistics: str = "support",
    ) -> str | Tensor:
        """Adapt the run's learner to your examples and predict others.

        Args:
            support: labelled examples: a table (`metareg.read_table`) with the input and target columns (for classes,
                one column with their names), or a folder with one folder of images per class; or a pandas frame in
                place of a table. Or a pair ``(x, y)`` of tensors or arrays, as for `MetaLearner.adapt`.
            query: the examples to predict: a table with the input columns, or a folder of images; or inputs as tensors
                or arrays.
            inner_steps: number of inner steps; by default, as in training.
            bn_statistics: as in `MetaLearner.adapt`.

        Returns:
            CSV: the inputs, or the image's name; then the predicted targets, or the class and its probability. For
            tensors, the outputs of the adapted module: class scores, or numbers ``[query, outputs]``.

        Raises:
            UsageError: the examples cannot be read, or do not fit the model.
        """
        if isinstance(support, tuple):
            return exports.predict_tensors(self.learner, support, query, inner_steps, bn_statistics)
        given = _read_given(support, "support"), _read_given(query, "query")
        return exports.predict(self.learner, self.source.plugin, *given, inner_steps, bn_statistics)

    def predict_sites(
        self, sites: str | Path, *, inner_steps: int | None = None, bn_statistics: str = "support"
    ) -> str:
        """Adapt the run's learner to each of many sites, and predict their queries.

        Args:
            sites: a folder with one folder per site, each with `support` and `query` as tables (``support.csv``) or
                folders of images, as for `predict`.
            inner_steps: as in `predict`.
            bn_statistics: as in `MetaLearner.adapt`.

        Returns:
            CSV: the site, then the columns that `predict` returns.

        Raises:
            UsageError: as for `predict`; or the sites' tables have different columns.
        """
        return exports.predict_sites(self.learner, self.source.plugin, Path(sites), inner_steps, bn_statistics)

    def export(
        self,
        to: str | Path,
        *,
        support: str | Path | None = None,
        adaptive: bool = False,
        inner_steps: int | None = None,
        bn_statistics: str = "support",
    ) -> None:
        """Export the run's learner, without anything that only training needs.

        ``FILE.safetensors`` is for `MetaLearner.load`. ``FILE.pt2`` is the plain module as a `torch.export` program,
        ``FILE.onnx`` as an ONNX program, for any number of examples: at the learned initialisation, or adapted to
        `support`. With `adaptive`, the program adapts itself: it takes ``support_x, support_y, query_x`` and returns
        predictions.

        The file ``metareg.json`` in a program (`extra_files` of `torch.export.load`; in ONNX an entry of the metadata)
        describes its inputs and outputs: classes, columns, the size of images and the values of black and white, and
        the statistics that BatchNorm layers use (``bn_statistics``; at the initialisation, those of each batch,
        ``"transductive"``).

        Args:
            to: the file.
            support: labelled examples, as for `predict`.
            adaptive: whether the program adapts where it runs.
            inner_steps: number of inner steps; by default, as in training.
            bn_statistics: as in `MetaLearner.adapt`.

        Raises:
            UsageError: `to` has another suffix, or `torch.export` cannot export the model or its adaptation.
        """
        exports.export(
            self.learner, self.source.plugin, Path(to), support=None if support is None else Path(support),
            adaptive=adaptive, inner_steps=inner_steps, bn_statistics=bn_statistics,
        )  # fmt: skip

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl.

        Raises:
            UsageError: they cannot be read.
        """
        path = self.path / METRICS
        try:
            return [parse_json(line) for line in read_text(path).splitlines()]
        except (OSError, ValueError, MemoryError) as error:
            raise UsageError(f"{path} cannot be read as lines of JSON: {error}.") from error


def read_config(path: Path) -> RunConfig:
    file = path / CONFIG
    if not file.is_file():
        raise UsageError(f"There is no run at {path}: it has no {CONFIG}.")
    return update_option_names(validate(RunConfig, read_yaml(file), str(file)))


def refuse_missing(
    path: Path, config: RunConfig, given: Collection[str], function: str, *, only: Collection[str] = PLUGIN_FIELDS
) -> None:
    """Refuse to continue a run without the objects that a program passed to it.

    Args:
        path: the run's folder.
        config: its configuration.
        given: the fields of the configuration for which the caller passed objects.
        function: the Python function that takes them.
        only: the fields that are needed.

    Raises:
        UsageError: an object is missing.
    """
    own = list_own(config)
    if not any(field in only and field not in given for field in own):
        return
    listed = {field: ", ".join(f"'{each.name}'" for each in chosen) for field, chosen in own.items()}
    objects = " and ".join(f"{field} {names}" for field, names in listed.items())
    arguments = "".join(f", {field}=…" for field in own)
    raise UsageError(
        f"The run at {path} uses {objects} from a program, which commands cannot create: continue in Python with "
        f"{function}({str(path)!r}{arguments})."
    )


def read_evaluations(path: Path) -> tuple[Evaluation, Evaluation | None]:
    """Read a run's test, and the same test with predictions one by one if there is one.

    Raises:
        UsageError: the results cannot be read.
    """
    content = read_json(path / RESULTS)
    with refuse_malformed(path / RESULTS, "results"):
        one_by_one = content.get("one_by_one")
        return Evaluation.from_dict(content), None if one_by_one is None else Evaluation.from_dict(one_by_one)


def read_planned_steps(path: Path, config: RunConfig) -> int | None:
    """Read the configured training steps of a run's results; None without results.

    Fewer than in the current configuration if the user raised `steps` and the run has not finished again.
    """
    if not (path / RESULTS).is_file():
        return None
    content = read_json(path / RESULTS)
    with suppress(*MALFORMED):
        # Earlier versions wrote only the step of the weights.
        last = content["weights"]["step"] if content["weights"]["select"] == "last" else config.steps
        stopped = content.get("stopped_early")
        return int(stopped["of_steps"] if stopped else content.get("trained_steps", last))
    return config.steps


def has_stopped_early(path: Path) -> bool:
    """Return whether early stopping ended the training of a run's results."""
    with suppress(*MALFORMED):
        return (path / RESULTS).is_file() and bool(read_json(path / RESULTS)["stopped_early"])
    return False


def _read_given(given: Any, what: str) -> Path | Table:
    """Return a path as it is, and a pandas frame as a table."""
    if isinstance(given, str | Path):
        return Path(given)
    if not hasattr(given, "columns"):
        raise UsageError(
            f"The {what} examples are a {type(given).__name__}; predict takes paths or frames, or the pair (x, y) and x."
        )
    return read_frame(given, f"The {what} frame")


def _resolve(kind: str, given: Any) -> Plugin:
    """Return the plugin for a class, an object or a pair of a class and options."""
    return resolve(kind, *given) if isinstance(given, tuple) else resolve(kind, given)


def format_resume_command(path: Path) -> str:
    return f"`metareg resume {shlex.quote(str(path))}`"


def check_fit(learner: MetaLearner, source: TaskSource, split: str) -> None:
    """Run the model on the first tasks, to find out early if it does not fit them."""
    try:
        learner.evaluate(source, 2, split=split, inner_steps=(0, 1))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        problem = str(error).splitlines()[0].removesuffix(".")
        raise UsageError(
            f"The model cannot be run on the {source.plugin.label}: {problem}.{_describe_inputs(source, split)}"
        ) from error


def _describe_inputs(source: TaskSource, split: str) -> str:
    """Say what inputs a task has if they are not plain tensors, and which model takes them."""
    inputs = source.episodes(split, [0], 0)[0].support_x
    if isinstance(inputs, Tensor):
        return ""
    default = getattr(source.plugin.instance, "default_model", None)
    remedy = f"; the task's own model is '{default}'" if default else ""
    kind = f"a dict of {', '.join(map(str, inputs))}" if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
    return f" The task's inputs are {kind}{remedy}."
