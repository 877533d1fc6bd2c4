"""Small models and tasks that most tests use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from metareg import Episodes


class MLP(nn.Module):
    """2-6-5-1 with ReLU, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU())
            self.head = nn.Linear(5, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class ConvNet(nn.Module):
    """Two blocks with BatchNorm for 8×8 images, 5-way, in float64; the body ends before the second pooling."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            )  # fmt: skip
            self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5))
            for layer in (self.body[1], self.body[5]):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": MLP, "conv": ConvNet}
LOSSES = {"mlp": "mse", "conv": "cross_entropy"}


def episodes(net: str, tasks: int = 3, shots: int = 2, query: int = 3, seed: int = 1) -> Episodes:
    """Return random tasks for a network of `MODELS`: regression on two numbers, or 5-way images that differ by class."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if net == "mlp":
        slopes = normal(tasks, 1, 2)
        parts: list[Tensor] = []
        for examples in (4 * shots, 4 * query):
            x = 2 * normal(tasks, examples, 2)
            parts += [x, (x * slopes).sum(-1, keepdim=True).sin() * 2]
        return Episodes(*parts)
    prototypes = normal(tasks, 5, 1, 1, 8, 8)
    parts = []
    for examples in (shots, query):
        x = prototypes + 0.7 * normal(tasks, 5, examples, 1, 8, 8)
        y = torch.arange(5).repeat_interleave(examples).expand(tasks, -1)
        parts += [x.flatten(1, 2), y]
    return Episodes(*parts)


def tasks_of(batch: Episodes) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Split a stack into its tasks."""
    return list(zip(*batch.parts, strict=True))


def write_tables(folder: Path, slope: float = 2.0) -> Path:
    """Write eight tables with the columns x and y of straight lines."""
    folder.mkdir(parents=True)
    for number in range(8):
        rows = [f"{x / 4},{slope * x + number}" for x in range(12)]
        (folder / f"machine-{number}.csv").write_text("\n".join(["x,y", *rows]) + "\n")
    return folder
