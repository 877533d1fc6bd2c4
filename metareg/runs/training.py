"""Start and resume runs: train, test and plot, from a configuration to a folder with results."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_jsonable_python

from metareg.contract.config import PluginConfig, PluginSpec, validate
from metareg.contract.evaluation import Evaluation
from metareg.contract.hookspecs import hookimpl
from metareg.contract.losses import Loss, Metric
from metareg.contract.splits import TRAIN, VALIDATION
from metareg.contract.tasks import TaskSpec
from metareg.errors import DivergenceError, Interrupted, LostProcessError, MetaregError, UsageError
from metareg.learner.config import LearnerConfig
from metareg.learner.display import display_training_in_notebook
from metareg.learner.learner import MetaLearner
from metareg.learner.learning_rate import check_schedule
from metareg.learner.processes import Processes, join_processes
from metareg.learner.training import Progress, connect_observers, fit
from metareg.printable import format_count
from metareg.registry.plugins import find_entry
from metareg.registry.task_source import TaskSource
from metareg.runs import environment
from metareg.runs.checkpoints import CheckpointManager, Checkpoints
from metareg.runs.config import PLUGIN_FIELDS, RunConfig
from metareg.runs.folder import CHECKPOINTS, CONFIG, ENVIRONMENT, FINAL, METRICS, PLOTS, RESULTS, TIMING
from metareg.runs.options import Selection, describe_task
from metareg.runs.own import OwnFacts, OwnModel, select
from metareg.runs.run import (
    Run,
    check_fit,
    format_resume_command,
    has_stopped_early,
    read_config,
    read_planned_steps,
    refuse_missing,
)
from metareg.util.devices import peak_memory, reset_peak_memory, use_deterministic_kernels
from metareg.util.files import (
    LinesFile,
    TimedLinesFile,
    is_leftover,
    lock_folder,
    remove_leftovers,
    write_json,
    write_text,
)
from metareg.util.seeding import seed_global_generators
from metareg.util.signals import StopRequest, catch_stop_signals
from metareg.util.torch_internals import import_compiler
from metareg.util.torchrun import is_launched
from metareg.util.yaml_files import read_yaml

__all__ = ["configure", "prepare_run", "resume", "train"]

log = logging.getLogger("metareg")

_SMALL = 20_000
"""Models with at most this many parameters use one thread, because their operations are too short to share."""


def train(
    algo: Any = None,
    augment: Any = None,
    task: Any = None,
    *,
    model: Any = None,
    out: str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    observers: Sequence[Any] = (),
    resume: bool = False,
    loss: str | Loss | None = None,
    metric: str | Metric | None = None,
    spec: TaskSpec | None = None,
    head: str | None = None,
    **options: Any,
) -> Run:
    """Train and test a learner and plot results, like ``metareg train``.

    The global generators of Python, NumPy and torch are seeded while it runs, so that plugins that draw from them
    depend only on the run's seed; afterwards, their previous states are restored.

    If torchrun started the program in several processes, all of them must make this call. They share the work; only
    process 0 writes files and calls observers, and each process gets the run.

    Args:
        algo: the algorithm: a name, a class, an object, or a pair ``(name or class, config)``; by default, ``"maml"``.
        augment: the augmenters, each in the same form.
        task: the task plugin, in the same form; by default, ``"sinusoid"``. Or your own tasks: an object with a method
            ``episodes(split, indices, seed)``, a function with these arguments, or a mapping from ``"train"``,
            ``"validation"`` and ``"test"`` to iterables of batches, such as a DataLoader (see `MetaLearner.fit`).
        model: the model plugin; by default, the task's own. Or an `nn.Module`, which starts with its current weights.
        out: the run's folder, which must not exist or must be empty; by default, a new one under ``runs/``.
        config: a configuration, or the path of a YAML file with one; the other arguments override it.
        observers: objects with observer hooks, in addition to those in the configuration; names of observer plugins
            override the configuration's.
        resume: resume the run at `out` if there is one; all options that define the run must be the same.
        loss: for your own tasks, as for `MetaLearner`; by default, the mean squared error for numbers and the
            cross-entropy for classes.
        metric: for your own tasks; by default, the metric for the loss.
        spec: for your own tasks; by default, inferred from the first tasks and the model's outputs.
        head: for your own module, the dotted name of its head.
        options: fields of `RunConfig` and options of the plugins, by name.

    Returns:
        The finished run.

    Raises:
        UsageError: an argument is invalid; nothing was written.
        DivergenceError: training produced a number that is not finite; the last valid checkpoint is in the folder.
        Interrupted: Ctrl-C or SIGTERM stopped it; continue with `resume`.
    """
    named, observers = _split_observers(observers)
    plugins = {"algo": algo, "augment": augment, "task": task, "model": model, **named}
    given = {name: value for name, value in plugins.items() if value is not None}
    facts = OwnFacts(loss, metric, spec, head)
    out = Path(out) if out is not None else None

    def select_plugins() -> Selection:
        selection = select(_read_base(config), given, facts, options)
        if resume and out is None:
            raise UsageError("To resume a run, give its folder with --out.")
        if isinstance(config, str | Path):
            _refuse_outer_places(selection, options.keys() | named.keys(), out or Path("runs", "new"), str(config))
        return selection

    with join_processes() as processes:
        selection = processes.each(select_plugins)
        if out is not None and processes.first(lambda: _should_resume(out, resume)):
            return _resume(out, selection, observers, processes)
        selection = _write_out_lengths(selection)
        with catch_stop_signals(is_launched() or processes.size > 1) as stop:
            learner, source = processes.each(lambda: prepare_run(selection, processes))
            path = processes.first(lambda: _create_folder(out, selection.config))
            run = Run(path, selection.config, learner, source, selection.model)
            with _lock(path, processes, new=True), learner.split_over(processes), _remove_if_refused(run):
                _carry_out(run, selection, observers, stop)
        return run


def configure(config: str | Path | Mapping[str, Any] | None = None, **options: Any) -> RunConfig:
    """Return the complete configuration of the run that `train` would start, without reading data or writing files.

    Args:
        config: as in `train`.
        options: names of plugins by field, options of the run and of its plugins.

    Raises:
        UsageError: an option is unknown or its value invalid.
    """
    given = {name: options.pop(name) for name in PLUGIN_FIELDS if name in options}
    return _write_out_lengths(select(_read_base(config), given, OwnFacts(), options)).config


def resume(
    path: str | Path,
    *,
    observers: Sequence[Any] = (),
    loss: Loss | None = None,
    metric: Metric | None = None,
    **options: Any,
) -> Run:
    """Resume a run from its newest valid checkpoint, like ``metareg resume``.

    On the same machine, its weights, metrics and results equal those of an uninterrupted run, bit for bit.

    Args:
        path: the run's folder.
        observers: as in `train`.
        loss: the callable that you passed to `train` as the loss of your own tasks.
        metric: the metric, in the same way.
        options: your own objects that you passed to `train` (``algo``, ``augment``, ``task``, ``model``), which must be
            the same; and options that may change: ``steps``, which you can raise, ``data``, the new location of the
            same data, and options that do not change the run's meaning (device, strategy, chunk, checkpoints,
            ``on_nonfinite``).

    Returns:
        The finished run; at once if it had already finished.

    Raises:
        UsageError: there is no run, another process is working on it, an option would change its meaning, or one of its
            objects is missing or different.
    """
    path = Path(path)
    named, observers = _split_observers(observers)
    given = {name: options.pop(name) for name in PLUGIN_FIELDS if name in options} | named

    def select_plugins(stored: RunConfig) -> Selection:
        refuse_missing(path, stored, given, "metareg.resume")
        return select(stored.model_dump(), given, OwnFacts(loss, metric), options)

    with join_processes() as processes:
        stored = processes.first(lambda: read_config(path))
        selection = processes.each(lambda: select_plugins(stored))
        _refuse_outer_places(selection, options.keys() | given.keys(), path, str(path / CONFIG))
        return _resume(path, selection, observers, processes)


def _read_base(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a configuration given as a mapping or a file."""
    return dict(config) if isinstance(config, Mapping) else read_yaml(Path(config)) if config else {}


