"""What a comparison consists of: its configuration, its arms, and the runs that they ask for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from metareg.comparison.space import Seeds, Tuning
from metareg.comparison.space import check as check_choices
from metareg.contract.config import PluginConfig, validate
from metareg.errors import UnknownNameError, UsageError
from metareg.util.files import write_text
from metareg.util.yaml_files import read_yaml

if TYPE_CHECKING:
    from metareg.runs.options import Selection

__all__ = ["Arm", "ArmRule", "ComparedTask", "ComparisonConfig", "Plan", "PlannedRun", "check", "stacked"]

NO_AUGMENTER = "none"
FILE = "comparison.yaml"

_NOT_OPTIONS = {
    "algo": "it is what 'algo' is for", "augment": "it is what 'augment' is for", "task": "it is what 'tasks' is for",
    "seed": "it is what 'seeds' is for", "config": "it is what 'options' is for", "test_split": "it is what 'tune' is for",
    "out": "the comparison's folder says it", "resume": "a comparison always goes on",
    "observers": "the runs of a comparison have none",
}  # fmt: skip


def _listed(value: Any) -> Any:
    """A list from a list, or from a text with commas."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError("a name is missing")
    return text.strip()


def _chain(text: str) -> str:
    """An augmenter or several in a chain, without blanks."""
    parts = [_name(part) for part in text.split("+")]
    if NO_AUGMENTER in parts and len(parts) > 1:
        raise ValueError(f"'{NO_AUGMENTER}' is no part of a chain")
    return "+".join(parts)


Name = Annotated[str, AfterValidator(_name)]
Chain = Annotated[str, AfterValidator(_chain)]
Options = dict[str, Any]


class ComparedTask(PluginConfig):
    """One task of a comparison: a plugin with options. In YAML a bare name is enough."""

    task: Name = Field(description="The task plugin.")
    label: str = Field("", description="How tables name it; the plugin's name where it is not given.")
    options: Options = Field({}, description="Options of the run and its plugins, for this task.")
    tune: Tuning | None = Field(
        None, description="How settings are chosen on this task; as on all others where it is not given."
    )

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, value: Any) -> Any:
        value = {"task": value} if isinstance(value, str) else value
        if isinstance(value, Mapping) and not value.get("label"):
            value = {**value, "label": value.get("task", "")}
        return value


class ArmRule(PluginConfig):
    """Options for the arms that it fits; a later rule stands before an earlier one."""

    algo: str | None = Field(None, description="Only arms with this algorithm.")
    augment: Chain | None = Field(None, description="Only arms with this augmenter, or chain of augmenters.")
    task: str | None = Field(None, description="Only arms on the task with this label.")
    options: Options = Field(description="Options of the run and its plugins.")

    def fits(self, arm: Arm) -> bool:
        """Whether the rule is one for this arm."""
        wanted = (self.algo, arm.algorithm), (self.augment, arm.augmenter), (self.task, arm.task)
        return all(given is None or given == own for given, own in wanted)


