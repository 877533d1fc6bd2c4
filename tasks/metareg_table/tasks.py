"""Few-shot tasks on users' own tables."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from metareg import (
    Columns,
    Dataset,
    Episodes,
    MetaLearner,
    Metric,
    PathText,
    PluginConfig,
    Table,
    Task,
    TaskSpec,
    UsageError,
    data_folder,
    derive_seed,
    draw_distinct,
    find_metric,
    format_count,
    hookimpl,
    task_uniform,
)
from metareg_table.encoding import (
    Encoding,
    Missing,
    StandardisedColumns,
    Statistics,
    fit_encoding,
    hash_tables,
    measure_support,
)
from metareg_table.example import write_example
from metareg_table.files import Layout, TaskTables, find_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TableFolder"]

log = logging.getLogger("metareg")


def _to_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _to_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


ColumnName = Annotated[str, BeforeValidator(_to_text)]
"""A column's name, which can be a number."""
ColumnNames = Annotated[list[ColumnName], BeforeValidator(_to_list)]
"""Names of columns, as a list or a comma-separated string."""


class TableFolder(Task):
    """Your own tables: one CSV, Parquet or npz file per task, or one table with a column that names the task.

    `data` is the folder (or the file) and `target` the column to predict. All other columns are inputs, matched by
    name: numbers, or texts as categories. The tasks are split into train, validation and test by folders with these
    names, by a file, by a column, or at random by ratios. A training task is a table with randomly drawn rows; the
    order of the tables is drawn anew for each round.
    """

    contract = 1

    class Config(PluginConfig):
        """Options of the table-folder task."""

        data: PathText | None = Field(
            None, description="The folder of tables, or one table; by default, in METAREG_DATA."
        )
        target: ColumnName | None = Field(None, description="The column to predict.")
        shots: int = Field(10, ge=1, description="Support rows of a task; for classification, of each class.")
        query: int = Field(
            10, ge=1, description="Query rows of a task; for classification, this many times the number of classes."
        )
        kind: Literal["auto", "regression", "classification"] = Field(
            "auto",
            description="auto: classification if the target contains texts or only 0 and 1, otherwise regression.",
        )
        columns: ColumnNames | None = Field(
            None, description="The input columns; by default, all but target, task and split."
        )
        numeric: ColumnNames = Field([], description="Columns to treat as numeric, whatever their cells look like.")
        categorical: ColumnNames = Field(
            [], description="Columns to treat as categorical, even if they look like numbers."
        )
        missing: Missing = Field(
            "refuse",
            description="What to do if a value is missing: refuse the table; insert the column's mean (and leave categories "
            "unknown); or drop the row.",
        )
        standardise: Statistics = Field(
            "training",
            description="Give numeric inputs mean 0 and deviation 1 over the rows of all training tasks, or over each "
            "task's support rows; or leave them unchanged.",
        )
        standardise_target: Statistics = Field("training", description="The same for a numeric target.")
        loss: Literal["mse", "mae", "huber", "cross_entropy"] | None = Field(
            None, description="The loss, on the standardised target; by default, mse or cross_entropy."
        )
        metric: (
            Literal["mse", "mae", "huber", "r2", "accuracy", "balanced_accuracy", "auroc", "cross_entropy"] | None
        ) = Field(
            None,
            description="The metric; by default, the loss for numbers and accuracy for classes. mse and mae are in the "
            "target's units, unless "
            "the target is standardised by support rows.",
        )
        task_column: ColumnName | None = Field(None, description="The column that names each row's task, in one table.")
        split_column: ColumnName | None = Field(None, description="A column that says train, validation or test.")
        split_file: PathText | None = Field(
            None,
            description="JSON or YAML {train: [task, …], validation: […], test: […]}, or CSV with the columns task and "
            "split; by default, splits.json in the folder if there is one.",
        )
        ratios: list[float] = Field(
            [0.6, 0.2, 0.2], min_length=3, max_length=3, description="Parts of the tasks for train, validation, test."
        )
        split_seed: int = Field(0, ge=0, description="Seed of the split by ratios.")
        encoding: Encoding | None = Field(
            None, description="Columns, categories and statistics of the training tasks; a run finds and keeps them."
        )

        @model_validator(mode="after")
        def _check_ratios(self) -> TableFolder.Config:
            if min(self.ratios) < 0 or sum(self.ratios) <= 0:
                raise ValueError(f"ratios must not be negative, and not all zero, got {self.ratios}")
            return self

    recommended: ClassVar[Mapping[str, Any]] = {
        "steps": 2000,
        "meta_batch": 8,
        "inner_steps": 5,
        "algo.inner_lr": 0.05,
        "outer_lr": 1e-3,
        "eval_tasks": 100,
        "test_tasks": 200,
    }
    default_model = "table-mlp"
    inherited_options = ("target", "shots", "query", "encoding")

    def __init__(self, config: Config) -> None:
        self.config = config
        if config.encoding is not None:
            _refuse_other_options(config, config.encoding)
        if config.target is not None or config.encoding is not None:
            sizes = [len(values) for values in self.encoding.categories.values()]
            self.recommended = {**type(self).recommended, "model.categories": sizes}  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------------------------ task

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec((self.encoding.width,), (len(self.encoding.classes or (0,)),))

    @property
    def loss(self) -> str:  # type: ignore[override]
        """The name of the loss, on standardised targets."""
        suits = ("cross_entropy",) if self.encoding.classes is not None else ("mse", "mae", "huber")
        return _choose(self.config.loss, suits, "loss", self.encoding)

    @property
    def metric(self) -> Metric:  # type: ignore[override]
        """The metric, in the target's units if it has any."""
        if self.encoding.classes is not None:
            suits: tuple[str, ...] = ("accuracy", "balanced_accuracy", "auroc", "cross_entropy")
            return find_metric(_choose(self.config.metric, suits, "metric", self.encoding), self.loss)
        metric = find_metric(
            _choose(self.config.metric or self.loss, ("mse", "mae", "huber", "r2"), "metric", self.encoding), ""
        )
        if self.config.standardise_target != "training" or metric.name not in _POWERS:
            return metric
        factor = self.encoding.target_scale[1] ** _POWERS[metric.name]
        return Metric(metric.name, lambda outputs, targets: factor * metric(outputs, targets), metric.higher_is_better)

    @property
    def stored_config(self) -> Config:
        """The options, with the encoding of the training tasks."""
        return self.config.model_copy(update={"encoding": self.encoding})

    @functools.cached_property
    def encoding(self) -> Encoding:
        """The encoding of the columns, from the options or computed from the training tasks' tables."""
        config = self.config
        if config.encoding is not None:
            return config.encoding
        tables = self._tables.select("train")
        first = next(iter(tables.values()))
        if config.target is None:
            raise UsageError(f"Name the column to predict with --target; the tables have {', '.join(first.names)}.")
        aside = [name for name in (config.target, config.task_column, config.split_column) if name is not None]
        for name in (*aside, *(config.columns or ()), *config.numeric, *config.categorical):
            first.require(name)
        inputs = [name for name in config.columns or first.names if name not in aside]
        unused = [name for name in first.names if name not in (*inputs, config.target)]
        return fit_encoding(
            tables,
            config.target,
            inputs,
            unused,
            classes=None if config.kind == "auto" else config.kind == "classification",
            categorical=config.categorical,
            numeric=config.numeric,
            missing=config.missing,
        )

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> Episodes:
        pool = self._find_pool(split)
        tables = _take_turns(len(pool.names), split, indices, seed)
        if self.encoding.classes is None:
            draws = task_uniform(seed, split, indices, self.config.shots + self.config.query, "rows")
            rows = pool.starts[tables][:, None] + draw_distinct(draws, pool.counts[tables])
            support, query = rows[:, : self.config.shots], rows[:, self.config.shots :]
        else:
            support, query = self._draw_of_classes(pool, tables, split, indices, seed)
        columns = self.measure_columns(pool.inputs[support], pool.targets[support])
        x, y = pool.inputs, pool.targets
        return Episodes(
            columns.scale_inputs(x[support]),
            columns.scale_targets(y[support]),
            columns.scale_inputs(x[query]),
            columns.scale_targets(y[query]),
        )

    def measure_columns(self, support_x: Tensor, support_y: Tensor) -> StandardisedColumns:
        """Return the columns of one task, or of many, with these support sets."""
        config, encoding = self.config, self.encoding
        of_inputs, of_targets = measure_support(
            encoding, support_x, support_y, config.standardise, config.standardise_target
        )
        return StandardisedColumns(
            inputs=tuple(encoding.inputs),
            targets=(encoding.target,),
            classes=None if encoding.classes is None else tuple(encoding.classes),
            input_shape=(encoding.width,),
            encoding=encoding,
            missing=config.missing,
            input_scale=of_inputs,
            target_scale=of_targets,
        )

    def _draw_of_classes(
        self, pool: _Pool, tables: np.ndarray, split: str, indices: Sequence[int], seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw rows of the support sets, class by class, and of the query sets: one of each class, then any others."""
        classes, shots, query = len(self.encoding.classes or ()), self.config.shots, self.config.query
        draws = task_uniform(seed, split, indices, classes * (shots + 1), "classes").reshape(len(indices), classes, -1)
        own = pool.class_starts[tables][..., None] + draw_distinct(draws, pool.class_counts[tables])
        taken = own.reshape(len(indices), -1)
        wanted = classes * (query - 1)
        more = task_uniform(seed, split, indices, wanted + taken.shape[1], "rows")
        others = pool.starts[tables][:, None] + draw_distinct(more, pool.counts[tables])
        again = (others[:, :, None] == taken[:, None]).any(-1)
        first = np.argsort(again, axis=1, kind="stable")[:, :wanted]
        support = own[..., :shots].reshape(len(indices), -1)
        return support, np.concatenate([own[..., shots], np.take_along_axis(others, first, 1)], 1)

    @hookimpl
    def figures(self, learner: MetaLearner, seed: int) -> Mapping[str, Figure]:
        """Draw predicted against true values of some test tasks, before and after adaptation."""
        if self.encoding.classes is not None:
            return {}
        from metareg_table.figures import draw_predictions  # imports matplotlib, which nothing else needs

        count = min(4, len(self._find_pool("test").names))
        tables = _take_turns(len(self._find_pool("test").names), "test", range(count), seed)
        names = [self._find_pool("test").names[table] for table in tables]
        restored = self.config.standardise_target == "training"
        offset, scale = self.encoding.target_scale if restored else (0.0, 1.0)
        episodes = self.episodes("test", range(count), seed)
        return {"predictions": draw_predictions(learner, episodes, names, self.encoding.target, offset, scale)}

    # ------------------------------------------------------------------------------------------------- a user's own rows

    @property
    def known_columns(self) -> Sequence[str]:  # type: ignore[override]
        return [*self.encoding.inputs, self.encoding.target]

    def choose_columns(self, support: Table, query: Table | None, classifies: bool) -> Columns:  # noqa: ARG002
        encoding = self.encoding
        aside = [name for name in (self.config.task_column, self.config.split_column) if name is not None]
        optional = [*encoding.unused, *aside]
        for table in (support, query):
            if table is not None and not table.named:
                raise UsageError(
                    f"{table.path} does not name its columns; they must be {', '.join(self.known_columns)}."
                )
        support.check_columns(self.known_columns, optional)
        if query is not None:
            query.check_columns(encoding.inputs, [*optional, encoding.target])
            if encoding.target in query.columns:
                log.info("%s: ignoring the column '%s', which is the target.", query.path, encoding.target)
        rows = encoding.choose_rows(support, self.config.missing)
        inputs = torch.from_numpy(encoding.read_inputs(rows))
        targets = torch.from_numpy(encoding.read_targets(rows))
        return self.measure_columns(inputs, targets if encoding.classes is not None else targets[:, None])

    # ------------------------------------------------------------------------------------------------------------ data

    @property
    def location(self) -> Path:
        """The file or folder of the tables."""
        return Path(self.config.data) if self.config.data is not None else data_folder() / "table-folder"

    @property
    def dataset(self) -> Dataset | None:
        return Dataset(
            self.location,
            self.location.exists(),
            "It is your own: one CSV, Parquet or npz file per task; --example DIR writes examples.",
            None,
            self._describe,
            write_example,
        )

    def _describe(self) -> str:
        found = self._tables
        rows = sum(map(len, found.tables.values()))
        counts = "/".join(str(len(found.select(split))) for split in ("train", "validation", "test"))
        return f"{counts} tasks (train/validation/test, {found.origin}), {format_count(rows, 'row')}"

    @functools.cached_property
    def _tables(self) -> TaskTables:
        config = self.config
        if config.data is None and not self.location.exists():
            raise UsageError(
                "The task 'table-folder' needs the folder of your tables: --data DIR. "
                "`metareg data table-folder --example DIR` writes example tables."
            )
        known = [config.target, config.task_column, config.split_column, *(config.columns or ())]
        layout = Layout(
            config.task_column,
            config.split_column,
            config.split_file,
            tuple(config.ratios),
            config.split_seed,
            tuple(name for name in known if name is not None),
        )
        return find_tables(self.location, layout)

    @functools.cached_property
    def _pools(self) -> dict[str, _Pool]:
        """The rows of each split's tasks; logs once what was found and ignored."""
        found, encoding = self._tables, self.encoding
        pools: dict[str, _Pool] = {}
        for split in ("train", "validation", "test"):
            tables = {}
            for name, table in found.select(split).items():
                table.check_columns(
                    self.known_columns, [*encoding.unused, *table.names] if self.config.columns else encoding.unused
                )
                tables[name] = encoding.choose_rows(table, self.config.missing)
            if split == "train" and hash_tables(encoding, tables) != encoding.digest:
                raise UsageError(
                    f"The training tasks in {self.location} differ from those of the configuration's 'encoding'; "
                    "remove 'encoding' from the configuration, and it will be computed again."
                )
            pools[split] = self._create_pool(tables)
        counts = "/".join(str(len(pool.names)) for pool in pools.values())
        target = f"classification, {', '.join(encoding.classes)}" if encoding.classes else "regression"
        log.info(
            "%s: %s tasks (train/validation/test, %s); target '%s': %s; inputs: %s.",
            self.location, counts, found.origin, encoding.target, target, _describe_inputs(encoding),
        )  # fmt: skip
        if found.left_out:
            log.info("%s: ignoring files that are not tables: %s.", self.location, _shorten(found.left_out))
        small = [name for pool in pools.values() for name in pool.small]
        if small:
            log.info("Leaving out tasks with too few rows for %s: %s.", self._describe_needs(), _shorten(small))
        return pools

    def _find_pool(self, split: str) -> _Pool:
        if split not in self._pools:
            raise UsageError(f"There is no split '{split}'; there are {', '.join(self._pools)}.")
        pool = self._pools[split]
        if not pool.names:
            why = f"none of its {len(pool.small)} tasks has" if pool.small else "it has no tasks; a task needs"
            raise UsageError(f"The {split} split of {self.location} cannot be used: {why} {self._describe_needs()}.")
        return pool

    def _describe_needs(self) -> str:
        shots, query = self.config.shots, self.config.query
        if self.encoding.classes is None:
            return f"{shots} support and {query} query rows"
        classes = len(self.encoding.classes)
        return f"{shots} support rows of each class, one more of it, and {classes * (shots + query)} rows in total"

    def _create_pool(self, tables: Mapping[str, Table]) -> _Pool:
        encoding, config = self.encoding, self.config
        classes = encoding.classes
        least = (config.shots + config.query) * len(classes or (0,))
        inputs, targets, counts, of_classes, names, small = [], [], [], [], [], []
        for name, table in tables.items():
            y = encoding.read_targets(table)
            members = np.bincount(y, minlength=len(classes)) if classes is not None else np.zeros(0, dtype=np.int64)
            if len(y) < least or (members < config.shots + 1).any():
                small.append(name)
                continue
            order = np.argsort(y, kind="stable") if classes is not None else np.arange(len(y))
            names.append(name)
            inputs.append(encoding.read_inputs(table)[order])
            targets.append(y[order] if classes is not None else y[order, None])
            counts.append(len(y))
            of_classes.append(members)
        starts = np.cumsum([0, *counts])[:-1]
        class_counts = np.array(of_classes, dtype=np.int64).reshape(len(names), len(classes or ()))
        return _Pool(
            tuple(names),
            tuple(small),
            torch.from_numpy(np.concatenate([*inputs, np.empty((0, encoding.width))])),
            torch.from_numpy(np.concatenate(targets)) if targets else torch.empty(0),
            starts,
            np.array(counts, dtype=np.int64),
            starts[:, None] + class_counts.cumsum(1) - class_counts,
            class_counts,
        )


_POWERS = {"mse": 2, "mae": 1}
"""The power of the target's scale in these metrics."""


@dataclass(frozen=True)
class _Pool:
    """The rows of a split's tasks, grouped by task and, for classification, by class."""

    names: tuple[str, ...]
    small: tuple[str, ...]
    """Tasks that were ignored because they have too few rows."""
    inputs: Tensor
    """``[rows, width]`` in float64."""
    targets: Tensor
    """``[rows, 1]`` in float64, or class numbers ``[rows]``."""
    starts: np.ndarray
    counts: np.ndarray
    class_starts: np.ndarray
    class_counts: np.ndarray


def _take_turns(tables: int, split: str, indices: Sequence[int], seed: int) -> np.ndarray:
    """Return the number of each task's table: every table once per round, in random order."""
    rounds, places = np.divmod(np.asarray(indices, dtype=np.int64), tables)
    orders = {}
    for each in set(rounds.tolist()):
        draws = task_uniform(derive_seed(seed, "tables"), split, [each], tables, "order")
        orders[each] = draws[0].argsort(kind="stable")
    return np.array([orders[each][place] for each, place in zip(rounds.tolist(), places.tolist(), strict=True)])


def _choose(given: str | None, suits: tuple[str, ...], what: str, encoding: Encoding) -> str:
    """Return the given loss or metric if it suits the target, or the first suitable one by default."""
    if given is not None and given not in suits:
        kind = "classes" if encoding.classes is not None else "numbers"
        raise UsageError(
            f"The {what} '{given}' does not suit the target '{encoding.target}', which is of {kind}: {', '.join(suits)}."
        )
    return given or suits[0]


def _refuse_other_options(config: TableFolder.Config, encoding: Encoding) -> None:
    """Refuse an encoding that was computed for other options."""
    pairs = {
        "target": (config.target, encoding.target),
        "columns": (config.columns and set(config.columns), set(encoding.inputs)),
        "kind": (
            None if config.kind == "auto" else config.kind,
            "regression" if encoding.classes is None else "classification",
        ),
    }
    for name, (wanted, found) in pairs.items():
        if wanted is not None and wanted != found:
            raise UsageError(
                f"The configuration's 'encoding' was computed for another '{name}'; remove it, and it will be computed "
                "again."
            )


def _describe_inputs(encoding: Encoding) -> str:
    numbers, categories = len(encoding.numbers), encoding.categories
    parts = [format_count(numbers, "number")] if numbers or not categories else []
    parts += [f"{name} ({format_count(len(values), 'category', 'categories')})" for name, values in categories.items()]
    return ", ".join(parts)


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
