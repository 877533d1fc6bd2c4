"""Plots of test episodes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from metareg import Episodes, MetaLearner

__all__ = ["draw_episodes"]

_CLASSES, _SUPPORT, _QUERY = 5, 3, 5
_LETTERS = 20
_TAG_LETTERS = 6
_COLUMN, _ROW = 1.22, 1.18
"""Inches from an image to the next; an image is one inch wide and high."""
_LEFT, _TOP, _GAP = 0.36, 0.44, 0.2
"""Inches for the names of classes, for a task's titles, and between support and query images."""


def draw_episodes(
    learner: MetaLearner,
    episodes: Episodes,
    names: Sequence[Sequence[str]],
    to_pixels: Callable[[Tensor], Tensor],
) -> Figure:
    """Draw a few tasks, one row per class: its support images on the left and, after a gap, its query images.

    Above each query image are the predicted class and the model's confidence after adaptation: green if correct,
    otherwise red with the true class.

    Args:
        learner: adapts to each task.
        episodes: the tasks.
        names: the names of each task's classes.
        to_pixels: converts an input ``[channels, height, width]`` to pixels in [0, 1].
    """
    ways = len(names[0])
    rows, shots = min(_CLASSES, ways), min(_SUPPORT, episodes.support_y.shape[1] // ways)
    queries = min(_QUERY, episodes.query_y.shape[1] // ways)
    width, height = _LEFT + _COLUMN * (shots + queries) + _GAP, _TOP + _ROW * rows
    figure = Figure(figsize=(width, height * len(episodes)))
    for number in range(len(episodes)):
        support_x, support_y, query_x, query_y = (each[number] for each in episodes.parts)
        with torch.no_grad():
            adapted = learner.adapt(support_x, support_y)
            confidence = adapted(query_x.to(learner.device)).softmax(-1).cpu()
        accuracy = (confidence.argmax(-1) == query_y).float().mean().item()
        right = f"{accuracy:.0%} of {len(query_y)} queries right"
        # One pair of axes per task, in inches: a pair for each image takes ten times as long to draw.
        place = (0, 1 - (number + 1) / len(episodes), 1, 1 / len(episodes))
        axes = figure.add_axes(place, xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        title = f"test task {number}: {right} (over each: predicted class · confidence)"
        axes.set_title(title, fontsize=9, y=1, pad=-14)
        given, tags = int((support_y == 0).sum()), _tag(names[number])
        what = "support" if given == shots else f"support: {shots} of {given}"
        axes.text(_LEFT + 0.5, _TOP - 0.03, what, fontsize=7, ha="center")
        for row in range(rows):
            top, mine = _TOP + _ROW * row, query_y == row
            label = _label(row, names[number][row])
            axes.text(_LEFT - 0.04, top + 0.5, label, fontsize=6, rotation=90, ha="right", va="center", ma="center")
            for column, image in enumerate(support_x[support_y == row][:shots]):
                _show(axes, to_pixels(image), _LEFT + _COLUMN * column, top, "0.35")
            for column, (image, scores) in enumerate(zip(query_x[mine][:queries], confidence[mine], strict=False)):
                guess = int(scores.argmax())
                colour = "tab:green" if guess == row else "tab:red"
                truth = "" if guess == row else f" (is {tags[row]})"
                left = _LEFT + _COLUMN * (shots + column) + _GAP
                _show(axes, to_pixels(image), left, top, colour)
                prediction = f"{tags[guess]} · {scores[guess]:.0%}{truth}"
                axes.text(left + 0.5, top - 0.03, prediction, fontsize=7, color=colour, ha="center")
    return figure


def _show(axes: Axes, image: Tensor, left: float, top: float, colour: str) -> None:
    """Draw an image in a frame; its left and top edges are in inches."""
    grey = image.shape[0] == 1
    axes.imshow(
        (image[0] if grey else image.movedim(0, -1)).numpy(), cmap="gray" if grey else None, vmin=0, vmax=1,
        extent=(left, left + 1, top + 1, top),
    )  # fmt: skip
    axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor=colour, linewidth=1.5))


def _tag(names: Sequence[str]) -> list[str]:
    """Return labels of the classes for above an image: their names if short, otherwise their numbers."""
    last = [name.rpartition("/")[2] for name in names]
    short = all(len(name) <= _TAG_LETTERS for name in last) and len(set(last)) == len(last)
    return last if short else [str(number) for number in range(len(names))]


def _label(number: int, name: str) -> str:
    """Format a class's number and name in at most two lines: the end of a path, or the beginning of a long name."""
    lines = name.split("/")[-2:] if "/" in name else textwrap.wrap(name, _LETTERS)[:2]
    return f"{number} · " + "\n".join(line if len(line) <= _LETTERS else f"{line[: _LETTERS - 1]}…" for line in lines)
