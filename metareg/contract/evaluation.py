"""Scores of many tasks after several numbers of inner steps."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metareg.contract.config import update_names
from metareg.errors import UsageError
from metareg.printable import format_count
from metareg.util.intervals import compute_half_width

__all__ = ["Evaluation"]


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """The metric on the query sets of some tasks, before and after adaptation.

    Args:
        metric: the metric's name.
        higher_is_better: whether larger is better.
        inner_steps: the numbers of inner steps, ascending.
        scores: ``[tasks, len(inner_steps)]``, in the order of the tasks' numbers.
        bn_statistics: the statistics that BatchNorm used: ``"transductive"``, ``"support"``, or ``"none"`` without such
            layers.
        predictor: the source of the predictions: ``"head"``, or the name of the plugin whose hook `predict` made them.
    """

    metric: str
    higher_is_better: bool
    inner_steps: tuple[int, ...]
    scores: Tensor
    bn_statistics: str
    predictor: str = "head"

    former_names: ClassVar[Mapping[str, str]] = {"norm": "bn_statistics"}
    """Former names in results, as in `PluginConfig`."""

    @property
    def tasks(self) -> int:
        return self.scores.shape[0]

    def mean(self, inner_steps: int) -> float:
        """Return the mean over tasks after a number of inner steps."""
        return self.get_scores(inner_steps).mean().item()

    def ci95(self, inner_steps: int) -> float:
        """Return half the width of the mean's 95 % interval over tasks (Student's t); NaN if a score is not finite."""
        return compute_half_width(self.get_scores(inner_steps).numpy())

    def count_diverged(self, inner_steps: int) -> int:
        """Count the tasks whose score after `inner_steps` is not finite; one is enough to make the mean not finite."""
        return int((~self.get_scores(inner_steps).isfinite()).sum())

    def to_dict(self) -> dict[str, Any]:
        """Return the content of results.json."""
        steps = [
            {
                "inner_steps": k, "mean": self.mean(k), "ci95": self.ci95(k), "tasks": self.tasks,
                "scores": self.get_scores(k).tolist(),
            }
            for k in self.inner_steps
        ]  # fmt: skip
        return {
            "metric": self.metric, "higher_is_better": self.higher_is_better, "bn_statistics": self.bn_statistics,
            "predictor": self.predictor, "steps": steps,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Evaluation:
        """Read what `to_dict` returned; other content raises a LookupError, TypeError, ValueError or similar."""
        content = update_names(cls, content)
        steps: Sequence[dict[str, Any]] = content["steps"]
        scores = np.array([each["scores"] for each in steps], dtype=np.float64)
        if scores.ndim != 2 or not scores.size:
            raise ValueError("its scores are not lists of equal length")
        return cls(
            str(content["metric"]),
            bool(content["higher_is_better"]),
            tuple(int(each["inner_steps"]) for each in steps),
            torch.from_numpy(scores).T,
            str(content["bn_statistics"]),
            str(content.get("predictor", "head")),
        )

    def __str__(self) -> str:
        cells = [f"{k}: {self._format_score(k)}" for k in self.inner_steps]
        return f"{self.metric} over {format_count(self.tasks, 'task')} after inner steps {', '.join(cells)}"

    def __repr__(self) -> str:
        return f"<Evaluation: {self}>"

    def _repr_html_(self) -> str:
        rows = [f"<tr><td>{k}</td><td>{self._format_score(k)}</td></tr>" for k in self.inner_steps]
        better = "higher" if self.higher_is_better else "lower"
        heading = f"<tr><th>inner steps</th><th>{html.escape(self.metric)} ({better} is better)</th></tr>"
        note = f"mean over {format_count(self.tasks, 'task')} and 95 % interval"
        return f"<table>{heading}{''.join(rows)}</table><div>{note}</div>"

    def _format_score(self, inner_steps: int) -> str:
        if diverged := self.count_diverged(inner_steps):
            return f"diverged on {diverged} of {format_count(self.tasks, 'task')}"
        return f"{self.mean(inner_steps):.4g} ± {self.ci95(inner_steps):.2g}"

    def get_scores(self, inner_steps: int) -> Tensor:
        """Return each task's score after a number of inner steps ``[tasks]``, in float64."""
        if inner_steps not in self.inner_steps:
            known = ", ".join(str(steps) for steps in self.inner_steps)
            raise UsageError(f"There are no scores after {inner_steps} inner steps, only after {known}.")
        return self.scores[:, self.inner_steps.index(inner_steps)].double()
