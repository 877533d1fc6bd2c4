"""Losses and metrics by name. Each takes ``(outputs, targets)`` of one task and returns a scalar, the mean over examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from metareg.errors import UnknownNameError, UsageError

__all__ = ["LOSSES", "METRICS", "Metric", "find_loss", "find_metric"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Metric:
    """How well the outputs fit the targets of one task."""

    name: str
    function: Loss
    higher_is_better: bool

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.function(outputs, targets)


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():  # probabilities of the classes, as mixtures of examples have them
        targets = targets.argmax(-1)
    return (outputs.argmax(-1) == targets).to(outputs.dtype).mean()


def _mse(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.shape != targets.shape:  # mse_loss would broadcast them and mean something else
        raise UsageError(
            f"The mean squared error needs outputs and targets of one shape; the model gives {tuple(outputs.shape)} "
            f"where the targets of a task are {tuple(targets.shape)}."
        )
    return F.mse_loss(outputs, targets)


LOSSES: dict[str, Loss] = {"cross_entropy": F.cross_entropy, "mse": _mse}
METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", _accuracy, higher_is_better=True),
    "mse": Metric("mse", _mse, higher_is_better=False),
}
_METRIC_OF = {"cross_entropy": "accuracy", "mse": "mse"}


def find_loss(loss: str | Loss) -> Loss:
    """A loss by name, or the callable itself."""
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise UnknownNameError("loss", loss, LOSSES)
    return LOSSES[loss]


def find_metric(metric: str | Metric | None, loss: str | Loss) -> Metric:
    """A metric by name; by default the one that goes with the loss: accuracy, mse, or a callable loss itself."""
    if isinstance(metric, Metric):
        return metric
    if metric is None:
        if not isinstance(loss, str):
            return Metric("loss", loss, higher_is_better=False)
        metric = _METRIC_OF.get(loss, loss)
    if metric not in METRICS:
        raise UnknownNameError("metric", metric, METRICS)
    return METRICS[metric]
