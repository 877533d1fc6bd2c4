"""Plots of test episodes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from metareg import Episodes, MetaLearner

__all__ = ["draw_episodes"]

_CLASSES, _SUPPORT, _QUERY = 5, 3, 5
_LETTERS = 20
_TAG_LETTERS = 6
_GAP = 0.25
"""The gap between support and query images, in image widths."""


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
    height = 0.62 + 1.12 * rows
    figure = Figure(figsize=(1.15 * (shots + queries) + 1.0, height * len(episodes)), layout="constrained")
    widths = [1.0] * shots + [_GAP] + [1.0] * queries
    for number, part in enumerate(figure.subfigures(len(episodes), 1, squeeze=False).flat):
        support_x, support_y, query_x, query_y = (each[number] for each in episodes.parts)
        with torch.no_grad():
            adapted = learner.adapt(support_x, support_y)
            confidence = adapted(query_x.to(learner.device)).softmax(-1).cpu()
        accuracy = (confidence.argmax(-1) == query_y).float().mean().item()
        right = f"{accuracy:.0%} of {len(query_y)} queries right"
        part.suptitle(f"test task {number}: {right} (over each: predicted class · confidence)", fontsize=9)
        tags = _tag(names[number])
        grid = part.subplots(rows, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
        for row, axes in enumerate(grid):
            axes[shots].axis("off")
            # The other columns are the gap and the query images.
            for axis, image in zip(axes[:shots], support_x[support_y == row], strict=False):
                _show(axis, to_pixels(image), "0.35")
            axes[0].set_ylabel(_label(row, names[number][row]), fontsize=6)
            mine = query_y == row
            for axis, image, scores in zip(axes[shots + 1 :], query_x[mine], confidence[mine], strict=False):
                guess = int(scores.argmax())
                colour = "tab:green" if guess == row else "tab:red"
                _show(axis, to_pixels(image), colour)
                truth = "" if guess == row else f" (is {tags[row]})"
                axis.set_title(f"{tags[guess]} · {scores[guess]:.0%}{truth}", fontsize=7, pad=2, color=colour)
        given = int((support_y == 0).sum())
        grid[0][0].set_title("support" if given == shots else f"support: {shots} of {given}", fontsize=7, pad=2)
    return figure


def _show(axis: Axes, image: Tensor, colour: str) -> None:
    grey = image.shape[0] == 1
    axis.imshow((image[0] if grey else image.movedim(0, -1)).numpy(), cmap="gray" if grey else None, vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=1.5)


def _tag(names: Sequence[str]) -> list[str]:
    """Return labels of the classes for above an image: their names if short, otherwise their numbers."""
    last = [name.rpartition("/")[2] for name in names]
    short = all(len(name) <= _TAG_LETTERS for name in last) and len(set(last)) == len(last)
    return last if short else [str(number) for number in range(len(names))]


def _label(number: int, name: str) -> str:
    """Format a class's number and name in at most two lines: the end of a path, or the beginning of a long name."""
    lines = name.split("/")[-2:] if "/" in name else textwrap.wrap(name, _LETTERS)[:2]
    return f"{number} · " + "\n".join(line if len(line) <= _LETTERS else f"{line[: _LETTERS - 1]}…" for line in lines)
