"""The configuration of a comparison, as in a YAML file."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from metareg.contract.config import NO_PLUGIN, Field, PluginConfig, validate
from metareg.contract.search import Range, RelativeRange, parse_domain
from metareg.errors import UnknownNameError, UsageError

__all__ = [
    "ALL_PAIRS", "GRID", "ArmRule", "Axis", "ComparedTask", "ComparisonConfig", "Options", "Tuning", "is_location",
    "merge_options", "slugify",
]  # fmt: skip

GRID: Final = "grid"
ALL_PAIRS: Final = "all"
Axis = Literal["augmenter", "algorithm", "variant", "all"]
"""What a baseline replaces: arms are compared with the arm that differs only in this."""

_MOST_SEEDS, _MOST_NAMES, _MOST_RUNS = 1000, 1000, 100_000

_NOT_OPTIONS = {
    "algo": "use 'algo'", "augment": "use 'augment'", "task": "use 'tasks'",
    "seed": "use 'seeds'", "config": "use 'options'", "test_split": "use 'tune'",
    "out": "the comparison's folder decides it", "resume": "a comparison always continues",
    "observers": "the runs of a comparison have none",
}  # fmt: skip


def _split_names(value: Any) -> Any:
    """Split a comma-separated string; return a list as it is."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_name(text: str) -> str:
    if not text.strip():
        raise ValueError("a name is missing")
    return text.strip()


def _check_chain(text: str) -> str:
    """Check an augmenter or chain of augmenters, and remove blanks."""
    parts = [_check_name(part) for part in text.split("+")]
    if NO_PLUGIN in parts and len(parts) > 1:
        raise ValueError(f"'{NO_PLUGIN}' cannot be part of a chain")
    return "+".join(parts)


def _check_distinct(what: str, values: list[Any], hint: str = "") -> list[Any]:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"the {what} '{twice[0]}' is listed twice{hint}")
    return values


Name = Annotated[str, AfterValidator(_check_name)]
Chain = Annotated[str, AfterValidator(_check_chain)]
Options = dict[str, Any]


