"""The encoding of tables' columns for a model: numbers, categories and the target, with their scales."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from metareg import Columns, Field, PluginConfig, Table, UsageError

__all__ = ["Encoding", "Missing", "StandardisedColumns", "Statistics", "fit_encoding", "measure_support"]

log = logging.getLogger("metareg")

Missing = Literal["refuse", "mean", "drop"]
Statistics = Literal["training", "support", "none"]

_MOST_CATEGORIES = 100


class Encoding(PluginConfig):
    """The columns of a task's tables, their categories, and the statistics of all rows of its training tasks.

    A run stores it in its configuration, and uses it for predictions.
    """

    target: str
    numbers: dict[str, tuple[float, float]] = Field(description="Mean and standard deviation of each numeric column.")
    categories: dict[str, list[str]] = Field(description="The categories of each other column.")
    classes: list[str] | None = Field(description="The classes of the target; null if it is a number.")
    target_scale: tuple[float, float] = Field((0.0, 1.0), description="Mean and standard deviation of the target.")
    unused: list[str] = Field([], description="Columns of the training tables that are not inputs.")
    digest: str = Field("", description="Identifies the training tasks, to detect changes.")

    @property
    def inputs(self) -> list[str]:
        """The names of the input columns in the model's order."""
        return [*self.numbers, *self.categories]

    @property
    def width(self) -> int:
        """The number of numbers in an input."""
        return len(self.numbers) + sum(map(len, self.categories.values()))

    def read_inputs(self, table: Table) -> np.ndarray:
        """Read inputs ``[rows, width]``: numbers (NaN if missing), then zeros and ones for each category."""
        parts = [table.get_numbers(name, missing=True)[:, None] for name in self.numbers]
        for name, values in self.categories.items():
            texts = np.array(table.get_texts(name), dtype=np.str_)
            parts.append(texts[:, None] == np.array(values, dtype=np.str_))
        return np.concatenate([*parts, np.empty((len(table), 0))], 1).astype(np.float64)

    def find_missing(self, table: Table) -> np.ndarray:
        """Return whether each cell of the inputs is missing ``[rows, columns]``."""
        numbers = [np.isnan(table.get_numbers(name, missing=True)) for name in self.numbers]
        texts = [np.array(table.get_texts(name), dtype=np.str_) == "" for name in self.categories]
        return np.stack([*numbers, *texts, np.zeros(len(table), dtype=bool)], 1)[:, :-1]

    def read_targets(self, table: Table) -> np.ndarray:
        """Read class numbers or numbers ``[rows]``; none may be missing."""
        if self.classes is None:
            return table.get_numbers(self.target)
        numbers = {name: number for number, name in enumerate(self.classes)}
        texts = table.get_texts(self.target)
        for row, text in enumerate(texts):
            if text not in numbers:
                raise UsageError(
                    f"{table.locate(row, self.target)} contains '{text}', which is not one of the classes of the "
                    f"training tasks: {', '.join(self.classes)}."
                )
        return np.array([numbers[text] for text in texts], dtype=np.int64)

    def choose_rows(self, table: Table, missing: Missing) -> Table:
        """Choose the rows of a table that have a target and satisfy the rule for missing values.

        Raises:
            UsageError: a value is missing, and the rule refuses it.
        """
        absent = np.concatenate([self.find_missing(table), self._find_missing_targets(table)[:, None]], 1)
        if missing == "refuse":
            self._refuse_missing(table, absent)
        left_out = absent.any(1) if missing == "drop" else absent[:, -1]
        if left_out.any():
            what = "missing values" if missing == "drop" else "no target"
            log.info("%s: dropping %d of %d rows, which have %s.", table.path, left_out.sum(), len(table), what)
            return table.select(np.flatnonzero(~left_out))
        return table

    def refuse_missing(self, table: Table) -> None:
        """Refuse a table with a missing input.

        Raises:
            UsageError: an input is missing.
        """
        self._refuse_missing(table, self.find_missing(table))

    def _refuse_missing(self, table: Table, absent: np.ndarray) -> None:
        if absent.any():
            row, column = (int(each[0]) for each in absent.nonzero())
            name = [*self.inputs, self.target][column]
            of_inputs = ", or with --set missing=mean to insert the column's mean (and leave categories unknown)"
            raise UsageError(
                f"{table.locate(row, name)} is empty. Train with --set missing=drop to drop such rows"
                f"{'' if name == self.target else of_inputs}."
            )

    def _find_missing_targets(self, table: Table) -> np.ndarray:
        if self.classes is None:
            return np.isnan(table.get_numbers(self.target, missing=True))
        return np.array(table.get_texts(self.target), dtype=np.str_) == ""


