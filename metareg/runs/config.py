"""The options of a run."""

from __future__ import annotations

from typing import Annotated, Literal

import yaml

from metareg.contract.config import Field, PluginSpec
from metareg.learner.config import LearnerConfig

__all__ = ["PLUGIN_FIELDS", "RunConfig"]

PLUGIN_FIELDS = {
    "algo": "algorithms", "augment": "augmenters", "task": "tasks", "model": "models", "observers": "observers",
}  # fmt: skip
"""The options of a run that name plugins, and the plugins' kinds."""


class RunConfig(LearnerConfig):
    """All that determines a run. What its plugins recommend stands before these defaults, what the user says before both."""

    algo: PluginSpec = Field(PluginSpec(name="maml"), description="The algorithm.")
    augment: list[PluginSpec] = Field([], description="Gradient augmenters, in the order in which they are chained.")
    task: PluginSpec = Field(PluginSpec(name="sinusoid"), description="The task plugin.")
    model: PluginSpec | None = Field(None, description="The model; the task's own where none is named.")
    observers: list[PluginSpec] = Field([], description="Observers beside the progress display and metrics.jsonl.")

    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads; unset, one for small models, whose threads only wait, else as torch decides.",
    )
    steps: int = Field(10_000, ge=1, description="Training steps (meta-updates).")
    meta_batch: int = Field(4, ge=1, description="Tasks per training step.")
    log_every: int = Field(100, ge=1, description="Training steps between two lines of metrics.jsonl.")
    eval_every: int | None = Field(
        None, ge=1, description="Training steps between validations; a tenth of the run where it is not set."
    )
    eval_tasks: int = Field(100, ge=2, description="Validation tasks each time.")
    select: Literal["last", "best"] = Field(
        "last", description="Which weights are tested and kept as final: the last, or those with the best validation."
    )
    checkpoint_every: int | None = Field(None, ge=1, description="Training steps between two checkpoints.")
    checkpoint_minutes: float = Field(2.0, gt=0, description="Minutes between two checkpoints, beside that.")
    keep_checkpoints: int = Field(3, ge=1, description="How many of the newest checkpoints to keep, beside the best.")
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="At a loss or gradient that is not finite: stop, leave the step out, or go back to the newest "
        "checkpoint and go on from there with other tasks.",
    )
    max_nonfinite: int = Field(10, ge=1, description="How often that may happen in a run before it stops.")
    test_tasks: int = Field(600, ge=2, description="Test tasks at the end.")
    test_split: Literal["test", "validation"] = Field(
        "test", description="The split of these tasks; validation while settings are still being chosen."
    )
    test_inner_steps: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 1, 5, 10], min_length=1, description="Numbers of inner steps after which to test."
    )

    def to_yaml(self) -> str:
        """The complete configuration, the plugins first."""
        values = self.model_dump(mode="json")
        plugins = {name: values.pop(name) for name in PLUGIN_FIELDS}
        return yaml.safe_dump(plugins | values, sort_keys=False, allow_unicode=True)