class ComparisonConfig(PluginConfig):
    """A comparison: every algorithm with every augmenter on every task, for every seed.

    Options are given by the names that ``metareg train --set`` takes. One that names its plugin, as ``cml.gamma``, is for
    the arms that have that plugin.
    """

    title: str = Field("", description="The heading of its reports.")
    notes: str = Field("", description="Markdown that its reports show below the heading.")
    algo: Annotated[list[Name], BeforeValidator(_listed)] = Field(["maml"], min_length=1, description="Algorithms.")
    augment: Annotated[list[Chain], BeforeValidator(_listed)] = Field(
        [NO_AUGMENTER], min_length=1, description="Augmenters; 'none' for none, 'dropgrad+cml' for a chain."
    )
    tasks: Annotated[list[ComparedTask], BeforeValidator(_listed)] = Field(
        [ComparedTask(task="sinusoid")], min_length=1, description="Tasks."
    )
    seeds: Seeds = Field([0], description="The seeds, or a number n for the seeds 0 to n − 1.")
    options: Options = Field({}, description="Options of every run and its plugins.")
    arms: list[ArmRule] = Field([], description="Options for some arms.")
    tune: Tuning | None = Field(None, description="How each arm's settings are chosen on validation tasks.")

    @model_validator(mode="after")
    def _consistent(self) -> ComparisonConfig:
        labels = [each.label for each in self.tasks]
        for what, names, hint in (
            ("algorithm", self.algo, ""),
            ("augmenter", self.augment, ""),
            ("task label", labels, "; give each of its tasks a label of its own"),
        ):
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ValueError(f"the {what} '{twice[0]}' stands twice{hint}")
        for one, other in itertools.combinations(labels, 2):
            if _slug(one) == _slug(other):
                raise ValueError(f"the task labels '{one}' and '{other}' share the folder '{_slug(one)}'; change one")
        for known, given, what in (
            (self.algo, [rule.algo for rule in self.arms], "algorithm of this comparison"),
            (self.augment, [rule.augment for rule in self.arms], "augmenter of this comparison"),
            (labels, [rule.task for rule in self.arms], "task label of this comparison"),
        ):
            for name in given:
                if name is not None and name not in known:
                    raise UnknownNameError(what, name, known)
        every = [self.options, *(each.options for each in self.tasks), *(rule.options for rule in self.arms)]
        every += [tune.options for tune in (self.tune, *(each.tune for each in self.tasks)) if tune]
        for key in (key for options in every for key in options if key in _NOT_OPTIONS):
            raise ValueError(f"'{key}' is no option here; {_NOT_OPTIONS[key]}")
        return self

    @classmethod
    def read(cls, path: Path) -> ComparisonConfig:
        """The configuration in a YAML file.

        Raises:
            UsageError: it cannot be read, or something in it is wrong.
        """
        return validate(cls, read_yaml(path), str(path))

    def to_yaml(self) -> str:
        """What `read` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


@dataclass(frozen=True)
class Arm:
    """One algorithm with one augmenter on one task."""

    algorithm: str
    augmenter: str
    """``"none"``, a name, or names with plus signs in the order in which they are chained."""
    task: str
    """The task's label."""

    @property
    def augmenters(self) -> list[str]:
        """The chain."""
        return [] if self.augmenter == NO_AUGMENTER else self.augmenter.split("+")

    @property
    def name(self) -> str:
        """``maml+cml``; without an augmenter, ``maml``."""
        return "+".join([self.algorithm, *self.augmenters])

    @property
    def folder(self) -> Path:
        """Its folder below those of a comparison's runs."""
        return Path(_slug(self.task), self.name.replace(":", "-"))

    def __str__(self) -> str:
        return f"{self.name} on {self.task}"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison, carried out by ``metareg.train(config=config, out=path, resume=True, **options)``."""

    arm: Arm
    seed: int
    path: Path
    config: Options
    options: Options

    @property
    def is_final(self) -> bool:
        """Whether its test counts; a trial's is on validation tasks."""
        return self.options.get("test_split", "test") == "test"

    @property
    def finished(self) -> bool:
        """Whether its results are there."""
        return (self.path / "results.json").is_file()

    def __str__(self) -> str:
        trial = "" if self.is_final else f"{self.path.parent.name}, "
        return f"{self.arm}, {trial}seed {self.seed}"


class Plan:
    """A comparison and its folder.

    Args:
        folder: the comparison's folder.
        config: what is compared.
    """

    def __init__(self, folder: Path, config: ComparisonConfig) -> None:
        self.folder = folder
        self.config = config
        self.arms = [
            Arm(algorithm, augmenter, task.label)
            for task, algorithm, augmenter in itertools.product(config.tasks, config.algo, config.augment)
        ]
        self._tasks = {task.label: task for task in config.tasks}
        self._plugins = {name for arm in self.arms for name in self._plugins_of(arm)}
        self._options = {arm: self._given(arm) for arm in self.arms}

    @classmethod
    def read(cls, folder: str | Path) -> Plan:
        """The plan of a comparison that was begun.

        Raises:
            UsageError: there is none, or its configuration is damaged.
        """
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise UsageError(f"There is no comparison at {folder}: it has no {FILE}.")
        return cls(folder, ComparisonConfig.read(folder / FILE))

    def write(self) -> None:
        """Write the configuration into the folder."""
        write_text(self.folder / FILE, self.config.to_yaml())

    def runs(self, chosen: Mapping[Arm, Options] | None = None) -> list[PlannedRun]:
        """The runs, whole tables seed after seed.

        Args:
            chosen: options that were chosen for some arms; they stand before those of the configuration.
        """
        arms = [self.runs_of(arm, (chosen or {}).get(arm, {})) for arm in self.arms]
        return [run for of_a_seed in zip(*arms, strict=True) for run in of_a_seed]

    def runs_of(self, arm: Arm, chosen: Mapping[str, Any]) -> list[PlannedRun]:
        """The runs of one arm, seed after seed.

        Args:
            arm: one of `arms`.
            chosen: options that were chosen for it; they stand before those of the configuration.
        """
        folder = Path("runs", arm.folder)
        return [self.run(arm, seed, folder / f"seed-{seed}", chosen) for seed in self.config.seeds]

    def run(self, arm: Arm, seed: int, folder: Path, options: Mapping[str, Any]) -> PlannedRun:
        """A run of an arm.

        Args:
            arm: one of `arms`.
            seed: fixes weights, tasks and noise: the same ones for every arm.
            folder: relative to the comparison's.
            options: stand before those of the configuration.
        """
        task = self.task(arm)
        config = {
            "algo": arm.algorithm,
            "augment": arm.augmenters,
            "task": task.task,
            "seed": seed,
        }
        return PlannedRun(arm, seed, self.folder / folder, config, stacked(self._options[arm], options))

    def trial(self, arm: Arm, number: int, seed: int, options: Mapping[str, Any]) -> PlannedRun:
        """A run on validation tasks, by which an arm's settings are chosen.

        Args:
            arm: one of `arms`.
            number: the trial's.
            seed: as in `run`.
            options: what the trial tries.
        """
        tuning = self.tuning(arm)
        assert tuning is not None
        own = {key: value for key, value in tuning.options.items() if self.is_for(arm, key)}
        folder = self.tuning_folder(arm).relative_to(self.folder) / f"trial-{number}" / f"seed-{seed}"
        return self.run(arm, seed, folder, {**own, **options, "test_split": "validation"})

    def tuning_folder(self, arm: Arm) -> Path:
        """Where an arm's trials are."""
        return self.folder / "tuning" / arm.folder

    def tuning(self, arm: Arm) -> Tuning | None:
        """How the settings of an arm are chosen; None where they are not."""
        return self.task(arm).tune or self.config.tune

    def tuning_seeds(self, arm: Arm) -> list[int]:
        """The seeds of every trial of an arm."""
        tuning = self.tuning(arm)
        return (tuning and tuning.seeds) or self.config.seeds[:1]

    def task(self, arm: Arm) -> ComparedTask:
        """The task of an arm."""
        return self._tasks[arm.task]

    def options(self, arm: Arm) -> Options:
        """The options that the configuration gives an arm, before any are chosen."""
        return dict(self._options[arm])

    def is_for(self, arm: Arm, key: str) -> bool:
        """Whether an option concerns an arm: one that names a plugin of other arms does not."""
        owner, dot, _ = key.partition(".")
        if owner == "augment" and dot:
            return bool(arm.augmenters)
        return not dot or owner not in self._plugins or owner in self._plugins_of(arm)

    def _given(self, arm: Arm) -> Options:
        rules = [rule.options for rule in self.config.arms if rule.fits(arm)]
        merged: Options = {}
        for options in (self.config.options, self.task(arm).options, *rules):
            merged = stacked(merged, options)
        return {key: value for key, value in merged.items() if self.is_for(arm, key)}

    def _plugins_of(self, arm: Arm) -> set[str]:
        names = arm.algorithm, *arm.augmenters, self.task(arm).task
        return {name.rpartition(":")[2] for name in names}


