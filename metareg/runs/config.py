"""The options of a run."""

from __future__ import annotations

from typing import Annotated, Literal

import yaml

from metareg.contract.config import Field, PluginSpec
from metareg.learner.config import Flag, LearnerConfig, Resumable, Schedule

__all__ = ["PLUGIN_FIELDS", "RunConfig"]

PLUGIN_FIELDS = {
    "algo": "algorithms", "augment": "augmenters", "task": "tasks", "model": "models", "observers": "observers",
}  # fmt: skip
"""Options of a run that name plugins, with the plugins' kinds."""


class RunConfig(LearnerConfig, Schedule):
    """Everything that determines a run. Recommendations of plugins override these defaults; the user overrides both."""

    algo: Annotated[PluginSpec, Flag()] = Field(PluginSpec(name="maml"), description="The algorithm.")
    augment: Annotated[list[PluginSpec], Flag()] = Field(
        [], description="Gradient augmenters, chained in this order; 'none' for none."
    )
    task: Annotated[PluginSpec, Flag()] = Field(PluginSpec(name="sinusoid"), description="The task plugin.")
    model: Annotated[PluginSpec | None, Flag()] = Field(None, description="The model; by default, the task's own.")
    observers: Annotated[list[PluginSpec], Flag("--observe"), Resumable()] = Field(
        [], description="Observers, in addition to the progress display and metrics.jsonl."
    )
    threads: Annotated[int | None, Resumable()] = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads; by default, one for small models (more would only wait), otherwise torch's default.",
    )
    select: Literal["last", "best"] = Field(
        "last", description="Weights to test and keep as final: the last ones, or those with the best validation."
    )
    checkpoint_every: Annotated[int | None, Flag(), Resumable()] = Field(
        None, ge=1, le=1_000_000_000, description="Training steps between checkpoints."
    )
    checkpoint_minutes: Annotated[float, Resumable()] = Field(
        2.0, gt=0, le=1_000_000, description="Minutes between checkpoints, in addition to checkpoint_every."
    )
    keep_checkpoints: Annotated[int, Resumable()] = Field(
        3, ge=1, le=1_000_000, description="Number of newest checkpoints to keep, in addition to the best one."
    )
    test_tasks: int = Field(600, ge=2, le=1_000_000, description="Test tasks at the end.")
    test_split: Literal["test", "validation"] = Field(
        "test", description="The split of these tasks; use validation while you choose settings."
    )
    test_inner_steps: list[Annotated[int, Field(ge=0, le=10_000)]] = Field(
        [0, 1, 5, 10], min_length=1, max_length=100, description="Numbers of inner steps to test after."
    )

    @property
    def title(self) -> str:
        """Return a title such as ``maml + cml on sinusoid, seed 3``."""
        names = [self.algo.name, *(choice.name for choice in self.augment)]
        return f"{' + '.join(names)} on {self.task.name}, seed {self.seed}"

    def to_yaml(self) -> str:
        """Return the complete configuration as YAML, plugins first."""
        values = self.model_dump(mode="json")
        plugins = {name: values.pop(name) for name in PLUGIN_FIELDS}
        return yaml.safe_dump(plugins | values, sort_keys=False, allow_unicode=True)

    @classmethod
    def list_flags(cls) -> dict[str, str]:
        """Map options that have their own flag to that flag."""
        return {
            name: mark.name or f"--{name.replace('_', '-')}"
            for name, field in cls.model_fields.items()
            for mark in field.metadata
            if isinstance(mark, Flag)
        }

    @classmethod
    def list_resumable(cls) -> set[str]:
        """List the options that may change when a run is resumed."""
        return {name for name, field in cls.model_fields.items() if Resumable() in field.metadata}