def fit_encoding(
    tables: Mapping[str, Table],
    target: str,
    inputs: Sequence[str],
    unused: Sequence[str],
    *,
    classes: bool | None,
    categorical: Sequence[str],
    numeric: Sequence[str],
    missing: Missing,
) -> Encoding:
    """Compute the encoding of the training tasks' tables.

    Args:
        tables: tables by their tasks' names.
        target: the target column.
        inputs: the input columns.
        unused: the other columns.
        classes: whether the target is a class; None to infer it.
        categorical: columns to treat as categorical, whatever their cells look like.
        numeric: columns to treat as numeric.
        missing: the rule for missing values.

    Raises:
        UsageError: a column is missing, mixes texts and numbers, or contains too many different texts.
    """
    listed = list(tables.values())
    for table in listed:
        for name in (*inputs, target):
            table.require(name)
    of_numbers = [name for name in inputs if _is_numeric(listed, name, categorical, numeric)]
    of_texts = [name for name in inputs if name not in of_numbers]
    categories = {name: _list_categories(listed, name, name in categorical) for name in of_texts}
    draft = Encoding(
        target=target,
        numbers=dict.fromkeys(of_numbers, (0.0, 1.0)),
        categories=categories,
        classes=_list_classes(listed, target, classes),
        unused=list(unused),
    )
    chosen = {name: draft.choose_rows(table, missing) for name, table in tables.items()}
    values = np.concatenate([draft.read_inputs(table) for table in chosen.values()])[:, : len(of_numbers)]
    update: dict[str, object] = {
        "numbers": {name: _measure(values[:, place]) for place, name in enumerate(of_numbers)},
        "digest": hash_tables(draft, chosen),
    }
    if draft.classes is None:
        update["target_scale"] = _measure(np.concatenate([draft.read_targets(table) for table in chosen.values()]))
    return draft.model_copy(update=update)


def hash_tables(encoding: Encoding, tables: Mapping[str, Table]) -> str:
    """Return a digest of all training data."""
    digest = hashlib.blake2b(digest_size=8)
    for name, table in sorted(tables.items()):
        digest.update(name.encode(errors="surrogateescape") + b"\0")
        digest.update(encoding.read_inputs(table).tobytes())
        digest.update(encoding.read_targets(table).tobytes())
    return digest.hexdigest()


