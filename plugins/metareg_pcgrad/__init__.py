"""PCGrad: gradient surgery between the tasks of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from metareg import PluginConfig, hookimpl


class PCGrad:
    """Removes from each task's meta-gradient the parts that conflict with those of the others, before their mean.

    gᵢ ← gᵢ − min(0, gᵢ · gⱼ) / ‖gⱼ‖² gⱼ for every other task j, where gᵢ changes from one j to the next and gⱼ is task
    j's original gradient. The paper visits the other tasks in random order. Here, they follow in the order of the
    batch, which is equally random because tasks are drawn independently. The paper sums the results. The gradients of
    all tasks are in memory at once.

    Reference:
        Yu, Kumar, Gupta, Levine, Hausman and Finn, Gradient Surgery for Multi-Task Learning, NeurIPS 2020,
        arXiv 2001.06782, Algorithm 1.
    """

    contract = 1
    exact_gradient = False  # a projected gradient is not the gradient of an objective

    class Config(PluginConfig):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def combine_tasks(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        own = torch.cat([value.reshape(len(value), -1) for value in grads.values()], 1)
        squares = own.square().sum(1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
        projected = own
        for shift in range(1, len(own)):
            other = own.roll(-shift, 0)
            conflict = (projected * other).sum(1, keepdim=True).clamp(max=0)
            projected = projected - conflict / squares.roll(-shift, 0) * other
        parts = projected.mean(0).split([value[0].numel() for value in grads.values()])
        return {name: part.view(grads[name].shape[1:]) for name, part in zip(grads, parts, strict=True)}
