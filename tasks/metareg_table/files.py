"""Discovery of a user's tables: the files of each task, and the split of the tasks."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from metareg import Table, UsageError, draw_distinct, find_split, read_split_file, read_table, task_uniform

__all__ = ["Layout", "TaskTables", "find_tables"]

log = logging.getLogger("metareg")

SPLITS = ("train", "validation", "test")
_TABLES = frozenset({".csv", ".tsv", ".txt", ".parquet", ".pq", ".npz"})
_SPLIT_FILES = ("splits.json", "splits.yaml", "splits.yml")
_NAMED = 5


@dataclass(frozen=True)
class Layout:
    """The layout of a user's tables; `TableFolder.Config` describes the options."""

    task_column: str | None
    split_column: str | None
    split_file: str | None
    ratios: tuple[float, ...]
    split_seed: int
    known: tuple[str, ...]
    """Known column names, for tables whose columns are named by numbers."""


@dataclass(frozen=True)
class TaskTables:
    """The tables of all tasks by name, the split of each, and its origin."""

    tables: Mapping[str, Table]
    split_of: Mapping[str, str]
    origin: str
    left_out: tuple[str, ...]
    """Files that are not tables."""

    def select(self, split: str) -> dict[str, Table]:
        """Return the tables of a split, sorted by their tasks' names."""
        return {name: self.tables[name] for name in sorted(self.tables) if self.split_of.get(name) == split}


def find_tables(location: Path, layout: Layout) -> TaskTables:
    """Read all tables of a file or folder, and split their tasks.

    Raises:
        UsageError: there are no tables, one cannot be read, or they cannot be split according to the layout.
    """
    root, paths, others = _list_files(location)
    if not paths:
        raise UsageError(
            f"There are no tables in {location} ({', '.join(sorted(_TABLES))}). `metareg data table-folder --example "
            "DIR` writes example tables."
        )
    stamps = tuple((path, _read_time(path)) for path in paths)
    names = {path: path.relative_to(root).with_suffix("").as_posix() for path in paths}
    _refuse_same_names(names)
    files = {names[path]: table for path, table in zip(paths, _read_all(stamps, layout.known), strict=True)}
    by_folders = _split_by_folders(location, list(files))
    tables = files
    if layout.task_column is not None:
        tables = _group_rows(files, layout.task_column)
        if by_folders:
            by_folders = _split_groups(files, by_folders, layout.task_column)
    elif len(files) == 1:
        raise UsageError(
            f"{paths[0]} is one table: name the column with the task of each row, with --set task_column=NAME, or use "
            "a folder with one file per task."
        )
    split_of, origin = _choose_split(location, tables, by_folders, layout)
    return TaskTables(tables, split_of, origin, tuple(others))


def _list_files(location: Path) -> tuple[Path, list[Path], list[str]]:
    """List the folder that tasks' names are relative to, the tables, and other files."""
    if location.is_file():
        return location.parent, [location], []
    if not location.is_dir():
        raise UsageError(f"There is no file or folder {location}.")
    found: list[Path] = []
    others: list[str] = []
    for folder, folders, files in os.walk(location):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in _TABLES and not name.startswith("."):
                found.append(path)
            elif not (name in _SPLIT_FILES and Path(folder) == location):
                others.append(str(path.relative_to(location)))
    return location, found, others


def _read_time(path: Path) -> int:
    """Return when a table was last changed."""
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise UsageError(f"{path} {'is a broken link' if path.is_symlink() else error.strerror}.") from error


@lru_cache(maxsize=2)
def _read_all(stamps: tuple[tuple[Path, int], ...], known: tuple[str, ...]) -> tuple[Table, ...]:
    return tuple(_refuse_unnamed(read_table(path, known)) for path, _ in stamps)


def _refuse_unnamed(table: Table) -> Table:
    if not table.named:
        raise UsageError(f"The first line of {table.path} does not name its columns; add a line with their names.")
    return table


def _refuse_same_names(names: Mapping[Path, str]) -> None:
    seen: dict[str, Path] = {}
    for path, name in names.items():
        if name in seen:
            raise UsageError(f"{seen[name]} and {path} would be tasks with the same name; keep one of them.")
        seen[name] = path


