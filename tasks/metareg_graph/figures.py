"""Pictures of adapted graph models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from metareg import Episodes, MetaLearner

__all__ = ["draw_confusion", "draw_features"]

Named = tuple[Episodes, list[str]]
"""One task, and the names of its classes in their order."""


def draw_confusion(learner: MetaLearner, tasks: Sequence[Named]) -> Figure:
    """How often query nodes of each class are taken for which, over some tasks, after adaptation."""
    names = sorted({name for _, labels in tasks for name in labels}, key=lambda name: (len(name), name))
    counts = np.zeros((len(names), len(names)))
    for episode, labels in tasks:
        where = np.array([names.index(label) for label in labels])
        _, outputs = _adapt(learner, episode)
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
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"{len(tasks)} test tasks, share of each class's query nodes", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def draw_features(learner: MetaLearner, tasks: Sequence[Named]) -> Figure:
    """The adapted body's features of each task's query nodes on their first two principal components."""
    names = sorted({name for _, labels in tasks for name in labels})
    figure = Figure(figsize=(9, 2.2 + 3 * ((len(tasks) + 1) // 2)), layout="constrained")
    grid = figure.subplots((len(tasks) + 1) // 2, 2, squeeze=False)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_axis_off()
    for number, ((episode, labels), axes) in enumerate(zip(tasks, grid.flat, strict=False)):
        features, outputs = _adapt(learner, episode)
        truth = episode.query_y[0]
        centred = (features.flatten(1) - features.flatten(1).mean(0)).double()
        _, _, components = torch.linalg.svd(centred, full_matrices=False)
        points = (centred @ components[:2].T).numpy()
        wrong = (outputs.argmax(-1) != truth).numpy()
        for label, name in enumerate(labels):
            here = truth.numpy() == label
            axes.scatter(*points[here].T, s=28, color=f"C{names.index(name)}", label=f"class {name}")
        axes.scatter(*points[wrong].T, s=90, facecolors="none", edgecolors="black", label="wrong")
        accuracy = 1 - wrong.mean()
        axes.set_title(f"test task {number}, accuracy {accuracy:.2f}", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(frameon=False, fontsize=8)
    return figure


def _adapt(learner: MetaLearner, episode: Episodes) -> tuple[Tensor, Tensor]:
    """Features and outputs of the query nodes of a single task after adaptation."""
    support_x, support_y, query_x, _ = episode.to(learner.device).unstack(0)
    module: Any = learner.adapt(support_x, support_y)
    with torch.no_grad():
        features = module.body(query_x)
        return features.cpu(), module.head(features).cpu()
