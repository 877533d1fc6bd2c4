"""MAML++: MAML with a loss after every inner step, and step sizes that are learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metareg import Field, PluginConfig, StepExample, hookimpl


class MAMLPlusPlus:
    """How to train your MAML: three of its measures, which make MAML with several inner steps stable.

    - Multi-step loss: the outer objective is Σₖ wₖ ℓ(θₖ; Q) over the inner steps k = 1 … S. The weights start equal; those
      of the earlier steps fall linearly to zero over the first `multi_step` training steps, and that of the last one
      grows by as much.
    - Learned step sizes: one for each parameter tensor and inner step, started at `inner_lr`.
    - Per-step BatchNorm: scale and shift of BatchNorm layers are not adapted; each inner step has its own, which learn in
      the outer loop.

    A task that takes more inner steps than training did goes on with the values of the last step. The measures that
    concern the outer loop alone are options of every algorithm or of an outer optimiser: derivative-order annealing
    (train with first_order=True first) and the cosine schedule of the outer step size.

    Reference:
        Antoniou, Edwards and Storkey, How to train your MAML, ICLR 2019, arXiv 1810.09502, §4. The authors keep running
        statistics for each step; here statistics are those of the batch.
    """

    contract = 1
    step_examples = (
        StepExample(param=2.0, grad=3.0, after=1.7, config={"inner_lr": 0.1}),
        StepExample(param=2.0, grad=3.0, after=1.7, config={"inner_lr": 0.1}, step=2),
    )

    class Config(PluginConfig):
        inner_lr: float = Field(
            0.01,
            gt=0,
            description="Initial step size of every tensor and inner step.",
            json_schema_extra={"search": {"factor": 10}},
        )
        multi_step: int = Field(
            5000, ge=0, description="Training steps over which the loss moves to the last inner step; 0 for at once."
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def init_meta(self, model: nn.Module, inner_steps: int) -> dict[str, Tensor]:
        norms = {
            f"{name}.{part}" if name else part
            for name, layer in model.named_modules()
            if isinstance(layer, _BatchNorm)
            for part, _ in layer.named_parameters()
        }
        meta = {}
        for name, value in model.named_parameters():
            if name in norms:
                meta[f"norm.{name}"] = value.detach().repeat(inner_steps, *[1] * value.dim())
            else:
                meta[f"step_size.{name}"] = torch.full((inner_steps,), self.config.inner_lr, dtype=value.dtype)
        return meta

    @hookimpl
    def inner_update(
        self, params: dict[str, Tensor], grads: dict[str, Tensor], meta: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        updated = {}
        for name, value in params.items():
            if f"norm.{name}" in meta:
                updated[name] = _of_step(meta[f"norm.{name}"], step)
            else:
                updated[name] = value - _of_step(meta[f"step_size.{name}"], step) * grads[name]
        return updated

    @hookimpl
    def outer_loss_weights(self, inner_steps: int, training_step: int) -> list[float] | None:
        if training_step >= self.config.multi_step:
            return None
        earlier = (1 - training_step / self.config.multi_step) / inner_steps
        return [earlier] * (inner_steps - 1) + [1 - earlier * (inner_steps - 1)]


def _of_step(values: Tensor, step: int) -> Tensor:
    return values[min(step, values.shape[0] - 1)]
