"""Splits of classes, graphs or nodes into training, validation and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from metareg import UsageError, derive_seed, format_count
from metareg_graph.data import GraphData

__all__ = ["SPLITS", "ClassSplit", "split_nodes"]

Group = dict[int, np.ndarray]
_NAMES = ("train", "validation", "test")
_SINGULAR = {"classes": "Class", "graphs": "Graph", "nodes": "Node"}


@dataclass(frozen=True)
class ClassSplit:
    """Disjoint classes for training, validation and test: either counts, drawn for each seed, or fixed classes."""

    counts: tuple[int, int, int] | None = None
    fixed: Mapping[str, Sequence[int]] | None = None


_CORA_FULL = {
    "train": [3, 8, 17, 20, 21, 24, 25, 26, 28, 32, 35, 36, 37, 38, 40, 42, 44, 47, 52, 55, 57, 62, 63, 67, 69],
    "validation": [2, 51, 48, 27, 13, 54, 46, 64, 16, 68, 6, 31, 60, 33, 65, 43, 23, 19, 18, 34],
    "test": [56, 14, 0, 11, 4, 10, 12, 49, 22, 15, 1, 59, 50, 58, 61, 41, 39, 30, 53, 29, 9, 5, 66, 45, 7],
}
_COAUTHOR_CS = {"train": [1, 4, 8, 9, 10], "validation": [2, 3, 7, 11, 14], "test": [0, 5, 6, 12, 13]}

SPLITS: Mapping[str, ClassSplit | str] = {
    "cora": ClassSplit((3, 2, 2)),
    "citeseer": ClassSplit((2, 2, 2)),
    "pubmed": "nodes",
    "cora-full": ClassSplit(fixed=_CORA_FULL),
    "coauthor-cs": ClassSplit(fixed=_COAUTHOR_CS),
    "amazon-computer": ClassSplit((4, 3, 3)),
    "ogbn-arxiv": ClassSplit((20, 10, 10)),
}
"""Counts: Tan et al., Transductive Linear Probing, LoG 2022 (TLP-FSNC), which draws the classes anew for each repeat.
Fixed: Wang et al., Task-Adaptive Few-shot Node Classification, KDD 2022 (TENT), and its follower TEG (Kim et al., 2023)."""


def split_nodes(
    data: GraphData, rule: ClassSplit | str, split: str, seed: int, ways: int, each: int
) -> tuple[list[Group], bool]:
    """Return the nodes of a split, by graph and class.

    Args:
        data: the graphs.
        rule: a class split, or ``"auto"``, ``"classes"``, ``"nodes"`` or ``"graphs"``.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: the seed for random splits.
        ways: number of classes that a task needs.
        each: number of nodes of each class that a task needs.

    Returns:
        The groups, and whether the splits share their classes, in which case a class has the same number in every task.

    Raises:
        UsageError: the split is impossible, or names something that does not exist.
    """
    if split not in _NAMES:
        raise UsageError(f"A graph task has the splits {', '.join(_NAMES)}; there is no '{split}'.")
    labels = data.labels.numpy()
    present = [label for label in np.unique(labels).tolist() if label >= 0]
    if isinstance(rule, str):
        kind = _choose_kind(data, rule, present, ways)
        given = data.splits.get(kind)
        if kind == "graphs":
            return _select_graphs(data, given, split, seed, ways, each), True
        if kind == "nodes":
            return [_select_nodes(labels, present, given, split, seed)], True
        rule = ClassSplit(fixed=given) if given is not None else ClassSplit(_choose_counts(len(present), ways))
    if rule.counts is not None:
        classes = _draw_classes(rule.counts, present, seed)
    else:
        classes = _check_classes(rule.fixed or {}, present)
    return [{label: np.flatnonzero(labels == label) for label in classes[split]}], False


def _choose_kind(data: GraphData, rule: str, present: Sequence[int], ways: int) -> str:
    if rule != "auto":
        return rule
    if data.splits:
        return next(iter(data.splits))
    if len(data.names) > 2:
        return "graphs"
    return "classes" if len(present) >= 3 * ways else "nodes"


def _choose_counts(classes: int, ways: int) -> tuple[int, int, int]:
    """Choose a quarter of the classes each for validation and test, and at least enough for a task."""
    held = max(ways, classes // 4)
    if classes < 2 * held + ways:
        raise UsageError(
            f"The graph has {format_count(classes, 'class', 'classes')}; a split by class needs {3 * ways} "
            f"for {ways}-way tasks. Set split=nodes to share them, or lower --ways."
        )
    return classes - 2 * held, held, held


def _draw_classes(counts: tuple[int, int, int], present: Sequence[int], seed: int) -> dict[str, list[int]]:
    if sum(counts) != len(present):
        raise UsageError(
            f"The split {' / '.join(map(str, counts))} needs {sum(counts)} classes; the graph has {len(present)}. "
            "Assign classes with classes={train: […], validation: […], test: […]}."
        )
    order = [present[position] for position in _permute(len(present), seed, "classes")]
    first, second = counts[0], counts[0] + counts[1]
    return {"train": order[:first], "validation": order[first:second], "test": order[second:]}


def _check_classes(given: Mapping[str, Any], present: Sequence[int]) -> dict[str, list[int]]:
    _check_splits(given, "classes")
    for split in _NAMES:
        for label in given[split]:
            if label not in present:
                raise UsageError(f"The {split} split names class {label}, which no node has; there are {present}.")
    return {split: list(given[split]) for split in _NAMES}


def _select_graphs(
    data: GraphData, given: Mapping[str, Any] | None, split: str, seed: int, ways: int, each: int
) -> list[Group]:
    names = list(data.names)
    if given is None:
        held = max(1, len(names) // 5)
        if len(names) < 3:
            raise UsageError(
                f"A split by graph needs at least three graphs; there are {len(names)}: {', '.join(names)}."
            )
        order = [names[position] for position in _permute(len(names), seed, "graphs")]
        given = {"train": order[2 * held :], "validation": order[:held], "test": order[held : 2 * held]}
    _check_splits(given, "graphs")
    groups = []
    for name in given[split]:
        if name not in names:
            there = ", ".join(names)
            raise UsageError(f"The {split} split names the graph '{name}', which does not exist; there are {there}.")
        inside = data.members.numpy() == names.index(name)
        labels = np.where(inside, data.labels.numpy(), -1)
        found = {label: np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0]).tolist()}
        enough = {label: nodes for label, nodes in found.items() if len(nodes) >= each}
        if len(enough) < ways:
            count = format_count(len(enough), "class", "classes")
            raise UsageError(
                f"The graph '{name}' has {count} of at least {format_count(each, 'node')}; a task needs {ways} such classes."
            )
        groups.append(enough)
    return groups


def _select_nodes(
    labels: np.ndarray, present: Sequence[int], given: Mapping[str, Any] | None, split: str, seed: int
) -> Group:
    if given is not None:
        _check_splits(given, "nodes")
        chosen = np.asarray(given[split], dtype=np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(labels)):
            raise UsageError(
                f"The {split} split names nodes that do not exist; their numbers are 0 to {len(labels) - 1}."
            )
        return {label: chosen[labels[chosen] == label] for label in present if (labels[chosen] == label).any()}
    group = {}
    for label in present:
        nodes = np.flatnonzero(labels == label)
        nodes = nodes[_permute(len(nodes), seed, "nodes", label)]
        first, second = round(0.6 * len(nodes)), round(0.8 * len(nodes))
        group[label] = {"train": nodes[:first], "validation": nodes[first:second], "test": nodes[second:]}[split]
    return group


def _check_splits(given: Mapping[str, Any], kind: str) -> None:
    """Refuse incomplete or overlapping splits.

    Raises:
        UsageError: a split is missing, or something occurs twice.
    """
    if given.keys() != set(_NAMES) or not all(isinstance(given[split], Sequence) for split in _NAMES):
        raise UsageError(f"A split of {kind} needs the lists {', '.join(_NAMES)}; it has {', '.join(given) or 'none'}.")
    places: dict[Any, list[str]] = {}
    for split in _NAMES:
        for each in given[split]:
            if not isinstance(each, str if kind == "graphs" else int) or isinstance(each, bool):
                wanted = "graphs by their names" if kind == "graphs" else f"{kind} by their numbers"
                raise UsageError(f"The {split} split names {each!r}; it must name {wanted}.")
            places.setdefault(each, []).append(split)
    repeated = {each: splits for each, splits in places.items() if len(splits) > 1}
    for each, splits in repeated.items():
        more = f", and {len(repeated) - 1} more do" if len(repeated) > 1 else ""
        raise UsageError(
            f"{_SINGULAR[kind]} {each!r} is in {' and in '.join(splits)}{more}; splits must be disjoint, because test "
            "examples must not be used in training."
        )


def _permute(count: int, seed: int, *labels: str | int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "graph split", *labels))
    return torch.randperm(count, generator=generator).tolist()