def check(plan: Plan) -> None:
    """Put together every arm's run once, and draw tasks of each task, so that what is wrong is found before anything runs.

    Raises:
        UsageError: an unknown name or option, an impossible value, missing data, a model that does not fit, or arms of a
            task that would not see the same tasks.
    """
    from metareg.runs.options import assemble
    from metareg.runs.training import prepare_run

    first: dict[str, tuple[Arm, Selection]] = {}
    known: dict[tuple[Any, ...], Arm] = {}
    tuned: dict[str, tuple[Tuning, dict[str, Selection]]] = {}
    for arm in plan.arms:
        run = plan.run(arm, plan.config.seeds[0], Path("runs"), {})
        try:
            selection = assemble(run.config, run.options)
            if arm.task not in first:
                prepare_run(selection)
            tuning = plan.tuning(arm)
            if tuning:
                trial = plan.trial(arm, 0, plan.tuning_seeds(arm)[0], {})
                alike = arm.task if plan.task(arm).tune else ""  # an option to choose must be one of some arm there
                trials = tuned.setdefault(alike, (tuning, {}))[1]
                trials[str(arm)] = assemble(trial.config, trial.options)
        except UsageError as error:
            raise UsageError(f"{arm}: {error}") from error
        # A plugin has two names, NAME and DIST:NAME.
        plugins = (selection.algorithm, *selection.augmenters)
        twin = known.setdefault((arm.task, *((each.distribution, each.name) for each in plugins)), arm)
        if twin != arm:
            raise UsageError(f"{twin} and {arm} are the same; leave one of them out.")
        other, theirs = first.setdefault(arm.task, (arm, selection))
        difference = _task_difference(selection, theirs)
        if difference:
            raise UsageError(
                f"{arm} would not see the tasks of {other}: {difference}. Options of the task belong under 'tasks'."
            )
    for tuning, trials in tuned.values():
        check_choices(tuning, trials)


def _task_difference(own: Selection, other: Selection) -> str:
    """How the options of a task differ between two runs of it, for a reader; empty where they do not."""
    values, others = own.config.task.config, other.config.task.config
    # What a model has the task prepare, as its layers' hops in a graph, leaves the examples that are drawn as they are.
    wishes = [key for each in (own, other) for key in getattr(each.model.instance, "recommended", {})]
    prepare_run = {key.rpartition(".")[2] for key in wishes}
    different = [key for key in values if key not in prepare_run and values[key] != others[key]]
    return ", ".join(f"{key} is {values[key]!r}, not {others[key]!r}" for key in different)


def stacked(options: Mapping[str, Any], later: Mapping[str, Any]) -> Options:
    """Options with others that stand before them.

    Of two names of one option, as inner_lr and maml.inner_lr, the last one counts: all of `later` goes to the end.
    """
    return {**{key: value for key, value in options.items() if key not in later}, **later}


def _slug(text: str) -> str:
    """A text as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "task"
