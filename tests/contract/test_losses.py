"""Losses and metrics against the definitions of other libraries, alone and under vmap over tasks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from metareg import UsageError
from metareg.contract.losses import LOSSES, METRICS, find_metric


def draw(classes: int, examples: int = 40, tasks: int = 6) -> tuple[Tensor, Tensor]:
    """Return outputs, with ties for two classes, and targets without some classes in some tasks."""
    generator = torch.Generator().manual_seed(classes)
    outputs = torch.randn(tasks, examples, classes, generator=generator, dtype=torch.float64).mul(2)
    outputs = outputs.round() if classes == 2 else outputs
    targets = torch.randint(classes, (tasks, examples), generator=generator)
    targets[0][targets[0] == classes - 1] = 0
    return outputs, targets


def area(scores: list[float], positive: list[bool]) -> float | None:
    """Compute the area under the ROC curve by its definition: all pairs, ties count half."""
    pairs = [
        (a, b) for (a, p), (b, q) in itertools.product(zip(scores, positive, strict=True), repeat=2) if p and not q
    ]
    return sum(a > b or 0.5 * (a == b) for a, b in pairs) / len(pairs) if pairs else None


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_of_classes(classes: int) -> None:
    outputs, targets = draw(classes)
    for name in ("auroc", "balanced_accuracy", "accuracy", "cross_entropy"):
        mapped = torch.func.vmap(METRICS[name].function)(outputs, targets)
        for number, (o, t) in enumerate(zip(outputs, targets, strict=True)):
            logits, labels = o.numpy(), t.numpy()
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            if name == "auroc":
                areas = [area(p[:, k].round(12).tolist(), (labels == k).tolist()) for k in range(classes)]
                expected = np.mean([each for each in areas if each is not None] or [0.5])
            elif name == "balanced_accuracy":
                expected = np.mean([(logits.argmax(1) == labels)[labels == k].mean() for k in set(labels.tolist())])
            elif name == "accuracy":
                expected = (logits.argmax(1) == labels).mean()
            else:
                expected = -np.log(p[range(len(p)), labels]).mean()
            assert METRICS[name](o, t).item() == pytest.approx(expected)
            assert mapped[number].item() == pytest.approx(expected)


def test_auroc_does_not_saturate_and_knows_its_limits() -> None:
    """The probabilities of such large outputs are 1 in float32, but their order is kept."""
    outputs = torch.tensor([[0.0, 60], [0, 50], [0, 40], [0, 30]])
    assert METRICS["auroc"](outputs, torch.tensor([1, 1, 0, 0])).item() == 1
    assert METRICS["auroc"](outputs, torch.tensor([1, 1, 1, 1])).item() == 0.5


def test_metrics_of_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(2, 5, 30, 2, generator=generator, dtype=torch.float64)
    error = (outputs - targets).numpy()
    small = np.abs(error) < 1
    variance = (targets - targets.mean(1, keepdim=True)).square().sum(1).numpy()
    expected = {
        "mse": (error**2).mean((1, 2)),
        "mae": np.abs(error).mean((1, 2)),
        "huber": np.where(small, error**2 / 2, np.abs(error) - 0.5).mean((1, 2)),
        "r2": (1 - (error**2).sum(1) / variance).mean(1),
    }
    for name, values in expected.items():
        assert torch.func.vmap(METRICS[name].function)(outputs, targets).tolist() == pytest.approx(values.tolist())
        if name in LOSSES:
            assert LOSSES[name](outputs[0], targets[0]).item() == pytest.approx(values[0])
            assert find_metric(None, name).name == name
        with pytest.raises(UsageError, match="of the same shape"):
            METRICS[name](outputs[0], targets[0, :, 0])
    level = torch.ones(4, 1)
    assert METRICS["r2"](level, level).item() == 1
    assert METRICS["r2"](level + 1, level).item() == 0


@pytest.mark.parametrize("name", ["auroc", "balanced_accuracy", "cross_entropy", "mae", "huber", "r2"])
def test_metrics_of_half_precision_are_computed_in_single(name: str) -> None:
    outputs, targets = draw(2, 1000, 1)
    y = (
        targets[0]
        if METRICS[name].function.__name__ in ("_auroc", "_balanced_accuracy", "_cross_entropy")
        else outputs[0] / 3
    )
    o = (outputs[0] + 0.37).bfloat16()
    value = METRICS[name](o, y if y.dtype == torch.int64 else y.bfloat16())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(
        METRICS[name](o.double(), y if y.dtype == torch.int64 else y.bfloat16().double()).item()
    )