def _measure(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of the numbers that are not missing; a deviation of 1 if all are equal."""
    there = values[~np.isnan(values)]
    if not len(there):
        return 0.0, 1.0
    deviation = float(there.std())
    return float(there.mean()), deviation if deviation > 0 else 1.0


def _is_numeric(tables: Sequence[Table], name: str, categorical: Sequence[str], numeric: Sequence[str]) -> bool:
    if name in categorical:
        return False
    if name in numeric:
        return True
    texts = {place: rows for place, table in enumerate(tables) if (rows := table.find_texts(name))}
    if not texts:
        return True
    numeric_cells = sum(len(table) for table in tables) - sum(map(len, texts.values()))
    if numeric_cells > sum(map(len, texts.values())):
        place, (row, *_) = next(iter(texts.items()))
        cell = tables[place].get_texts(name)[row]
        raise UsageError(
            f"{tables[place].locate(row, name)} contains '{cell}', but most of the column's cells are numbers: correct "
            f"it, or declare the column categorical with --set 'categorical=[{name}]'."
        )
    return False


def _list_categories(tables: Sequence[Table], name: str, declared: bool) -> list[str]:
    found = sorted({text for table in tables for text in table.get_texts(name)} - {""})
    if len(found) > _MOST_CATEGORIES and not declared:
        raise UsageError(
            f"The column '{name}' contains {len(found)} different texts, such as '{found[0]}': leave it out with --set "
            f"'columns=[…]', or declare it categorical with --set 'categorical=[{name}]'."
        )
    return found


def _list_classes(tables: Sequence[Table], target: str, classes: bool | None) -> list[str] | None:
    """List the classes of the target; None if it is a number."""
    numeric = all(table.is_numeric(target) or not any(table.get_texts(target)) for table in tables)
    found = sorted({text for table in tables for text in table.get_texts(target)} - {""})
    if classes is None:
        classes = not numeric or (len(found) == 2 and {float(text) for text in found} == {0.0, 1.0})
    if not classes:
        return None
    if len(found) < 2:
        raise UsageError(f"The target '{target}' has only one class, '{''.join(found)}', in all training tasks.")
    if len(found) > _MOST_CATEGORIES:
        raise UsageError(f"The target '{target}' contains {len(found)} different texts, too many for classes.")
    return sorted(found, key=float) if numeric else found


def measure_support(
    encoding: Encoding, inputs: Tensor, targets: Tensor, standardise: Statistics, standardise_target: Statistics
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compute the offset and scale of inputs and targets, for one task or many at once.

    Args:
        encoding: the encoding of the training tasks.
        inputs: inputs of support sets ``[…, support, width]``; NaN for missing numbers.
        targets: ``[…, support, 1]``; ignored for classes.
        standardise: the source of the statistics for the inputs.
        standardise_target: the source of the statistics for the targets.

    Returns:
        Offset and scale of the inputs ``[…, 1, width]`` and of the targets ``[…, 1, 1]``, without the leading
        dimensions if they are the same for all tasks. If all numbers of a support set are equal, the scale is that of
        the training tasks.
    """
    numbers = list(encoding.numbers.values())
    groups = encoding.width - len(numbers)
    trained = inputs.new_tensor(
        [[*(mean for mean, _ in numbers), *[0.0] * groups], [*(s for _, s in numbers), *[1.0] * groups]]
    )
    of_target = inputs.new_tensor(encoding.target_scale)[:, None]
    fixed = torch.arange(encoding.width) >= len(numbers)
    scaled = _choose_scale(standardise, inputs, trained, fixed)
    if encoding.classes is not None:
        return scaled, (inputs.new_zeros(()), inputs.new_ones(()))
    return scaled, _choose_scale(standardise_target, targets, of_target, torch.tensor([False]))


def _choose_scale(whose: Statistics, values: Tensor, trained: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
    offset, scale = trained[:1].clone(), trained[1:].clone()  # copies, because torch.export cannot save views well
    if whose == "none":
        return torch.zeros_like(offset), torch.ones_like(scale)
    if whose == "training":
        return offset, scale
    mean = values.nanmean(-2, keepdim=True)
    deviation = (values - mean).square().nanmean(-2, keepdim=True).sqrt()
    unknown = fixed | mean.isnan()
    return torch.where(unknown, offset, mean), torch.where(unknown | (deviation <= 1e-6 * scale), scale, deviation)


@dataclass(frozen=True)
class StandardisedColumns(Columns):
    """The columns of one task, standardised like the run's tasks."""

    encoding: Encoding
    missing: Missing
    input_scale: tuple[Tensor, Tensor]
    """Offset and scale ``[1, width]``."""
    target_scale: tuple[Tensor, Tensor]

    @property
    def features(self) -> list[str]:
        groups = self.encoding.categories.items()
        return [*self.encoding.numbers, *(f"{name}={value}" for name, values in groups for value in values)]

    def select_rows(self, support: Table) -> Table:
        return self.encoding.choose_rows(support, self.missing)

    def read_inputs(self, table: Table) -> Tensor:
        if self.missing != "mean":
            self.encoding.refuse_missing(table)
        for name, values in self.encoding.categories.items():
            new = sorted(set(table.get_texts(name)) - {*values, ""})
            if new:
                listed = ", ".join(new)
                log.info(
                    "%s: no training task had the categories %s of '%s'; they are treated as unknown.",
                    table.path,
                    listed,
                    name,
                )
        return torch.from_numpy(self.encoding.read_inputs(table))

    def read_targets(self, table: Table) -> Tensor:
        targets = torch.from_numpy(self.encoding.read_targets(table))
        return targets if self.classes is not None else targets[:, None]

    def scale_inputs(self, inputs: Tensor) -> Tensor:
        offset, scale = self.input_scale
        return ((inputs - offset) / scale).nan_to_num(0.0).to(torch.get_default_dtype())

    def scale_targets(self, targets: Tensor) -> Tensor:
        offset, scale = self.target_scale
        return targets if self.classes is not None else ((targets - offset) / scale).to(torch.get_default_dtype())

    def restore_outputs(self, outputs: Tensor) -> Tensor:
        offset, scale = self.target_scale
        return outputs if self.classes is not None else (outputs * scale + offset).to(outputs.dtype)
