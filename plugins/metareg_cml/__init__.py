"""CML: cooperative meta-learning with gradient augmentation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metareg import Field, PluginConfig, UsageError, hookimpl

log = logging.getLogger("metareg")

_WIDEST = 128


class CML:
    """A co-learner: a second head ψ on the adapted body's features, which learns in the outer loop only.

    total = ℓ(head(θ_K; f), y_Q) + γ · ℓ(ψ(f), y_Q) with f = body(θ_K; x_Q). For the body, the second term is a gradient
    augmentation that is learned instead of drawn at random. It also flows through the inner loop, because f depends on
    θ_K. The co-learner is neither adapted nor used in the inner loop, and is dropped after training.

    On feature maps, the co-learner is that of the authors' code: a block of 3×3 convolution, BatchNorm and ReLU, a
    second one with 2×2 max-pooling, and a linear layer, all with the channels of the map. The paper's Table 8 has 0 to
    4 blocks. On feature vectors, it is the one that the paper uses for regression and graphs: a linear layer with ReLU,
    and a linear layer.

    If the inner loop does not change the body (ANIL), f does not depend on the task. If labels are permuted from task
    to task, ψ then stays at chance.

    With ``predictor="colearner"``, it stays and predicts in evaluation and in adapted modules: the paper's CML†. In
    evaluation, the inner loop then adapts only the body, with the head's support loss, as in the authors' code (Eq. 9
    of the paper uses the co-learner's). Training is the same.

    With ``frozen=True``, ψ keeps its initial values, the paper's control for random noise (Fig. 3a).

    Reference:
        Shin, Han and Kim, Cooperative Meta-Learning with Gradient Augmentation, UAI 2024, PMLR 244:3198–3210,
        arXiv 2406.04639.
    """

    contract = 1

    class Config(PluginConfig):
        gamma: float | None = Field(
            None,
            ge=0,
            description="Weight γ of the co-learner's loss; by default, 1 on feature maps, as in the authors' code, and 0.2 "
            "on vectors, as in the paper.",
            # From well below the default for vectors (0.013 was best on sinusoids) to ten times the default for maps.
            json_schema_extra={"search": {"low": 0.005, "high": 10.0, "log": True}},
        )
        # Not searched, because they determine the cost of a step.
        depth: int | None = Field(
            None,
            ge=0,
            le=4,
            description="Hidden layers of the co-learner; by default, 2 convolutions on feature maps and 1 linear layer on "
            "vectors.",
        )
        width: int | None = Field(
            None,
            ge=1,
            description="Hidden width of the co-learner; by default, that of the features (at most 128 for vectors).",
        )
        # Not searched, because it is for comparisons.
        predictor: Literal["head", "colearner"] = Field(
            "head",
            description="Predictor in evaluation: the adapted head, or the co-learner on the adapted body (CML†).",
        )
        # Not searched, because it is a control.
        frozen: bool = Field(False, description="Keep the co-learner at its initial values, as a control.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def training_only(self) -> bool:
        """Whether the co-learner is dropped after training."""
        return self.config.predictor == "head"

    @hookimpl
    def init_meta(
        self, features: Tensor, outputs: Tensor, adapted: tuple[str, ...], body: tuple[str, ...]
    ) -> dict[str, Tensor]:
        if features.dim() not in (2, 4) or outputs.dim() != 2:
            raise UsageError(
                "CML needs features [examples, features] or [examples, channels, height, width] and outputs "
                f"[examples, outputs]; the model gives {tuple(features.shape)} and {tuple(outputs.shape)}."
            )
        if not set(adapted) & set(body):
            log.warning(
                "The co-learner of CML cannot learn anything about a task here: it sees only the body's features, and "
                "this algorithm does not change the body."
            )
        build = _build_for_maps if features.dim() == 4 else _build_for_vectors
        colearner = build(features.shape[1:], self._get_depth(features), self.config.width, outputs.shape[-1])
        return {f"colearner.{name}": value for name, value in colearner.named_parameters()}

    @hookimpl
    def augment_outer_loss(
        self,
        features: Tensor,
        targets: Tensor,
        meta: dict[str, Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        metric: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.config.frozen:
            meta = {name: value.detach() for name, value in meta.items()}
        predictions = self._apply(meta, features)
        gamma = self.config.gamma
        if gamma is None:
            gamma = 1.0 if features.dim() == 4 else 0.2
        return gamma * loss(predictions, targets), {"colearner_metric": metric(predictions.detach(), targets)}

    @hookimpl
    def predict(self, features: Tensor, support_features: Tensor | None, meta: dict[str, Tensor]) -> Tensor:
        return self._apply(meta, features, support_features)

    def _apply(self, meta: dict[str, Tensor], features: Tensor, support_features: Tensor | None = None) -> Tensor:
        """Return the co-learner's outputs; BatchNorm uses the statistics of `support_features` if they are given."""
        depth = self._get_depth(features)
        if features.dim() == 2:
            return _predict_vectors(meta, features, depth)
        if support_features is None:
            return _predict_maps(meta, features, depth, len(features))
        both = torch.cat([support_features, features])
        return _predict_maps(meta, both, depth, len(support_features))[len(support_features) :]

    def _get_depth(self, features: Tensor) -> int:
        if self.config.depth is not None:
            return self.config.depth
        return 2 if features.dim() == 4 else 1


def _build_for_vectors(shape: tuple[int, ...], depth: int, width: int | None, outputs: int) -> nn.Module:
    (features,) = shape
    width = width or min(features, _WIDEST)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, outputs))


