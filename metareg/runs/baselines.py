"""Simpler baselines on a run's test tasks, which show whether meta-learning is worth it.

Both adapt all weights to a support set with Adam. Its step size and number of steps are chosen on validation tasks.

- *From scratch*: a model with initial weights is trained on each support set.
- *Fine-tuned*: one model is trained on the pooled examples of all training tasks, with the run's number of steps and
  batch size, and then fine-tuned on each support set.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metareg.contract.config import Field, PluginConfig
from metareg.contract.evaluation import Evaluation
from metareg.contract.hookspecs import hookimpl
from metareg.contract.splits import VALIDATION
from metareg.contract.views import TaskView
from metareg.errors import UsageError
from metareg.learner.learner import MetaLearner
from metareg.registry.plugins import Plugin
from metareg.registry.task_source import TaskSource
from metareg.runs.config import RunConfig

__all__ = ["FINE_TUNED", "FROM_SCRATCH", "Baseline", "measure_baselines"]

log = logging.getLogger("metareg")

FROM_SCRATCH, FINE_TUNED = "from scratch", "fine-tuned"
_RATES = (0.001, 0.01, 0.1)
_STEPS = (5, 20, 100, 500)
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Baseline:
    """A baseline and its test results."""

    name: str
    rate: float
    """Adam's step size on a support set, chosen on validation tasks."""
    evaluation: Evaluation
    """The test on the run's test tasks, after the number of steps chosen on validation tasks."""

    @property
    def steps(self) -> int:
        """The number of steps on a support set."""
        return self.evaluation.inner_steps[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry for baselines.json."""
        return {"name": self.name, "rate": self.rate, **self.evaluation.to_dict()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Baseline:
        """Return the baseline that `to_dict` described."""
        rest = {key: value for key, value in content.items() if key not in ("name", "rate")}
        return cls(content["name"], content["rate"], Evaluation.from_dict(rest))


class Adam:
    """Algorithm: Adam on all weights, starting from meta-parameters trained on the pooled examples of all tasks.

    Reference:
        Kingma and Ba, Adam, ICLR 2015, arXiv 1412.6980, algorithm 1.
    """

    contract = 1
    name = "adam"

    class Config(PluginConfig):
        """Options of the algorithm."""

        rate: float = Field(0.001, gt=0, description="Step size.")

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def start_task(self, params: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Start with moments of zero."""
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        return params, (zeros, zeros)

    @hookimpl
    def inner_update(
        self, params: dict[str, Tensor], grads: dict[str, Tensor], state: Any, step: int
    ) -> tuple[dict[str, Tensor], Any]:
        """Take one step of Adam."""
        (b1, b2), (first, second) = _BETAS, state
        first = {name: b1 * first[name] + (1 - b1) * g for name, g in grads.items()}
        second = {name: b2 * second[name] + (1 - b2) * g.square() for name, g in grads.items()}
        rate = self.config.rate / (1 - b1 ** (step + 1))
        correction = 1 - b2 ** (step + 1)
        moved = {
            name: p - rate * first[name] / ((second[name] / correction).sqrt() + _EPSILON) for name, p in params.items()
        }
        return moved, (first, second)

    @hookimpl
    def outer_objective(self, start: dict[str, Tensor], task: TaskView) -> Tensor:
        """Return the loss on all examples of the task without adaptation."""
        support, query = task.support_y.shape[0], task.query_y.shape[0]
        return (support * task.support_loss(start) + query * task.query_loss(start)) / (support + query)


def measure_baselines(config: RunConfig, model: Plugin, source: TaskSource, device: torch.device) -> list[Baseline]:
    """Measure both baselines on a run's test tasks.

    Args:
        config: the run's configuration.
        model: the run's model.
        source: the run's tasks.
        device: where to compute.

    Raises:
        UsageError: no step size gives finite scores on validation tasks.
    """
    task = source.plugin.instance
    options = {"metric": getattr(task, "metric", None), "loss": task.loss, "seed": config.seed, "device": device}
    options |= {
        "inner_steps": 1,
        "first_order": True,
        "outer_lr": config.outer_lr,
        "bn_statistics": config.bn_statistics,
    }

    def create(rate: float, trained: MetaLearner | None = None) -> MetaLearner:
        given = model if trained is None else trained.model.create_adapted_module(trained.meta_parameters)
        return MetaLearner(given, Adam, spec=task.spec, algo_config={"rate": rate}, **options)

    log.info("Baselines: training the model on each support set from scratch.")
    scratch = _choose(FROM_SCRATCH, config, source, create, _STEPS)
    log.info("Baselines: training one model on the pooled examples of all training tasks, %d steps.", config.steps)
    pooled = create(_RATES[0])
    pooled.fit(source, config.steps, meta_batch=config.meta_batch)
    return [scratch, _choose(FINE_TUNED, config, source, lambda rate: create(rate, pooled), (0, *_STEPS))]


def _choose(
    name: str, config: RunConfig, source: TaskSource, create: Callable[[float], MetaLearner], steps: Sequence[int]
) -> Baseline:
    """Choose the step size and number of steps on validation tasks, and test them."""
    best: tuple[float, float, int] | None = None
    for rate in _RATES:
        found = create(rate).evaluate(source, config.eval_tasks, split=VALIDATION, inner_steps=steps, seed=config.seed)
        sign = 1 if found.higher_is_better else -1
        candidates = [(sign * found.mean(k), rate, k) for k in steps if math.isfinite(found.mean(k))]
        best = max(filter(None, (best, *candidates)), key=lambda each: each[0], default=None)
    if best is None:
        raise UsageError(f"The baseline '{name}' has no finite scores on the validation tasks.")
    _, rate, k = best
    evaluation = create(rate).evaluate(
        source, config.test_tasks, split=config.test_split, inner_steps=[k], seed=config.seed
    )
    return Baseline(name, rate, evaluation)