def _split_observers(observers: Sequence[Any]) -> tuple[dict[str, list[str]], list[Any]]:
    """Separate names of observers, as an option if there are any, from observer objects."""
    names = [each for each in observers if isinstance(each, str)]
    return {"observers": names} if names else {}, [each for each in observers if not isinstance(each, str)]


def _refuse_outer_places(selection: Selection, said: Collection[str], folder: Path, where: str) -> None:
    """Refuse observers that write outside the run's folder because an untrusted file says so.

    Args:
        selection: the run.
        said: the names of the options that the user gave in addition to the file.
        folder: the run's folder.
        where: the file.

    Raises:
        UsageError: an observer's option is a path outside the folder, or a URL.
    """
    if "observers" in said:
        return
    anew = {option.rpartition(".")[2] for option in said}
    for observer in selection.observers:
        for option, value in dict(observer.config or ()).items():
            default = observer.config.__class__.model_fields[option].get_default(call_default_factory=True)
            if option in anew or value == default or not _leads_out(value, folder):
                continue
            raise UsageError(
                f"In {where}, the {observer.label} writes to {value}, outside the run's folder. If you want this, name "
                f"the observer again: --observe {observer.name} --set "
                f"{observer.name}.{option}={shlex.quote(str(value))}."
            )


def _leads_out(value: Any, folder: Path) -> bool:
    """Return whether an option's value contains a path outside a folder, or a URL."""
    if isinstance(value, Mapping | list | tuple):
        return any(_leads_out(each, folder) for each in (value.values() if isinstance(value, Mapping) else value))
    if not isinstance(value, str):
        return False
    return "://" in value or not (folder / value).resolve().is_relative_to(folder.resolve())


