"""A task source, models and an algorithm for tests of learners."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from metareg import Episodes, PluginConfig, hookimpl
from samples import episodes

AUGMENTERS = [("cml", {"gamma": 0.5}), "dropgrad", ("gradient-noise", {"where": "outer"})]


class Source:
    """Tasks for one of the sample networks."""

    def __init__(self, net: str = "mlp", tasks: int = 400) -> None:
        self.batch = episodes(net, tasks, seed=11)

    def episodes(self, split: str, indices: Sequence[int]) -> Episodes:
        offset = {"train": 0, "validation": 100, "test": 200}[split]
        numbers = [offset + index % 100 for index in indices]
        return Episodes(*(part[numbers] for part in self.batch.parts))


class Plain(nn.Module):
    """A model without submodules named body and head."""

    def __init__(self, last: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 5), nn.Linear(5, 5), last

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.second(hidden) if self.last else self.second(hidden).tanh()


class TiedBody(nn.Module):
    """A model whose body uses one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        self.head = nn.Linear(2, 1)
        self.body[2].weight = self.body[0].weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class SignMAML:
    """An algorithm that no package installs."""

    class Config(PluginConfig):
        inner_lr: float = 0.01

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - self.config.inner_lr * grads[name].sign() for name, value in params.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
