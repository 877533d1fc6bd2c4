"""Small models and tasks on which the checks run, and the comparisons that they make."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from metareg.contract.config import PluginConfig
from metareg.contract.episodes import Episodes
from metareg.contract.hookspecs import hookimpl
from metareg.contract.tasks import TaskSpec
from metareg.learner.learner import MetaLearner
from metareg.registry.dispatch import find_hook
from metareg.registry.plugins import Plugin, resolve
from metareg.testing._check import fail
from metareg.util.seeding import create_generator, use_seed
from metareg.util.torch_internals import tree_flatten, tree_map

__all__ = [
    "Bench",
    "Descent",
    "Given",
    "benches_for",
    "built",
    "channels_last",
    "difference",
    "equal",
    "global_randomness",
    "snapshot",
]

TASKS, SUPPORT, QUERY, STEPS = 3, 5, 4, 2


class Descent:
    """The algorithm beside which augmenters, tasks, models and observers are checked: plain gradient steps."""

    name = "descent"

    class Config(PluginConfig):
        inner_lr: float = Field(0.1, gt=0, description="Step size of the inner loop.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - self.config.inner_lr * grads[name] for name, value in params.items()}


@dataclass(frozen=True)
class Given:
    """Tasks in a row as a task source, which begins again after the last."""

    tasks: Episodes

    def episodes(self, indices: Sequence[int]) -> Episodes:
        which = [index % len(self.tasks) for index in indices]
        return Episodes(*tree_map(lambda leaf: leaf[which], self.tasks.parts))


@dataclass(frozen=True)
class Bench:
    """A model and the tasks that go with it."""

    name: str
    model: nn.Module
    episodes: Episodes
    loss: str

    def learner(
        self,
        algorithm: Plugin | type,
        augmenters: Sequence[Plugin | type] = (),
        dtype: Any = torch.float64,
        **options: Any,
    ) -> MetaLearner:
        """A learner on this model, serial and with several inner steps unless `options` say otherwise."""
        given: dict[str, Any] = {"strategy": "serial", "inner_steps": STEPS} | options
        learner = MetaLearner(copy.deepcopy(self.model).to(dtype), algorithm, list(augmenters), loss=self.loss, **given)
        learner.initialize(self.episodes.to("cpu", dtype).unstack(0)[0])
        return learner


def benches_for(algorithm: Plugin | type) -> list[Bench]:
    """The benches on which an algorithm runs: the model that it needs, or vectors and images.

    Vectors for finite differences, images with BatchNorm and feature maps.
    """
    needed = getattr(algorithm.instance if isinstance(algorithm, Plugin) else algorithm, "default_model", None)
    vectors = _vectors()
    if needed is not None:
        return [Bench("vectors", built(needed, TaskSpec((3,), (2,))), vectors.episodes, vectors.loss)]
    return [vectors, _images()]


def _vectors() -> Bench:
    with use_seed(0, "testing", "vectors") as generator:
        model = nn.Sequential()
        model.add_module("body", nn.Sequential(nn.Linear(3, 6), nn.Tanh()))
        model.add_module("head", nn.Linear(6, 2))
        support_x, query_x, common, own = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((TASKS, SUPPORT, 3), (TASKS, QUERY, 3), (3, 2), (TASKS, 3, 2))
        )
    maps = common + 0.3 * own  # related tasks: there is something to learn from one for another
    return Bench("vectors", model, Episodes(support_x, support_x @ maps, query_x, query_x @ maps), "mse")


def _images() -> Bench:
    """Images as task plugins draw them, channels last, and large enough for the gradients of convolutions to come so too.

    The model is smooth: a unit that rounding in float32 switches on or off would change gradients by some percent.
    """
    with use_seed(0, "testing", "images") as generator:
        model = nn.Sequential()
        model.add_module("body", nn.Sequential(_Scaled(), *_block(3, 8), nn.AvgPool2d(2), *_block(8, 8)))
        model.add_module("head", nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 49, 2)))
        xs = [
            channels_last(torch.randn(TASKS, n, 3, 28, 28, generator=generator, dtype=torch.float64))
            for n in (SUPPORT, QUERY)
        ]
    ys = [torch.arange(n).remainder(2).expand(TASKS, n).clone() for n in (SUPPORT, QUERY)]
    return Bench("images", model, Episodes(xs[0], ys[0], xs[1], ys[1]), "cross_entropy")


def _block(before: int, after: int) -> Sequence[nn.Module]:
    return nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.SiLU()


class _Scaled(nn.Module):
    """A buffer that a forward reads, as normalisation constants of images are."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def channels_last(images: Tensor) -> Tensor:
    """Images ``[…, channels, height, width]`` with the memory layout that task plugins give them."""
    return images.movedim(-3, -1).clone(memory_format=torch.contiguous_format).movedim(-1, -3)


def built(model: str | type | Plugin, spec: TaskSpec) -> nn.Module:
    """The model of a plugin, the same each time."""
    plugin = resolve("models", model)
    build = find_hook(plugin, "build")
    if build is None:
        fail(f"The {plugin.label} implements no hook 'build'.", "implement build(spec, generator) -> nn.Module.")
    with use_seed(0, "testing", "model") as generator:
        module: nn.Module = build(spec=spec, generator=generator)
    return module


# ---------------------------------------------------------------------------------------------------------- comparisons


def snapshot(tree: Any) -> Any:
    """A copy that later changes in place do not reach; a module stands for its state."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        if isinstance(leaf, nn.Module):
            return {name: value.detach().clone() for name, value in leaf.state_dict().items()}
        return leaf

    return tree_map(copied, tree)


def equal(a: Any, b: Any) -> bool:
    """Whether two pytrees have the same structure and the same bits."""
    first, structure = tree_flatten(a)
    second, other = tree_flatten(b)
    if structure != other:
        return False
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or bool(x == y)
        for x, y in zip(first, second, strict=True)
    )


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference between two dicts of tensors relative to the largest entry, and where it is."""
    scale = max(1e-12, *(value.abs().max().item() for value in a.values()))
    worst = {name: (a[name] - b[name]).abs().max().item() / scale for name in a}
    name = max(worst, key=lambda each: worst[each] if worst[each] == worst[each] else float("inf"))
    return worst[name], name


@contextmanager
def global_randomness() -> Iterator[list[str]]:
    """Restores the global random generators after the block, and says which of them it moved."""
    moved: list[str] = []
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield moved
        after = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
        if not torch.equal(before[0], after[0]):
            moved.append("torch")
        if not all(np.array_equal(x, y) for x, y in zip(before[1], after[1], strict=True)):
            moved.append("numpy")
        if before[2] != after[2]:
            moved.append("random")
    finally:
        torch.random.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def generator(*labels: str | int) -> torch.Generator:
    """A generator that is the same in every call."""
    return create_generator(0, "testing", *labels)