def _should_resume(out: Path, resume: bool) -> bool:
    """Return whether a folder contains a run to continue; refuse a folder with anything else."""
    has_run = (out / CONFIG).is_file()
    if not (resume and has_run) and _is_taken(out):
        hint = f"; {format_resume_command(out)} continues the run in it" if has_run else ""
        raise UsageError(f"{out} already exists and is not empty; choose another folder for the run{hint}.")
    return resume and has_run


def _resume(path: Path, selection: Selection, observers: Sequence[Any], processes: Processes) -> Run:
    def reopen() -> tuple[RunConfig, bool]:
        """Return the configuration to continue with, and whether the run has already finished with it."""
        stored = read_config(path)
        lengths = {
            name: getattr(selection.config, name) or getattr(stored, name)
            for name in ("eval_every", "lr_schedule_steps")
        }
        wanted = selection.config.model_copy(update=lengths)
        _refuse_changes(path, stored, wanted, f"{format_resume_command(path)} continues it unchanged.")
        if began := environment.read_first_config(path):
            advice = f"Its {CONFIG} was edited; {ENVIRONMENT} holds the options with which it began."
            _refuse_changes(path, began, wanted, advice)
        ended = read_planned_steps(path, stored) == wanted.steps
        return wanted, ended and (not has_stopped_early(path) or wanted.patience == stored.patience)

    with catch_stop_signals(is_launched() or processes.size > 1) as stop, _lock(path, processes):
        wanted, ended = processes.first(reopen)
        if ended:
            log.info("The run at %s has already finished.", path)
            return Run.load(path, device=wanted.device)
        selection = dataclasses.replace(selection, config=wanted)
        learner, source = processes.each(lambda: prepare_run(selection, processes))
        run = Run(path, wanted, learner, source, selection.model)
        processes.first(lambda: environment.refuse_other_data(run))
        with learner.split_over(processes):
            _carry_out(run, selection, observers, stop)
    return run


@contextmanager
def _lock(path: Path, processes: Processes, *, new: bool = False) -> Iterator[None]:
    """Lock a run's folder for these processes while the block runs; a new one must be empty."""
    with ExitStack() as stack:

        def take() -> None:
            stack.enter_context(lock_folder(path))
            if new and _is_taken(path):
                raise UsageError(f"{path} was just taken by another run; choose another folder.")

        processes.first(take)
        yield