def _parse_space(given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    return {str(key): None if value is None else parse_domain(str(key), value) for key, value in given.items()}


def _check_trials(given: Any) -> Any:
    if given == GRID or (isinstance(given, int) and not isinstance(given, bool) and given >= 2):
        return given
    raise ValueError("it should be a number of 2 or more (the first trial uses the defaults), or grid")


def parse_seeds(given: Any) -> Any:
    """Convert a number n to the seeds 0 to n − 1, and parse strings (``"0,3,7"``, ``"1000-1004"``)."""
    if isinstance(given, str):
        try:
            numbers = [number for part in given.split(",") for number in _parse_seed_range(part)]
        except ValueError:
            expected = "a number of seeds (5), seeds separated by commas (0,3,7), or a range (1000-1004)"
            raise ValueError(f"it should be {expected}") from None
        given = numbers if re.search("[,-]", given.strip()) else numbers[0]
    if not isinstance(given, int) or isinstance(given, bool):
        return given
    if not 1 <= given <= _MOST_SEEDS:
        raise ValueError(f"the number of seeds must be from 1 to {_MOST_SEEDS}, not {given}")
    return list(range(given))


def _parse_seed_range(text: str) -> Iterable[int]:
    """Parse ``"3"`` or ``"1000-1004"``; raise a ValueError for anything else, and for too many seeds."""
    first, dash, last = text.partition("-")
    ends = int(first), int(last if dash else first)
    if not 0 <= ends[1] - ends[0] < _MOST_SEEDS:
        raise ValueError
    return range(ends[0], ends[1] + 1)


_Seed = Annotated[int, Field(ge=0, lt=2**63)]  # the range of a run's seed
_DISTINCT_SEEDS = AfterValidator(partial(_check_distinct, "seed"))
Seeds = Annotated[
    list[_Seed], BeforeValidator(parse_seeds), Field(min_length=1, max_length=_MOST_SEEDS), _DISTINCT_SEEDS
]


class Tuning(PluginConfig):
    """How the settings of each arm of a comparison are chosen, on validation tasks."""

    trials: Annotated[int | Literal["grid"], BeforeValidator(_check_trials)] = Field(
        GRID, description="How many settings each arm tries, or grid: every combination of the values in 'space'."
    )
    seeds: Seeds | None = Field(
        None,
        description="Seeds for every setting, or a number n for 0 to n − 1; by default, the comparison's first seed.",
    )
    space: Annotated[dict[str, list[Any] | Range | RelativeRange | None], BeforeValidator(_parse_space)] = Field(
        {},
        description="Options to choose, and their values: a list, {low: …, high: …, log: true}, {factor: …} around the "
        "option's default, or null for the range that its plugin declares. If empty, all options that the "
        "algorithm and the augmenters declare.",
    )
    options: dict[str, Any] = Field({}, description="Options of the trials only, such as fewer steps.")

    @model_validator(mode="after")
    def _check_consistency(self) -> Tuning:
        for key in self.space.keys() & self.options.keys():
            raise ValueError(f"'{key}' cannot be tuned because it has a fixed value in 'options'")
        if self.trials == GRID and not self.space:
            raise ValueError(
                "a grid needs values in 'space', such as {inner_lr: [0.01, 0.1]}; a search needs a number of trials"
            )
        settings = math.prod(len(values) for values in self.space.values() if isinstance(values, list))
        if self.trials == GRID and settings > _MOST_RUNS:
            raise ValueError(
                f"the grid has {settings} settings, more than {_MOST_RUNS}; use a search with a number of trials "
                "instead"
            )
        return self


class ComparedTask(PluginConfig):
    """One task of a comparison: a plugin with options. In YAML a bare name is enough."""

    task: Name = Field(description="The task plugin.")
    label: str = Field("", description="Its name in tables; by default, the plugin's name.")
    options: Options = Field({}, description="Options of the run and its plugins, for this task.")
    tune: Tuning | None = Field(None, description="How settings are chosen on this task; by default, as on all others.")

    @model_validator(mode="before")
    @classmethod
    def _fill_label(cls, value: Any) -> Any:
        value = {"task": value} if isinstance(value, str) else value
        if isinstance(value, Mapping) and not value.get("label"):
            value = {**value, "label": value.get("task", "")}
        return value


class ArmSelector(PluginConfig):
    """Some arms of a comparison."""

    variant: str | None = Field(None, description="Only arms of this variant.")
    algo: str | None = Field(None, description="Only arms with this algorithm.")
    augment: Chain | None = Field(None, description="Only arms with this augmenter, or chain of augmenters.")
    task: str | None = Field(None, description="Only arms on the task with this label.")

    def fits(self, *, algorithm: str, augmenter: str, task: str, variant: str) -> bool:
        """Return whether the selector matches an arm."""
        wanted = (self.algo, algorithm), (self.augment, augmenter), (self.task, task), (self.variant, variant)
        return all(name in (None, own) for name, own in wanted)


class ArmRule(ArmSelector):
    """Options for the arms that match; a later rule overrides an earlier one."""

    options: Options = Field(description="Options of the run and its plugins.")


class ComparisonConfig(PluginConfig):
    """A comparison: every algorithm with every augmenter on every task, for every seed.

    Options have the same names as in ``metareg train --set``. An option that names its plugin, such as ``cml.gamma``,
    applies to the arms with that plugin.
    """

    title: str = Field("", description="The heading of its reports.")
    notes: str = Field("", description="Markdown that its reports show below the heading.")
    plan: str = Field(
        "",
        description="Markdown that its reports show below the notes: the question, the runs that answer it, and the "
        "conclusion for each outcome. It is fixed once a run that counts has begun.",
    )
    algo: Annotated[list[Name], BeforeValidator(_split_names)] = Field(
        ["maml"], min_length=1, max_length=_MOST_NAMES, description="Algorithms."
    )
    augment: Annotated[list[Chain], BeforeValidator(_split_names)] = Field(
        [NO_PLUGIN],
        min_length=1,
        max_length=_MOST_NAMES,
        description="Augmenters; 'none' for none, 'dropgrad+cml' for a chain.",
    )
    tasks: Annotated[list[ComparedTask], BeforeValidator(_split_names)] = Field(
        [ComparedTask(task="sinusoid")], min_length=1, max_length=_MOST_NAMES, description="Tasks."
    )
    seeds: Seeds = Field([0], description="The seeds, as a list or as 1000-1004, or a number n for 0 to n − 1.")
    options: Options = Field({}, description="Options of every run and its plugins.")
    variants: dict[str, Options] = Field(
        {},
        description="A second axis: options by name of the variant. Every arm runs with each variant, paired by seed; arms "
        "with none of the options run once.",
    )
    baseline: str = Field(
        "",
        description="What reports compare with: an augmenter, algorithm or variant, or 'all' for all pairs. By default, "
        "'none' if there are augmenters, otherwise the first variant.",
    )
    inner_steps: int | None = Field(
        None,
        ge=0,
        description="Reports compare after this number of inner steps; by default, after the largest tested number.",
    )
    names: dict[str, str] = Field(
        {}, description="Names of plugins and variants in paper tables, such as {metasgd: Meta-SGD}."
    )
    arms: list[ArmRule] = Field([], description="Options for some arms.")
    leave_out: list[ArmSelector] = Field(
        [], description="Arms that are not run, for example because an algorithm needs classes."
    )
    tune: Tuning | None = Field(None, description="How each arm's settings are chosen on validation tasks.")
    program: dict[Literal["algo", "augment", "task", "model"], list[str]] = Field(
        {}, description="Which of these names refer to objects and classes from a program."
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> ComparisonConfig:
        runs = len(self.algo) * len(self.augment) * len(self.tasks) * len(self.seeds)
        if runs > _MOST_RUNS:
            raise ValueError(f"this would be {runs} runs, but a comparison can have at most {_MOST_RUNS}; split it")
        labels = [each.label for each in self.tasks]
        _check_distinct("algorithm", self.algo)
        _check_distinct("augmenter", self.augment)
        _check_distinct("task label", labels, "; give each of its tasks its own label")
        for one, other in itertools.combinations(labels, 2):
            if slugify(one) == slugify(other):
                raise ValueError(f"the task labels '{one}' and '{other}' share the folder '{slugify(one)}'; change one")
        for one, other in itertools.combinations(self.variants, 2):
            if slugify(one) == slugify(other):
                raise ValueError(f"the variants '{one}' and '{other}' share the folder '{slugify(one)}'; change one")
        if self.baseline:
            self.find_axis(self.baseline)
        for rule in (*self.arms, *self.leave_out):
            given = ("algorithm", rule.algo, self.algo), ("augmenter", rule.augment, self.augment)
            of_variants = "variant", rule.variant, list(self.variants)
            for what, name, known in (*given, ("task label", rule.task, labels), of_variants):
                if name is not None and name not in known:
                    raise UnknownNameError(f"{what} of this comparison", name, known)
        tunings = [tune for tune in (self.tune, *(each.tune for each in self.tasks)) if tune]
        every = [self.options, *(each.options for each in self.tasks), *(rule.options for rule in self.arms)]
        every += [*self.variants.values(), *(tune.options for tune in tunings)]
        for key in self._varied & {key for tune in tunings for key in (*tune.space, *tune.options)}:
            raise ValueError(f"'{key}' is set by variants and cannot be tuned")
        for key in (key for options in every for key in options if key in _NOT_OPTIONS):
            raise ValueError(f"'{key}' is no option here; {_NOT_OPTIONS[key]}")
        return self

    @property
    def _varied(self) -> set[str]:
        """The options that variants set."""
        return {key for options in self.variants.values() for key in options}

    def find_axis(self, name: str) -> Axis:
        """Return what this baseline is: an augmenter, an algorithm, a variant, or ``"all"``.

        Raises:
            UnknownNameError: nothing has this name.
            UsageError: several things have this name.
        """
        names: dict[Axis, list[str]] = {
            "augmenter": self.augment, "algorithm": self.algo, "variant": list(self.variants), "all": [ALL_PAIRS],
        }  # fmt: skip
        found = [axis for axis, known in names.items() if name in known]
        if not found:
            raise UnknownNameError("baseline", name, [each for known in names.values() for each in known])
        if len(found) > 1:
            raise UsageError(f"The baseline '{name}' is ambiguous ({found[0]}, {found[1]}); rename the variant.")
        return found[0]

    def override(
        self, *, options: Options | None = None, space: Mapping[str, Any] | None = None, search: int | None = None
    ) -> ComparisonConfig:
        """Return the comparison with values that override everything in it.

        Args:
            options: for every run; they override those of tasks, rules and tunings.
            space: the search space of every arm, as in `Tuning`.
            search: the number of trials for each arm; without it, a grid over `space`.
        """
        options, space = options or {}, space or {}
        for key in self._varied & {*options, *space}:
            raise UsageError(f"'{key}' is set by the variants of this comparison; change it there.")
        values = self.model_dump()
        values["options"] = merge_options(values["options"], options)
        rules = values["arms"]
        if options and any(each["options"] for each in values["tasks"] + rules):
            # The last rule, if it is for all arms, overrides tasks and other rules; a repeated call reuses it.
            if not rules or any(rules[-1][key] for key in ("algo", "augment", "task")):
                rules.append({"options": {}})
            rules[-1]["options"] = merge_options(rules[-1]["options"], options)
        tune: dict[str, Any] = {"space": space} if space else {}
        if tune or search is not None:
            tune["trials"] = GRID if search is None else search
            values["tune"] = values["tune"] or {"options": {}}
        for tuning in filter(None, (values["tune"], *(each["tune"] for each in values["tasks"]))):
            own = {key: value for key, value in tuning["options"].items() if key not in {*options, *space}}
            tuning |= {"options": own, **tune}
        return validate(ComparisonConfig, values, "the comparison")

    def locate_data(self, data: str, readers: Collection[str]) -> ComparisonConfig:
        """Return the comparison with the location of the data of some tasks.

        Args:
            data: the folder or file.
            readers: the labels of the tasks that read it.
        """
        for key in self._varied:
            if is_location(key):
                raise UsageError(f"'{key}' is set by the variants of this comparison; change it there.")
        values = self.model_dump()
        for options in (values["options"], *(each["options"] for each in values["tasks"] + values["arms"])):
            for key in [key for key in options if is_location(key)]:
                del options[key]
        for task in values["tasks"]:
            if task["label"] in readers:
                task["options"]["task.data"] = data
        return validate(ComparisonConfig, values, "the comparison")


def is_location(key: str) -> bool:
    """Return whether an option says where a task's data is, which can differ from machine to machine."""
    return key.rpartition(".")[2] == "data"


def slugify(text: str) -> str:
    """Convert a text to the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "task"


def merge_options(options: Mapping[str, Any], later: Mapping[str, Any]) -> Options:
    """Merge options; `later` overrides `options`.

    If an option occurs under two names, such as inner_lr and maml.inner_lr, the last one counts, so `later` comes last.
    """
    return {**{key: value for key, value in options.items() if key not in later}, **later}
