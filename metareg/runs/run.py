"""A run: a folder that holds all of a training, from its configuration to its results and pictures."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metareg.contract.config import validate
from metareg.contract.evaluation import Evaluation
from metareg.contract.losses import Metric
from metareg.contract.splits import TEST
from metareg.errors import UsageError, describe_error
from metareg.learner.learner import MetaLearner
from metareg.registry.plugins import find_entry, resolve
from metareg.registry.task_source import TaskSource
from metareg.runs import exports
from metareg.runs.baselines import Baseline, measure_baselines
from metareg.runs.config import RunConfig
from metareg.runs.folder import BASELINES, CONFIG, FINAL, METRICS, PLOTS, RESULTS
from metareg.runs.options import update_option_names
from metareg.util.devices import find_device
from metareg.util.files import read_json, write_json
from metareg.util.yaml_files import read_yaml

__all__ = ["Run", "check_fit", "format_resume_command", "read_config", "read_trained_steps"]

log = logging.getLogger("metareg")


class Run:
    """A run and its folder.

    ======================  ================================================================================
    config.yaml             the complete configuration; ``metareg train --config`` takes it
    environment.json        versions, device, strategy, plugins and their distributions
    metrics.jsonl           a line per report of the training and per validation; bit for bit the same for a resumed run
    timing.jsonl            a line per report with the speed, the peak memory so far and the time of day
    checkpoints/            ``step-….safetensors``, from which `resume` goes on, and the learner as ``final.safetensors``
    plots/                  pictures (PNG)
    results.json            the test: mean, interval and every task's score after each number of inner steps
    baselines.json          what simpler ways reach on the test tasks, where that was asked for (`evaluate_baselines`)
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
        self.evaluation_one_by_one: Evaluation | None = None
        """The same test by predictions that do not depend on a task's other queries; None where those of the test do not."""
        self.plots: list[Path] = []
        """The pictures that were drawn."""

    @classmethod
    def load(cls, path: str | Path, *, device: str | None = None) -> Run:
        """A finished run from its folder, its learner included.

        Raises:
            UsageError: the folder holds no run, or the run is not finished or damaged.
        """
        path = Path(path)
        config = read_config(path)
        if not (path / FINAL).is_file():
            raise UsageError(f"The run at {path} has not ended; {format_resume_command(path)} goes on with it.")
        source = TaskSource(resolve("tasks", config.task.name, config.task.config))
        metric = getattr(source.plugin.instance, "metric", None)
        own = metric if isinstance(metric, Metric) else None
        learner = MetaLearner.load(path / FINAL, metric=own, device=find_device(device or config.device))
        run = cls(path, config, learner, source)
        if (path / RESULTS).is_file():
            try:
                content = read_json(path / RESULTS)
                run.evaluation = Evaluation.from_dict(content)
                if "one_by_one" in content:
                    run.evaluation_one_by_one = Evaluation.from_dict(content["one_by_one"])
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                problem = describe_error(error)
                raise UsageError(f"{path / RESULTS} holds no results of metareg ({problem}).") from error
            if (done := read_trained_steps(path, config)) != config.steps:
                log.warning(
                    "The training at %s goes on to %d steps; its learner and results are those after %s.",
                    path, config.steps, done,
                )  # fmt: skip
        run.plots = sorted((path / PLOTS).glob("*.png"))
        return run

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
        """Test the run's learner anew.

        Args:
            tasks: how many tasks.
            inner_steps: numbers of inner steps.
            task: another task plugin to test on; the run's own where it is None. It takes the options that it declares as
                `Task.inherited_options` from the run's task.
            task_options: further options of the task.
            split: the tasks' split.
            bn_statistics: as that of the run, which is the default.
        """
        source = self.source
        if task or task_options:
            own = self.config.task.config
            if task:
                inherited = getattr(find_entry("tasks", task).load(), "inherited_options", ())
                own = {name: own[name] for name in inherited if name in own}
            source = TaskSource(resolve("tasks", task or self.config.task.name, {**own, **(task_options or {})}))
            check_fit(self.learner, source, split)
        return self.learner.evaluate(
            source, tasks, split=split, inner_steps=inner_steps, seed=self.config.seed, bn_statistics=bn_statistics
        )

    def evaluate_baselines(self) -> list[Baseline]:
        """What simpler ways reach on the run's test tasks; computed once, which may take longer than training.

        Returns:
            A model that is trained from scratch on each support set; and one that is trained on all training tasks and
            fine-tuned on each support set.

        Raises:
            UsageError: the run's model is no installed plugin, or a baseline has no finite scores.
        """
        path = self.path / BASELINES
        if path.is_file():
            return [Baseline.from_dict(each) for each in read_json(path)]
        if self.config.model is None:
            raise UsageError(f"The configuration of the run at {self.path} names no model.")
        model = resolve("models", self.config.model.name, self.config.model.config)
        found = measure_baselines(self.config, model, self.source, self.learner.device)
        write_json(path, [each.to_dict() for each in found])
        return found

    def predict(
        self,
        support: str | Path,
        query: str | Path,
        *,
        inner_steps: int | None = None,
        bn_statistics: str = "support",
    ) -> str:
        """Adapt the run's learner to a user's examples and predict others.

        Args:
            support: labelled examples: a table (`metareg.read_table`) with the input and target columns (for class targets
                one column with the classes' names), or a folder with a folder of images for each class.
            query: what to predict: a table with the input columns, or a folder of images.
            inner_steps: how many steps to adapt; as many as in training by default.
            bn_statistics: as in `MetaLearner.adapt`.

        Returns:
            CSV: the inputs, or the image's name; then the predicted targets, or the class and its probability.

        Raises:
            UsageError: the examples cannot be read, or do not suit the model.
        """
        return exports.predict(self.learner, self.source.plugin, Path(support), Path(query), inner_steps, bn_statistics)

    def predict_sites(
        self, sites: str | Path, *, inner_steps: int | None = None, bn_statistics: str = "support"
    ) -> str:
        """Adapt the run's learner to each of many sites, and predict there.

        Args:
            sites: a folder with a folder for each site, in which `support` and `query` are tables (``support.csv``) or
                folders of images, as `predict` takes them.
            inner_steps: as in `predict`.
            bn_statistics: as in `MetaLearner.adapt`.

        Returns:
            CSV: the site, then what `predict` returns.

        Raises:
            UsageError: as `predict`; or the sites' tables have other columns.
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
        """Write the run's learner without what is there in training alone.

        ``FILE.safetensors`` is for `MetaLearner.load`. ``FILE.pt2`` is the plain module as a program of `torch.export`,
        and ``FILE.onnx`` as one of ONNX, with any number of examples: at the learned initialisation, or adapted to
        `support`. With `adaptive` the program adapts by itself: it takes ``support_x, support_y, query_x`` and returns
        predictions.

        The file ``metareg.json`` in a program (`extra_files` of `torch.export.load`; in ONNX an entry of the metadata) says
        what its numbers mean: classes, columns, the size of images and the values of black and white, and whose statistics
        BatchNorm layers use (``bn_statistics``: at the initialisation those of each batch, ``"transductive"``).

        Args:
            to: the file.
            support: labelled examples, as for `predict`.
            adaptive: whether the program adapts where it runs.
            inner_steps: how many steps to adapt; as many as in training by default.
            bn_statistics: as in `MetaLearner.adapt`.

        Raises:
            UsageError: another ending, or a model or an adaptation that `torch.export` cannot take.
        """
        exports.export(
            self.learner, self.source.plugin, Path(to), support=None if support is None else Path(support),
            adaptive=adaptive, inner_steps=inner_steps, bn_statistics=bn_statistics,
        )  # fmt: skip

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl.

        Raises:
            UsageError: they cannot be read.
        """
        path = self.path / METRICS
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read as lines of JSON: {error}.") from error