def _predict_vectors(meta: dict[str, Tensor], features: Tensor, depth: int) -> Tensor:
    for layer in range(depth):
        features = _linear(meta, 2 * layer, features).relu()
    return _linear(meta, 2 * depth, features)


def _build_for_maps(shape: tuple[int, ...], depth: int, width: int | None, outputs: int) -> nn.Module:
    channels, height, breadth = shape
    pool = _choose_pool(height, breadth)
    layers: list[nn.Module] = []
    for _ in range(depth):
        before, channels = channels, width or channels
        norm = nn.BatchNorm2d(channels, track_running_stats=False)
        layers += [nn.Conv2d(before, channels, 3, padding=1), norm, nn.ReLU()]
    flat = channels * (height // pool) * (breadth // pool)
    return nn.Sequential(*layers, nn.MaxPool2d(pool), nn.Flatten(), nn.Linear(flat, outputs))


def _predict_maps(meta: dict[str, Tensor], features: Tensor, depth: int, rows: int) -> Tensor:
    """Return the outputs for maps, with BatchNorm statistics of the first `rows`."""
    for layer in range(0, 3 * depth, 3):
        features = F.conv2d(features, *_weights(meta, layer), padding=1)
        features = _normalise(features, *_weights(meta, layer + 1), rows).relu()
    return _linear(meta, 3 * depth + 2, F.max_pool2d(features, _choose_pool(*features.shape[-2:])).flatten(1))


def _normalise(features: Tensor, weight: Tensor, bias: Tensor, rows: int) -> Tensor:
    if rows == len(features):
        return F.batch_norm(features, None, None, weight, bias, training=True)
    variance, mean = torch.var_mean(features[:rows], (0, 2, 3), correction=0, keepdim=True)
    return (features - mean) * (variance + 1e-5).rsqrt() * weight[:, None, None] + bias[:, None, None]


def _linear(meta: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
    return F.linear(x, *_weights(meta, layer))


def _weights(meta: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    return meta[f"colearner.{layer}.weight"], meta[f"colearner.{layer}.bias"]


def _choose_pool(height: int, breadth: int) -> int:
    """Return the pooling size: 2×2, unless the map is a single row or column."""
    return 2 if min(height, breadth) >= 2 else 1
