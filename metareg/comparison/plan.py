"""The plan of a comparison: its arms and their runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from metareg.comparison.config import ComparisonConfig, Options, Tuning, is_location, merge_options, slugify
from metareg.comparison.space import check_tuning
from metareg.contract.config import NO_PLUGIN, validate
from metareg.contract.splits import TEST, VALIDATION
from metareg.errors import UsageError
from metareg.printable import format_count
from metareg.runs.config import PLUGIN_FIELDS
from metareg.runs.folder import ENVIRONMENT, RESULTS
from metareg.runs.options import Selection
from metareg.util.files import write_text
from metareg.util.yaml_files import read_yaml

__all__ = [
    "CHOSEN_FILE", "CONFIG_FILE", "TRIAL_FILE", "Arm", "Objects", "Plan", "PlannedRun", "check_plan",
    "refuse_other_data", "select_plugins",
]  # fmt: skip

Objects = Mapping[tuple[str, str], Any]
"""A user's own objects in a comparison, by ``(field, name)``."""

CONFIG_FILE = "comparison.yaml"
CHOSEN_FILE = "chosen.json"
"""The file with the chosen settings of an arm, in the folder of its trials."""
TRIAL_FILE = "trial.json"
"""The file with the settings of a trial, in its folder."""


@dataclass(frozen=True)
class Arm:
    """One algorithm with one augmenter on one task."""

    algorithm: str
    augmenter: str
    """``"none"``, a name, or names joined by ``+`` in the order of the chain."""
    task: str
    """The task's label."""
    variant: str = ""
    """The name of the variant; empty if no variant changes the arm."""

    @property
    def augmenters(self) -> list[str]:
        """The augmenters' names in order."""
        return [] if self.augmenter == NO_PLUGIN else self.augmenter.split("+")

    @property
    def name(self) -> str:
        """``maml+cml``; without an augmenter, ``maml``; with a variant, ``maml+cml (bf16)``."""
        return f"{self._method} ({self.variant})" if self.variant else self._method

    @property
    def setting(self) -> str:
        """The arm without its algorithm: ``cml``, or with a variant, ``cml, bf16``."""
        return f"{self.augmenter}, {self.variant}" if self.variant else self.augmenter

    @property
    def _method(self) -> str:
        return "+".join([self.algorithm, *self.augmenters])

    @property
    def folder(self) -> Path:
        """The arm's folder, relative to the folder of runs."""
        variant = f"@{slugify(self.variant)}" if self.variant else ""
        return Path(slugify(self.task), self._method.replace(":", "-") + variant)

    def __str__(self) -> str:
        return f"{self.name} on {self.task}"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison: ``metareg.train(config=config, out=path, resume=True, **options)``."""

    arm: Arm
    seed: int
    path: Path
    config: Options
    options: Options

    @property
    def is_final(self) -> bool:
        """Whether the run is a result of the comparison; a trial of tuning is not."""
        return self.options.get("test_split", TEST) == TEST

    @property
    def finished(self) -> bool:
        return (self.path / RESULTS).is_file()

    def __str__(self) -> str:
        trial = "" if self.is_final else f"{self.path.parent.name}, "
        return f"{self.arm}, {trial}seed {self.seed}"


class Plan:
    """A comparison and its folder.

    Args:
        folder: the folder.
        config: the configuration.
        objects: the user's own objects, by ``(field, name)`` as in `ComparisonConfig.program`.
    """

    def __init__(self, folder: Path, config: ComparisonConfig, objects: Objects | None = None) -> None:
        self.folder = folder
        self.config = config
        self.objects = objects or {}
        self._tasks = {task.label: task for task in config.tasks}
        methods = itertools.product(self._tasks, config.algo, config.augment)
        arms = [Arm(algorithm, augmenter, task) for task, algorithm, augmenter in methods]
        self._plugins = {name for arm in arms for name in self._list_plugins(arm)}
        self._run_as = {each: run_as for arm in arms for each, run_as in self._list_variants(arm).items()}
        self.arms = [arm for arm in dict.fromkeys(self._run_as.values()) if not self._is_left_out(arm)]
        if not self.arms:
            raise UsageError("'leave_out' excludes every arm of the comparison.")
        self.options = {arm: self._collect_options(arm) for arm in self.arms}
        """Each arm's options from the configuration, before tuning."""

    @classmethod
    def read(cls, folder: str | Path, objects: Objects | None = None) -> Plan:
        """Read the plan of an existing comparison; raise a `UsageError` if none exists or it is damaged."""
        folder = Path(folder)
        file = folder / CONFIG_FILE
        if not file.is_file():
            raise UsageError(f"There is no comparison at {folder}: it has no {CONFIG_FILE}.")
        return cls(folder, validate(ComparisonConfig, read_yaml(file), str(file)), objects)

    def write(self) -> None:
        values = self.config.model_dump(mode="json")
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
        write_text(self.folder / CONFIG_FILE, text)

    def list_runs(self) -> list[PlannedRun]:
        """List the runs without chosen settings, ordered by seed, then arm."""
        arms = [self.list_arm_runs(arm, {}) for arm in self.arms]
        return [run for of_a_seed in zip(*arms, strict=True) for run in of_a_seed]

    def list_arm_runs(self, arm: Arm, chosen: Mapping[str, Any]) -> list[PlannedRun]:
        """List the runs of one arm with its chosen settings, ordered by seed."""
        folder = Path("runs", arm.folder)
        return [self.make_run(arm, seed, folder / f"seed-{seed}", chosen) for seed in self.config.seeds]

    def make_run(self, arm: Arm, seed: int, folder: Path, options: Mapping[str, Any]) -> PlannedRun:
        """Create a run of an arm, in a folder relative to the comparison's; `options` override the configuration's."""
        find = self._find_object
        config = {
            "algo": find("algo", arm.algorithm),
            "augment": [find("augment", name) for name in arm.augmenters],
            "task": find("task", self._tasks[arm.task].task),
            "seed": seed,
        }
        merged = merge_options(self.options[arm], options)
        if isinstance(model := merged.get("model"), str):
            merged["model"] = find("model", model)
        return PlannedRun(arm, seed, self.folder / folder, config, merged)

    def _find_object(self, field: str, name: str) -> Any:
        """Return the object with this name, or the name itself if it is a plugin's."""
        return self.objects.get((field, name), name)

    def make_trial(self, arm: Arm, number: int, seed: int, options: Mapping[str, Any]) -> PlannedRun:
        """Create a run of a trial on validation tasks, with the settings `options`."""
        tuning = self.get_tuning(arm)
        assert tuning is not None
        own = {key: value for key, value in tuning.options.items() if self._concerns(arm, key)}
        folder = self.get_tuning_folder(arm).relative_to(self.folder) / f"trial-{number}" / f"seed-{seed}"
        return self.make_run(arm, seed, folder, {**own, **options, "test_split": VALIDATION})

    def get_tuning_folder(self, arm: Arm) -> Path:
        """Return the folder of an arm's trials."""
        return self.folder / "tuning" / arm.folder

    def get_tuning(self, arm: Arm) -> Tuning | None:
        """Return how an arm's settings are chosen, or None."""
        return self._tasks[arm.task].tune or self.config.tune

    def get_tuning_seeds(self, arm: Arm) -> list[int]:
        """Return the seeds of every trial of an arm."""
        tuning = self.get_tuning(arm)
        return (tuning and tuning.seeds) or self.config.seeds[:1]

    def find_arm(self, arm: Arm) -> Arm | None:
        """Return the arm that is run for `arm`: without a variant that changes nothing; None if it is left out."""
        found = self._run_as.get(arm)
        return None if found is None or self._is_left_out(found) else found

    def _is_left_out(self, arm: Arm) -> bool:
        return any(each.fits(**asdict(arm)) for each in self.config.leave_out)

    def _list_variants(self, arm: Arm) -> dict[Arm, Arm]:
        """Map an arm in each variant to the arm that is run for it."""
        found: list[tuple[Options, Arm]] = []
        run_as: dict[Arm, Arm] = {}
        for name, options in self.config.variants.items():
            own = {key: value for key, value in options.items() if self._concerns(arm, key)}
            each = replace(arm, variant=name)
            same = [known for known_options, known in found if known_options == own]
            run_as[each] = same[0] if same else each
            found += [] if same else [(own, each)]
        if len(found) <= 1 and not any(own for own, _ in found):
            return dict.fromkeys((arm, *run_as), arm)
        return {arm: found[0][1]} | run_as

    def _concerns(self, arm: Arm, key: str) -> bool:
        """Return whether an option applies to an arm: not if it names a plugin of other arms."""
        owner, dot, _ = key.partition(".")
        if owner == "augment" and dot:
            return bool(arm.augmenters)
        return not dot or owner not in self._plugins or owner in self._list_plugins(arm)

    def _collect_options(self, arm: Arm) -> Options:
        rules = [rule for rule in self.config.arms if rule.fits(**asdict(arm))]
        ordinary = [rule.options for rule in rules if rule.variant is None]
        of_variant = [self.config.variants.get(arm.variant, {}), *(rule.options for rule in rules if rule.variant)]
        merged: Options = {}
        for options in (self.config.options, self._tasks[arm.task].options, *ordinary, *of_variant):
            merged = merge_options(merged, options)
        return {key: value for key, value in merged.items() if self._concerns(arm, key)}

    def _list_plugins(self, arm: Arm) -> set[str]:
        names = arm.algorithm, *arm.augmenters, self._tasks[arm.task].task
        return {name.rpartition(":")[2] for name in names}


