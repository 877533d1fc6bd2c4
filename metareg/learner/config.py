"""The options of a learner and its training, with marks for the commands."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import model_validator

from metareg.contract.config import Field, PluginConfig, unknown_option_error, validate
from metareg.registry.plugins import find_entry, get_config_class

__all__ = [
    "BatchNormStatistics", "Flag", "LearnerConfig", "Resumable", "Schedule", "create_config", "describe_options",
    "is_outer_option",
]  # fmt: skip


BatchNormStatistics = Literal["transductive", "support"]
"""The source of BatchNorm's statistics for predictions: the current batch or the support set."""


_MOST_STEPS = 1_000_000_000

_OPTIONS_OF = {
    "outer_betas": ("outer_optimizer", ("adam", "adamw", "radam")),
    "outer_momentum": ("outer_optimizer", ("rmsprop", "sgd")),
    "outer_nesterov": ("outer_optimizer", ("sgd",)),
    "lr_schedule_steps": ("lr_schedule", ("cosine",)),
    "lr_step_size": ("lr_schedule", ("step",)),
    "lr_milestones": ("lr_schedule", ("multistep",)),
    "lr_gamma": ("lr_schedule", ("step", "multistep")),
}
"""Options that apply only to some values of another option."""


@dataclass(frozen=True)
class Flag:
    """Marks an option with its own command-line flag; all options work with ``--set``."""

    name: str | None = None
    """The flag; if None, the option's name with hyphens."""


@dataclass(frozen=True)
class Resumable:
    """Marks an option that can change when a run is resumed, because it does not change the run's meaning."""


class LearnerConfig(PluginConfig):
    """The options of a `MetaLearner` besides its model, algorithm, augmenters and loss."""

    former_names: ClassVar[Mapping[str, str]] = {"norm": "bn_statistics"}

    seed: Annotated[int, Flag()] = Field(
        0, ge=0, lt=2**63, description="Fixes initial weights, training tasks, noise and test tasks."
    )
    inner_steps: Annotated[int, Flag()] = Field(
        1, ge=1, le=10_000, description="Inner steps on the support set in training."
    )
    first_order: Annotated[bool, Flag()] = Field(
        False, description="Treat inner gradients as constants in the meta-gradient."
    )
    outer_lr: float = Field(
        1e-3, gt=0, description="Learning rate of the outer optimiser.", json_schema_extra={"search": {"factor": 10}}
    )
    outer_optimizer: Literal["adam", "adamw", "radam", "rmsprop", "sgd"] = Field(
        "adam", description="The outer optimiser, one of torch.optim."
    )
    outer_weight_decay: float | None = Field(
        None,
        ge=0,
        description="Weight decay of the model's own parameters, as torch's optimiser defines it; parameters of "
        "plugins do not decay. By default, 0.01 for adamw, 0 for the others.",
        json_schema_extra={"search": [0.0, 1e-4, 1e-3, 1e-2]},
    )
    outer_momentum: float | None = Field(None, ge=0, lt=1, description="Momentum of sgd and rmsprop; by default, 0.")
    outer_nesterov: bool = Field(False, description="Use Nesterov's momentum in sgd.")
    outer_betas: list[Annotated[float, Field(ge=0, lt=1)]] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Decay rates of the moments of adam, adamw and radam; by default, 0.9 and 0.999.",
    )
    lr_schedule: Literal["constant", "cosine", "step", "multistep"] = Field(
        "constant", description="How outer_lr changes from step to step, as torch.optim.lr_scheduler defines it."
    )
    lr_warmup_steps: int = Field(
        0,
        ge=0,
        le=_MOST_STEPS,
        description="Training steps in which outer_lr rises linearly, before lr_schedule begins.",
    )
    lr_schedule_steps: int | None = Field(
        None,
        ge=1,
        le=_MOST_STEPS,
        description="The training step at which the cosine schedule reaches 0, including warm-up; by default, the "
        "run's last step.",
    )
    lr_step_size: int | None = Field(
        None, ge=1, le=_MOST_STEPS, description="Steps between multiplications by lr_gamma; for lr_schedule step."
    )
    lr_milestones: list[Annotated[int, Field(ge=1, le=_MOST_STEPS)]] | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="Multiply by lr_gamma after each of these training steps; for lr_schedule multistep.",
    )
    lr_gamma: float | None = Field(
        None, gt=0, le=1, description="The factor of the schedules step and multistep; by default, 0.1."
    )
    reset_optimizer_every: int | None = Field(
        None,
        ge=1,
        le=_MOST_STEPS,
        description="Reset the outer optimiser's moments after this many steps, as the CML authors' code does.",
    )
    strategy: Annotated[Literal["auto", "serial", "traced", "vectorized", "compiled"], Flag(), Resumable()] = Field(
        "auto", description="How to run the tasks of a batch; the results agree up to rounding."
    )
    memory: Annotated[Literal["store", "recompute"], Flag(), Resumable()] = Field(
        "store", description="Keep the graph of every inner step, or only its parameters and rebuild the graph."
    )
    bn_statistics: Annotated[BatchNormStatistics, Flag()] = Field(
        "transductive", description="The statistics that BatchNorm uses for query predictions."
    )
    precision: Annotated[Literal["full", "bf16"], Flag()] = Field(
        "full",
        description="Run the model in its own precision, or in bfloat16 (bf16); parameters, losses, gradients and updates "
        "stay in full precision.",
    )
    chunk: Annotated[int | None, Flag(), Resumable()] = Field(
        None, ge=1, le=100_000, description="Maximum number of tasks to run at once; gradients accumulate."
    )
    device: Annotated[str, Flag(), Resumable()] = Field(
        "auto", description="cpu, cuda, cuda:1, mps; auto uses a GPU if there is one."
    )

    @model_validator(mode="after")
    def _refuse_without_effect(self) -> LearnerConfig:
        for option, (other, values) in _OPTIONS_OF.items():
            given = getattr(self, option)
            if given and getattr(self, other) not in values:
                raise ValueError(
                    f"{option} = {given} goes with {other} = {' or '.join(values)}, not with {getattr(self, other)}"
                )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> LearnerConfig:
        if self.outer_nesterov and not self.outer_momentum:
            raise ValueError("outer_nesterov needs an outer_momentum above 0")
        for option, schedule in (("lr_step_size", "step"), ("lr_milestones", "multistep")):
            if self.lr_schedule == schedule and not getattr(self, option):
                raise ValueError(f"lr_schedule = {schedule} needs {option}")
        milestones = self.lr_milestones or []
        if milestones != sorted(set(milestones)):
            raise ValueError(f"lr_milestones must ascend, got {milestones}")
        ends = {
            "lr_schedule_steps": self.lr_schedule_steps,
            "lr_step_size": self.lr_step_size,
            "lr_milestones": min(milestones, default=None),
        }
        for option, end in ends.items():
            if end is not None and self.lr_warmup_steps >= end:
                raise ValueError(f"lr_warmup_steps = {self.lr_warmup_steps} must be less than {option}, {end}")
        return self


