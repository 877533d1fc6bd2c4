"""Executes a comparison: schedules its runs and retries failed ones."""

from __future__ import annotations

import bisect
import logging
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Protocol

from pydantic_core import PydanticSerializationError

from metareg.comparison.archive import add_archived_runs, unpack_archive
from metareg.comparison.config import ComparisonConfig, is_location
from metareg.comparison.own import ThisProcess, name_objects, refuse_missing_objects
from metareg.comparison.plan import CONFIG_FILE, Arm, Objects, Plan, PlannedRun, check_plan, refuse_other_data
from metareg.comparison.pool import Launcher, LocalPool, Outcome, count_cpu_cores, read_divergence
from metareg.comparison.tuning import create_tuners
from metareg.contract.config import validate
from metareg.errors import Interrupted, MetaregError, UnknownNameError, UsageError
from metareg.printable import format_count
from metareg.registry.plugins import find_entry, get_config_class
from metareg.runs.folder import CONFIG, TIMING
from metareg.util.data_files import absolute_path
from metareg.util.files import MALFORMED, is_leftover, lock_folder, parse_json, read_text
from metareg.util.signals import StopRequest, catch_stop_signals
from metareg.util.torchrun import read_rank
from metareg.util.yaml_files import read_yaml

__all__ = ["LAUNCHERS", "Comparison", "ComparisonObserver", "compare"]

log = logging.getLogger("metareg")

LAUNCHERS = ("local", "ray")
_TRIES = 2
_POLL_SECONDS = 0.5


class ComparisonObserver(Protocol):
    """Receives the progress of a comparison."""

    def on_progress(self, comparison: Comparison) -> None:
        """Called about twice a second, even if nothing has changed."""

    def on_run_end(self, comparison: Comparison, outcome: Outcome) -> None:
        """Called when a run has finished, failed or diverged."""


