"""What a learner and a run are made of: the one list of their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import yaml
from pydantic import Field

from metareg.contract.config import Choice, PluginConfig

__all__ = ["LearnerConfig", "RunConfig"]


class LearnerConfig(PluginConfig):
    """What a `MetaLearner` is told beside its model, algorithm, augmenters and loss."""

    former_names: ClassVar[Mapping[str, str]] = {"norm": "bn_statistics"}

    seed: int = Field(0, ge=0, lt=2**63, description="Fixes initial weights, training tasks, noise and test tasks.")
    inner_steps: int = Field(1, ge=1, description="Adaptation steps on the support set in training.")
    first_order: bool = Field(False, description="Treat inner gradients as constants in the meta-gradient.")
    outer_lr: float = Field(1e-3, gt=0, description="Step size of the outer Adam.")
    reset_optimizer_every: int | None = Field(
        None,
        ge=1,
        description="Forget the outer optimiser's moments every so many steps, as the CML authors' code does.",
    )
    strategy: Literal["auto", "serial", "traced", "vectorized", "compiled"] = Field(
        "auto", description="How the tasks of a batch are run; the result is the same to rounding."
    )
    memory: Literal["store", "recompute"] = Field(
        "store", description="Keep every inner step's graph, or its parameters only and rebuild the graph."
    )
    bn_statistics: Literal["transductive", "support"] = Field(
        "transductive", description="Whose statistics BatchNorm uses for predictions on the query set."
    )
    precision: Literal["full", "bf16"] = Field(
        "full",
        description="Run the model in its own precision, or in bfloat16 (bf16); parameters, losses, gradients and updates "
        "keep its own.",
    )
    chunk: int | None = Field(None, ge=1, description="At most so many tasks at once; gradients accumulate.")
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.")


class RunConfig(LearnerConfig):
    """All that determines a run. What its plugins recommend stands before these defaults, what the user says before both."""

    algo: Choice = Field(Choice(name="maml"), description="The algorithm.")
    augment: list[Choice] = Field([], description="Gradient augmenters, in the order in which they are chained.")
    task: Choice = Field(Choice(name="sinusoid"), description="The task plugin.")
    model: Choice | None = Field(None, description="The model; the task's own where none is named.")
    observers: list[Choice] = Field([], description="Observers beside the progress display and metrics.jsonl.")

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
        plugins = {name: values.pop(name) for name in ("algo", "augment", "task", "model", "observers")}
        return yaml.safe_dump(plugins | values, sort_keys=False, allow_unicode=True)
