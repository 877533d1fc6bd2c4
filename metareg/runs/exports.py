"""A finished run's learner put to use elsewhere: as a file, as a program, on a user's own examples."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metareg.contract.columns import Columns, name_columns
from metareg.contract.tasks import Task
from metareg.errors import UsageError
from metareg.learner.learner import MetaLearner
from metareg.registry.plugins import Plugin, resolve
from metareg.util.devices import find_device
from metareg.util.files import write_bytes
from metareg.util.images import find_images
from metareg.util.tables import Table, read_table

__all__ = ["FACTS", "export", "load_learner", "predict"]

log = logging.getLogger("metareg")

FACTS = "metareg.json"
"""The file in an exported program that says what its numbers mean."""


def load_learner(path: Path, device: str | None) -> tuple[MetaLearner, Plugin]:
    """A learner from its file alone, and the task by which it reads a user's examples; no data is read.

    Raises:
        UsageError: the file is no learner's, or a run did not train it.
    """
    learner = MetaLearner.load(path, device=find_device(device or "auto"))
    if learner.task is None:
        raise UsageError(f"{path} does not say what its inputs mean: no run with an installed task trained it.")
    return learner, resolve("tasks", learner.task.name, learner.task.config)


def export(
    learner: MetaLearner, task: Plugin, to: Path, support: Path | None, inner_steps: int | None, bn_statistics: str
) -> None:
    """Write a learner that was trained on a task's tasks, as `metareg.Run.export` says."""
    if to.suffix == ".safetensors":
        if support is not None:
            raise UsageError(
                f"{to} would hold the learner, which adapts wherever it is loaded; --support is for FILE.pt2."
            )
        learner.save(to)
        return
    if to.suffix != ".pt2":
        raise UsageError(f"A run is exported to FILE.safetensors (the learner) or FILE.pt2 (a program), not to '{to}'.")
    columns: Columns | None = None
    if support is None and bool(getattr(task.instance, "known_columns", ())):
        raise UsageError(
            f"A program for tables is adapted to one of them; name its labelled rows with --support to write {to}."
        )
    if support is None:
        module = learner.engine.plain.create_module(learner.plain_meta_parameters)
        bn_statistics = "transductive"
        if learner.model.batch_norms:
            log.warning(
                "Without --support the BatchNorm layers use the statistics of each batch that the program gets."
            )
    else:
        examples = _Examples(learner, task, support)
        module = learner.adapt(examples.x, examples.y, inner_steps, bn_statistics=bn_statistics)
        columns = examples.columns
        if columns is not None:
            module = _InUnits(module, columns)
    example = torch.zeros(2, *_get_input_shape(task))
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    # Anything can be wrong with a model of somebody's own making, and torch.export has errors of many kinds for it.
    except Exception as error:
        problem = str(error).strip().splitlines()[0]
        raise UsageError(f"torch.export cannot take the {type(module).__name__}: {problem}") from error
    buffer = io.BytesIO()
    facts: dict[str, Any] = {"bn_statistics": bn_statistics if learner.model.batch_norms else "none"}
    if columns is not None:
        facts |= {"inputs": columns.features, "targets": columns.targets, "classes": columns.classes}
    torch.export.save(program, buffer, extra_files={FACTS: json.dumps(facts)})
    write_bytes(to, buffer.getvalue())


def predict(
    learner: MetaLearner, task: Plugin, support: Path, query: Path, inner_steps: int | None, bn_statistics: str
) -> str:
    """Predict with a learner that was trained on a task's tasks, as `metareg.Run.predict` says."""
    examples = _Examples(learner, task, support, query)
    module = learner.adapt(examples.x, examples.y, inner_steps, bn_statistics=bn_statistics)
    header, rows, x = examples.read_queries(query)
    with torch.no_grad():
        outputs = examples.restore_outputs(module(x.to(learner.device)).cpu())
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if examples.classes:
        writer.writerow([*header, *examples.targets, "probability"])
        best = outputs[:, : len(examples.classes)].softmax(-1).max(-1)
        for row, value, index in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
            writer.writerow([*row, examples.classes[index], f"{value:.4f}"])
    else:
        writer.writerow([*header, *examples.targets])
        writer.writerows(
            [*row, *(f"{value:.9g}" for value in y)] for row, y in zip(rows, outputs.flatten(1).tolist(), strict=True)
        )
    return buffer.getvalue()


