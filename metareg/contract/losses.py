"""Losses and metrics by name. Each takes ``(outputs, targets)`` of one task and returns a scalar, the mean over examples.

All use only operations that `torch.func.vmap` and tracing support; no branch depends on a value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metareg.errors import UnknownNameError, UsageError

__all__ = ["LOSSES", "METRICS", "Metric", "find_loss", "find_loss_name", "find_metric", "widen"]

log = logging.getLogger("metareg")

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Metric:
    """A measure of how well outputs fit the targets of one task."""

    name: str
    function: Loss
    higher_is_better: bool

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one task's metric in float32 or better, because bfloat16 cannot represent a value such as 0.2008."""
        return self.function(widen(outputs), widen(targets))


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    classes = _find_classes(outputs, targets)
    return (outputs.argmax(1) == classes).to(outputs.dtype).mean()


def _balanced_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean recall over the classes that occur in the targets."""
    targets = _find_classes(outputs, targets)
    members = _compare_classes(targets, outputs)
    counts = members.sum(0)
    right = (members * (outputs.argmax(-1) == targets).unsqueeze(-1)).sum(0)
    return (right / counts.clamp(min=1)).sum() / (counts > 0).sum()


def _auroc(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the area under the one-vs-rest ROC curve, averaged over classes with members and non-members.

    For one class, this is the fraction of pairs of a member and a non-member in which the member has the higher odds;
    ties count half (Mann and Whitney, 1947). It is ½ if no class has both.
    """
    targets = _find_classes(outputs, targets)
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


def _find_classes(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the class numbers of targets, which may be probabilities ``[examples, classes]`` of mixed examples.

    Raises:
        UsageError: the targets do not match outputs ``[examples, classes, …]`` and would broadcast.
    """
    shape = tuple(outputs.shape)
    if targets.is_floating_point() and outputs.dim() > 1 and targets.shape == outputs.shape:
        return targets.argmax(1)
    if outputs.dim() < 2 or targets.is_floating_point() or tuple(targets.shape) != (shape[0], *shape[2:]):
        raise UsageError(
            f"A metric of classes needs outputs [examples, classes] and class numbers [examples]; the model gives {shape} "
            f"where the targets of a task are {tuple(targets.shape)}, {targets.dtype}."
        )
    return targets


def _r2(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the explained fraction of the targets' variance, ``1 − Σ(t − o)² / Σ(t − t̄)²``, averaged over outputs.

    If the targets do not vary, it is 1 for perfect outputs and 0 for others.
    """
    _check_shapes(outputs, targets, "The R²")
    outputs, targets = outputs.flatten(1), targets.flatten(1)
    residual = (targets - outputs).square().sum(0)
    total = (targets - targets.mean(0)).square().sum(0)
    constant = (residual == 0).to(residual.dtype)
    return torch.where(total > 0, 1 - residual / torch.where(total > 0, total, 1), constant).mean()


def _check_shapes(outputs: Tensor, targets: Tensor, what: str) -> None:
    if outputs.shape != targets.shape:  # torch's losses would broadcast them
        raise UsageError(
            f"{what} needs outputs and targets of the same shape; the model gives {tuple(outputs.shape)} where the "
            f"targets of a task are {tuple(targets.shape)}."
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


def widen(values: Tensor) -> Tensor:
    """Convert numbers to float32 or better."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _compare_classes(targets: Tensor, outputs: Tensor) -> Tensor:
    """Return the class membership ``[examples, classes]`` of each example, as 0 and 1 in the outputs' type."""
    classes = torch.arange(outputs.shape[-1], device=targets.device)
    return (targets.unsqueeze(-1) == classes).to(outputs.dtype)


LOSSES: dict[str, Loss] = {"cross_entropy": F.cross_entropy, "mse": _mse, "mae": _mae, "huber": _huber}
METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", _accuracy, higher_is_better=True),
    "balanced_accuracy": Metric("balanced_accuracy", _balanced_accuracy, higher_is_better=True),
    "auroc": Metric("auroc", _auroc, higher_is_better=True),
    "cross_entropy": Metric("cross_entropy", F.cross_entropy, higher_is_better=False),
    "mse": Metric("mse", _mse, higher_is_better=False),
    "mae": Metric("mae", _mae, higher_is_better=False),
    "huber": Metric("huber", _huber, higher_is_better=False),
    "r2": Metric("r2", _r2, higher_is_better=True),
}
_METRIC_OF = {"cross_entropy": "accuracy", "mse": "mse", "mae": "mae", "huber": "huber"}
_CLASSES_OF_TORCH: dict[Any, str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.MSELoss: "mse",
    nn.L1Loss: "mae",
    nn.HuberLoss: "huber",
}
_FUNCTIONS_OF_TORCH: dict[Any, str] = {
    F.cross_entropy: "cross_entropy",
    F.mse_loss: "mse",
    F.l1_loss: "mae",
    F.huber_loss: "huber",
}


def find_loss(loss: str | type | Loss) -> Loss:
    """Return a loss given by name, as a callable, or as a torch class that needs no arguments.

    Raises:
        UsageError: there is no such loss.
    """
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        return LOSSES[_CLASSES_OF_TORCH[loss]] if loss in _CLASSES_OF_TORCH else _create(loss)
    if callable(loss) and not isinstance(loss, type):
        return loss
    if not isinstance(loss, str):
        raise UsageError(f"A loss is a name ({', '.join(LOSSES)}) or a function of outputs and targets; got {loss!r}.")
    if loss not in LOSSES:
        raise UnknownNameError("loss", loss, LOSSES)
    return LOSSES[loss]


def _create(loss: type[nn.Module]) -> Loss:
    try:
        return loss()
    except TypeError as error:
        raise UsageError(f"loss = {loss.__name__} needs arguments; pass an instance. ({error})") from error


def find_loss_name(loss: str | type | Loss) -> str | None:
    """Return the name of a known loss, whatever its options; None for a custom loss."""
    if isinstance(loss, str):
        return loss
    known = [*((function, name) for name, function in LOSSES.items()), *_FUNCTIONS_OF_TORCH.items()]
    name = next((name for function, name in known if function is loss), None)
    return name or _CLASSES_OF_TORCH.get(loss if isinstance(loss, type) else type(loss))


def find_metric(metric: str | Metric | Loss | None, loss: str | type | Loss) -> Metric:
    """Find a metric by name, or wrap a function; by default, the metric for the loss.

    The default is the accuracy for classes, and the loss itself for numbers.

    Raises:
        UsageError: there is no such metric.
    """
    if isinstance(metric, Metric):
        return metric
    if metric is None:
        known = find_loss_name(loss)
        if known is None:
            return Metric("loss", find_loss(loss), higher_is_better=False)
        metric = _METRIC_OF.get(known, known)
    if isinstance(metric, str):
        if metric not in METRICS:
            raise UnknownNameError("metric", metric, METRICS)
        return METRICS[metric]
    if not callable(metric) or isinstance(metric, type):
        raise UsageError(
            f"A metric is a name ({', '.join(METRICS)}), a function of outputs and targets, or a metareg.Metric; got "
            f"{metric!r}."
        )
    name = getattr(metric, "__name__", type(metric).__name__).strip("<>")
    is_error = metric is loss or find_loss_name(metric) is not None
    if not is_error:
        log.warning(
            "Higher values of the metric '%s' count as better; for the opposite, use metareg.Metric('%s', function, "
            "higher_is_better=False).",
            name,
            name,
        )
    return Metric(name, metric, higher_is_better=not is_error)
