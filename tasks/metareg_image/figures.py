"""Pictures of test episodes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from metareg import Episodes, MetaLearner

__all__ = ["draw_episodes"]

_CLASSES, _SUPPORT, _QUERY = 5, 3, 5


def draw_episodes(learner: MetaLearner, episodes: Episodes, names: Sequence[Sequence[str]]) -> Figure:
    """A picture of a few tasks: one row a class, its support images on the left and its query images on the right.

    Over each query image stand the predicted class and the model's confidence after adaptation, in green where it is
    right and in red, with the true class, where it is wrong.

    Args:
        learner: adapts to each task.
        episodes: the tasks.
        names: the names of each task's classes.
    """
    ways = len(names[0])
    rows, shots = min(_CLASSES, ways), min(_SUPPORT, episodes.support_y.shape[1] // ways)
    queries = min(_QUERY, episodes.query_y.shape[1] // ways)
    height = 0.62 + 1.12 * rows
    figure = Figure(figsize=(1.15 * (shots + queries) + 0.7, height * len(episodes)), layout="constrained")
    for number, part in enumerate(figure.subfigures(len(episodes), 1, squeeze=False).flat):
        support_x, support_y, query_x, query_y = (each[number] for each in episodes.parts)
        with torch.no_grad():
            adapted = learner.adapt(support_x, support_y)
            confidence = adapted(query_x.to(learner.device)).softmax(-1).cpu()
        accuracy = (confidence.argmax(-1) == query_y).float().mean().item()
        part.suptitle(f"test task {number}: {accuracy:.0%} of {len(query_y)} queries right", fontsize=10)
        grid = part.subplots(rows, shots + queries, squeeze=False)
        for row, axes in enumerate(grid):
            for axis, image in zip(axes, support_x[support_y == row], strict=False):
                _show(axis, image, "0.35")
            axes[0].set_ylabel(_label(row, names[number][row]), fontsize=6)
            mine = query_y == row
            for axis, image, scores in zip(axes[shots:], query_x[mine], confidence[mine], strict=False):
                guess = int(scores.argmax())
                right = guess == row
                _show(axis, image, "tab:green" if right else "tab:red")
                label = f"{guess} · {scores[guess]:.0%}" if right else f"{guess} · {scores[guess]:.0%} (is {row})"
                axis.set_title(label, fontsize=7, pad=2, color="tab:green" if right else "tab:red")
        grid[0][0].set_title("support", fontsize=7, pad=2)
    return figure


def _show(axis: Axes, image: Tensor, colour: str) -> None:
    grey = image.shape[0] == 1
    axis.imshow((image[0] if grey else image.movedim(0, -1)).numpy(), cmap="gray" if grey else None, vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=1.5)


def _label(number: int, name: str) -> str:
    return "\n".join(textwrap.wrap(f"{number} · {name}", 20, max_lines=2, placeholder=" …"))
