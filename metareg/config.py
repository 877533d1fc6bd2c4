"""Configurations: what plugins declare, what a run is made of, and how bad values are reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from metareg.errors import UnknownNameError, UsageError

__all__ = [
    "Choice",
    "Field",
    "LearnerConfig",
    "PluginConfig",
    "RunConfig",
    "parse_yaml",
    "read_yaml",
    "under_present_names",
    "unknown_option",
    "validated",
]


class PluginConfig(BaseModel):
    """Base of a plugin's `Config`: unknown keys, infinities and NaN are refused; instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    former_names: ClassVar[Mapping[str, str]] = {}
    """Names that options once had, and those they have today; a stored configuration may have either."""


_LONGEST_YAML = 1 << 20

_Config = TypeVar("_Config", bound=BaseModel)


def validated(cls: type[_Config], values: Mapping[str, Any], where: str) -> _Config:
    """Build `cls` from `values`.

    Raises:
        UsageError: one sentence that names each bad key, what it holds, what is allowed and the nearest valid key.
    """
    values = under_present_names(cls, values)
    unknown = [key for key in values if key not in cls.model_fields]
    if unknown and cls.model_config.get("extra") == "forbid":
        raise UnknownNameError(f"option of {where}", unknown[0], cls.model_fields)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"In {where}, {'; '.join(_sentence(each) for each in error.errors())}.") from error


def under_present_names(cls: type[BaseModel], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration of a class with today's names of its options in the place of former ones."""
    former: Mapping[str, str] = getattr(cls, "former_names", {})
    return {key if former.get(key, key) in stored else former[key]: value for key, value in stored.items()}


def unknown_option(what: str, name: str, known: Iterable[str], present_names: Sequence[str] = ()) -> UsageError:
    """The error for an option that there is not, or no longer.

    Args:
        what: what it should be one of.
        name: what was written.
        known: the names that there are.
        present_names: those of options that once had this name.
    """
    if present_names:
        present = " or ".join(f"'{each}'" for each in present_names)
        return UsageError(f"There is no {what} named '{name}' any more: it is {present} now.")
    return UnknownNameError(what, name, known)


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    problem = error["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if not key:
        return problem
    if error["type"] == "missing":
        return f"'{key}' is required and has no value"
    return f"{key} = {error['input']!r} cannot be used: {problem[0].lower()}{problem[1:]}"


class Choice(PluginConfig):
    """A plugin by name, with values for its configuration. In YAML a bare name is enough."""

    name: str = Field(description="The name of an installed plugin, or DIST:NAME.")
    config: dict[str, Any] = Field({}, description="Values for the plugin's own options.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class LearnerConfig(PluginConfig):
    """What a `MetaLearner` is told beside its model, algorithm, augmenters and loss."""

    former_names = {"norm": "bn_statistics"}

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


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as a dict; nothing in it can execute.

    Raises:
        UsageError: it is missing, unreadable, no YAML, or no mapping at the top.
    """
    try:
        if path.stat().st_size > _LONGEST_YAML:
            raise UsageError(f"The configuration file {path} is larger than {_LONGEST_YAML >> 20} MiB.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"There is no configuration file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The configuration file {path} cannot be read: {error}.") from error
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"The configuration file {path} is malformed{error}.") from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise UsageError(f"The configuration file {path} must hold 'key: value' lines; it is {found}.")
    return {str(key): value for key, value in content.items()}


def parse_yaml(text: str) -> Any:
    """What a YAML text holds; nothing in it can execute, nor grow when it is read.

    Raises:
        ValueError: it is malformed; the message says where and how, and begins with a space or a colon.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{at}: {getattr(error, 'problem', None) or 'it is not valid YAML'}") from error
    except RecursionError as error:
        raise ValueError(": it is nested too deeply") from error
    except ValueError as error:  # a date or a number that cannot be
        raise ValueError(f": {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML without aliases, a few of which can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias '*{event.anchor}' is not allowed", event.start_mark
            )
        return super().compose_node(parent, index)
