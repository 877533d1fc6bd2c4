"""The data that the installed tasks read, for ``metareg data``."""

from __future__ import annotations

from pathlib import Path

from metareg.contract.tasks import Dataset
from metareg.errors import MetaregError, UsageError
from metareg.registry.plugins import find_entry, list_entries, resolve

__all__ = ["find_dataset", "list_datasets"]


def find_dataset(name: str, where: Path | None = None) -> Dataset:
    """What a task says about its data.

    Args:
        name: the task's name.
        where: the folder to look in, for a task with an option `data`.

    Raises:
        UsageError: the task reads no data.
    """
    dataset = _dataset(name, where)
    if dataset is None:
        raise UsageError(f"The task '{name}' reads no data.")
    return dataset


def list_datasets(where: Path | None = None) -> list[tuple[str, Dataset | str]]:
    """Every installed task that reads data, and what it says of it; a text where it cannot be asked."""
    rows: list[tuple[str, Dataset | str]] = []
    for entry in list_entries("tasks"):
        try:
            dataset = _dataset(entry.name, where)
        except MetaregError as error:
            rows.append((entry.name, str(error)))
            continue
        if dataset is not None:
            rows.append((entry.name, dataset))
    return rows


def _dataset(name: str, where: Path | None) -> Dataset | None:
    options = getattr(getattr(find_entry("tasks", name).load(), "Config", None), "model_fields", {})
    given = {"data": str(where)} if where is not None and "data" in options else {}
    dataset: Dataset | None = getattr(resolve("tasks", name, given).instance, "dataset", None)
    return dataset
