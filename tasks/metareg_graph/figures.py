"""Plots of adapted graph models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from metareg import Episodes, MetaLearner, format_count

__all__ = ["draw_confusion", "draw_features"]

Named = tuple[Episodes, list[str]]
"""One task, and the names of its classes in order."""
_UPRIGHT = 6
"""Maximum length of a class name that is written horizontally below a confusion matrix."""


def draw_confusion(learner: MetaLearner, tasks: Sequence[Named]) -> Figure:
    """Draw the confusion matrix of query nodes after adaptation, over some tasks."""
    names = sorted({name for _, labels in tasks for name in labels}, key=lambda name: (len(name), name))
    counts = np.zeros((len(names), len(names)))
    for episode, labels in tasks:
        where = np.array([names.index(label) for label in labels])
        *_, outputs = _adapt(learner, episode)
        np.add.at(counts, (where[episode.query_y[0].numpy()], where[outputs.argmax(-1).numpy()]), 1)
    shares = counts / counts.sum(1, keepdims=True)
    side = 2.6 + 0.55 * len(names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    if len(names) <= 12:
        for row, column in np.ndindex(*shares.shape):
            dark = shares[row, column] > 0.5
            text = f"{shares[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    slanted = max(map(len, names)) > _UPRIGHT
    axes.set_xticks(range(len(names)), names, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(format_count(len(tasks), "test task"), fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8, label="fraction of the true class")
    return figure


def draw_features(learner: MetaLearner, tasks: Sequence[Named]) -> Figure:
    """Draw the adapted body's features of each task's nodes on their first two principal components."""
    names = sorted({name for _, labels in tasks for name in labels})
    rows = (len(tasks) + 1) // 2
    figure = Figure(figsize=(9, 1 + 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for number, ((episode, labels), axes) in enumerate(zip(tasks, grid.flat, strict=False)):
        _draw_projection(axes, learner, episode, [names.index(label) for label in labels], names)
        axes.set_title(f"test task {number}, {axes.get_title()}", fontsize=10)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("features of the adapted body", fontsize=11)
    return figure


def _draw_projection(
    axes: Axes, learner: MetaLearner, episode: Episodes, classes: Sequence[int], names: Sequence[str]
) -> None:
    """Draw the nodes of one task; `classes` are the positions of its classes in `names`."""
    support, query, outputs = _adapt(learner, episode)
    features = torch.cat([support, query]).flatten(1).double()
    centred = features - features.mean(0)
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ components[:2].T
    shares = singular.square() / singular.square().sum().clamp(min=1e-30)
    wrong = outputs.argmax(-1) != episode.query_y[0]
    known, asked = points[: len(support)].numpy(), points[len(support) :].numpy()

    def scatter(some: np.ndarray, **look: Any) -> None:
        axes.scatter(some[:, 0], some[:, 1], **look)

    for label, place in enumerate(classes):
        colour = f"C{place}"
        scatter(known[episode.support_y[0] == label], s=60, marker="^", color=colour, edgecolors="black")
        scatter(asked[episode.query_y[0] == label], s=28, color=colour, label=names[place])
    scatter(np.empty((0, 2)), s=60, marker="^", color="white", edgecolors="black", label="support nodes")
    scatter(asked[wrong], s=90, facecolors="none", edgecolors="black", label="predicted wrongly")
    axes.set_title(f"accuracy {1 - wrong.double().mean():.2f}")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"1st principal component ({shares[0]:.0%} of the variance)", fontsize=9)
    axes.set_ylabel(f"2nd principal component ({shares[1]:.0%})", fontsize=9)


def _adapt(learner: MetaLearner, episode: Episodes) -> tuple[Tensor, Tensor, Tensor]:
    """Return features of a task's support and query nodes after adaptation, and the query nodes' outputs."""
    support_x, support_y, query_x, _ = episode.to(learner.device).unstack(0)
    module: Any = learner.adapt(support_x, support_y)
    with torch.no_grad():
        features = module.body(query_x)
        return module.body(support_x).cpu(), features.cpu(), module.head(features).cpu()
