"""The class lists of the standard few-shot splits."""

from __future__ import annotations

import json
from importlib.resources import files

__all__ = ["read_splits"]


def read_splits(name: str) -> dict[str, list[str]]:
    """Read the class names of ``train``, ``validation`` and ``test``, in their published order."""
    content: dict[str, list[str]] = json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return content
