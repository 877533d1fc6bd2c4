"""``metareg data``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from metareg.cli.common import Data, NoPlugin, stderr, stdout
from metareg.errors import UsageError

__all__ = ["data"]


def data(
    name: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="One task; all where none is named.", show_default=False)
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the task's data.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of the task's data, and count it.")] = False,
    where: Data = None,
    _no_plugin: NoPlugin = None,
) -> None:
    """List the data that tasks read: where it is, or how to get it; download and verify it."""
    if name is None and (download or verify):
        raise UsageError("Name the task whose data is meant: metareg data TASK --download.")
    from metareg.cli.tables import create_dataset_table
    from metareg.registry.datasets import find_dataset, list_datasets

    if name is None:
        stdout.print(create_dataset_table(list_datasets(where)))
        return
    dataset = find_dataset(name, where)
    if download and not dataset.present:
        if dataset.download is None:
            raise UsageError(f"The data of the task '{name}' cannot be downloaded. {dataset.obtain}")
        dataset.download()
        dataset = find_dataset(name, where)
    stdout.print(create_dataset_table([(name, dataset)]))
    if verify:
        with stderr.status("Reading …"):
            found = dataset.verify()
        stdout.print(f"[green]complete[/]: {escape(found)}", soft_wrap=True)
