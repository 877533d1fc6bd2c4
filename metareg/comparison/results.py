"""The results of a comparison so far: its folder as arrays, and a list of what is missing."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metareg.comparison.archive import unpack_archive
from metareg.comparison.plan import CHOSEN_FILE, Arm, Plan, PlannedRun
from metareg.comparison.pool import read_divergence, read_failure
from metareg.contract.config import update_names
from metareg.contract.splits import TEST, VALIDATION
from metareg.errors import UsageError
from metareg.learner.config import LearnerConfig
from metareg.runs.folder import ANALYSIS, CONFIG, ENVIRONMENT, METRICS, RESULTS, TIMING
from metareg.runs.options import parse_assignments
from metareg.util.files import MALFORMED, parse_json, read_json, read_text

__all__ = ["ArmResults", "Chosen", "Gap", "Results", "TaskResults", "format_command", "read_results"]

Array = NDArray[np.float64]

_OF_ENVIRONMENT = ("metareg", "python", "platform", "processor", "torch", "torch_threads", "cuda", "device", "strategy")


@dataclass(frozen=True)
class Gap:
    """A run that is missing or incomplete."""

    what: str
    """A description: arm and task, and for a trial its number."""
    seed: str
    """The seed; empty if the gap concerns all seeds."""
    state: str
    """``"diverged"``, ``"broken"``, ``"unfinished"``, ``"not begun"``, or ``"damaged"``, which means that the run
    counts but the named file is ignored."""
    reason: str
    path: Path
    """The run's folder, relative to the comparison's."""


@dataclass(frozen=True)
class Chosen:
    """The settings that tuning chose for an arm."""

    options: Mapping[str, Any]
    trials: int
    """The number of settings tried."""
    failed: int
    """The number of settings without a score, because training diverged or the arm does not allow them."""


@dataclass(frozen=True, eq=False)
class ArmResults:
    """The finished runs of an arm, in the order of `seeds`."""

    arm: Arm
    seeds: tuple[int, ...]
    diverged: tuple[int, ...]
    """Seeds whose training diverged, so that they have no score."""
    inner_steps: tuple[int, ...]
    scores: Array
    """``[seeds, inner_steps, tasks]``."""
    curves: Mapping[int, Mapping[int, float]]
    """For each seed, the validation metric by training step; seeds without validation are missing."""
    seconds_per_step: Array
    """``[seeds]``: each run's median over its reports; NaN if it has none."""
    peak_bytes: Array
    """``[seeds]``: each run's peak memory in bytes; NaN if unknown."""
    planned: int
    """The configured number of seeds."""
    steps: int | None
    """The configured number of training steps; None before the first run has begun, if the configuration does not say."""
    chosen: Chosen | None
    """The chosen settings; None without tuning or before it has ended."""
    analyses: Mapping[int, Mapping[str, Any]]
    """For each seed, the run's analysis from ``metareg analyse``, as in `metareg.runs.adaptation.Analysis`."""
    command: str
    """The command that trains one run of the arm, with SEED in place of the seed."""

    def by_seed(self, inner_steps: int) -> dict[int, Array]:
        """Return each seed's scores ``[tasks]`` after a number of inner steps; empty if this number was not tested."""
        if inner_steps not in self.inner_steps:
            return {}
        column = self.inner_steps.index(inner_steps)
        return {seed: self.scores[row, column] for row, seed in enumerate(self.seeds)}

    def outcomes(self, inner_steps: int) -> dict[int, Array]:
        """Return the same as `by_seed`, with a single NaN for each seed whose training diverged."""
        scores = self.by_seed(inner_steps)
        return {} if self.seeds and not scores else scores | dict.fromkeys(self.diverged, np.array([np.nan]))