class _InUnits(nn.Module):
    """An adapted module that takes inputs as they stand in a table, and returns targets in their units."""

    def __init__(self, module: nn.Module, columns: Columns) -> None:
        super().__init__()
        self.module = module
        self._columns = columns

    def forward(self, x: Tensor) -> Tensor:
        return self._columns.restore_outputs(self.module(self._columns.scale_inputs(x)))


class _Examples:
    """A user's labelled examples for a learner that was trained on a task's tasks."""

    def __init__(self, learner: MetaLearner, task: Plugin, support: Path, query: Path | None = None) -> None:
        self._task = task.instance
        self._shape = _get_input_shape(task)
        self.columns: Columns | None = None
        self._query: Table | None = None
        classifies = learner.loss is nn.functional.cross_entropy
        if support.is_dir():
            files = find_images(support)
            files.warn_of_left_out()
            labels = [_to_text(name) for name, paths in files.classes.items() for _ in paths]
            self.x = self._read_images([path for paths in files.classes.values() for path in paths], support)
            if not classifies:
                raise UsageError(
                    f"{support} is a folder of classes; this learner predicts numbers and takes a CSV file."
                )
            self.targets: Sequence[str] = ("class",)
            self.classes: Sequence[str] | None = sorted(set(labels))
            outputs = task.instance.spec.output_shape[0]
            if len(self.classes) > outputs:
                raise UsageError(f"{support} has {len(self.classes)} classes; this learner tells {outputs} apart.")
            self.y = torch.tensor([self.classes.index(label) for label in labels])
        else:
            known = getattr(task.instance, "known_columns", ())
            table = read_table(support, known)
            if query is not None and not query.is_dir():
                self._query = read_table(query, known or table.names)
            if not known:
                inputs, outputs = math.prod(self._shape), math.prod(task.instance.spec.output_shape)
                table, self._query = name_columns(inputs, 1 if classifies else outputs, classifies, table, self._query)
            choose = getattr(task.instance, "choose_columns", None) or partial(Task.choose_columns, task.instance)
            columns = self.columns = choose(table, self._query, classifies)
            table = _refuse_empty(columns.select_rows(table))
            self.targets, self.classes = columns.targets, columns.classes
            self.x = columns.scale_inputs(columns.read_inputs(table))
            self.y = columns.scale_targets(columns.read_targets(table))

    def read_queries(self, path: Path) -> tuple[Sequence[str], list[list[str]], Tensor]:
        """What names the rows of the answer (a header, and a list per row), and the inputs."""
        if path.is_dir():
            files = find_images(path)
            files.warn_of_left_out(of_classes=False)
            images = [image for members in files.by_folder.values() for image in members]
            names = [[_to_text(image.relative_to(path).as_posix())] for image in images]
            return ["image"], names, self._read_images(images, path)
        if self.columns is None or self._query is None:
            raise UsageError(f"{path} is a file; this learner takes a folder of images.")
        inputs, query = self.columns.inputs, _refuse_empty(self._query)
        return inputs, query.get_rows(inputs), self.columns.scale_inputs(self.columns.read_inputs(query))

    def restore_outputs(self, outputs: Tensor) -> Tensor:
        """Outputs in the units of the targets."""
        return outputs if self.columns is None else self.columns.restore_outputs(outputs)

    def _read_images(self, paths: Sequence[Path], where: Path) -> Tensor:
        if len(self._shape) != 3:
            raise UsageError(f"{where} is a folder; this learner takes no images but a CSV file.")
        if not paths:
            raise UsageError(f"{where} holds no images, or not in a folder for each class.")
        read = getattr(self._task, "read_image", None) or partial(Task.read_image, self._task)
        return torch.stack([read(path) for path in paths])


def _refuse_empty(table: Table) -> Table:
    if not len(table):
        raise UsageError(f"{table.path} holds no rows.")
    return table


def _get_input_shape(task: Plugin) -> tuple[int, ...]:
    shape = task.instance.spec.input_shape
    if not all(isinstance(size, int) for size in shape):
        raise UsageError(f"The {task.label} has inputs that are neither vectors nor images.")
    return tuple(shape)


def _to_text(name: str) -> str:
    """A file's name as text; bytes of it that are no UTF-8 as ``\\xff``."""
    return os.fsencode(name).decode(errors="backslashreplace")
