"""MetaMix: query examples mixed with support examples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metareg import Episodes, Field, PluginConfig, UsageError, hookimpl


class MetaMix:
    """Mixes each query example of a training task with a support example of the task, inputs and targets.

    x = λ x_Q + (1 − λ) x_S and y = λ y_Q + (1 − λ) y_S with λ ~ Beta(a, a), one for each task. For class targets, y
    contains the probabilities of the classes: their cross-entropy is λ ℓ(·, y_Q) + (1 − λ) ℓ(·, y_S), and the logged
    accuracy counts the more probable class. Each support example is used once before any is used again. The support set
    does not change.

    The paper and its code mix inputs or hidden features, drawn for each task; this plugin mixes inputs. Settings: a =
    2.

    Reference:
        Yao, Huang, Zhang, Wei, Tian, Zou, Huang and Li, Improving Generalization in Meta-learning via Task Augmentation,
        ICML 2021, arXiv 2007.13040, MetaMix.
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
        support_x, support_y, query_x, query_y = episodes.parts
        if not isinstance(query_x, Tensor) or not query_x.is_floating_point():
            raise UsageError("The augmenter 'mixup' can mix only inputs that are one tensor of real numbers.")
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        shares = torch.from_numpy(random.beta(self.config.beta, self.config.beta, len(episodes))).to(query_x)
        sizes = support_y.shape[1], query_y.shape[1]
        partners = torch.stack([_draw_partners(*sizes, generator) for _ in shares]).to(query_x.device)
        mixed_x = _mix(query_x, support_x, partners, shares)
        if not query_y.is_floating_point():
            classes = torch.arange(int(support_y.max()) + 1, device=query_x.device)
            support_y, query_y = ((y[..., None] == classes).to(query_x) for y in (support_y, query_y))
        mixed_y = _mix(query_y, support_y, partners, shares)
        return Episodes(support_x, episodes.support_y, mixed_x, mixed_y)


def _draw_partners(support: int, query: int, generator: torch.Generator) -> Tensor:
    """Draw the number of a support example for each query example ``[query]``."""
    rounds = -(-query // support)
    return torch.cat([torch.randperm(support, generator=generator) for _ in range(rounds)])[:query]


def _mix(own: Tensor, others: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """Return λ own + (1 − λ) partner for each example, with one λ per task."""
    inner = [1] * (own.dim() - 2)
    chosen = others.take_along_dim(partners.view(*partners.shape, *inner), 1)
    return torch.lerp(chosen, own, shares.view(-1, 1, *inner))