@dataclass(frozen=True, eq=False)
class TaskResults:
    """The results of all arms on a task."""

    label: str
    metric: str
    """The metric's name; empty before the first run has finished."""
    higher_is_better: bool
    bn_statistics: tuple[str, ...]
    """The BatchNorm statistics used in the tests, from results.json; normally one value."""
    arms: tuple[ArmResults, ...]

    @property
    def inner_steps(self) -> tuple[int, ...]:
        """All numbers of inner steps that were tested in any arm, ascending."""
        return tuple(sorted({number for each in self.arms for number in each.inner_steps}))

    @property
    def shared_inner_steps(self) -> tuple[int, ...]:
        """The numbers of inner steps that were tested in every arm with a finished run, ascending."""
        tested = [set(each.inner_steps) for each in self.arms if each.seeds]
        return tuple(sorted(set.intersection(*tested))) if tested else ()

    @property
    def single(self) -> bool:
        """Whether no arm has more than one seed, so that intervals over seeds do not exist."""
        return all(len(each.seeds) <= 1 for each in self.arms)


@dataclass(frozen=True, eq=False)
class Results:
    """A comparison's results so far."""

    plan: Plan
    tasks: tuple[TaskResults, ...]
    gaps: tuple[Gap, ...]
    environment: Mapping[str, Counter[str]]
    """For each fact of the environment, the number of finished runs by value."""

    @property
    def finished(self) -> int:
        """The number of finished runs."""
        return sum(len(each.seeds) for task in self.tasks for each in task.arms)

    @property
    def diverged(self) -> int:
        """The number of runs without a score because their training diverged."""
        return sum(len(each.diverged) for task in self.tasks for each in task.arms)

    @property
    def missing(self) -> int:
        """The number of runs that have neither finished nor diverged."""
        return self.planned - self.finished - self.diverged

    @property
    def planned(self) -> int:
        """The configured number of runs."""
        return len(self.plan.arms) * len(self.plan.config.seeds)

    def choose_inner_steps(self, wanted: int | None) -> dict[str, int]:
        """Return the number of inner steps to compare after on each task that has results.

        Args:
            wanted: the number, where it was tested; by default, the largest that was tested in every arm.

        Raises:
            UsageError: no run was tested after `wanted`.
        """
        tasks = [task for task in self.tasks if task.inner_steps]
        known = sorted({number for task in tasks for number in task.inner_steps})
        if wanted is not None and wanted not in known:
            numbers = ", ".join(map(str, known))
            raise UsageError(f"No run was tested after {wanted} inner steps; there are results after {numbers}.")
        return {
            # Arms without a common number of inner steps cannot be compared, but their means are still worth a table.
            task.label: wanted if wanted in task.inner_steps else (task.shared_inner_steps or task.inner_steps)[-1]
            for task in tasks
        }


def read_results(path: str | Path) -> Results:
    """Read a comparison's folder or archive; `Results.gaps` lists everything that is missing or damaged.

    Raises:
        UsageError: there is no comparison, or its configuration is damaged.
    """
    if not Path(path).is_file():
        return _read_folder(Path(path))
    with unpack_archive(Path(path)) as folder:
        return _read_folder(folder)


def _read_folder(folder: Path) -> Results:
    plan = Plan.read(folder)
    gaps: list[Gap] = []
    chosen = {arm: _read_chosen(plan, arm, gaps) for arm in plan.arms}
    environment: dict[str, Counter[str]] = {}
    tasks = []
    for task in plan.config.tasks:
        reader = _TaskReader(plan, gaps, environment)
        arms = tuple(reader.read_arm(arm, chosen[arm]) for arm in plan.arms if arm.task == task.label)
        test = reader.test or _Test("", False, (), ())
        tasks.append(TaskResults(task.label, test.metric, test.higher_is_better, tuple(reader.bn_statistics), arms))
    gaps += _list_broken_trials(plan)
    return Results(plan, tuple(tasks), tuple(gaps), environment)


def format_command(run: PlannedRun, program: Mapping[Any, Sequence[str]] | None = None) -> str:
    """Return the command that trains a run, with SEED in place of its seed, or a Python call if it has own objects.

    Args:
        run: the run.
        program: the names of the user's own objects, as in `ComparisonConfig.program`.
    """
    if program:
        return _format_call(run, {name for names in program.values() for name in names})
    words = ["metareg", "train", "--algo", run.arm.algorithm]
    if run.arm.augmenters:
        words += ["--augment", ",".join(run.arm.augmenters)]
    words += ["--task", str(run.config["task"])]
    options = dict(run.options)
    model = options.pop("model", None)
    if isinstance(model, Mapping):
        options |= {f"model.{key}": value for key, value in model.get("config", {}).items()}
        model = model.get("name")
    if model is not None:
        words += ["--model", str(model)]
    words += ["--seed", "SEED"]
    for key, value in options.items():
        words += ["--set", f"{key}={_format_value(value)}"]
    return shlex.join(words)


