"""Meta-Curvature: learned matrices transform the gradient of every inner step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metareg import PluginConfig, hookimpl
from metareg_maml import MAML


class MetaCurvature:
    """MAML with a learned curvature: θₖ₊₁ = θₖ − α M(∇ℓ(θₖ; S)), where the outer loop learns θ and M.

    For a weight G ∈ ℝ^{out × in × d}, where d is the number of positions of a filter, M(G) = G ×₁ M_out ×₂ M_in ×₃
    M_filter: one matrix for each mode, so that the Kronecker product of three small matrices replaces a large one. A
    linear layer has no filter; vectors (biases, normalisation) are scaled entry by entry. All start as identities,
    where the method equals MAML.

    Reference:
        Park and Oliva, Meta-Curvature, NeurIPS 2019, arXiv 1902.03356, §3. Settings of the authors' code: those of MAML
        (sinusoid: 70,000 steps; Omniglot 5-way: α = 0.4, one inner step, 32 tasks a step, 60,000 steps).
    """

    contract = 1
    Config = MAML.Config
    step_examples = MAML.step_examples

    def __init__(self, config: MAML.Config) -> None:
        self.config = config

    @hookimpl
    def init_meta(self, model: nn.Module, adapted: tuple[str, ...]) -> dict[str, Tensor]:
        return _create_identities(model, adapted)

    @hookimpl
    def inner_update(
        self, params: dict[str, Tensor], grads: dict[str, Tensor], meta: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        transformed = _transform(grads, meta)
        return {name: value - self.config.inner_lr * transformed[name] for name, value in params.items()}


class Curvature:
    """The transformation M of Meta-Curvature for any algorithm: g ← M(g) in every inner step, also in evaluation.

    The algorithm decides what is adapted and how the transformed gradient is used; with MAML, this equals the algorithm
    `metacurvature`.

    Reference:
        Park and Oliva, Meta-Curvature, NeurIPS 2019, arXiv 1902.03356, §3.
    """

    contract = 1
    training_only = False

    class Config(PluginConfig):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def init_meta(self, model: nn.Module, adapted: tuple[str, ...]) -> dict[str, Tensor]:
        return _create_identities(model, adapted)

    @hookimpl
    def augment_inner_gradient(self, grads: dict[str, Tensor], meta: dict[str, Tensor]) -> dict[str, Tensor]:
        return _transform(grads, meta)


def _create_identities(model: nn.Module, adapted: tuple[str, ...]) -> dict[str, Tensor]:
    """Create one matrix for each mode of a weight, or one factor for each entry of a vector."""
    meta = {}
    for name in adapted:
        value = model.get_parameter(name)
        if value.dim() < 2:
            meta[f"scale.{name}"] = torch.ones_like(value)
            continue
        for mode, size in enumerate(_merge_places(value).shape):
            meta[f"mode{mode}.{name}"] = torch.eye(size, dtype=value.dtype, device=value.device)
    return {name: value.detach() for name, value in meta.items()}


def _transform(grads: dict[str, Tensor], meta: dict[str, Tensor]) -> dict[str, Tensor]:
    transformed = {}
    for name, value in grads.items():
        if value.dim() < 2:
            transformed[name] = meta[f"scale.{name}"] * value
            continue
        result = _merge_places(value)
        for mode in range(result.dim()):
            matrix = meta[f"mode{mode}.{name}"]
            result = torch.tensordot(matrix, result, dims=([1], [mode])).movedim(0, mode)
        transformed[name] = result.reshape(value.shape)
    return transformed


def _merge_places(value: Tensor) -> Tensor:
    """Reshape ``[out, in, …]`` to ``[out, in, d]``."""
    return value.flatten(2) if value.dim() > 2 else value