@contextmanager
def _remove_if_refused(run: Run) -> Iterator[None]:
    """Remove the folder of a new run if wrong use ends the block before the first step; it holds only what is new."""
    try:
        yield
    except UsageError as error:
        started = run.learner.steps_done > 0 or isinstance(error, DivergenceError)
        if run.learner.processes.leads and not started:
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _refuse_changes(path: Path, stored: RunConfig, wanted: RunConfig, advice: str) -> None:
    """Raise a UsageError that shows the difference if `wanted` would change the run's meaning."""
    may_change: dict[str, Any] = {**dict.fromkeys(RunConfig.list_resumable(), True), "task": {"config": {"data"}}}
    old, new = (each.model_dump(mode="json", exclude=may_change) for each in (_add_new_options(stored, wanted), wanted))
    changes = [f"{key} is {old[key]!r}, not {new[key]!r}" for key in old if old[key] != new[key]]
    if changes:
        raise UsageError(
            f"The run at {path} cannot be resumed with other options: its {'; its '.join(changes)}. {advice}"
        )
    if wanted.steps < stored.steps:
        raise UsageError(
            f"The run at {path} has {format_count(stored.steps, 'step')}; you can raise this number, but not lower it."
        )


def _add_new_options(stored: RunConfig, wanted: RunConfig) -> RunConfig:
    """Add to a stored configuration the options that its plugins gained since, if their defaults are wanted."""

    def complete(kind: str, old: PluginSpec, new: PluginSpec) -> PluginSpec:
        if old.program or old.name != new.name:
            return old
        fields = getattr(find_entry(kind, old.name).load(), "Config", PluginConfig).model_fields
        defaults = {
            name: to_jsonable_python(each.get_default(call_default_factory=True)) for name, each in fields.items()
        }
        added = {
            name: value
            for name, value in new.config.items()
            if name not in old.config and name in defaults and to_jsonable_python(value) == defaults[name]
        }
        return old.model_copy(update={"config": {**old.config, **added}})

    changes: dict[str, Any] = {}
    for option, kind in PLUGIN_FIELDS.items():
        old, new = getattr(stored, option), getattr(wanted, option)
        if isinstance(old, PluginSpec) and isinstance(new, PluginSpec):
            changes[option] = complete(kind, old, new)
        elif isinstance(old, list) and len(old) == len(new):
            changes[option] = [complete(kind, *pair) for pair in zip(old, new, strict=True)]
    return stored.model_copy(update=changes)


def _is_taken(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or not all(is_leftover(path) for path in out.iterdir()))


