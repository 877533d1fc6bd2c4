"""Uses of a finished run's learner: as a file, as a program, and on a user's own examples."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from metareg.contract.columns import Columns, name_columns
from metareg.contract.episodes import convert_arrays
from metareg.contract.named import NamedExamples
from metareg.contract.tasks import Task
from metareg.errors import UsageError, nearest
from metareg.learner.learner import MetaLearner
from metareg.printable import format_count, format_csv
from metareg.registry.plugins import Plugin, resolve
from metareg.runs.programs import (
    ENDINGS,
    describe_program,
    export_adaptation,
    export_module,
    export_named,
    get_input_shape,
    write_program,
)
from metareg.util.devices import find_device, move_tensors
from metareg.util.images import find_images
from metareg.util.tables import Table, read_table

__all__ = ["export", "load_learner", "predict", "predict_sites", "predict_tensors"]

log = logging.getLogger("metareg")

_LABEL = "label"
_AT_ONCE = 512
"""Number of named examples whose inputs are read together; each input can be a whole neighbourhood."""
_LARGEST_LIST = 20_000
"""Maximum number of names to search for one similar to a wrong name."""

Given = Path | Table
"""A user's examples: a file, a folder, or a table."""


def load_learner(path: Path, device: str | None, data: str | None = None) -> tuple[MetaLearner, Plugin]:
    """Load a learner from its file alone, and the task that reads a user's examples.

    Args:
        path: the file.
        device: the device to load it on.
        data: the data folder of a task that holds the examples itself, such as a graph.

    Raises:
        UsageError: the file contains no learner, or it was not trained by a run.
    """
    learner = MetaLearner.load(path, device=find_device(device or "auto"))
    if learner.task is None:
        raise UsageError(f"{path} does not describe its inputs: it was not trained by a run with an installed task.")
    return learner, resolve("tasks", learner.task.name, {**learner.task.config, **({"data": data} if data else {})})


def export(
    learner: MetaLearner,
    task: Plugin,
    to: Path,
    *,
    support: Path | None,
    adaptive: bool,
    inner_steps: int | None,
    bn_statistics: str,
) -> None:
    """Implement `metareg.Run.export` for a learner and its task."""
    if adaptive and support is not None:
        raise UsageError("A program that adapts takes the support set as an input; remove --support.")
    if to.suffix == ".safetensors":
        if adaptive or support is not None:
            raise UsageError(
                f"{to} would contain the learner itself, which can adapt; --support and --adaptive are for FILE.pt2."
            )
        learner.save(to)
        return
    if to.suffix not in ENDINGS:
        raise UsageError(
            f"Export a run to FILE.safetensors (the learner), FILE.pt2 or FILE.onnx (a program), not to '{to}'."
        )
    steps = learner.config.inner_steps if inner_steps is None else inner_steps
    if adaptive:
        program, facts = export_adaptation(learner, task, steps, bn_statistics)
        facts = describe_program(learner, task, steps, bn_statistics, None) | facts
    elif support is None:
        program, facts = _export_initialisation(learner, task, to)
    else:
        program, facts = _export_adapted(learner, task, support, steps, bn_statistics)
    write_program(program, to, facts)


def _export_initialisation(
    learner: MetaLearner, task: Plugin, to: Path
) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """Export the module with the learned initial parameters."""
    if getattr(task.instance, "known_columns", ()):
        raise UsageError(
            f"A program for tables must be adapted to one of them; give its labelled rows with --support to write {to}."
        )
    if (named := getattr(task.instance, "named_examples", None)) is not None:
        raise UsageError(
            f"A program that takes {named.column}s by number must be adapted to some of them; give them with --support "
            f"to write {to}: a table with the columns {named.column} and {_LABEL}."
        )
    if learner.model.batch_norms:
        log.warning(
            "Without --support, the BatchNorm layers use the statistics of each batch that the program receives."
        )
    module = learner.engine.plain.create_module(learner.plain_meta_parameters)
    facts = describe_program(learner, task, 0, "transductive", None)
    return export_module(module, get_input_shape(task)), facts