def read_config(path: Path) -> RunConfig:
    file = path / CONFIG
    if not file.is_file():
        raise UsageError(f"There is no run at {path}: it has no {CONFIG}.")
    return update_option_names(validate(RunConfig, read_yaml(file), str(file)))


def read_trained_steps(path: Path, config: RunConfig) -> int | None:
    """The steps of the training that a run's results are of; None where there are none.

    They are fewer than the configuration's once these were raised, until the run has ended anew.
    """
    if not (path / RESULTS).is_file():
        return None
    content = read_json(path / RESULTS)
    try:
        # Earlier versions wrote the step of the weights alone.
        last = content["weights"]["step"] if content["weights"]["select"] == "last" else config.steps
        return content.get("trained_steps", last)
    except (LookupError, TypeError, AttributeError):
        return config.steps


def format_resume_command(path: Path) -> str:
    return f"`metareg resume {shlex.quote(str(path))}`"


def check_fit(learner: MetaLearner, source: TaskSource, split: str) -> None:
    """Run the model on the first tasks, so that one that does not fit them is found before anything else."""
    try:
        learner.evaluate(source, 2, split=split, inner_steps=(0, 1))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        problem = str(error).splitlines()[0]
        raise UsageError(f"The model cannot be run on the {source.plugin.label}: {problem}.") from error
