"""Small models, tasks and learners for the checks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from metareg.contract.config import PluginConfig
from metareg.contract.episodes import Episodes
from metareg.contract.hookspecs import hookimpl
from metareg.contract.tasks import TaskSpec
from metareg.learner import model_plugin
from metareg.learner.learner import MetaLearner
from metareg.registry.plugins import Plugin, resolve
from metareg.testing.check import Subject
from metareg.util.seeding import create_generator, use_seed
from metareg.util.torch_internals import tree_map

__all__ = [
    "Bench",
    "Descent",
    "Pair",
    "RepeatedTasks",
    "build_model",
    "draw_noise",
    "new_generator",
    "to_channels_last",
]

TASKS, SUPPORT, QUERY, STEPS = 3, 5, 4, 2


class Descent:
    """Plain gradient steps: the algorithm used to check augmenters, tasks, models and observers."""

    name = "descent"

    class Config(PluginConfig):
        inner_lr: float = Field(0.1, gt=0, description="Step size of the inner loop.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def inner_update(self, params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value - self.config.inner_lr * grads[name] for name, value in params.items()}


@dataclass(frozen=True)
class RepeatedTasks:
    """A task source that cycles through a list of tasks."""

    tasks: Episodes

    def episodes(self, indices: Sequence[int]) -> Episodes:
        which = [index % len(self.tasks) for index in indices]
        return Episodes(*tree_map(lambda leaf: leaf[which], self.tasks.parts))


@dataclass(frozen=True)
class Bench:
    """A model and matching tasks."""

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
        """Create a learner on this model, by default serial and with several inner steps."""
        given: dict[str, Any] = {"strategy": "serial", "inner_steps": STEPS} | options
        learner = MetaLearner(copy.deepcopy(self.model).to(dtype), algorithm, list(augmenters), loss=self.loss, **given)
        learner.initialize(tree_map(lambda leaf: leaf[0].to(dtype), self.episodes.support_x))
        return learner


@dataclass(frozen=True)
class Pair:
    """An algorithm with augmenters, to be trained in a check."""

    algorithm: Plugin | type
    augmenters: tuple[Plugin, ...] = ()

    @classmethod
    def of(cls, subject: Subject, **config: Any) -> Pair:
        """Create the pair for a subject; an augmenter gets plain gradient steps as its algorithm."""
        plugin = subject.resolve(**config)
        return cls(plugin) if subject.kind == "algorithms" else cls(Descent, (plugin,))

    @property
    def benches(self) -> list[Bench]:
        """Return the benches for the pair: vectors for finite differences, and images with BatchNorm and feature maps.

        If the algorithm has a default model, only vectors with that model. If a plugin declares `targets`, only those
        targets.
        """
        plugins = [each.instance if isinstance(each, Plugin) else each for each in (self.algorithm, *self.augmenters)]
        targets = next((found for each in plugins if (found := getattr(each, "targets", None))), None)
        vectors = _classes() if targets == "classes" else _vectors()
        needed = getattr(plugins[0], "default_model", None)
        if needed is not None:
            return [replace(vectors, model=build_model(needed, TaskSpec((3,), (2,))))]
        return [vectors] if targets == "numbers" else [vectors, _images()]

    def learner(self, bench: Bench, **options: Any) -> MetaLearner:
        return bench.learner(self.algorithm, self.augmenters, **options)

    @property
    def frozen_bench(self) -> Bench:
        """Return the first bench, with a frozen layer in front."""
        bench = self.benches[0]
        model = copy.deepcopy(bench.model)
        with use_seed(0, "testing", "frozen"):
            frozen = nn.Linear(3, 3).to(torch.float64).requires_grad_(False)
        model.body = nn.Sequential(OrderedDict(front=frozen, back=model.get_submodule("body")))
        return replace(bench, model=model)

    @property
    def label(self) -> str:
        return " with ".join(getattr(each, "name", "None") for each in (self.algorithm, *self.augmenters))


def _vectors() -> Bench:
    with use_seed(0, "testing", "vectors") as generator:
        model = nn.Sequential()
        model.add_module("body", nn.Sequential(nn.Linear(3, 6), nn.Tanh()))
        model.add_module("head", nn.Linear(6, 2))
        support_x, query_x, common, own = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((TASKS, SUPPORT, 3), (TASKS, QUERY, 3), (3, 2), (TASKS, 3, 2))
        )
    maps = common + 0.3 * own  # related tasks, so that tasks help each other
    return Bench("vectors", model, Episodes(support_x, support_x @ maps, query_x, query_x @ maps), "mse")


def _classes() -> Bench:
    """Return the same vectors in two classes, by the sign of their targets."""
    vectors = _vectors()
    support_x, support_y, query_x, query_y = vectors.episodes.parts
    # Every support set contains both classes.
    ranks = [y[..., 0].argsort(1).argsort(1) for y in (support_y, query_y)]
    labels = [(rank >= rank.shape[1] // 2).long() for rank in ranks]
    return replace(vectors, episodes=Episodes(support_x, labels[0], query_x, labels[1]), loss="cross_entropy")


def _images() -> Bench:
    """Return channels-last images like those of task plugins, large enough for channels-last convolution gradients.

    The model is smooth, because a ReLU that float32 rounding switches on or off would change gradients by some percent.
    """
    with use_seed(0, "testing", "images") as generator:
        model = nn.Sequential()
        model.add_module("body", nn.Sequential(_Scaled(), *_block(3, 8), nn.AvgPool2d(2), *_block(8, 8)))
        model.add_module("head", nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 49, 2)))
        xs = [
            to_channels_last(torch.randn(TASKS, n, 3, 28, 28, generator=generator, dtype=torch.float64))
            for n in (SUPPORT, QUERY)
        ]
    ys = [torch.arange(n).remainder(2).expand(TASKS, n).clone() for n in (SUPPORT, QUERY)]
    return Bench("images", model, Episodes(xs[0], ys[0], xs[1], ys[1]), "cross_entropy")


def _block(before: int, after: int) -> Sequence[nn.Module]:
    return nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.SiLU()


class _Scaled(nn.Module):
    """Reads a buffer in forward, like the normalisation constants of images."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def to_channels_last(images: Tensor) -> Tensor:
    """Convert images ``[…, channels, height, width]`` to the memory layout that task plugins use."""
    return images.movedim(-3, -1).clone(memory_format=torch.contiguous_format).movedim(-1, -3)


def build_model(model: str | type | Plugin, spec: TaskSpec, seed: int = 0) -> nn.Module:
    """Build a plugin's model, with the same weights each time."""
    return model_plugin.build_model(resolve("models", model), spec, seed)


def draw_noise(learner: MetaLearner, stage: str, names: Iterable[str], *labels: int) -> dict[str, Any]:
    """Draw the noise of an initialized learner's plugins for a training step; the first label is the step."""
    meta, config = learner.meta_parameters, learner.config
    params = {name: meta[name] for name in names}
    like = next(iter(meta.values()))
    drawn = learner.stages.draw_noise(stage, params, like, config.inner_steps, config.seed, [labels], labels[0])
    return drawn[0] if drawn else {}


def new_generator(*labels: str | int) -> torch.Generator:
    """Create a generator with a fixed seed for these labels."""
    return create_generator(0, "testing", *labels)
