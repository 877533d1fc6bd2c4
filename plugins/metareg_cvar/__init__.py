"""CVaR: the meta-gradient of the worst tasks of a batch."""

from __future__ import annotations

import math

from torch import Tensor

from metareg import Field, PluginConfig, hookimpl


class CVaR:
    """Averages the meta-gradients of the tasks with the largest objectives, and ignores the others.

    The conditional value at risk at level α is the mean of the largest losses, a fraction 1 − α of them; in a batch of
    T tasks, the ⌈(1 − α) T⌉ largest. With a level near 1, only the worst task counts. Task-robust MAML has the same
    objective (Collins, Mokhtari and Shakkottai, NeurIPS 2020, arXiv 2002.04766), but its weights, learned for each of
    finitely many tasks, do not apply if tasks are drawn anew.

    Reference:
        Wang, Lv, Feng, Xie and Huang, A Simple Yet Effective Strategy to Robustify the Meta Learning Paradigm, NeurIPS
        2023, arXiv 2310.00708.
    """

    contract = 1
    exact_gradient = False  # the gradient of the worst tasks' mean, not of the batch's mean

    class Config(PluginConfig):
        level: float = Field(
            0.5,
            ge=0,
            lt=1,
            description="Level α: the fraction of tasks to ignore, those with the smallest objectives.",
            json_schema_extra={"search": {"low": 0.0, "high": 0.9}},
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def combine_tasks(self, grads: dict[str, Tensor], losses: Tensor) -> dict[str, Tensor]:
        # Rounded, because 1 − 0.7 is slightly more than 0.3, which would keep four of ten tasks.
        count = max(1, math.ceil(round((1 - self.config.level) * len(losses), 6)))
        worst = losses.topk(count).indices
        return {name: value[worst].mean(0) for name, value in grads.items()}