def _split_by_folders(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the split by the tables' outermost folders; empty if these are not splits.

    Raises:
        UsageError: only some folders are splits, or training or test is missing.
    """
    found = {name: find_split(name.partition("/")[0]) if "/" in name else None for name in names}
    if not any(found.values()):
        return {}
    stray = [name for name, split in found.items() if split is None]
    if stray:
        raise UsageError(
            f"{root} has folders that look like a split, and {_join(stray)} outside them; put all tables into the "
            "folders train, validation and test, or assign them with --set split_file=FILE."
        )
    return {name: split for name, split in found.items() if split is not None}


def _group_rows(files: Mapping[str, Table], column: str) -> dict[str, Table]:
    """Group the rows of all files into one table per value of a column."""
    grouped: dict[str, Table] = {}
    for table in files.values():
        table.require(column)
        texts = np.array(table.get_texts(column), dtype=np.str_)
        for name in sorted(set(texts.tolist())):
            if not name:
                where = table.locate(int((texts == "").argmax()), column)
                raise UsageError(f"{where} is empty; it must name the row's task.")
            if name in grouped:
                raise UsageError(f"The task '{name}' has rows in {grouped[name].path} and in {table.path}; merge them.")
            grouped[name] = table.select(np.flatnonzero(texts == name))
    return grouped


def _split_groups(files: Mapping[str, Table], split_of: Mapping[str, str], column: str) -> dict[str, str]:
    """Return the splits of the tasks in files with known splits."""
    return {name: split_of[file] for file, table in files.items() for name in set(table.get_texts(column))}


def _choose_split(
    location: Path, tables: Mapping[str, Table], by_folders: Mapping[str, str], layout: Layout
) -> tuple[dict[str, str], str]:
    names = sorted(tables)
    default = next((location / name for name in _SPLIT_FILES if (location / name).is_file()), None)
    if layout.split_column is not None:
        split_of = {name: _read_split_column(tables[name], layout.split_column, name) for name in names}
        origin = f"by the column '{layout.split_column}'"
    elif layout.split_file is not None or default is not None:
        path = Path(layout.split_file) if layout.split_file is not None else default
        assert path is not None
        split_of, origin = read_split_file(path, names, "task"), f"by {path}"
    elif by_folders:
        split_of, origin = dict(by_folders), "by their folders"
        _refuse_shared_names(names, split_of)
    else:
        return _split_at_random(names, layout), "at random"
    return _hold_out_validation(split_of, layout, origin)


def _read_split_column(table: Table, column: str, name: str) -> str:
    table.require(column)
    given = sorted(set(table.get_texts(column)))
    splits = {find_split(each) for each in given}
    if len(splits) != 1 or None in splits:
        raise UsageError(
            f"The column '{column}' must contain train, validation or test, the same in all rows of a task; for the "
            f"task '{name}', it contains {_join(given)}."
        )
    return str(splits.pop())


def _refuse_shared_names(names: Sequence[str], split_of: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        own = name.partition("/")[2] or name
        if seen.setdefault(own, split_of[name]) != split_of[name]:
            raise UsageError(
                f"The task '{own}' is in {seen[own]} and in {split_of[name]}; test tasks must not be used in training."
            )


def _hold_out_validation(split_of: dict[str, str], layout: Layout, origin: str) -> tuple[dict[str, str], str]:
    """Add validation tasks to a split without any, from the training tasks."""
    for split in ("train", "test"):
        if split not in split_of.values():
            raise UsageError(f"The split {origin} has no {split} tasks.")
    if "validation" in split_of.values():
        return split_of, origin
    train = sorted(name for name, split in split_of.items() if split == "train")
    held = max(1, len(train) // 5)
    if len(train) < 2:
        raise UsageError(f"The split {origin} has one training task and no validation task.")
    chosen = _permute(train, layout.split_seed)[:held]
    return {**split_of, **dict.fromkeys(chosen, "validation")}, f"{origin}, validation from train"


def _split_at_random(names: Sequence[str], layout: Layout) -> dict[str, str]:
    if len(names) < 3:
        raise UsageError(
            f"Training, validation and test need at least three tasks; there are {len(names)}: {_join(names)}."
        )
    order, shares = _permute(names, layout.split_seed), np.array(layout.ratios)
    ends = np.round(shares.cumsum() / shares.sum() * len(names)).astype(int)
    # Each split with a nonzero ratio gets at least one task.
    for place in (1, 2):
        ends[-place - 1] = min(ends[-place - 1], ends[-place] - (shares[-place] > 0))
    for place in (0, 1):
        ends[place] = max(ends[place], (ends[place - 1] if place else 0) + (shares[place] > 0))
    return {name: SPLITS[int(np.searchsorted(ends, place, side="right"))] for place, name in enumerate(order)}


def _permute(names: Sequence[str], seed: int) -> list[str]:
    listed = sorted(names)
    order = draw_distinct(task_uniform(seed, "tables", [0], len(listed)), len(listed))[0]
    return [listed[place] for place in order]


def _join(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
