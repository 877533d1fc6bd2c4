"""Parsers of MATLAB files for `metareg.parse_in_child`, because scipy's reader can crash on damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import loadmat

__all__ = ["read_boxes", "read_class_names"]

_CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def read_boxes(path: Path) -> dict[str, np.ndarray]:
    """Read the images' names, classes (from 1) and boxes ``[images, 4]`` of Stanford Cars' ``cars_train_annos.mat``."""
    rows = np.atleast_1d(loadmat(path, squeeze_me=True)["annotations"])
    return {
        "names": np.array([str(each["fname"]) for each in rows], dtype=np.str_),
        "classes": np.array([int(each["class"]) for each in rows], dtype=np.int64),
        "boxes": np.array([[int(each[corner]) for corner in _CORNERS] for each in rows], dtype=np.int64).reshape(-1, 4),
    }


def read_class_names(path: Path) -> dict[str, np.ndarray]:
    """Read the names of the classes from ``cars_meta.mat``."""
    names = np.atleast_1d(loadmat(path, squeeze_me=True)["class_names"])
    return {"names": np.array([str(name) for name in names], dtype=np.str_)}
