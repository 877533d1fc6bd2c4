"""The mapping between columns of a user's table and a task's inputs and targets."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from metareg.errors import UsageError, nearest
from metareg.printable import format_count

if TYPE_CHECKING:
    from torch import Tensor

    from metareg.util.tables import Table

__all__ = ["Columns", "match_columns", "name_columns"]

log = logging.getLogger("metareg")


@dataclass(frozen=True)
class Columns:
    """Converts the tables of one task to tensors, and a model's outputs to their meaning.

    This class leaves cells unchanged; a task that standardises its numbers, or has text columns, overrides it.
    `scale_inputs`, `scale_targets` and `restore_outputs` must be functions of tensors only, so that they can be
    exported.

    Args:
        inputs: the names of the input columns, in the model's order.
        targets: the names of the target columns; one if targets are classes.
        classes: the names of the classes in the order of the model's outputs; None if targets are numbers.
        input_shape: the shape of one input.
    """

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    classes: tuple[str, ...] | None
    input_shape: tuple[int, ...]

    @property
    def features(self) -> list[str]:
        """Describe each number of an input."""
        return list(self.inputs)

    def select_rows(self, support: Table) -> Table:
        """Select the rows of a support table to use; by default, all of them."""
        return support

    def read_inputs(self, table: Table) -> Tensor:
        """Read the inputs ``[rows, *input_shape]`` of a table.

        Raises:
            UsageError: a column is missing, or a cell contains no finite number.
        """
        for name in self.inputs:
            table.require(name)
        values = np.stack([table.get_numbers(name) for name in self.inputs], 1)
        return torch.from_numpy(values).float().reshape(-1, *self.input_shape)

    def read_targets(self, table: Table) -> Tensor:
        """Read the targets of a table: class numbers ``[rows]``, or numbers ``[rows, targets]``.

        Raises:
            UsageError: a column is missing, or a cell contains no finite number or no known class.
        """
        for name in self.targets:
            table.require(name)
        if self.classes is None:
            return torch.from_numpy(np.stack([table.get_numbers(name) for name in self.targets], 1)).float()
        texts = table.get_texts(self.targets[0])
        for row, text in enumerate(texts):
            if text not in self.classes:
                close = nearest(text, self.classes)
                advice = f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(self.classes)}."
                raise UsageError(
                    f"{table.locate(row, self.targets[0])} contains '{text}', which is not one of the classes{advice}"
                )
        return torch.tensor([self.classes.index(text) for text in texts])

    def scale_inputs(self, inputs: Tensor) -> Tensor:
        """Scale inputs for the model."""
        return inputs

    def scale_targets(self, targets: Tensor) -> Tensor:
        """Scale targets to the model's outputs."""
        return targets

    def restore_outputs(self, outputs: Tensor) -> Tensor:
        """Convert the model's outputs to the units of the targets; class scores are unchanged."""
        return outputs


def name_columns(
    inputs: int, targets: int, classifies: bool, support: Table, query: Table | None
) -> tuple[Table, Table | None]:
    """Name the columns of tables without names by position, inputs first.

    A table without names takes the names of the other one. If neither has names, they are ``x1, x2, …`` and ``y`` or
    ``class``.
    """
    unnamed = [table for table in (support, query) if table is not None and not table.named]
    for table in unnamed:
        _check_count(table, table.names, inputs, targets if table is support else 0)
        log.info("%s does not name its columns: they are matched by position, inputs first.", table.path)
    if query is not None and not query.named:
        query = query.rename(support.names[:inputs])
    if not support.named:
        own = ["class"] if classifies else ["y"] if targets == 1 else [f"y{number}" for number in range(1, targets + 1)]
        of_query = query is not None and len(query.names) == inputs
        support = support.rename([*(query.names if of_query and query else support.names[:inputs]), *own])
    return support, query


def match_columns(
    input_shape: tuple[int, ...], outputs: int, classifies: bool, support: Table, query: Table | None
) -> Columns:
    """Match columns for a task without column names: the query table's are the inputs, the others the targets.

    Without a query table, the first columns are the inputs.

    Args:
        input_shape: the shape of one input.
        outputs: the number of the model's outputs: the number of targets, or the maximum number of classes.
        classifies: whether targets are classes.
        support: labelled examples.
        query: the examples to predict.

    Raises:
        UsageError: the number of columns does not fit the task, or a column of the query table is not in the support
            table.
    """
    inputs, targets = math.prod(input_shape), 1 if classifies else outputs
    names = support.names
    if query is not None:
        for name in query.names:
            if name not in names:
                close = nearest(name, names)
                advice = f"; did you mean '{close[0]}'?" if close else f", whose columns are {', '.join(names)}."
                raise UsageError(f"{query.path} has the column '{name}', which is not in {support.path}{advice}")
        if len(query.names) == len(names) > inputs:
            raise UsageError(
                f"{query.path} has all columns of {support.path} ({', '.join(names)}): remove the target column, so "
                "that the target can be identified."
            )
        names = [name for name in names if name in query.names] + [name for name in names if name not in query.names]
        _check_count(query, query.names, inputs, 0)
    _check_count(support, names, inputs, targets)
    classes = tuple(sorted(set(support.get_texts(names[inputs])))) if classifies else None
    if classes is not None and len(classes) > outputs:
        raise UsageError(
            f"{support.path} has {format_count(len(classes), 'class', 'classes')}; this learner distinguishes {outputs}."
        )
    return Columns(tuple(names[:inputs]), tuple(names[inputs:]), classes, input_shape)


def _check_count(table: Table, names: Sequence[str], inputs: int, targets: int) -> None:
    if len(names) == inputs + targets:
        return
    wanted = format_count(inputs, "input")
    wanted += f" and {format_count(targets, 'target')}" if targets else ""
    has = f"{format_count(len(names), 'column')} ({', '.join(names[:12])}{', …' * (len(names) > 12)})"
    raise UsageError(f"{table.path} has {has}; this learner takes {wanted}.")