def _format_call(run: PlannedRun, own: Collection[str]) -> str:
    """Return the call of metareg.train, with objects by name."""

    def show(value: Any) -> str:
        return value if isinstance(value, str) and value in own else repr(value)

    options = {**run.options, "seed": "SEED"}
    named = {key: value for key, value in options.items() if key.isidentifier()}
    others = {key: value for key, value in options.items() if key not in named}
    words = [show(run.arm.algorithm), f"[{', '.join(map(show, run.arm.augmenters))}]", show(run.config["task"])]
    words += [f"{key}={'SEED' if key == 'seed' else show(value)}" for key, value in named.items()]
    return f"metareg.train({', '.join(words)}{f', **{others!r}' if others else ''})"


# ------------------------------------------------------------------------------------------------------ one task's runs


@dataclass(frozen=True, eq=False)
class _Test:
    """The content of a results.json."""

    metric: str
    higher_is_better: bool
    inner_steps: tuple[int, ...]
    scores: Sequence[Array]

    @classmethod
    def parse(cls, content: Any) -> _Test:
        """Parse the file's content; raise a LookupError, TypeError or ValueError if metareg did not write it."""
        if content.get("split", TEST) != TEST:
            raise ValueError(f"its tasks are from the split '{content['split']}'")
        scores = [np.array(each["scores"], dtype=np.float64) for each in content["steps"]]
        if not scores or any(each.ndim != 1 or len(each) != len(scores[0]) or not len(each) for each in scores):
            raise ValueError("its scores are not lists of equal length")
        inner_steps = tuple(int(each["inner_steps"]) for each in content["steps"])
        return cls(str(content["metric"]), bool(content["higher_is_better"]), inner_steps, scores)

    def explain_difference(self, of_task: _Test | None, of_arm: _Test | None) -> str:
        """Explain why it cannot be compared with others of its task and arm; empty if it can."""
        if of_task and (self.metric, self.higher_is_better) != (of_task.metric, of_task.higher_is_better):
            return f"its metric is '{self.metric}', but earlier runs have '{of_task.metric}'"
        if of_arm and self.inner_steps != of_arm.inner_steps:
            numbers, others = (", ".join(map(str, each.inner_steps)) for each in (self, of_arm))
            return f"it was tested after {numbers} inner steps, earlier runs after {others}"
        if of_arm and len(self.scores[0]) != len(of_arm.scores[0]):
            return f"it has {len(self.scores[0])} test tasks, earlier runs have {len(of_arm.scores[0])}"
        return ""


