"""The outer optimiser."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adam import adam

from metareg.util.layout import match_strides

__all__ = ["Adam"]


class Adam:
    """`torch.optim.Adam` with its default coefficients, called as a function.

    The bookkeeping of the optimiser's object takes longer than the update of a small model.

    Args:
        params: what it updates, in place: contiguous tensors by name.
        lr: the step size.
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