def _export_adapted(
    learner: MetaLearner, task: Plugin, support: Path, inner_steps: int, bn_statistics: str
) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """Export the module adapted to a user's examples, with inputs and outputs in their units."""
    examples = _Examples(learner, task, support)
    module = learner.adapt(examples.x, examples.y, inner_steps, bn_statistics=bn_statistics)
    facts = describe_program(learner, task, inner_steps, bn_statistics, examples.columns)
    facts |= {"classes": None if examples.classes is None else list(examples.classes)}
    if examples.named is not None:
        return export_named(module, examples.named, examples.numbers), facts
    if examples.columns is not None:
        module = _InUnits(module, examples.columns)
    return export_module(module, get_input_shape(task)), facts


def predict(
    learner: MetaLearner, task: Plugin, support: Given, query: Given, inner_steps: int | None, bn_statistics: str
) -> str:
    """Implement `metareg.Run.predict` for a learner and its task."""
    return format_csv(_predict_rows(learner, task, support, query, inner_steps, bn_statistics))


def predict_tensors(
    learner: MetaLearner, support: tuple[Any, Any], query: Any, inner_steps: int | None, bn_statistics: str
) -> Tensor:
    """Implement `metareg.Run.predict` for tensors."""
    query_x = convert_arrays(query, "The query set")
    module = learner.adapt(*support, inner_steps, query_x, bn_statistics=bn_statistics)
    with torch.no_grad():
        outputs: Tensor = module(move_tensors(query_x, learner.device, next(module.parameters()).dtype))
    return outputs.cpu()


def predict_sites(learner: MetaLearner, task: Plugin, sites: Path, inner_steps: int | None, bn_statistics: str) -> str:
    """Implement `metareg.Run.predict_sites` for a learner and its task."""
    answer: list[list[str]] = []
    for site in _list_sites(sites):
        support, query = (_find_set(site, name) for name in ("support", "query"))
        header, *rows = _predict_rows(learner, task, support, query, inner_steps, bn_statistics)
        answer = answer or [["site", *header]]
        if answer[0][1:] != header:
            names, others = (", ".join(each) for each in (answer[0][1:], header))
            raise UsageError(
                f"{site} has the columns {others}, but earlier sites have {names}; all sites must have the same "
                "columns."
            )
        answer += [[_to_text(site.name), *row] for row in rows]
    return format_csv(answer)


def _list_sites(folder: Path) -> list[Path]:
    """List the sites' folders in order, without hidden ones.

    Raises:
        UsageError: there is no site.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UsageError(f"The folder {folder} cannot be read: {error.strerror}.") from error
    if not found:
        raise UsageError(
            f"{folder} contains no sites: it needs one folder per site, each with support and query (files or folders)."
        )
    return found


def _find_set(site: Path, name: str) -> Path:
    """Find the table or folder of a site with this name, whatever its suffix.

    Raises:
        UsageError: there is none, or several.
    """
    found = sorted(path for path in site.iterdir() if path.stem == name)
    if len(found) != 1:
        has = " and ".join(path.name for path in found) if found else f"no {name}"
        raise UsageError(f"The site {site} has {has}; it needs one table or folder of images named '{name}'.")
    return found[0]


def _predict_rows(
    learner: MetaLearner, task: Plugin, support: Given, query: Given, inner_steps: int | None, bn_statistics: str
) -> list[list[str]]:
    """Return the header and the rows of the predictions."""
    examples = _Examples(learner, task, support, query)
    apart = bn_statistics == "support" and not learner.engine.plain.stages.transductive
    header, rows, parts = examples.read_queries(query, _AT_ONCE if apart else None)
    query_x = None if len(parts) > 1 else parts[0]
    module = learner.adapt(examples.x, examples.y, inner_steps, query_x, bn_statistics=bn_statistics)
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        outputs = torch.cat([module(move_tensors(x, learner.device, dtype)).cpu() for x in parts])
    outputs = examples.restore_outputs(outputs)
    if examples.classes:
        best = outputs[:, : len(examples.classes)].softmax(-1).max(-1)
        answers = [
            [examples.classes[index], f"{value:.4f}"]
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        header = [*header, *examples.targets, "probability"]
    else:
        answers = [[f"{value:.9g}" for value in y] for y in outputs.flatten(1).tolist()]
        header = [*header, *examples.targets]
    return [header, *([*row, *answer] for row, answer in zip(rows, answers, strict=True))]


class _InUnits(nn.Module):
    """An adapted module that takes inputs in a table's units, and returns targets in theirs."""

    def __init__(self, module: nn.Module, columns: Columns) -> None:
        super().__init__()
        self.module = module
        self._columns = columns

    def forward(self, x: Tensor) -> Tensor:
        return self._columns.restore_outputs(self.module(self._columns.scale_inputs(x)))