def _write_out_lengths(selection: Selection) -> Selection:
    """Set lengths that depend on the number of steps explicitly, so that raising `steps` does not change them."""
    config = selection.config
    lengths = {"eval_every": config.eval_every or max(1, config.steps // 10)}
    if config.lr_schedule == "cosine":
        lengths["lr_schedule_steps"] = config.lr_schedule_steps or config.steps
    return dataclasses.replace(
        selection, config=validate(RunConfig, config.model_dump() | lengths, "the run's options")
    )


def prepare_run(selection: Selection, processes: Processes | None = None) -> tuple[MetaLearner, TaskSource]:
    """Create the learner and its tasks; errors that can be found before training occur here, with nothing written."""
    with seed_global_generators(selection.config.seed, "learner"):
        return _prepare_run(selection, processes or Processes())


def _prepare_run(selection: Selection, processes: Processes) -> tuple[MetaLearner, TaskSource]:
    config, task = selection.config, selection.task.instance
    processes.check_batch(config.meta_batch)
    check_schedule(config, config.steps)
    import_compiler()
    own = selection.model.instance if isinstance(selection.model.instance, OwnModel) else None
    source = TaskSource(selection.task)
    source.check_splits()
    learner = MetaLearner(
        selection.model if own is None else own.module,
        selection.algorithm,
        selection.augmenters,
        spec=task.spec,
        loss=task.loss,
        metric=getattr(task, "metric", None),
        head=None if own is None else own.head,
        device=processes.device(config.device),
        **config.model_dump(include=set(LearnerConfig.model_fields) - {"device"}),
    )
    learner.task = describe_task(selection.task)
    check_fit(learner, source, TRAIN)
    for split in dict.fromkeys((VALIDATION, config.test_split)):
        source.episodes(split, [0], config.seed)
    if not config.task.program:  # a program's own tasks were checked when they were adopted
        source.check_repeatable(TRAIN, config.seed)
    return learner, source


def _create_folder(out: Path | None, config: RunConfig) -> Path:
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        arm = "+".join([config.algo.name, *(choice.name for choice in config.augment)])
        name = f"{config.task.name}-{arm}-seed{config.seed}".replace(":", "-")
        for number in itertools.count(1):
            path = Path("runs", name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):
                path.mkdir(parents=True)
                return path
    except OSError as error:
        raise MetaregError(f"The run's folder cannot be created: {error.strerror}: {error.filename}.") from error
    raise AssertionError("unreachable")


def _carry_out(run: Run, selection: Selection, observers: Sequence[Any], stop: StopRequest) -> None:
    """Run everything from the newest checkpoint on; the caller holds the folder's lock."""
    config, learner, path = run.config, run.learner, run.path
    processes = learner.processes
    store = Checkpoints(path / CHECKPOINTS, config.keep_checkpoints)
    processes.first(lambda: _open_folder(run, store))

    progress = Progress()
    metrics, timing = LinesFile(path / METRICS), TimedLinesFile(path / TIMING)
    reset_peak_memory(learner.device)
    writer = _LinesWriter(metrics, timing, learner.device)
    seeded = seed_global_generators(config.seed, "training")
    displayed = display_training_in_notebook()
    with _set_threads(run), use_deterministic_kernels(learner.device), displayed as displays, seeded:
        every = [writer, *displays, *observers, *selection.observers] if processes.leads else []
        lines = [metrics, timing] if processes.leads else []
        every_steps, every_minutes = config.checkpoint_every, config.checkpoint_minutes
        manager = CheckpointManager(
            store, learner, progress, lines, every_steps=every_steps, every_minutes=every_minutes, stop=stop
        )
        try:
            _start(run, manager)
            hooks = connect_observers(every, learner)
            hooks.on_run_start(run=run)
            _train(run, progress, manager, every)
            _finish(run, progress, store, stop, hooks)
            hooks.on_run_end(run=run)
        except (Interrupted, KeyboardInterrupt, LostProcessError) as error:
            where = "its beginning" if manager.last_saved is None else f"step {manager.last_saved}"
            advice = f"{format_resume_command(path)} continues from {where}."
            if isinstance(error, LostProcessError):
                raise LostProcessError(f"{error} {advice}") from error
            raise Interrupted(f"Stopped. {advice}") from error


def _open_folder(run: Run, store: Checkpoints) -> None:
    """Write the run's configuration and create its folders."""
    # Written first: a folder with a configuration can be resumed, one without can be started.
    write_text(run.path / CONFIG, run.config.to_yaml())
    try:
        store.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise MetaregError(f"{store.folder} cannot be created: {error.strerror}.") from error
    remove_leftovers(run.path, store.folder, run.path / PLOTS)


@contextmanager
def _set_threads(run: Run) -> Iterator[None]:
    """Set the run's number of CPU threads while the block runs."""
    before = torch.get_num_threads()
    parameters = sum(value.numel() for value in run.learner.meta_parameters.values())
    torch.set_num_threads(run.config.threads or (1 if parameters <= _SMALL else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start(run: Run, manager: CheckpointManager) -> None:
    """Restore the newest checkpoint or write the first one, then write environment.json."""
    config, learner = run.config, run.learner
    strategy, reason = learner.choose_strategy(config.meta_batch, config.steps, run.source.stackable)
    if manager.restore():
        log.info("Resuming from step %d.", learner.steps_done)
        if learner.strategy != strategy:
            strategy, reason = learner.strategy or strategy, "as before the run was resumed"
    log.info("Strategy %s: %s.", strategy, reason)

    def describe() -> None:
        environment.settle_strategy(run)
        environment.write(run, strategy, reason, learner.steps_done)

    learner.processes.first(describe)
    if manager.last_saved is None:
        manager.save()


def _train(run: Run, progress: Progress, manager: CheckpointManager, observers: Sequence[Any]) -> None:
    try:
        fit(run.learner, run.source, run.config, observers, progress=progress, manager=manager)
    except DivergenceError as error:
        with suppress(DivergenceError):
            manager.save()
        assert manager.last_saved is not None
        if run.config.on_nonfinite == "stop":
            advice = f"{format_resume_command(run.path)} with --on-nonfinite skip or rollback continues from it."
        else:
            advice = f"This happened more than max_nonfinite = {run.config.max_nonfinite} times."
        where = manager.store.path(manager.last_saved)
        raise DivergenceError(f"{error} The last valid checkpoint is {where}. {advice}") from error
    finally:
        if run.learner.processes.leads:
            environment.settle_strategy(run)


def _finish(run: Run, progress: Progress, store: Checkpoints, stop: StopRequest, hooks: Any) -> None:
    """Test, save the results, and draw the plots."""
    config, learner = run.config, run.learner
    processes = learner.processes
    stop.at_once = True
    # A signal may have arrived during the validation after the last step.
    if any(processes.gather(lambda: stop.asked)):
        raise Interrupted("Stopped before the test.")
    trained, best = learner.steps_done, progress.best_step
    if config.select == "best" and best is not None:
        learner.load_state(processes.first(lambda: store.load(best)["learner"]))
        log.info("Testing the weights from step %d, the best in validation.", learner.steps_done)
    evaluation, one_by_one = run.evaluate_one_by_one(
        config.test_tasks, config.test_inner_steps, split=config.test_split
    )
    run.evaluation, run.evaluation_one_by_one = evaluation, one_by_one
    hooks.on_evaluation(step=learner.steps_done, split=config.test_split, evaluation=evaluation)

    def conclude() -> list[Path]:
        from metareg.runs import plots  # imports matplotlib, which nothing else needs

        # The results of a run whose steps were raised are kept until new ones replace them.
        learner.save(run.path / FINAL)
        weights = {"select": config.select, "step": learner.steps_done}
        others = {} if one_by_one is None else {"one_by_one": one_by_one.to_dict()}
        facts: dict[str, Any] = {"split": config.test_split, "weights": weights, "trained_steps": trained}
        if trained < config.steps:
            facts["stopped_early"] = {"of_steps": config.steps, "patience": config.patience, "best_step": best}
        write_json(run.path / RESULTS, {**evaluation.to_dict(), **facts, **others})
        with learner.split_over(Processes()):
            return plots.draw(run)

    run.plots = processes.first(conclude)


class _LinesWriter:
    """Writes metrics.jsonl, which a resumed run reproduces bit for bit, and timing.jsonl, which differs."""

    def __init__(self, metrics: LinesFile, timing: LinesFile, device: torch.device) -> None:
        self._metrics, self._timing, self._device = metrics, timing, device

    @hookimpl
    def on_step(self, step: int, logs: dict[str, float]) -> None:
        speed = {"steps_per_second": logs["steps_per_second"]}
        self._metrics.append({"step": step, "split": TRAIN} | {key: logs[key] for key in logs if key not in speed})
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._timing.append({"step": step, **speed, "peak_bytes": peak_memory(self._device), "time": now})

    @hookimpl
    def on_evaluation(self, step: int, split: str, evaluation: Evaluation) -> None:
        for inner_steps in evaluation.inner_steps:
            scores = {evaluation.metric: evaluation.mean(inner_steps), "ci95": evaluation.ci95(inner_steps)}
            self._metrics.append({"step": step, "split": split, "inner_steps": inner_steps, **scores})