def check_plan(plan: Plan) -> None:
    """Assemble a run of every arm and draw tasks from each task, to find errors before anything runs.

    Raises:
        UsageError: a run would be refused, two arms are the same, or arms of a task would not see the same tasks.
    """
    from metareg.runs.training import prepare_run  # imports torch, which reports do not need

    first: dict[str, tuple[Arm, Selection]] = {}
    known: dict[tuple[Any, ...], Arm] = {}
    tuned: dict[str, tuple[Tuning, dict[str, Selection]]] = {}
    tested: set[int] = set()
    for arm in plan.arms:
        run = plan.make_run(arm, plan.config.seeds[0], Path("runs"), {})
        try:
            selection = select_plugins(run)
            if arm.task not in first:
                prepare_run(selection)
            tuning = plan.get_tuning(arm)
            if tuning:
                trial = plan.make_trial(arm, 0, plan.get_tuning_seeds(arm)[0], {})
                # An option to tune must exist in one of these arms.
                alike = "" if tuning is plan.config.tune else arm.task
                trials = tuned.setdefault(alike, (tuning, {}))[1]
                trials[str(arm)] = select_plugins(trial)
        except UsageError as error:
            raise UsageError(f"{arm}: {error}") from error
        tested |= set(selection.config.test_inner_steps)
        # NAME and DIST:NAME are the same plugin.
        plugins = (selection.algorithm, *selection.augmenters)
        twin = known.setdefault((arm.task, arm.variant, *((each.distribution, each.name) for each in plugins)), arm)
        if twin != arm:
            raise UsageError(f"{twin} and {arm} are the same; remove one of them.")
        other, theirs = first.setdefault(arm.task, (arm, selection))
        difference = _describe_task_difference(selection, theirs)
        if difference:
            hint = "Options of the task belong under 'tasks'."
            raise UsageError(f"{arm} would not see the tasks of {other}: {difference}. {hint}")
    wanted = plan.config.inner_steps
    if wanted is not None and wanted not in tested:
        raise UsageError(
            f"The comparison compares after {format_count(wanted, 'inner step')} (inner_steps), but its runs are tested "
            f"after {', '.join(map(str, sorted(tested)))} (test_inner_steps)."
        )
    for tuning, trials in tuned.values():
        check_tuning(tuning, trials)