class Comparison:
    """A comparison and the state of its runs."""

    def __init__(self, plan: Plan, launcher: Launcher) -> None:
        self.plan = plan
        self.broken: dict[Path, Outcome] = {}
        """Runs that failed for good, by folder."""
        self.running: dict[Path, tuple[PlannedRun, float]] = {}
        """Active runs and their start times (`time.monotonic`), by folder."""
        self._finished: set[Path] = set()
        self._launcher = launcher
        self._tries: Counter[Path] = Counter()
        self._seconds: dict[tuple[str, bool], list[float]] = {}
        self._waiting: list[PlannedRun] = []
        self._tuners = create_tuners(plan)
        self._order = {arm: number for number, arm in enumerate(plan.arms)}
        for arm in plan.arms:
            self._queue_arm(arm)

    def __repr__(self) -> str:
        arms, seeds = len(self.plan.arms), len(self.plan.config.seeds)
        return (
            f"<Comparison at {self.path}: {format_count(arms, 'arm')} × {format_count(seeds, 'seed')}; runs: "
            f"{self.finished} finished, {self.left} left, {len(self.broken)} broken>"
        )

    @property
    def path(self) -> Path:
        """The comparison's folder, which `metareg.report` takes."""
        return self.plan.folder

    @property
    def finished(self) -> int:
        """The number of finished runs, including trials."""
        return len(self._finished) + sum(tuner.runs - tuner.remaining for tuner in self._tuners.values())

    @property
    def left(self) -> int:
        """The number of runs that are neither finished nor broken."""
        undecided = [tuner for tuner in self._tuners.values() if tuner.chosen is None]
        to_come = sum(tuner.remaining for tuner in undecided) + len(undecided) * len(self.plan.config.seeds)
        under_way = [run for run, _ in self.running.values()] + self._waiting
        broken_trials = sum(not outcome.run.is_final for outcome in self.broken.values())
        return to_come + sum(run.is_final for run in under_way) - broken_trials

    @property
    def seconds_left(self) -> float | None:
        """The estimated time for the remaining runs in seconds; None before the first run has ended."""
        known = [second for seconds in self._seconds.values() for second in seconds]
        if not known:
            return None
        mean = sum(known) / len(known)

        def expected(run: PlannedRun) -> float:
            similar = self._seconds.get(_get_duration_group(run), [mean])
            return sum(similar) / len(similar)

        now = time.monotonic()
        under_way = sum(max(0.0, expected(run) - (now - began)) for run, began in self.running.values())
        waiting = sum(map(expected, self._waiting))
        unknown = max(0, self.left - len(self.running) - len(self._waiting))
        return (under_way + waiting + unknown * mean) / self._launcher.capacity

    def carry_out(self, stop: StopRequest, observer: ComparisonObserver | None = None) -> None:
        """Execute all runs; those that cannot be finished are in `broken`.

        Raises:
            Interrupted: a signal asked to stop; all active runs have written checkpoints.
        """
        while self._waiting or self.running:
            while self._waiting and len(self.running) < self._launcher.capacity and not stop.asked:
                run = self._waiting.pop(0)
                self.running[run.path] = (run, time.monotonic())
                self._tries[run.path] += 1
                self._launcher.submit(run)
            for outcome in self._launcher.wait(_POLL_SECONDS):
                self._record(outcome)
                if observer is not None:
                    observer.on_run_end(self, outcome)
            if stop.asked:
                self._launcher.stop()
                folder = shlex.quote(str(self.path))
                raise Interrupted(f"Stopped. `metareg compare --out {folder}` continues the comparison.")
            if observer is not None:
                observer.on_progress(self)

    def _record(self, outcome: Outcome) -> None:
        run = outcome.run
        _, began = self.running.pop(run.path)
        if outcome.error is not None and outcome.again and self._tries[run.path] < _TRIES:
            log.warning("%s: %s It is tried again.", run, outcome.error)
            self._queue(run)
        elif outcome.error is None:
            self._seconds.setdefault(_get_duration_group(run), []).append(time.monotonic() - began)
            if run.is_final:
                self._finished.add(run.path)
        elif run.is_final or read_divergence(run.path) is None:  # a diverged trial is a result
            self.broken[run.path] = outcome
        if not run.is_final:
            self._queue_arm(run.arm)

    def _queue_arm(self, arm: Arm) -> None:
        """Queue the arm's trials, or its final runs once its settings are chosen."""
        tuner = self._tuners.get(arm)
        wanted = tuner.next_runs() if tuner else []
        chosen = tuner.chosen if tuner else {}
        if chosen is not None:
            wanted = self.plan.list_arm_runs(arm, chosen)
        paths = {run.path for run in wanted}

        def is_settled(run: PlannedRun) -> bool:
            """Return whether its trial has ended: if one seed diverges, the others are not needed."""
            return run.arm == arm and not run.is_final and run.path not in paths

        self._waiting = [run for run in self._waiting if not is_settled(run)]
        self.broken = {path: outcome for path, outcome in self.broken.items() if not is_settled(outcome.run)}
        known = {run.path for run in self._waiting} | self.running.keys() | self.broken.keys()
        for run in wanted:
            if run.finished:
                self._finished.add(run.path)
            elif run.path not in known:
                self._queue(run)

    def _queue(self, run: PlannedRun) -> None:
        """Queue a run: trials first, then final runs by seed."""

        def rank(run: PlannedRun) -> tuple[bool, int, int]:
            seed = self.plan.config.seeds.index(run.seed) if run.is_final else 0
            return run.is_final, seed, self._order[run.arm]

        bisect.insort(self._waiting, run, key=rank)


