"""Losses and metrics by name. Each takes ``(outputs, targets)`` of one task and returns a scalar, the mean over examples.

All are made of operations that `torch.func.vmap` and traced graphs know: no branch depends on a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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


def _balanced_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over the classes that have targets of the share of them that is recognised."""
    outputs = _widen(outputs)
    members = _compare_classes(targets, outputs)
    counts = members.sum(0)
    right = (members * (outputs.argmax(-1) == targets).unsqueeze(-1)).sum(0)
    return (right / counts.clamp(min=1)).sum() / (counts > 0).sum()


def _auroc(outputs: Tensor, targets: Tensor) -> Tensor:
    """The area under the ROC curve of each class against the others, averaged over the classes that have both.

    It is the share of pairs of a member and another example of which the member has the higher odds, ties counting half
    (Mann and Whitney, 1947). Where no class has both it is ½.
    """
    outputs = _widen(outputs)
    own = torch.eye(outputs.shape[-1], dtype=torch.bool, device=outputs.device)
    odds = outputs - outputs.unsqueeze(-2).masked_fill(own, -torch.inf).logsumexp(-1)
    members = _compare_classes(targets, outputs)
    first, second = odds.unsqueeze(1), odds.unsqueeze(0)
    won = (first > second).to(odds.dtype) + 0.5 * (first == second).to(odds.dtype)
    wins = (members.unsqueeze(1) * (1 - members).unsqueeze(0) * won).sum((0, 1))
    pairs = members.sum(0) * (1 - members).sum(0)
    known = (pairs > 0).to(odds.dtype)
    areas = torch.where(pairs > 0, wins / pairs.clamp(min=1), 0)
    return torch.where(known.sum() > 0, areas.sum() / known.sum().clamp(min=1), 0.5)


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(_widen(outputs), targets)


def _r2(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of the targets' variance that is explained, ``1 − Σ(t − o)² / Σ(t − t̄)²``, averaged over the outputs.

    Where the targets do not vary it is 1 for perfect outputs and 0 for others.
    """
    _check_shapes(outputs, targets, "The R²")
    outputs, targets = _widen(outputs).flatten(1), _widen(targets).flatten(1)
    residual = (targets - outputs).square().sum(0)
    total = (targets - targets.mean(0)).square().sum(0)
    constant = (residual == 0).to(residual.dtype)
    return torch.where(total > 0, 1 - residual / torch.where(total > 0, total, 1), constant).mean()


def _check_shapes(outputs: Tensor, targets: Tensor, what: str) -> None:
    if outputs.shape != targets.shape:  # torch's losses would broadcast them and mean something else
        raise UsageError(
            f"{what} needs outputs and targets of one shape; the model gives {tuple(outputs.shape)} where the targets of a "
            f"task are {tuple(targets.shape)}."
        )


def _mse(outputs: Tensor, targets: Tensor) -> Tensor:
    _check_shapes(outputs, targets, "The mean squared error")
    return F.mse_loss(outputs, targets)


def _mae(outputs: Tensor, targets: Tensor) -> Tensor:
    _check_shapes(outputs, targets, "The mean absolute error")
    return F.l1_loss(outputs, targets)


def _huber(outputs: Tensor, targets: Tensor) -> Tensor:
    _check_shapes(outputs, targets, "The Huber loss")
    return F.huber_loss(outputs, targets)


def _widen(values: Tensor) -> Tensor:
    """Numbers in float32 or better."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _compare_classes(targets: Tensor, outputs: Tensor) -> Tensor:
    """Whether each example ``[examples]`` is of each class ``[examples, classes]``, as 0 and 1 of the outputs' type."""
    classes = torch.arange(outputs.shape[-1], device=targets.device)
    return (targets.unsqueeze(-1) == classes).to(outputs.dtype)


def _measure(error: Loss) -> Loss:
    """A loss as a metric: in float32 or better."""
    return lambda outputs, targets: error(_widen(outputs), _widen(targets))


LOSSES: dict[str, Loss] = {"cross_entropy": F.cross_entropy, "mse": _mse, "mae": _mae, "huber": _huber}
METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", _accuracy, higher_is_better=True),
    "balanced_accuracy": Metric("balanced_accuracy", _balanced_accuracy, higher_is_better=True),
    "auroc": Metric("auroc", _auroc, higher_is_better=True),
    "cross_entropy": Metric("cross_entropy", _cross_entropy, higher_is_better=False),
    "mse": Metric("mse", _mse, higher_is_better=False),
    "mae": Metric("mae", _measure(_mae), higher_is_better=False),
    "huber": Metric("huber", _measure(_huber), higher_is_better=False),
    "r2": Metric("r2", _r2, higher_is_better=True),
}
_METRIC_OF = {"cross_entropy": "accuracy", "mse": "mse", "mae": "mae", "huber": "huber"}


def find_loss(loss: str | Loss) -> Loss:
    """A loss by name, or the callable itself."""
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise UnknownNameError("loss", loss, LOSSES)
    return LOSSES[loss]


def find_metric(metric: str | Metric | None, loss: str | Loss) -> Metric:
    """A metric by name; by default the one that goes with the loss: accuracy, the loss itself where it is an error."""
    if isinstance(metric, Metric):
        return metric
    if metric is None:
        if not isinstance(loss, str):
            return Metric("loss", loss, higher_is_better=False)
        metric = _METRIC_OF.get(loss, loss)
    if metric not in METRICS:
        raise UnknownNameError("metric", metric, METRICS)
    return METRICS[metric]
