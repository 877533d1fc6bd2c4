"""A multilayer perceptron with embeddings for categories."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metareg import Field, PluginConfig, TaskSpec, hookimpl

__all__ = ["TableMLP", "TableNetwork"]


class TableMLP:
    """A multilayer perceptron for the columns of a table, with an embedding for each category; the last layer is the head.

    An input starts with the numbers, followed by a one-hot group for each categorical column. A group of zeros (a
    missing or unknown category) has the embedding zero.
    """

    contract = 1

    class Config(PluginConfig):
        hidden: list[int] = Field([64, 64], min_length=1, description="Widths of the hidden layers.")
        embedding: int = Field(4, ge=1, description="Size of a category's embedding, at most the number of categories.")
        categories: list[int] = Field(
            [], description="Number of categories of each categorical column; set by the task."
        )

    def __init__(self, config: Config) -> None:
        for name, values in (("hidden", config.hidden), ("categories", config.categories)):
            if any(value < 1 for value in values):
                raise ValueError(f"{name} must be positive, got {values}")
        self.config = config

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        return TableNetwork(spec, self.config.hidden, self.config.embedding, self.config.categories)


class TableNetwork(nn.Module):
    """``[examples, columns]`` → features ``[examples, hidden[-1]]`` → ``[examples, outputs]``."""

    def __init__(self, spec: TaskSpec, hidden: Sequence[int], embedding: int, categories: Sequence[int]) -> None:
        super().__init__()
        embed = Embeddings(math.prod(spec.input_shape), embedding, categories)
        layers: list[nn.Module] = [embed]
        width = embed.width
        for each in hidden:
            layers += [nn.Linear(width, each), nn.ReLU()]
            width = each
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, math.prod(spec.output_shape))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        return outputs


class Embeddings(nn.Module):
    """``[examples, inputs]`` → numbers and embeddings ``[examples, width]``."""

    def __init__(self, inputs: int, embedding: int, categories: Sequence[int]) -> None:
        super().__init__()
        numbers = inputs - sum(categories)
        if numbers < 0:
            raise ValueError(f"{inputs} inputs are too few for categories of the sizes {list(categories)}")
        self.sizes = [numbers, *categories]
        # Matrices instead of nn.Embedding: a one-hot group selects a row, and a missing category (zeros) selects none.
        self.tables = nn.ModuleList(nn.Linear(size, min(embedding, size), bias=False) for size in categories)
        self.width = numbers + sum(min(embedding, size) for size in categories)

    def forward(self, x: Tensor) -> Tensor:
        numbers, *groups = x.split(self.sizes, -1)
        return torch.cat([numbers, *(table(group) for table, group in zip(self.tables, groups, strict=True))], -1)
