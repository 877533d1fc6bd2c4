"""Checks of tasks' examples before and after a learner uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metareg.contract.episodes import Episodes
from metareg.contract.losses import Loss, find_loss_name
from metareg.errors import ExamplesError, NonfiniteExamplesError
from metareg.util.torch_internals import tree_leaves, tree_map

__all__ = ["TargetCheck", "refuse_nonfinite"]

_PARTS = ("support_x", "support_y", "query_x", "query_y")


class TargetCheck:
    """Compares targets with a model's outputs, if the loss is a known one.

    Values on a CPU are always checked. Values on a GPU are checked once, because each check waits for the GPU.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = find_loss_name(loss)
        self._ignored: int | None = loss.ignore_index if isinstance(loss, nn.CrossEntropyLoss) else None
        self._looked = False
        """Whether values on a GPU were checked."""

    def prepare(self, episodes: Episodes, outputs: tuple[int, ...], dtype: torch.dtype) -> Episodes:
        """Check the targets; convert whole numbers to floating point if the loss is a regression loss.

        Args:
            outputs: the shape ``(examples, …)`` of the model's outputs for a task.
            dtype: the model's type.

        Raises:
            ExamplesError: the targets do not fit the outputs.
        """
        if self._loss is None:
            return episodes
        for name in ("support_y", "query_y"):
            y: Tensor = getattr(episodes, name)
            if self._loss == "cross_entropy":
                self._check_classes(name, y, outputs)
            else:
                _check_numbers(name, y, outputs)
        if self._loss == "cross_entropy" or episodes.support_y.is_floating_point():
            return episodes
        x, y, query_x, query_y = episodes.parts
        changed = Episodes(x, y.to(dtype), query_x, query_y.to(dtype))
        return changed if episodes.positions is None else changed.placed(episodes.positions)

    def _check_classes(self, name: str, y: Tensor, outputs: tuple[int, ...]) -> None:
        if len(outputs) < 2:
            raise ExamplesError(f"Cross-entropy needs outputs [examples, classes]; the model gives {outputs}.")
        classes = outputs[1]
        if y.is_floating_point():
            if y.dim() != len(outputs) + 1 or y.shape[2] != classes:
                raise ExamplesError(
                    f"{_describe(name, y)}. Floating-point targets of cross-entropy are probabilities "
                    f"[tasks, examples, {classes}]; class numbers must be integers: y.long()."
                )
            return
        if y.dim() != len(outputs):
            one_hot = y.dim() == len(outputs) + 1 and y.shape[2] == classes > 1
            remedy = "y.argmax(2) makes them of one-hot rows" if one_hot else "y.squeeze(2) drops a dimension of size 1"
            raise ExamplesError(f"{_describe(name, y)}; cross-entropy takes class numbers [tasks, examples]. {remedy}.")
        if y.device.type != "cpu":
            if self._looked:
                return
            self._looked = name == "query_y"
        labels = y.cpu().numpy()
        # As unsigned, negative numbers are large, so one comparison is enough; NumPy is much faster than torch here.
        if labels.view(np.uint64).max() < classes:
            return
        if self._ignored is not None:
            labels = labels[labels != self._ignored]
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ExamplesError(
                f"{name} contains class numbers from {labels.min()} to {labels.max()}; the model has {classes} "
                f"outputs, for classes 0 to {classes - 1}."
            )


def _describe(name: str, y: Tensor) -> str:
    return f"{name} has the shape {tuple(y.shape)} and the type {y.dtype}"


def _check_numbers(name: str, y: Tensor, outputs: tuple[int, ...]) -> None:
    if y.dim() == len(outputs) + 1 and (len(outputs) > 2 or y.shape[2:] == outputs[1:]):
        return
    wanted = ", ".join(("tasks", "examples", *map(str, outputs[1:])))
    ones = y.dim() == len(outputs) and outputs[1:] == (1,)
    extra = y.dim() == len(outputs) + 2 and y.shape[-1] == 1
    remedy = " y.unsqueeze(-1) makes it so." if ones else " y.squeeze(-1) makes it so." if extra else ""
    raise ExamplesError(
        f"{name} has the shape {tuple(y.shape)}; the targets must have the shape of the model's outputs, "
        f"[{wanted}].{remedy}"
    )


def refuse_nonfinite(episodes: Episodes, predict: Callable[[Any], Tensor], where: str = "") -> None:
    """Refuse tasks whose examples contain NaN or infinite values.

    Args:
        predict: computes the model's outputs for a task's inputs ``[examples, …]``; some models can handle NaN.
        where: the beginning of the error message.

    Raises:
        NonfiniteExamplesError: there are such values, and the model's outputs for them are not finite.
    """
    for name, part in zip(_PARTS, episodes.parts, strict=True):
        leaves = [leaf for leaf in tree_leaves(part) if leaf.is_floating_point()]
        finite = [leaf.isfinite().flatten(1).all(1) for leaf in leaves]
        if all(bool(each.all()) for each in finite):
            continue
        task = int(torch.stack(finite).all(0).logical_not().nonzero()[0])
        if name.endswith("x") and bool(predict(tree_map(lambda leaf, task=task: leaf[task], part)).isfinite().all()):
            continue
        raise NonfiniteExamplesError(f"{where}{name} of task {task} (counted from 0) contains NaN or infinite values.")