def refuse_other_data(begun: Plan, plan: Plan) -> None:
    """Compare the data of tasks whose location has changed with the first run that has begun on each.

    Raises:
        UsageError: it is other data.
    """
    from metareg.runs import environment
    from metareg.runs.run import Run  # imports torch, which reports do not need
    from metareg.runs.training import prepare_run

    checked: set[str] = set()
    wanted = {(run.arm, run.seed): run for run in plan.list_runs()}
    for before in begun.list_runs():
        now = wanted.get((before.arm, before.seed))
        moved = now is not None and _find_locations(before) != _find_locations(now)
        if now is None or not moved or before.arm.task in checked or not (before.path / ENVIRONMENT).is_file():
            continue
        selection = select_plugins(now)
        environment.refuse_other_data(Run(before.path, selection.config, *prepare_run(selection), selection.model))
        checked.add(before.arm.task)


def _find_locations(run: PlannedRun) -> list[Any]:
    return [value for key, value in run.options.items() if is_location(key)]


def select_plugins(run: PlannedRun) -> Selection:
    """Load the plugins and complete the configuration of a run."""
    from metareg.runs.own import OwnFacts, select  # imports torch, which reports do not need

    options = dict(run.options)
    facts = {field.name: options.pop(field.name, None) for field in dataclasses.fields(OwnFacts)}
    given = {field: options.pop(field) for field in PLUGIN_FIELDS if field in options}
    return select(run.config, given, OwnFacts(**facts), options)


def _describe_task_difference(own: Selection, other: Selection) -> str:
    """Describe how the task's options differ between two runs; empty if they do not."""
    values, others = own.config.task.config, other.config.task.config
    # Options that a model recommends to its task, such as the hops in a graph, do not change which examples are drawn.
    wishes = [key for each in (own, other) for key in getattr(each.model.instance, "recommended", {})]
    prepared = {key.rpartition(".")[2] for key in wishes}
    different = [key for key in values if key not in prepared and values[key] != others[key]]
    return ", ".join(f"{key} is {values[key]!r}, not {others[key]!r}" for key in different)
