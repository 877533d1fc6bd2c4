"""Files in which users assign names to training, validation and test."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from metareg.contract.splits import SPLITS, find_split
from metareg.errors import UnknownNameError, UsageError
from metareg.printable import format_count
from metareg.util.files import MALFORMED, read_text, refuse_twice
from metareg.util.tables import read_table
from metareg.util.yaml_files import parse_yaml

__all__ = ["read_name_lists", "read_split_file"]


def read_split_file(path: Path, known: Collection[str], what: str) -> dict[str, str]:
    """Read the split of each name from a file.

    Args:
        path: JSON or YAML, ``{train: [name, …], validation: […], test: […]}``; or a table with a column of names and a
            column ``split``. Every name is a string, even if it looks like a number.
        known: the existing names.
        what: what the names are, for messages, such as ``"class"``.

    Raises:
        UsageError: the file cannot be read, or has an unknown name or split, or a name in two splits.
    """
    if path.suffix.lower() in (".json", ".yaml", ".yml"):
        pairs = [(name, split) for split, names in read_name_lists(path).items() for name in names]
    else:
        pairs = _read_pairs(path, what)
    split_of: dict[str, str] = {}
    for name, given in pairs:
        split = find_split(given)
        if split is None:
            raise UnknownNameError(f"split (in {path})", given, SPLITS)
        if split_of.setdefault(name, split) != split:
            raise UsageError(f"The split file {path} puts the {what} '{name}' into {split_of[name]} and into {split}.")
        if name not in known:
            raise UnknownNameError(f"{what} (in {path})", name, known)
    return split_of


def read_name_lists(path: Path) -> dict[str, list[str]]:
    """Read the lists of a JSON or YAML file ``{key: [name, …], …}``; names are strings, even if they look like numbers.

    Raises:
        UsageError: the file cannot be read, or contains something else.
    """
    is_json = path.suffix.lower() == ".json"
    try:
        text = read_text(path).removeprefix("\ufeff")
        content: Any = _parse_json(text) if is_json else parse_yaml(text, texts=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The file {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except MALFORMED as error:
        reason = str(error).lstrip(": ").splitlines()[0]
        raise UsageError(f"The file {path} is not valid {'JSON' if is_json else 'YAML'}: {reason}.") from error
    lists = content.values() if isinstance(content, Mapping) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise UsageError(f"The file {path} must map train, validation and test to lists of names.")
    return dict(content)


def _parse_json(text: str) -> Any:
    return json.loads(text, parse_int=str, parse_float=str, object_pairs_hook=refuse_twice)


def _read_pairs(path: Path, what: str) -> list[tuple[str, str]]:
    """Read the lines ``name, split`` of a table with or without a header."""
    table = read_table(path, is_data=lambda cells: any(map(find_split, cells)))
    names = table.names
    if len(names) != 2 or (table.named and "split" not in names):
        raise UsageError(
            f"The split file {path} must have the columns '{what}' and 'split'; it has {', '.join(names)}."
            if table.named
            else f"The split file {path} must have lines '{what},split'; its first has {format_count(len(names), 'cell')}."
        )
    split = "split" if table.named else names[1]
    (name,) = (each for each in names if each != split)
    return list(zip(table.get_texts(name), table.get_texts(split), strict=True))
