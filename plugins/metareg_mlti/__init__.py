"""MLTI: new training tasks interpolated between two tasks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metareg import Episodes, Field, PluginConfig, UsageError, hookimpl


class MLTI:
    """Mixes each training task with another one, support set with support set and query set with query set.

    The other task is, with probability 1/2 each, the next one of the batch or the task itself. With λ ~ Beta(a, a), one
    for each task, x = λ x₁ + (1 − λ) x₂. Class numbers have no meaning across tasks: each class is paired with a random
    class of the other task, and the pair is a class of the new task with the same number. Regression targets are mixed
    like inputs, y = λ y₁ + (1 − λ) y₂, for examples that are paired at random.

    The paper mixes inputs or hidden features, and uses CutMix on images with ProtoNet; this plugin mixes whole inputs.
    Settings: a = 2 (miniImageNet, ISIC, DermNet; 25 tasks a step).

    Reference:
        Yao, Zhang and Finn, Meta-Learning with Fewer Tasks through Task Interpolation, ICLR 2022, arXiv 2106.02695; the
        pairing is that of the authors' code.
    """

    contract = 1

    class Config(PluginConfig):
        beta: float = Field(
            2.0,
            gt=0,
            description="Both parameters a of the Beta distribution of λ.",
            json_schema_extra={"search": {"low": 0.2, "high": 5.0, "log": True}},
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def augment_episodes(self, episodes: Episodes, generator: torch.Generator) -> Episodes:
        if not isinstance(episodes.support_x, Tensor) or not episodes.support_x.is_floating_point():
            raise UsageError("The augmenter 'mlti' can mix only inputs that are one tensor of real numbers.")
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        count = len(episodes)
        shares = random.beta(self.config.beta, self.config.beta, count)
        others = (np.arange(count) + random.integers(2, size=count)) % count
        mixed = [self._mix(episodes, *pair, random) for pair in zip(range(count), others, shares, strict=True)]
        return Episodes(*(torch.stack(parts) for parts in zip(*mixed, strict=True)))

    def _mix(
        self, episodes: Episodes, task: int, other: int, share: float, random: np.random.Generator
    ) -> tuple[Tensor, ...]:
        """Return the support and query set of a task mixed with another one."""
        own, partner = episodes.unstack(task), episodes.unstack(other)
        classes = None if own[1].is_floating_point() else random.permutation(int(own[1].max()) + 1)
        mixed: list[Tensor] = []
        for x, y, other_x, other_y in ((*own[:2], *partner[:2]), (*own[2:], *partner[2:])):
            if classes is None:
                chosen = random.permutation(len(y))
            else:
                chosen = _pair_classes(y.cpu().numpy(), other_y.cpu().numpy(), classes, random)
            numbers = torch.as_tensor(chosen, device=y.device)
            mixed.append(torch.lerp(other_x[numbers], x, share))
            mixed.append(torch.lerp(other_y[numbers], y, share) if classes is None else y)
        return tuple(mixed)


def _pair_classes(own: np.ndarray, other: np.ndarray, classes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return, for each example of one task, the number of an example of the other in the class that `classes` gives."""
    numbers = np.empty(len(own), dtype=np.int64)
    for number, partner in enumerate(classes):
        mine, theirs = np.flatnonzero(own == number), random.permutation(np.flatnonzero(other == partner))
        if len(mine) > 0 == len(theirs):
            raise UsageError("The augmenter 'mlti' needs examples of every class in each support and query set.")
        numbers[mine] = np.resize(theirs, len(mine))  # repeats examples if there are fewer
    return numbers
