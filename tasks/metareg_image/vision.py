"""The import of torchvision and timm on first use; no other module imports them."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType

import torch

from metareg import MetaregError

__all__ = ["import_timm", "import_torchvision"]

_declared: list[torch.library.Library] = []
"""Kept alive, because declarations of operators end with these objects."""


def import_torchvision(what: str) -> ModuleType:
    """Import torchvision, with `datasets` and `transforms.v2`.

    Args:
        what: the name of what needs it, for the message.

    Raises:
        MetaregError: it is not installed, or does not work with the installed torch.
    """
    return _import(what, _import_repaired, "torchvision", "images")


def import_timm(what: str) -> ModuleType:
    """Import timm, and first torchvision, which it needs.

    Args:
        what: the name of what needs it, for the message.

    Raises:
        MetaregError: one of them is not installed, or does not work with the installed torch.
    """
    return _import(what, _import_timm, "timm", "timm")


def _import(what: str, load: Callable[[], ModuleType], library: str, extra: str) -> ModuleType:
    install = f"pip install 'metareg[{extra}]'"
    try:
        return load()
    except ModuleNotFoundError as error:
        raise MetaregError(f"'{what}' needs {error.name}, which is not installed: {install}.") from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise MetaregError(
            f"'{what}' needs {library}, whose import fails with torch {torch.__version__} ({type(error).__name__}: "
            f"{reason}); install the {library} version for this torch: {install}."
        ) from error


@functools.cache
def _import_timm() -> ModuleType:
    _import_repaired()
    return importlib.import_module("timm")


@functools.cache
def _import_repaired() -> ModuleType:
    try:
        torchvision = importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        _declare_operators()
        torchvision = importlib.import_module("torchvision")
    importlib.import_module("torchvision.datasets")
    importlib.import_module("torchvision.transforms.v2")
    return torchvision


def _declare_operators() -> None:
    """Make a torchvision built for CUDA importable with a torch built without it.

    torchvision's compiled library then does not load, and the import fails because of two operators for object
    detection that the library defines. Declaring them is enough: data sets, transforms and models do not call them.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