class _Examples:
    """A user's labelled examples, read for a learner and its task."""

    def __init__(self, learner: MetaLearner, task: Plugin, support: Given, query: Given | None = None) -> None:
        self._task = task.instance
        self._classifies = learner.loss is nn.functional.cross_entropy
        self._output_shape = task.instance.spec.output_shape
        self.named: NamedExamples | None = getattr(task.instance, "named_examples", None)
        """The task's own examples, if tables only name them."""
        self.columns: Columns | None = None
        self.targets: Sequence[str]
        self.classes: Sequence[str] | None
        self._query: Table | None = None
        if self.named is not None:
            self._name_examples(self.named, support, query)
        elif _is_folder(support):
            self._shape = get_input_shape(task)
            self._take_images(support)
        else:
            self._shape = get_input_shape(task)
            self._take_tables(support, query)

    def _take_images(self, support: Path) -> None:
        files = find_images(support)
        files.warn_of_left_out()
        labels = [_to_text(name) for name, paths in files.classes.items() for _ in paths]
        self.x = self._read_images([path for paths in files.classes.values() for path in paths], support)
        if not self._classifies:
            raise UsageError(f"{support} is a folder of classes; this learner predicts numbers and needs a CSV file.")
        self.targets = ("class",)
        self._number_labels(labels, sorted(set(labels)), support)

    def _take_tables(self, support: Given, query: Given | None) -> None:
        known = getattr(self._task, "known_columns", ())
        table = _read(support, known)
        if query is not None and not _is_folder(query):
            self._query = _read(query, known or table.names)
        if not known:
            inputs, outputs = math.prod(self._shape), 1 if self._classifies else math.prod(self._output_shape)
            table, self._query = name_columns(inputs, outputs, self._classifies, table, self._query)
        choose = getattr(self._task, "choose_columns", None) or partial(Task.choose_columns, self._task)
        columns = self.columns = choose(table, self._query, self._classifies)
        table = _refuse_empty(columns.select_rows(table))
        self.targets, self.classes = columns.targets, columns.classes
        self.x = columns.scale_inputs(columns.read_inputs(table))
        self.y = columns.scale_targets(columns.read_targets(table))

    def _name_examples(self, named: NamedExamples, support: Given, query: Given | None) -> None:
        table = self._read_names(support, (named.column, _LABEL))
        if query is not None:
            self._query = self._read_names(query, (named.column,))
        labels = table.get_texts(_LABEL)
        if "" in labels:
            raise UsageError(f"{table.locate(labels.index(''), _LABEL)} is empty; it must name a class.")
        self.numbers = self._number_names(named, table)
        self.x = named.read(self.numbers)
        self.targets = (_LABEL,)
        by_size = all(label.isdecimal() for label in labels)
        self._number_labels(labels, sorted(set(labels), key=int if by_size else None), table.path)

    def _read_names(self, given: Given, columns: Sequence[str]) -> Table:
        """Read a table that names examples and has only these columns."""
        if _is_folder(given):
            raise UsageError(f"{given} is a folder; this learner needs a table with {' and '.join(columns)}.")
        table = _read(given, (*columns, _LABEL))
        table.check_columns(columns)
        return _refuse_empty(table)

    @staticmethod
    def _number_names(named: NamedExamples, table: Table) -> Tensor:
        """Return the numbers of the examples in a table, which must not repeat."""
        names = table.get_texts(named.column)
        for row, name in enumerate(names):
            if name in names[:row]:
                raise UsageError(f"{table.locate(row, named.column)} contains '{name}' a second time.")
        try:
            return named.number(names)
        except KeyError as error:
            row = names.index(error.args[0])
            known = named.names or ()
            close = nearest(names[row], known[:_LARGEST_LIST])
            advice = f"; did you mean '{close[0]}'?" if close else f": there is no such {named.column}."
            raise UsageError(
                f"{table.locate(row, named.column)} contains '{names[row]}', which is not in the data{advice}"
            ) from error

    def _number_labels(self, labels: Sequence[str], classes: Sequence[str], where: Path) -> None:
        if len(classes) > self._output_shape[0]:
            count = format_count(len(classes), "class", "classes")
            raise UsageError(f"{where} has {count}; this learner distinguishes {self._output_shape[0]}.")
        self.classes = classes
        self.y = torch.tensor([classes.index(label) for label in labels])

    def read_queries(self, given: Given, at_once: int | None) -> tuple[Sequence[str], list[list[str]], list[Any]]:
        """Read the examples to predict.

        Args:
            given: their file, folder or table.
            at_once: the number of inputs per part, if they are named examples; None for all.

        Returns:
            The header of the columns that identify an example, their values for each row, and the inputs in parts.
        """
        if self.named is not None:
            assert self._query is not None
            numbers = self._number_names(self.named, self._query)
            parts = [self.named.read(some) for some in numbers.split(at_once or len(numbers))]
            return [self.named.column], self._query.get_rows([self.named.column]), parts
        if _is_folder(given):
            path = given
            files = find_images(path)
            files.warn_of_left_out(of_classes=False)
            images = [image for members in files.by_folder.values() for image in members]
            names = [[_to_text(image.relative_to(path).as_posix())] for image in images]
            return ["image"], names, [self._read_images(images, path)]
        if self.columns is None or self._query is None:
            raise UsageError(f"{given} is a file; this learner needs a folder of images.")
        inputs, query = self.columns.inputs, _refuse_empty(self._query)
        return inputs, query.get_rows(inputs), [self.columns.scale_inputs(self.columns.read_inputs(query))]

    def restore_outputs(self, outputs: Tensor) -> Tensor:
        """Convert outputs to the units of the targets."""
        return outputs if self.columns is None else self.columns.restore_outputs(outputs)

    def _read_images(self, paths: Sequence[Path], where: Path) -> Tensor:
        if len(self._shape) != 3:
            raise UsageError(f"{where} is a folder; this learner needs a CSV file, not images.")
        if not paths:
            raise UsageError(f"{where} contains no images in one folder per class.")
        read = getattr(self._task, "read_image", None) or partial(Task.read_image, self._task)
        return torch.stack([read(path) for path in paths])


def _is_folder(given: Given) -> TypeGuard[Path]:
    return isinstance(given, Path) and given.is_dir()


def _read(given: Given, known: Collection[str]) -> Table:
    return read_table(given, known) if isinstance(given, Path) else given


def _refuse_empty(table: Table) -> Table:
    if not len(table):
        raise UsageError(f"{table.path} contains no rows.")
    return table


def _to_text(name: str) -> str:
    """Return a file's name as text, with ``\\xff`` for bytes that are not UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")
