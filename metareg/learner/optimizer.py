"""The outer optimiser: one of torch's, or a plugin's."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from metareg.engine.stages import Stages
from metareg.engine.step_loop import Batches, OuterUpdate, divide, join
from metareg.errors import UsageError
from metareg.learner.config import LearnerConfig
from metareg.learner.learning_rate import compute_learning_rate
from metareg.util.devices import move_tensors
from metareg.util.layout import match_strides

__all__ = ["Adam", "OuterOptimizer", "TorchOptimizer", "create_optimizer"]

Tensors = dict[str, Tensor]

_CLASSES: Mapping[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}

_EPS = 1e-8
"""Adam's ε."""


class OuterOptimizer:
    """The outer update of meta-parameters: a plugin's `outer_update`, or an optimiser of torch.

    Raises:
        UsageError: the cosine schedule has no length.
    """

    def __init__(self, stages: Stages, config: LearnerConfig) -> None:
        if config.lr_schedule == "cosine" and config.lr_schedule_steps is None:
            raise UsageError("lr_schedule = cosine needs lr_schedule_steps, the step at which the learning rate is 0.")
        self._stages = stages
        self._config = config
        self._optimizer: Adam | TorchOptimizer | None = None
        self._plugin_state: dict[str, Any] = {}

    def update(self, meta: Tensors, grads: Tensors, training_step: int) -> Tensors:
        """Return the meta-parameters after a step; torch's optimisers change them in place.

        Args:
            meta: contiguous tensors by name, as returned by the last call.
            grads: the meta-gradient by name.
            training_step: training steps before this one.
        """
        if self._starts_anew(training_step):
            self._optimizer, self._plugin_state = None, {}
        with torch.no_grad():
            if self._stages.implements("outer_update"):
                updated, self._plugin_state = self._stages.outer_update(meta, grads, self._plugin_state)
                return {name: value.contiguous() for name, value in updated.items()}
            if self._optimizer is None:
                self._optimizer = create_optimizer(meta, self._stages, self._config)
            self._optimizer.step(grads, compute_learning_rate(self._config, training_step))
            return meta

    def describe_update(self, meta: Tensors, batches: Batches, training_step: int) -> OuterUpdate | None:
        """Describe `update` for a compiled program; None if only `update` can do it, or a reset is due in these steps.

        Args:
            meta: as in `update`.
            batches: the batches of the steps.
            training_step: training steps before the first of them.
        """
        if self._stages.implements("outer_update") or any(
            self._starts_anew(training_step + number) for number in range(1, len(batches))
        ):
            return None
        optimizer = None if self._starts_anew(training_step) else self._optimizer
        optimizer = optimizer or create_optimizer(meta, self._stages, self._config)
        if not isinstance(optimizer, Adam):
            return None
        rates = [compute_learning_rate(self._config, training_step + number) for number in range(len(batches))]
        factors = optimizer.compute_factors(rates, batches)
        return OuterUpdate(optimizer.function, optimizer.betas, optimizer.flat_state(), factors)

    def adopt(self, meta: Tensors, state: Sequence[Tensor]) -> None:
        """Continue from the results of the program for `describe_update`."""
        optimizer = create_optimizer(meta, self._stages, self._config)
        assert isinstance(optimizer, Adam)
        optimizer.adopt(state)
        self._optimizer = optimizer

    def _starts_anew(self, training_step: int) -> bool:
        """Return whether the optimiser's state is reset before a step."""
        every = self._config.reset_optimizer_every
        return every is not None and training_step % every == 0

    def state(self) -> dict[str, Any]:
        """Return the state of the optimiser or of the plugin."""
        return {"optimizer": self._optimizer.state() if self._optimizer else {}, "outer_state": self._plugin_state}

    def load_state(self, state: Mapping[str, Any], meta: Tensors) -> None:
        """Restore what `state` returned, for the meta-parameters of the next `update`; ignore other entries."""
        self._optimizer = None
        stored = state["optimizer"] if "optimizer" in state else state["adam"]  # the key in earlier checkpoints
        if stored:
            self._optimizer = create_optimizer(meta, self._stages, self._config)
            self._optimizer.load_state(stored)
        self._plugin_state = move_tensors(state["outer_state"], next(iter(meta.values())).device)


def create_optimizer(meta: Tensors, stages: Stages, config: LearnerConfig) -> Adam | TorchOptimizer:
    """Create the torch optimiser that the options describe."""
    if config.outer_optimizer == "adam" and not config.outer_weight_decay:
        return Adam(meta, *(config.outer_betas or (0.9, 0.999)))
    return TorchOptimizer(meta, config, [name for name in meta if stages.owner(name)])