class _TaskReader:
    """Reads the runs of one task, whose results must have the same metric."""

    def __init__(self, plan: Plan, gaps: list[Gap], environment: dict[str, Counter[str]]) -> None:
        self.test: _Test | None = None
        """The first test that was read."""
        self.bn_statistics: dict[str, None] = {}
        self._plan = plan
        self._gaps = gaps
        self._environment = environment

    def read_arm(self, arm: Arm, chosen: Chosen | None) -> ArmResults:
        runs = self._plan.list_arm_runs(arm, chosen.options if chosen else {})
        tests: dict[int, _Test] = {}
        curves: dict[int, dict[int, float]] = {}
        analyses: dict[int, Mapping[str, Any]] = {}
        costs = []
        trained = {run.seed: _read_steps(run) for run in runs}
        planned = _find_planned_steps(runs, trained)
        first = None
        for run in runs:
            steps = trained[run.seed]
            longer = f"it was trained for {steps} steps instead of the comparison's {planned}"
            test = self._read_test(run, "" if steps in (None, planned) else longer, first)
            if test is None:
                continue
            first = first or test
            tests[run.seed] = test
            curve = self._read_curve(run, test.metric)
            if curve:
                curves[run.seed] = curve
            if (run.path / ANALYSIS).is_file():
                with self._note_damage(run, f"{ANALYSIS} cannot be read"):
                    analyses[run.seed] = _check_analysis(read_json(run.path / ANALYSIS))
            costs.append(self._read_cost(run))
            self._note_environment(run)
        seconds, peaks = np.array(costs).reshape(-1, 2).T
        return ArmResults(
            arm=arm,
            seeds=tuple(tests),
            diverged=tuple(run.seed for run in runs if not run.finished and read_divergence(run.path) is not None),
            inner_steps=first.inner_steps if first else (),
            scores=np.array([test.scores for test in tests.values()]) if first else np.empty((0, 0, 0)),
            curves=curves,
            seconds_per_step=seconds,
            peak_bytes=peaks,
            planned=len(runs),
            steps=planned,
            chosen=chosen,
            analyses=analyses,
            command=format_command(runs[0], self._plan.config.program),
        )

    def _read_test(self, run: PlannedRun, longer: str, before: _Test | None) -> _Test | None:
        """Read a run's test; note a gap and return None if it cannot count, for example because it trained `longer`."""
        if not run.finished:
            self._add_gap(run, *self._explain_unfinished(run))
            return None
        try:
            content = read_json(run.path / RESULTS)
            test = _Test.parse(content)
        except UsageError as error:
            self._add_gap(run, "broken", str(error))
            return None
        except MALFORMED as error:
            self._add_gap(run, "broken", f"{RESULTS} is not what metareg writes ({type(error).__name__}: {error})")
            return None
        difference = longer or test.explain_difference(self.test, before)
        if difference:
            self._add_gap(run, "broken", difference)
            return None
        self.test = self.test or test
        content = update_names(LearnerConfig, content)
        self.bn_statistics[str(content.get("bn_statistics", "none"))] = None
        return test

    def _explain_unfinished(self, run: PlannedRun) -> tuple[str, str]:
        failure = read_failure(run.path)
        if failure:
            return failure
        if (run.path / CONFIG).is_file():
            return "unfinished", f"it has begun but has no {RESULTS} yet"
        if self._plan.get_tuning(run.arm) and not (self._plan.get_tuning_folder(run.arm) / CHOSEN_FILE).is_file():
            return "not begun", "the arm's settings are not chosen yet"
        return "not begun", "it has not begun"

    def _read_curve(self, run: PlannedRun, metric: str) -> dict[int, float]:
        points: dict[int, float] = {}
        with self._note_damage(run, f"{METRICS} cannot be read, so that it has no learning curve"):
            for line in _read_lines(run.path / METRICS):
                # Parse only the few validation lines among the many training lines.
                if f'"{VALIDATION}"' in line:
                    content = parse_json(line)
                    if content["split"] == VALIDATION:
                        points[int(content["step"])] = float(content[metric])
            return points
        return {}

    def _read_cost(self, run: PlannedRun) -> tuple[float, float]:
        """Read seconds per training step and peak memory."""
        with self._note_damage(run, f"{TIMING} cannot be read, so that its time and memory are not known"):
            lines = [parse_json(line) for line in _read_lines(run.path / TIMING)]
            speeds = [float(line["steps_per_second"]) for line in lines]
            peaks = [float(line["peak_bytes"]) for line in lines if line.get("peak_bytes") is not None]
            seconds = [1 / speed for speed in speeds if speed > 0]
            return float(np.median(seconds)) if seconds else np.nan, max(peaks, default=np.nan)
        return np.nan, np.nan

    def _note_environment(self, run: PlannedRun) -> None:
        with self._note_damage(run, f"{ENVIRONMENT} cannot be read"):
            for name, value in [*_list_facts(read_json(run.path / ENVIRONMENT))]:
                self._environment.setdefault(name, Counter())[value] += 1

    @contextmanager
    def _note_damage(self, run: PlannedRun, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, UsageError, *MALFORMED) as error:
            self._add_gap(run, "damaged", f"{what}: {error}")

    def _add_gap(self, run: PlannedRun, state: str, reason: str) -> None:
        self._gaps.append(_make_gap(self._plan, str(run.arm), str(run.seed), state, reason, run.path))


