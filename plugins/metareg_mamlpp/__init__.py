"""MAML++: MAML with a loss after every inner step, learned step sizes, and BatchNorm parameters of each step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metareg import Field, PluginConfig, StepExample, TaskView, hookimpl

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class MAMLPlusPlus:
    """How to train your MAML: techniques that stabilise MAML with several inner steps.

    - Multi-step loss: the outer objective is Σₖ wₖ ℓ(θₖ; Q) over the inner steps k = 1 … K. The weights start equal.
      Over the first `multi_step` training steps, those of the earlier steps fall linearly to zero, and that of the last
      step grows accordingly.
    - Learned step sizes: θₖ₊₁ = θₖ − αₖ ∇ℓ(θₖ; S) with a separate αₖ for each parameter tensor and inner step, which
      starts at `inner_lr`.
    - Per-step BatchNorm: scale and shift of BatchNorm layers are not adapted. Each inner step has its own, used for its
      gradient and for the query set after it; they learn in the outer loop.
    - Derivative-order annealing: in the first `first_order_steps` training steps, the inner gradients are constants for
      the outer loop.

    Inner steps beyond those of training use the values of the last step.

    Reference:
        Antoniou, Edwards and Storkey, How to train your MAML, ICLR 2019, arXiv 1810.09502, §4. Settings: 5 inner steps;
        `inner_lr` 0.1 on Omniglot and 0.01 on miniImageNet; multi-step loss for 10 and 15 epochs of 500 steps; first
        order for 50 epochs in the paper, for none in the authors' settings files. Their weights change from epoch to
        epoch, ours from step to step. Statistics are those of the batch, here and in their code, whose running ones are
        never read. For the cosine schedule of the outer learning rate, use the run's `lr_schedule`.
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
            5000,
            ge=0,
            description="Training steps over which the loss shifts to the last inner step; 0 for immediately.",
        )
        first_order_steps: int = Field(0, ge=0, description="First-order training steps before the exact derivative.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def init_meta(self, model: nn.Module, adapted: tuple[str, ...], inner_steps: int) -> dict[str, Tensor]:
        norms = {
            f"{name}.{part}" if name else part
            for name, layer in model.named_modules()
            if isinstance(layer, _BATCH_NORMS)
            for part, _ in layer.named_parameters()
        }
        meta = {}
        for name in adapted:
            value = model.get_parameter(name)
            if name not in norms:
                meta[f"step_size.{name}"] = value.new_full((inner_steps,), self.config.inner_lr)
            elif inner_steps > 1:  # the first step uses the model's own
                meta[f"norm.{name}"] = value.detach().repeat(inner_steps - 1, *[1] * value.dim())
        return meta

    @hookimpl
    def draw_noise(self, stage: str, training_step: int | None) -> Tensor | None:
        """Return the fraction of the exact derivative in the outer loop: 0 or 1."""
        if training_step is None or stage != "task" or self.config.first_order_steps == 0:
            return None
        return torch.tensor(float(training_step >= self.config.first_order_steps))

    @hookimpl
    def inner_gradient(
        self, params: dict[str, Tensor], meta: dict[str, Tensor], step: int, noise: Tensor | None, task: TaskView
    ) -> dict[str, Tensor]:
        grads = task.gradient(params | _select_norms(params, meta, step))
        if noise is None:
            return grads
        constant = {name: value.detach() for name, value in grads.items()}
        return {name: constant[name] + noise * (value - constant[name]) for name, value in grads.items()}

    @hookimpl
    def inner_update(
        self, params: dict[str, Tensor], grads: dict[str, Tensor], meta: dict[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        sizes = {name: meta[f"step_size.{name}"] for name in params if f"step_size.{name}" in meta}
        moved = {name: params[name] - _of_step(each, step) * grads[name] for name, each in sizes.items()}
        return params | _select_norms(params, meta, step) | moved

    @hookimpl
    def outer_loss_weights(self, inner_steps: int, training_step: int) -> list[float] | None:
        if training_step >= self.config.multi_step:
            return None
        earlier = (1 - training_step / self.config.multi_step) / inner_steps
        return [earlier] * (inner_steps - 1) + [1 - earlier * (inner_steps - 1)]


def _select_norms(params: dict[str, Tensor], meta: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Return the BatchNorm parameters of an inner step if they differ from the model's own."""
    if step == 0:
        return {}
    return {name: _of_step(meta[f"norm.{name}"], step - 1) for name in params if f"norm.{name}" in meta}


def _of_step(values: Tensor, step: int) -> Tensor:
    return values[min(step, values.shape[0] - 1)]