def compare(
    algo: Any = None,
    augment: Any = None,
    task: Any = None,
    *,
    model: Any = None,
    seeds: int | str | Sequence[int] | None = None,
    out: str | Path | None = None,
    config: ComparisonConfig | Mapping[str, Any] | str | Path | None = None,
    archive: str | Path | None = None,
    space: Mapping[str, Any] | None = None,
    search: int | None = None,
    jobs: int | None = None,
    launcher: str = "local",
    ray_address: str | None = None,
    data: str | Path | None = None,
    observer: ComparisonObserver | None = None,
    **options: Any,
) -> Comparison:
    """Run a comparison, or continue it, like ``metareg compare``.

    The other arguments override `config` or, without one, the configuration in `out`. Runs that have begun in `out` are
    continued. A comparison that would change or omit them, or those of an `archive`, is refused.

    Args:
        algo: the names of the algorithms, as a list or a comma-separated string; by default, ``"maml"``.
        augment: augmenters or chains of them (``"dropgrad+cml"``), ``"none"`` for none, in the same form.
        task: the task plugins, in the same form; by default, ``"sinusoid"``. An item can be a mapping with ``task``,
            ``label`` and ``options``.
        model: the model plugin of every run, or an `nn.Module`, which starts with the same weights for every seed.
        seeds: the seeds, as a list or a string (``"1000-1004"``), or a number n for 0 to n − 1; by default, only 0.
        out: the comparison's folder; by default, one under ``comparisons/``.
        config: a configuration, its values, or the path of a YAML file with them.
        archive: raw results of a comparison (``metareg report DIR --archive FILE``): its finished runs and chosen
            settings are kept. Without a `config`, and if `out` contains no comparison, it also provides the
            configuration.
        space: options to choose for each arm on validation tasks, with their values: a list, or a range (``{"low":
            0.001, "high": 1, "log": True}``); None means the range that the option's plugin declares.
        search: the number of trials for each arm; without it, every combination of the values is tried.
        jobs: the number of runs at a time; by default, one for every GPU that they use, or as many as the CPU cores
            allow.
        launcher: ``"local"``, processes on this machine, or ``"ray"``, a Ray cluster whose nodes all see `out`.
        ray_address: of the cluster, or ``"auto"`` for the one that this machine is part of; by default, one is started.
        data: the location of the data, for each task that reads some, as in `metareg.train`. It can be another one than
            before if the data is the same.
        observer: receives the progress of the comparison.
        options: fields of `RunConfig` and options of the plugins, by name, for every run; for your own tasks and
            modules also ``loss``, ``metric`` and ``head``, as in `metareg.train`.

    Algorithms, augmenters, tasks and the model can be your own objects and classes, as in `metareg.train`. The runs
    then execute in this process, one after the other; pass the same objects to continue.

    Returns:
        The comparison, with all its runs finished except those in `broken`.

    Raises:
        UsageError: an argument is invalid; nothing was written or run.
        Interrupted: Ctrl-C or SIGTERM stopped it; call it again to continue.
    """
    if read_rank().size > 1:
        raise UsageError(
            "A comparison must be started as one process, which starts others; torchrun is for `metareg train`."
        )
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs must be 1 or more; got {jobs}.")
    if launcher not in LAUNCHERS:
        raise UnknownNameError("launcher", launcher, LAUNCHERS)
    if ray_address is not None and launcher != "ray":
        raise UsageError("--ray-address is for --launcher ray.")
    fields = _drop_none(algo=algo, augment=augment, tasks=task, seeds=seeds)
    fields, model, objects = name_objects(fields, model)
    if objects and (launcher != "local" or jobs not in (None, 1)):
        raise UsageError("A comparison of your own objects runs in the program's process; do not set launcher or jobs.")
    options |= _drop_none(model=model)
    changes = _drop_none(options=options or None, space=space or None, search=search)
    folder = _choose_folder(config or archive, fields.get("tasks")) if out is None else Path(out)
    with ExitStack() as stack:
        archived = (
            Plan.read(stack.enter_context(unpack_archive(Path(archive))), objects) if archive is not None else None
        )
        plan = _build_plan(folder, config, fields, changes, objects, archived, data)
        check_plan(plan)
        for before in filter(None, (_read_begun(folder, objects), archived)):
            refuse_other_data(before, plan)
        stop = stack.enter_context(catch_stop_signals())
        created: Launcher = ThisProcess() if objects else _create_launcher(launcher, plan, jobs, ray_address)
        workers = stack.enter_context(closing(created))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MetaregError(f"The comparison's folder cannot be created: {error.strerror}: {folder}.") from error
        # Processes end before the lock is released and another process can use the folder.
        with lock_folder(folder), closing(workers):
            if (folder / CONFIG_FILE).is_file():  # another process can have changed it
                _refuse_changes(Plan.read(folder, objects), plan)
            if archived is not None:
                added, kept = add_archived_runs(archived.folder, folder)
                stay = f"; {kept} that {folder} has begun are kept" if kept else ""
                log.info("%s: %s taken as done%s.", archive, format_count(added, "finished run"), stay)
            plan.write()
            comparison = Comparison(plan, workers)
            try:
                comparison.carry_out(stop, observer)
            except Interrupted as error:
                if not objects:
                    raise
                advice = f"metareg.compare(out={str(folder)!r}, …) with the same objects continues the comparison."
                raise Interrupted(f"Stopped. {advice}") from error
    return comparison


