"""The outer optimiser: Adam, or what a plugin does in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from metareg.engine.stages import Stages
from metareg.learner.config import LearnerConfig
from metareg.util.devices import move_tensors
from metareg.util.layout import match_strides

__all__ = ["Adam", "OuterOptimizer"]

Tensors = dict[str, Tensor]


class OuterOptimizer:
    """The outer update of meta-parameters: a plugin's `outer_update`, or Adam."""

    def __init__(self, stages: Stages, config: LearnerConfig) -> None:
        self._stages = stages
        self._config = config
        self._adam: Adam | None = None
        self._plugin_state: dict[str, Any] = {}

    def update(self, meta: Tensors, grads: Tensors, training_step: int) -> Tensors:
        """The meta-parameters after a step; Adam changes those that it is given.

        Args:
            meta: contiguous tensors by name, those that the last call returned.
            grads: the meta-gradient by name.
            training_step: training steps before this one.
        """
        reset_every = self._config.reset_optimizer_every
        if reset_every is not None and training_step % reset_every == 0:
            self._adam, self._plugin_state = None, {}
        with torch.no_grad():
            if self._stages.implements("outer_update"):
                updated, self._plugin_state = self._stages.outer_update(meta, grads, self._plugin_state)
                return {name: value.contiguous() for name, value in updated.items()}
            if self._adam is None:
                self._adam = Adam(meta, self._config.outer_lr)
            self._adam.step(grads)
            return meta

    def state(self) -> dict[str, Any]:
        """Adam's moments and the plugin's state, whichever there is."""
        return {"adam": self._adam.state() if self._adam else {}, "outer_state": self._plugin_state}

    def load_state(self, state: Mapping[str, Any], meta: Tensors) -> None:
        """Take over what `state` returned, which may hold more, for the meta-parameters that `update` will be given next."""
        self._adam = None
        if state["adam"]:
            self._adam = Adam(meta, self._config.outer_lr)
            self._adam.load_state(state["adam"])
        self._plugin_state = move_tensors(state["outer_state"], next(iter(meta.values())).device)


class Adam:
    """`torch.optim.Adam` with its default coefficients, called as a function.

    The bookkeeping of the optimiser's object takes longer than the update of a small model. It changes `params`, contiguous
    tensors, in place.
    """

    def __init__(self, params: Mapping[str, Tensor], lr: float) -> None:
        self._params = dict(params)
        self._lr = lr
        self._moments = {
            "exp_avg": [torch.zeros_like(value) for value in params.values()],
            "exp_avg_sq": [torch.zeros_like(value) for value in params.values()],
            "step": [torch.zeros((), dtype=torch.float32, device=value.device) for value in params.values()],
        }
        self._fused = all(value.device.type in ("cpu", "cuda") for value in params.values())

    def step(self, grads: Mapping[str, Tensor]) -> None:
        """Update the parameters with their gradients."""
        adam(
            list(self._params.values()), list(match_strides(grads, self._params).values()),
            self._moments["exp_avg"], self._moments["exp_avg_sq"], [], self._moments["step"],
            fused=self._fused, amsgrad=False, beta1=0.9, beta2=0.999, lr=self._lr, weight_decay=0.0, eps=1e-8,
            maximize=False,
        )  # fmt: skip

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The moments and the number of steps of each parameter, by its name."""
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