class TorchOptimizer:
    """An optimiser of `torch.optim`, with its state by parameter names.

    Args:
        params: contiguous tensors by name, which `step` changes in place.
        config: the options.
        not_decayed: the names of parameters without weight decay: those of plugins, such as learned step sizes, because
            decay is a prior for weights only.
    """

    def __init__(self, params: Mapping[str, Tensor], config: LearnerConfig, not_decayed: Collection[str] = ()) -> None:
        self._params = dict(params)
        options: dict[str, Any] = {
            "weight_decay": config.outer_weight_decay, "momentum": config.outer_momentum, "betas": config.outer_betas,
            "nesterov": config.outer_nesterov or None,
        }  # fmt: skip
        groups: list[dict[str, Any]] = [
            {"params": [value for name, value in params.items() if name not in not_decayed]},
            {"params": [params[name] for name in not_decayed], "weight_decay": 0.0},
        ]
        create: Callable[..., torch.optim.Optimizer] = _CLASSES[config.outer_optimizer]
        # Without fused and foreach kernels, whose results depend on the tensors' memory layout.
        self._optimizer = create(
            [group for group in groups if group["params"]], lr=config.outer_lr, foreach=False,
            **{name: value for name, value in options.items() if value is not None},
        )  # fmt: skip

    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        """Update the parameters with their gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for name, grad in match_strides(grads, self._params).items():
            self._params[name].grad = grad
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the optimiser's state of each parameter by name."""
        kept = {name: dict(self._optimizer.state.get(value, {})) for name, value in self._params.items()}
        return {name: state for name, state in kept.items() if state}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `state` returned."""
        for name, kept in state.items():
            param = self._params[name]
            self._optimizer.state[param] = {
                key: value.clone() if key == "step" else torch.empty_like(param).copy_(value)
                for key, value in kept.items()
            }


class Adam:
    """`torch.optim.Adam` without weight decay, called as a function.

    For small models, torch's optimiser object spends more time on bookkeeping than on the update. Changes `params`,
    which must be contiguous, in place.
    """

    def __init__(self, params: Mapping[str, Tensor], beta1: float = 0.9, beta2: float = 0.999) -> None:
        self._params = dict(params)
        self.betas = beta1, beta2
        self._moments = {
            "exp_avg": [torch.zeros_like(value) for value in params.values()],
            "exp_avg_sq": [torch.zeros_like(value) for value in params.values()],
            "step": [torch.zeros((), dtype=torch.float32, device=value.device) for value in params.values()],
        }
        self._fused = all(value.device.type in ("cpu", "cuda") for value in params.values())

    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        """Update the parameters with their gradients."""
        beta1, beta2 = self.betas
        adam(
            list(self._params.values()), list(match_strides(grads, self._params).values()),
            self._moments["exp_avg"], self._moments["exp_avg_sq"], [], self._moments["step"],
            fused=self._fused, amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=0.0, eps=_EPS,
            maximize=False,
        )  # fmt: skip

    @property
    def function(self) -> Callable[[Tensor, Tensor, Sequence[Tensor], Tensor], list[Tensor]]:
        """`step` as a function of tensors, equal up to rounding; see `OuterUpdate`."""
        return partial(_compute_adam, betas=self.betas)

    def compute_factors(self, rates: Sequence[float], batches: Batches) -> Tensor:
        """Compute the factors of `OuterUpdate` for the next steps, whose learning rates are given.

        A program would compute the powers once for every few parameters. Python's do not depend on how many steps are asked
        for at once, and have double precision: in single precision, 1 - 0.999 has three digits fewer than 0.999.
        """
        beta1, beta2 = self.betas
        done = int(self._moments["step"][0])
        factors = next(iter(self._params.values())).new_zeros(len(batches.stack) // batches.tasks, 2)
        rows = [
            (rate / (1 - beta1**step), math.sqrt(1 - beta2**step)) for step, rate in enumerate(rates, start=done + 1)
        ]
        factors[batches.which.start : batches.which.stop] = torch.tensor(rows, dtype=torch.float64)
        return factors

    def flat_state(self) -> list[Tensor]:
        """Return the first and the second moments of all parameters ``[numbers]``, and the number of steps."""
        averages, squares, steps = self._moments.values()
        return [join(averages), join(squares), steps[0].clone()]

    def adopt(self, state: Sequence[Tensor]) -> None:
        """Use a state in the order of `flat_state`."""
        *moments, steps = state
        averages, squares = ([part.clone() for part in divide(each, self._params).values()] for each in moments)
        self._moments = {"exp_avg": averages, "exp_avg_sq": squares, "step": [steps.clone() for _ in self._params]}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the moments and the number of steps of each parameter by name."""
        columns = zip(*self._moments.values(), strict=True)
        return {
            name: dict(zip(self._moments, column, strict=True))
            for name, column in zip(self._params, columns, strict=True)
        }

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `state` returned."""
        for number, name in enumerate(self._params):
            for key, column in self._moments.items():
                column[number].copy_(state[name][key])


def _compute_adam(
    params: Tensor, grads: Tensor, state: Sequence[Tensor], factors: Tensor, betas: tuple[float, float]
) -> list[Tensor]:
    """Take one step of Adam as a pure function (Kingma and Ba, ICLR 2015, Algorithm 1; ε is added as in torch).

    Args:
        params: the parameters ``[numbers]``.
        grads: their gradient ``[numbers]``.
        state: as `Adam.flat_state`.
        factors: the learning rate over 1 − β₁ᵗ, and the square root of 1 − β₂ᵗ, where t counts the steps from 1.
        betas: β₁ and β₂.

    Returns:
        The parameters and the state after the step.
    """
    (beta1, beta2), (averages, squares, steps), (size, root) = betas, state, factors.unbind()
    averages = averages.lerp(grads, 1 - beta1)
    squares = beta2 * squares + (1 - beta2) * grads * grads
    return [params - size * averages / (squares.sqrt() / root + _EPS), averages, squares, steps + 1]