def _make_gap(plan: Plan, what: str, seed: str, state: str, reason: str, path: Path) -> Gap:
    # Published reports should not contain paths of the machine.
    reason = reason.replace(f"{plan.folder.resolve()}/", "").replace(f"{plan.folder}/", "")
    return Gap(what, seed, state, reason, path.relative_to(plan.folder))


def _check_analysis(content: Any) -> Mapping[str, Any]:
    """Check the content of an analysis.json; raise a LookupError or TypeError if metareg did not write it."""
    for layer in content["layers"]:
        float(layer["relative"][-1]["mean"])
    for means in (*content["adapting"].values(), content["train"]):
        float(means[-1]["mean"])
    for angle in content["angles"]:
        float(angle["degrees"]["mean"])
    return dict(content)


def _find_planned_steps(runs: Sequence[PlannedRun], trained: Mapping[int, int | None]) -> int | None:
    """Return the configured steps of an arm's runs; None before the first has begun.

    If the comparison does not set it, this is the smallest number among the runs, because ``metareg resume --steps``
    can only raise it.
    """
    given = runs[0].options.get("steps")
    if isinstance(given, int | float) and math.isfinite(given):
        return int(given)
    return min((steps for steps in trained.values() if steps is not None), default=None)


def _read_steps(run: PlannedRun) -> int | None:
    """Read a run's configured steps from its results, or from its config.yaml if an earlier version wrote the results.

    Searches for one line, because parsing the files of all runs would take longer than the report.
    """
    planned = (RESULTS, r'^    "of_steps": (\d{1,18})')  # early stopping
    for file, line in (planned, (RESULTS, r'^  "trained_steps": (\d{1,18})'), (CONFIG, r"^steps: (\d{1,18})$")):
        with suppress(OSError):
            text = read_text(run.path / file, errors="replace")
            if found := re.search(line, text, re.MULTILINE):
                return int(found[1])
    return None


def _list_facts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the facts of an environment.json that a report shows."""
    for name in _OF_ENVIRONMENT:
        if content.get(name) is not None:
            yield name.replace("_", " "), str(content[name])
    yield "GPUs", ", ".join(content.get("gpus") or []) or "none"
    for name, version in content.get("libraries", {}).items():
        yield name, str(version)
    for plugin in content.get("plugins", []):
        if plugin["distribution"] not in content:
            yield f"{plugin['name']} from", f"{plugin['distribution']} {plugin['version']}"
    for resumed in content.get("resumed", []):
        for name, value in resumed["changed"].items():
            yield name.replace("_", " "), f"{value} (after it was resumed)"


# --------------------------------------------------------------------------------------------------------------- tuning


def _read_chosen(plan: Plan, arm: Arm, gaps: list[Gap]) -> Chosen | None:
    path = plan.get_tuning_folder(arm) / CHOSEN_FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        trials = content["trials"]
        return Chosen(dict(content["options"]), len(trials), sum(trial["score"] is None for trial in trials))
    except (UsageError, *MALFORMED) as error:
        reason = f"{CHOSEN_FILE} cannot be read, so that its settings are not known: {error}"
        gaps.append(_make_gap(plan, f"tuning of {arm}", "", "damaged", reason, path.parent))
        return None


def _list_broken_trials(plan: Plan) -> Iterator[Gap]:
    for arm in plan.arms:
        folder = plan.get_tuning_folder(arm)
        for path in sorted(folder.glob("trial-*/seed-*")):
            failure = read_failure(path)
            if failure is None or failure[0] == "diverged":
                continue  # tuning has counted the divergence
            trial, seed = path.parent.name.replace("-", " "), path.name.removeprefix("seed-")
            yield _make_gap(plan, f"{arm}, {trial}", seed, *failure, path)


# ----------------------------------------------------------------------------------------------------------------- text


def _read_lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from file


def _format_value(value: Any) -> str:
    """Format a value in the syntax of ``--set``."""
    if isinstance(value, str):
        with suppress(UsageError):
            if parse_assignments([f"x={value}"])["x"] == value:
                return value
    return json.dumps(value, ensure_ascii=False)
