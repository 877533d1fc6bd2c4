"""R2-D2: the head is a ridge regression of the support targets on their embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metareg import Field, PluginConfig, StepExample, TaskView, UsageError, hookimpl

_SCALE_FOR_CLASSES = 10.0


class R2D2:
    """Ridge regression in closed form as the base learner; the outer loop learns the embedding and the regularisation.

    The rows of X are the n support embeddings, each followed by a one, and the rows of Y are the targets (one-hot for
    classes). The outputs for an embedding x are α (x W) + β, where

        W = argmin ‖X W − Y‖² / n + λ ‖W‖² = (Xᵀ X + λ n I)⁻¹ Xᵀ Y = Xᵀ (X Xᵀ + λ n I)⁻¹ Y.

    The smaller of the two systems is solved; with few examples, that is the second one, by Woodbury's identity. α W and
    β are the values of the head's last `nn.Linear`. Inner steps have no effect, whatever their number. The outer loop
    learns the body, log λ, log α and, for regression, β, which does not affect cross-entropy. For a class without
    support examples, the output is 0 everywhere.

    The authors' code starts at λ = 50, and at α = 1e-4 on miniImageNet and 10 on Omniglot. It trains on tasks of 16 classes
    (Omniglot: 60), one task a step, with Adam at 5e-3, halved every 2,000 tasks.

    Reference:
        Bertinetto, Henriques, Torr and Vedaldi, Meta-learning with Differentiable Closed-Form Solvers, ICLR 2019,
        arXiv 1805.08136, "Efficient ridge regression base learners".
    """

    contract = 1
    adapts = "head"
    step_examples = (StepExample(param=2.0, grad=3.0, after=2.0),)

    class Config(PluginConfig):
        ridge: float = Field(
            1.0, gt=0, description="Initial λ of the ridge regression.", json_schema_extra={"search": {"factor": 10}}
        )
        scale: float | None = Field(
            None,
            gt=0,
            description="Initial factor α of the outputs; by default, 1 for numbers and 10 for classes, whose regression "
            "outputs are 0 to 1.",
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def init_meta(self, model: nn.Module) -> dict[str, Tensor]:
        zero = next(model.parameters()).new_zeros(())
        return {"log_ridge": zero + math.log(self.config.ridge), "log_scale": zero, "offset": zero}

    @hookimpl
    def adapted_parameters(self, output_layer: tuple[str, str | None]) -> tuple[str, ...]:
        return tuple(name for name in output_layer if name is not None)

    @hookimpl
    def start_task(self, params: dict[str, Tensor], meta: dict[str, Tensor], task: TaskView) -> dict[str, Tensor]:
        weight, bias = task.output_layer
        if bias is None:
            raise UsageError(f"R2-D2 needs a bias, but the layer of '{weight}' has none.")
        embeddings = task.embed(params, task.support_features(params)).to(params[weight])
        targets, offset, scale = task.support_y, meta["offset"], self.config.scale or 1.0
        if not targets.is_floating_point():
            classes = torch.arange(params[weight].shape[0], device=targets.device)
            targets, offset = (targets[:, None] == classes).to(embeddings), torch.zeros_like(offset)
            scale = self.config.scale or _SCALE_FOR_CLASSES
        rows = torch.cat([embeddings, torch.ones_like(embeddings[:, :1])], 1)
        solution = scale * meta["log_scale"].exp() * _solve_ridge(rows, targets, meta["log_ridge"].exp())
        return {**params, weight: solution[:-1].T, bias: solution[-1] + offset}

    @hookimpl
    def inner_gradient(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in params.items()}

    @hookimpl
    def inner_update(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(params)


def _solve_ridge(x: Tensor, y: Tensor, ridge: Tensor) -> Tensor:
    """Return W ``[features, outputs]`` for rows ``[examples, features]`` and targets ``[examples, outputs]``."""
    examples, features = x.shape
    shrinkage = ridge * examples * torch.eye(min(x.shape), dtype=x.dtype, device=x.device)
    if examples < features:
        return x.T @ torch.linalg.solve(x @ x.T + shrinkage, y)
    return torch.linalg.solve(x.T @ x + shrinkage, x.T @ y)