def _drop_none(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _choose_folder(config: Any, task: str | Sequence[str | Mapping[str, Any]] | None) -> Path:
    """Choose a folder for a comparison without one."""
    if isinstance(config, str | Path):
        return Path("comparisons", Path(config).stem.removesuffix(".tar"))
    tasks = [task or "sinusoid"] if isinstance(task, str | None) else task
    if config is not None or not all(isinstance(each, str) for each in tasks):
        raise UsageError("Set 'out' to the comparison's folder.")
    return Path("comparisons", re.sub("[,:]", "-", ",".join(map(str, tasks))))


def _build_plan(
    folder: Path,
    config: ComparisonConfig | Mapping[str, Any] | str | Path | None,
    fields: Mapping[str, Any],
    changes: Mapping[str, Any],
    objects: Objects,
    archived: Plan | None = None,
    data: str | Path | None = None,
) -> Plan:
    """Build the plan; refuse it if it contradicts the folder or the archive.

    `config` defaults to the folder's configuration, or the archive's. `fields` replace its values, then
    `ComparisonConfig.override` applies the `changes`, and `data` its tasks' location of data.
    """
    begun = _read_begun(folder, objects)
    base = begun or archived
    if config is None and not fields and not changes and data is None:
        if base is None:
            raise UsageError(f"There is no comparison to continue at {folder}; say what to compare.")
        refuse_missing_objects(base.config, objects)
        if archived is None:
            return base
    values, where = config if config is not None else base.config if base else {}, "the comparison"
    if isinstance(values, str | Path):
        values, where = read_yaml(Path(values)), str(values)
    elif isinstance(values, ComparisonConfig):
        values = values.model_dump()
    compared = validate(ComparisonConfig, {**values, **fields}, where)
    compared = compared.override(**changes) if changes else compared
    compared = _make_storable(compared if data is None else _locate_data(compared, data))
    refuse_missing_objects(compared, objects)
    program = _list_names(objects) or compared.program
    plan = Plan(folder, compared.model_copy(update={"program": program}), objects)
    if begun is None and folder.is_dir() and not all(is_leftover(path) for path in folder.iterdir()):
        raise UsageError(f"{folder} already exists and contains no comparison; choose another folder with --out.")
    for before in filter(None, (begun, archived)):
        _refuse_changes(before, plan)
    return plan


def _read_begun(folder: Path, objects: Objects) -> Plan | None:
    """Read the plan of the comparison in a folder; None if there is none."""
    return Plan.read(folder, objects) if (folder / CONFIG_FILE).is_file() else None


def _locate_data(config: ComparisonConfig, data: str | Path) -> ComparisonConfig:
    """Set the location of the data for the tasks that have this option."""
    own = config.program.get("task", [])
    readers = [
        each.label
        for each in config.tasks
        if each.task not in own and "data" in get_config_class(find_entry("tasks", each.task).load()).model_fields
    ]
    if not readers:
        names = ", ".join(each.label for each in config.tasks)
        raise UsageError(f"--data names the data of tasks; none of these reads any: {names}.")
    return config.locate_data(str(absolute_path(data)), readers)


def _list_names(objects: Objects) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for field, name in objects:
        names.setdefault(field, []).append(name)
    return names


def _choose_threads(plan: Plan, jobs: int | None) -> int:
    """Choose the threads per run so that all cores are used, even with fewer runs than cores."""
    tuned = any(plan.get_tuning(arm) for arm in plan.arms)
    cores = count_cpu_cores()
    return max(1, cores // (jobs or (cores if tuned else min(cores, len(plan.list_runs())))))


def _make_storable(config: ComparisonConfig) -> ComparisonConfig:
    """Replace values that a file cannot contain, such as a path by a string."""
    try:
        values = config.model_dump(mode="json")
    except PydanticSerializationError as error:
        raise UsageError(f"A comparison's values must be writable to a file: {error}.") from error
    return ComparisonConfig.model_validate(values)


def _refuse_changes(begun: Plan, plan: Plan) -> None:
    """Raise a UsageError if a run that has begun would change or be left out.

    `begun` is the plan in the folder, or that of a folder whose runs will be added.
    """
    name = f"at {plan.folder}" if begun.folder == plan.folder else f"of {begun.folder.name}"
    where, other = f"The comparison {name} cannot be continued with these changes", "choose another folder with --out"
    for arm in (arm for arm in plan.arms if arm in begun.arms):
        places = begun.get_tuning_folder(arm), begun.folder / "runs" / arm.folder
        ways = [(of.get_tuning(arm), of.get_tuning(arm) and of.get_tuning_seeds(arm)) for of in (begun, plan)]
        if ways[0] != ways[1] and any(place.is_dir() for place in places):
            raise UsageError(f"{where}: the settings of {arm} were chosen differently; {other}.")

    if begun.config.plan.strip() not in ("", plan.config.plan.strip()) and any(
        (run.path / CONFIG).is_file() for run in begun.list_runs()
    ):
        raise UsageError(f"{where}: its plan was written before its first run and is fixed; put additions into notes.")

    def defaults(of: Plan) -> dict[Path, PlannedRun]:
        trials = [of.make_trial(arm, 0, of.get_tuning_seeds(arm)[0], {}) for arm in of.arms if of.get_tuning(arm)]
        return {run.path.relative_to(of.folder): run for run in of.list_runs() + trials}

    wanted = defaults(plan)
    for place, before in defaults(begun).items():
        if not (before.path / CONFIG).is_file():
            continue
        run = wanted.get(place)
        if run is None:
            raise UsageError(
                f"{where}: it has begun {before}, which the new configuration omits; include it, or choose another "
                "folder with --out."
            )
        was, now = {**before.config, **before.options}, {**run.config, **run.options}
        for key in (*was, *now):
            # The number of threads says how a run runs; comparisons of earlier versions hold one that nobody chose.
            # Data can move; `refuse_other_data` compares it.
            if key != "threads" and not is_location(key) and was.get(key) != now.get(key):
                values = f"{was.get(key, 'not set')!r}, not {now.get(key, 'unset')!r}"
                raise UsageError(f"{where}: {key} of {run} was {values}; {other}.")


def _create_launcher(name: str, plan: Plan, jobs: int | None, ray_address: str | None) -> Launcher:
    threads = int(plan.config.options.get("threads") or _choose_threads(plan, jobs))
    if name == "ray":
        from metareg.comparison.ray_launcher import RayLauncher

        return RayLauncher(jobs, threads, ray_address)
    gpus = _list_gpus(plan)
    jobs = jobs or len(gpus) or max(1, count_cpu_cores() // threads)
    return LocalPool(jobs, threads, plan.folder / "workers.log", gpus)


def _list_gpus(plan: Plan) -> list[str]:
    """List this machine's GPUs, named as in CUDA_VISIBLE_DEVICES; empty if a run sets its own device."""
    if any(plan.options[arm].get("device", "auto") not in ("auto", "cuda") for arm in plan.arms):
        return []
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def read_progress(run: PlannedRun) -> tuple[int, float | None]:
    """Read an active run's training steps and steps per second from the last line of its timing.jsonl."""
    with suppress(OSError, *MALFORMED):
        line = parse_json(read_text(run.path / TIMING).splitlines()[-1])
        return int(line["step"]), float(line["steps_per_second"])
    return 0, None


def _get_duration_group(run: PlannedRun) -> tuple[str, bool]:
    """Return a key for runs that take about the same time."""
    return run.arm.task, run.is_final
