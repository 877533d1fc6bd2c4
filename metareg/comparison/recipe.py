"""Recipes: trainings with an expected value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, model_validator

from metareg.contract.config import Field, PluginConfig, validate
from metareg.errors import UnknownNameError
from metareg.util.yaml_files import read_yaml

__all__ = ["SHIPPED", "Expected", "Recipe", "list_recipes"]

SHIPPED = Path(__file__).parent / "recipes"
"""The folder of the shipped recipes."""


class Expected(PluginConfig):
    """A value that was measured before."""

    mean: float = Field(description="The value, in the metric's own unit: accuracies from 0 to 1.")
    interval: tuple[float, float] | None = Field(description="Its 95 % interval; null if the source gives none.")
    over: str | None = Field(
        description="What the interval covers, such as '3 seeds' or '600 test tasks'; null if unknown."
    )
    source: str = Field(description="Where it comes from.")

    @model_validator(mode="after")
    def _check_interval(self) -> Expected:
        if self.interval is not None and not self.interval[0] <= self.mean <= self.interval[1]:
            raise ValueError(f"the interval {list(self.interval)} does not contain the mean {self.mean}")
        return self


class Recipe(PluginConfig):
    """A training with its requirements and expected value."""

    name: str = Field("", description="The name of its file.")
    summary: str = Field(description="One line.")
    algo: str = Field(description="The algorithm.")
    augment: str = Field("none", description="An augmenter, a chain such as 'dropgrad+cml', or 'none'.")
    task: str = Field(description="The task plugin.")
    options: dict[str, Any] = Field({}, description="Further options, with the names for `metareg train --set`.")
    seeds: list[NonNegativeInt] = Field(min_length=1, description="The seeds that are run.")
    metric: str = Field(description="The metric that is judged.")
    inner_steps: int = Field(ge=0, description="The number of inner steps at which it is judged.")
    expected: Expected | None = Field(description="The expected value; null if none is known.")
    unknown: str | None = Field(None, description="Why no value is known.")
    minutes: float | None = Field(gt=0, description="The approximate duration of one run; null if unknown.")
    hardware: str = Field(description="The hardware of this duration.")
    data: str | None = Field(None, description="The data that it reads; null if it needs none.")
    gpu: bool = Field(False, description="Whether it needs a GPU to finish within a day.")
    notes: str = Field("", description="What differs from the source's setting.")

    @model_validator(mode="after")
    def _check_explanation(self) -> Recipe:
        if (self.expected is None) != (self.unknown is not None):
            raise ValueError("'unknown' must say why there is no value if, and only if, 'expected' is null")
        if self.metric == "accuracy" and self.expected is not None and self.expected.mean > 1:
            raise ValueError(f"write accuracies from 0 to 1; {self.expected.mean:g} is above 1")
        return self

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe from its YAML file; raise a `UsageError` if it cannot be read or is invalid."""
        return validate(cls, {**read_yaml(path), "name": path.stem}, f"the recipe {path}")

    def to_comparison(self) -> dict[str, Any]:
        """Return the recipe as a configuration for `metareg.compare`, with one arm."""
        return {
            "title": self.name,
            "notes": "\n\n".join(filter(None, [self.summary, self.notes])),
            "algo": [self.algo],
            "augment": [self.augment],
            "tasks": [{"task": self.task}],
            "seeds": self.seeds,
            "options": self.options,
        }

    def format_value(self, value: float) -> str:
        """Format a value of the metric."""
        return f"{100 * value:.2f} %" if self.metric == "accuracy" else f"{value:.4g}"

    def format_interval(self, interval: tuple[float, float]) -> str:
        """Format an interval of the metric."""
        low, high = map(self.format_value, interval)
        return f"{low.removesuffix(' %')} to {high}"


def list_recipes(task: str | None = None) -> list[Recipe]:
    """List the shipped recipes, or those on a task, by name; raise a `UsageError` if there are none on it."""
    recipes = [Recipe.read(path) for path in sorted(SHIPPED.glob("*.yaml"))]
    if task is not None and task not in (known := {recipe.task for recipe in recipes}):
        raise UnknownNameError("task with recipes", task, known)
    return [recipe for recipe in recipes if task in (None, recipe.task)]