class Schedule(PluginConfig):
    """The schedule of training steps, validations and logs."""

    steps: Annotated[int, Flag(), Resumable()] = Field(10_000, ge=1, le=_MOST_STEPS, description="Training steps.")
    meta_batch: Annotated[int, Flag()] = Field(4, ge=1, le=100_000, description="Tasks per training step.")
    log_every: int = Field(100, ge=1, le=_MOST_STEPS, description="Training steps between lines of metrics.jsonl.")
    eval_every: int | None = Field(
        None,
        ge=1,
        le=_MOST_STEPS,
        description="Training steps between validations; by default, a tenth of the run.",
    )
    eval_tasks: int = Field(100, ge=2, le=1_000_000, description="Tasks per validation.")
    patience: Annotated[int | None, Resumable()] = Field(
        None,
        ge=1,
        le=_MOST_STEPS,
        description="Stop after this many validations in a row without a better one; by default, never.",
    )
    on_nonfinite: Annotated[Literal["stop", "skip", "rollback"], Flag(), Resumable()] = Field(
        "stop",
        description="If a loss or gradient is not finite: stop, skip the step, or roll back to the newest checkpoint and "
        "continue with other tasks.",
    )
    max_nonfinite: Annotated[int, Resumable()] = Field(
        10, ge=1, le=_MOST_STEPS, description="Maximum number of skips and rollbacks before the run stops."
    )


def is_outer_option(name: str) -> bool:
    """Return whether an option belongs to the outer optimiser or its schedule."""
    return name.startswith(("outer_", "lr_"))


def create_config(parameters: Mapping[str, Any]) -> LearnerConfig:
    """Create the options from the parameters of `MetaLearner`, which include `algo` and `algo_options`.

    Raises:
        UsageError: an option is unknown or its value invalid.
    """
    own = parameters.keys() - {"self", "algo_options"}
    _check_algorithm_options(parameters["algo"], parameters["algo_options"], own)
    options = [name for name in LearnerConfig.model_fields if name != "device"]
    return validate(LearnerConfig, {name: parameters[name] for name in options}, "MetaLearner")


def _check_algorithm_options(algo: str | type | object, options: Collection[str], own: Collection[str]) -> None:
    """Refuse an unknown keyword, and suggest similar options of the learner and the algorithm."""
    if not options or not isinstance(algo, str | type):
        return
    cls = find_entry("algorithms", algo).load() if isinstance(algo, str) else algo
    known = get_config_class(cls).model_fields
    for name in options:
        if name not in known:
            present = [LearnerConfig.former_names[name]] if name in LearnerConfig.former_names else []
            raise unknown_option_error("option of MetaLearner or its algorithm", name, [*known, *own], present)


def describe_options() -> str:
    """Describe the options, for `help(metareg.MetaLearner)`."""
    lines = ["    Options:"]
    for name, field in LearnerConfig.model_fields.items():
        if name != "device":
            choices = (
                f" One of {', '.join(get_args(field.annotation))}." if get_origin(field.annotation) is Literal else ""
            )
            lines.append(f"        {name}: {field.description}{choices} Default: {field.default}.")
    return "\n".join(lines)
