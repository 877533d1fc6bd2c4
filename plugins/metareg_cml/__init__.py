"""CML: cooperative meta-learning with gradient augmentation."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from metareg import Field, PluginConfig, UsageError, hookimpl

_WIDEST = 128


class CML:
    """A co-learner: a second head ψ on the adapted body's features, which learns in the outer loop only.

    total = ℓ(head(θ_S; f), y_Q) + γ · ℓ(ψ(f), y_Q) with f = body(θ_S; x_Q). For the body the second term is a gradient
    augmentation that is learned rather than drawn at random; it flows through the inner loop as well, for f depends on
    θ_S. The co-learner is neither adapted nor used in the inner loop, and is dropped after training.

    On feature maps the co-learner is that of the authors' code: a block of 3×3 convolution, BatchNorm and ReLU, a second
    one with 2×2 max-pooling, and a linear layer, all with the channels of the map. On feature vectors, for which no code
    is public, it is two linear layers with ReLU and a linear layer.

    Reference:
        Shin, Han and Kim, Cooperative Meta-Learning with Gradient Augmentation, UAI 2024, PMLR 244:3198–3210,
        arXiv 2406.04639.
    """

    contract = 1

    class Config(PluginConfig):
        gamma: float | None = Field(
            None,
            ge=0,
            description="Weight γ of the co-learner's loss; unset, 1 for class targets as in the authors' code, and 0.05 "
            "for regression, where 1 does harm.",
            # A factor of 10 below the default for regression and above that for classes.
            json_schema_extra={"search": {"low": 0.005, "high": 10.0, "log": True}},
        )
        # Not searched: it decides the cost of a step.
        width: int | None = Field(
            None,
            ge=1,
            description="Hidden width of the co-learner; unset, that of the features (128 at most for vectors).",
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def init_meta(self, features: Tensor, outputs: Tensor) -> dict[str, Tensor]:
        if features.dim() not in (2, 4) or outputs.dim() != 2:
            raise UsageError(
                "CML needs features [examples, features] or [examples, channels, height, width] and outputs "
                f"[examples, outputs]; the model gives {tuple(features.shape)} and {tuple(outputs.shape)}."
            )
        shape, classes = tuple(features.shape[1:]), outputs.shape[-1]
        build = _build_for_maps if len(shape) == 3 else _build_for_vectors
        return {
            f"colearner.{name}": value for name, value in build(shape, self.config.width, classes).named_parameters()
        }

    @hookimpl
    def augment_outer_loss(
        self,
        features: Tensor,
        targets: Tensor,
        meta: dict[str, Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        metric: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        predictions = (_predict_maps if features.dim() == 4 else _predict_vectors)(meta, features)
        gamma = self.config.gamma
        if gamma is None:
            gamma = 0.05 if targets.is_floating_point() else 1.0
        return gamma * loss(predictions, targets), {"colearner_metric": metric(predictions.detach(), targets)}


def _build_for_vectors(shape: tuple[int, ...], width: int | None, outputs: int) -> nn.Module:
    features = shape[-1]
    width = width or min(features, _WIDEST)
    return nn.Sequential(
        nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def _predict_vectors(meta: dict[str, Tensor], features: Tensor) -> Tensor:
    for layer in (0, 2):
        features = _linear(meta, layer, features).relu()
    return _linear(meta, 4, features)


def _build_for_maps(shape: tuple[int, ...], width: int | None, outputs: int) -> nn.Module:
    channels, height, breadth = shape
    width = width or channels
    pool = _choose_pool(height, breadth)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(pool),
        nn.Flatten(),
        nn.Linear(width * (height // pool) * (breadth // pool), outputs),
    )


def _predict_maps(meta: dict[str, Tensor], features: Tensor) -> Tensor:
    for layer in (0, 3):
        features = F.conv2d(features, *_weights(meta, layer), padding=1)
        features = F.batch_norm(features, None, None, *_weights(meta, layer + 1), training=True).relu()
    return _linear(meta, 8, F.max_pool2d(features, _choose_pool(*features.shape[-2:])).flatten(1))


def _linear(meta: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
    return F.linear(x, *_weights(meta, layer))


def _weights(meta: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    return meta[f"colearner.{layer}.weight"], meta[f"colearner.{layer}.bias"]


def _choose_pool(height: int, breadth: int) -> int:
    """2×2 pooling, unless the map is a single row or column."""
    return 2 if min(height, breadth) >= 2 else 1
