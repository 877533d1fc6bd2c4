"""Warped gradients: additional layers that learn only in the outer loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metareg import hookimpl
from metareg_maml import MAML

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class WarpGrad:
    """MAML with warp layers ω that the inner loop uses but does not adapt; the outer loop learns θ and ω.

    Linear warps (T-Nets): every adapted linear or convolutional layer becomes y = T(Wx + b), where T mixes the layer's
    outputs (a convolution's channels, as a 1×1 convolution) and starts as the identity. T is constant within a task, so
    it can be multiplied into the layer: V = TW and c = Tb. The inner loop on W and b is then

        V₀ = TW,    Vₖ₊₁ = Vₖ − α T Tᵀ ∇_V ℓ(Vₖ; S),    and likewise for c:

    a learned metric, for any model and at the cost of MAML.

    Your own warps: if a model has submodules whose names begin with "warp", these are ω, in any form, and no T is added.

    Reference:
        Lee and Choi, Gradient-Based Meta-Learning with Learned Layerwise Metric and Subspace, ICML 2018, arXiv 1801.05558,
        T-net of §3 (no binary masks; settings of MAML: sinusoid α from 0.01 to 0.1, Omniglot 5-way α = 0.4 and one inner
        step). Flennerhag et al., Meta-Learning with Warped Gradient Descent, ICLR 2020, arXiv 1909.00025, §2, with the
        objective of MAML (Warp-MAML), not the one along trajectories.
    """

    contract = 1
    Config = MAML.Config
    step_examples = MAML.step_examples

    def __init__(self, config: MAML.Config) -> None:
        self.config = config

    @hookimpl
    def adapted_parameters(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if not _is_warp(name))

    @hookimpl
    def init_meta(self, model: nn.Module, adapted: tuple[str, ...]) -> dict[str, Tensor]:
        if any(_is_warp(name) for name, _ in model.named_parameters()):
            return {}
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _LAYERS)}
        weights = {name: layer.weight for name, layer in layers.items() if f"{name}.weight" in adapted}
        return {f"warp.{name}": torch.eye(len(w), dtype=w.dtype, device=w.device) for name, w in weights.items()}

    @hookimpl
    def start_task(self, params: dict[str, Tensor], meta: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: _multiply(_find_warp(meta, name), value) for name, value in params.items()}

    @hookimpl
    def inner_update(
        self, params: dict[str, Tensor], grads: dict[str, Tensor], meta: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        warped = {}
        for name, value in grads.items():
            warp = _find_warp(meta, name)
            warped[name] = value if warp is None else _multiply(warp @ warp.T, value)
        return {name: value - self.config.inner_lr * warped[name] for name, value in params.items()}


def _is_warp(name: str) -> bool:
    return any(part.startswith("warp") for part in name.split("."))


def _find_warp(meta: dict[str, Tensor], name: str) -> Tensor | None:
    """Return the matrix T of a parameter's layer, or None."""
    return meta.get(f"warp.{name.rpartition('.')[0]}")


def _multiply(matrix: Tensor | None, value: Tensor) -> Tensor:
    """Multiply a matrix by a weight ``[outputs, …]`` or a bias ``[outputs]``."""
    return value if matrix is None else torch.tensordot(matrix, value, 1)
