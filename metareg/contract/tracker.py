"""`Tracker`: the names under which trackers, such as TensorBoard, hold the metrics of a run."""

from __future__ import annotations

from metareg.contract.evaluation import Evaluation
from metareg.contract.hookspecs import hookimpl
from metareg.contract.splits import TRAIN

__all__ = ["Tracker"]


class Tracker:
    """Base of observers that log numbers by name and training step; a subclass implements `log`.

    The names are ``train/KEY`` for training logs and ``SPLIT/METRIC/inner_steps_K`` for the means of evaluations, so that
    all trackers show a run alike.
    """

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name, as of a training step. Without a run (`MetaLearner.fit`), there may be nowhere to log."""
        raise NotImplementedError

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        self.log({f"{TRAIN}/{name}": value for name, value in logs.items()}, step)

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        steps = evaluation.inner_steps
        self.log({f"{split}/{evaluation.metric}/inner_steps_{k}": evaluation.mean(k) for k in steps}, step)
