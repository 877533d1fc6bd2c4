"""Tuning of an arm's settings in trials on validation tasks, by grid or search.

A search proposes the settings of a trial as a pure function of the trial's number and the arm's earlier trials and
their scores. If it is killed at any moment and continued, it tries the same settings as without the interruption.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metareg.comparison.config import GRID
from metareg.comparison.plan import CHOSEN_FILE, TRIAL_FILE, Arm, Plan, PlannedRun, select_plugins
from metareg.comparison.pool import read_divergence
from metareg.comparison.space import Dimension, list_dimensions
from metareg.contract.search import Range, format_domain
from metareg.contract.splits import VALIDATION
from metareg.errors import UsageError
from metareg.printable import format_count
from metareg.runs.folder import RESULTS
from metareg.util.files import read_json, refuse_malformed, write_json
from metareg.util.seeding import derive_seed

__all__ = ["Tuner", "create_tuners", "propose"]

log = logging.getLogger("metareg.tuning")

_RANDOM_TRIALS = 5
"""Number of first trials, including the defaults, that are drawn independently and can run at the same time."""
_DRAWS = 20
"""Maximum number of new proposals if a search proposes settings that were already tried."""
_DIGITS = 4
"""Significant digits of a proposed number."""

Settings = dict[str, Any]


def create_tuners(plan: Plan) -> dict[Arm, Tuner]:
    """Create a tuner for every arm that is tuned; on one task, a grid gives every arm the same number of trials."""
    arms = [arm for arm in plan.arms if plan.get_tuning(arm)]
    most: dict[str, int] = {}
    for arm in arms:
        tuning = plan.get_tuning(arm)
        if tuning and tuning.trials == GRID:
            most[arm.task] = max(most.get(arm.task, 0), len(_build_grid(_list_dimensions(plan, arm))))
    return {arm: Tuner(plan, arm, most.get(arm.task, 0)) for arm in arms}


@dataclass
class _Trial:
    """One combination of settings and its result."""

    options: Settings
    runs: list[PlannedRun]
    twin: _Trial | None = None
    """An earlier trial with the same settings, whose result is used."""
    score: float | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.score is not None or self.error is not None


class Tuner:
    """Chooses the settings of one arm.

    A trial's score is the mean validation metric over the trial's seeds, after the largest of ``test_inner_steps``. A
    trial that diverges, or whose settings the arm does not allow, is worse than any other. The chosen settings are
    written to chosen.json, which is final. The arm must have a `tune`.

    Args:
        plan: the comparison.
        arm: an arm of the comparison.
        trials: minimum number of trials in a grid. If the arm's own grid is smaller, the rest is drawn at random
            between the smallest and the largest value of each option.
    """

    def __init__(self, plan: Plan, arm: Arm, trials: int = 0) -> None:
        tuning = plan.get_tuning(arm)
        assert tuning is not None
        self._plan = plan
        self._arm = arm
        self._seeds = plan.get_tuning_seeds(arm)
        self.folder = plan.get_tuning_folder(arm)
        """The folder of its trials."""
        self._dimensions = _list_dimensions(plan, arm)
        self._space = {each.key: format_domain(each.domain) for each in self._dimensions}
        self._grid = _build_grid(self._dimensions) if tuning.trials == GRID else None
        count = len(self._grid) if self._grid is not None else int(tuning.trials)
        self._own_trials = count if self._dimensions else 0
        fills_up = self._grid is not None and any(_find_span(each) for each in self._dimensions)
        self.trials = max(trials, self._own_trials) if fills_up else self._own_trials
        """The number of trials; 0 if the search space is empty."""
        self.runs = self.trials * len(self._seeds)
        """The number of the trials' runs."""
        self._trials: list[_Trial] = []
        self._measured: tuple[str, bool, int] | None = None
        self.chosen = self._read_chosen()
        """The chosen options, empty for the defaults; None if nothing was chosen at the last `next_runs`."""

    @property
    def remaining(self) -> int:
        """The number of runs that have not ended."""
        if self.chosen is not None:
            return 0
        settled = sum(
            len(self._seeds) if trial.ended else sum(run.finished for run in trial.runs) for trial in self._trials
        )
        return self.runs - settled

    def next_runs(self) -> list[PlannedRun]:
        """Update the trials with the runs that ended, and choose the settings once all trials have ended.

        Returns the runs that can run now, including active ones.
        """
        if self.chosen is not None:
            return []
        if not self._trials and self.trials:
            log.info(
                "%s: %s of %s.", self._arm, format_count(self.trials, "trial"), "; ".join(map(str, self._dimensions))
            )
        while True:
            for trial in self._trials:
                self._update(trial)
            if not self._may_start_trial():
                break
            self._trials.append(self._start_trial(len(self._trials)))
        if len(self._trials) == self.trials and all(trial.ended for trial in self._trials):
            self._choose()
        return [run for trial in self._trials if not trial.ended for run in trial.runs if not run.finished]

    # ---------------------------------------------------------------------------------------------------------- trials

    def _may_start_trial(self) -> bool:
        number = len(self._trials)
        if number >= self.trials:
            return False
        return self._grid is not None or number < _RANDOM_TRIALS or all(trial.ended for trial in self._trials)

    def _start_trial(self, number: int) -> _Trial:
        """Start the trial with this number, or read it if an earlier process started it."""
        file = self.folder / f"trial-{number}" / TRIAL_FILE
        if not file.is_file():
            options = self._propose(number)
            write_json(file, {"options": options, "error": self._explain_refusal(options)})
        options, error = _read_trial(file)
        runs = [self._plan.make_trial(self._arm, number, seed, options) for seed in self._seeds]
        trial = _Trial(options, runs, error=error)
        settings = self._fill_defaults(options)
        trial.twin = next((each for each in self._trials if self._fill_defaults(each.options) == settings), None)
        return trial

    def _explain_refusal(self, options: Settings) -> str | None:
        """Explain why the arm does not allow this combination of settings; None if it does."""
        run = self._plan.make_trial(self._arm, 0, self._seeds[0], options)
        try:
            select_plugins(run)
        except UsageError as error:
            return str(error)
        return None

    def _fill_defaults(self, options: Settings) -> Settings:
        """Complete the settings of a trial with the defaults of the other dimensions."""
        return {each.key: options.get(each.key, each.default) for each in self._dimensions}

    def _propose(self, number: int) -> Settings:
        if self._grid is not None:
            return self._grid[number] if number < len(self._grid) else self._draw_between(number)
        if number == 0:
            return {}  # the defaults, so that a search is never worse than them
        known = self._trials if number >= _RANDOM_TRIALS else []
        history = [(self._fill_defaults(trial.options), self._compute_cost(trial)) for trial in known]
        # The seed is the same for every arm, so that all begin with the same step sizes.
        options = propose(self._dimensions, history, derive_seed(self._seeds[0], "tuning", number))
        tried = [self._fill_defaults(trial.options) for trial in self._trials]
        for draw in range(_DRAWS):
            if self._fill_defaults(options) not in tried:
                break
            options = propose(self._dimensions, [], derive_seed(self._seeds[0], "tuning", number, draw))
        return options

    def _draw_between(self, number: int) -> Settings:
        """Draw settings in addition to the grid, if possible ones that were not tried yet."""
        tried = [self._fill_defaults(trial.options) for trial in self._trials]
        options: Settings = {}
        for draw in range(_DRAWS):
            # As in a search, arms draw the same values for options that they share.
            seeds = {each.key: derive_seed(self._seeds[0], "grid", number, draw, each.key) for each in self._dimensions}
            options = {each.key: _draw_value(each, seeds[each.key]) for each in self._dimensions}
            if options not in tried:
                break
        return options

    def _update(self, trial: _Trial) -> None:
        """Set a trial's score or error once its runs have ended."""
        if trial.ended:
            return
        if trial.twin is not None:
            trial.score, trial.error = trial.twin.score, trial.twin.error
            return
        trial.error = next(filter(None, (read_divergence(run.path) for run in trial.runs)), None)
        if trial.error is None and all(run.finished for run in trial.runs):
            score = statistics.fmean(map(self._read_score, trial.runs))
            if math.isfinite(score):
                trial.score = score
            else:
                trial.error = f"Its score is {score}."

    def _read_score(self, run: PlannedRun) -> float:
        file = run.path / RESULTS
        if _read_key(file, "split") != VALIDATION:
            raise UsageError(f"{file} is not a result on validation tasks; the comparison needs its own folder.")
        with refuse_malformed(file, "results"):
            last = _read_key(file, "steps")[-1]
            self._measured = _read_key(file, "metric"), _read_key(file, "higher_is_better"), last["inner_steps"]
            return float(last["mean"])

    def _compute_cost(self, trial: _Trial) -> float:
        """Return the value that a search minimises."""
        if trial.score is None:
            return math.inf
        return -trial.score if self._measured and self._measured[1] else trial.score

    # ---------------------------------------------------------------------------------------------------------- choice

    def _choose(self) -> None:
        best = min(self._trials, key=self._compute_cost, default=None)
        if best is not None and best.score is None:
            log.warning("%s: none of its %d trials has a score; using the defaults.", self._arm, len(self._trials))
        self.chosen = {} if best is None or best.score is None else best.options
        metric, higher_is_better, inner_steps = self._measured or (None, None, None)
        write_json(
            self.folder / CHOSEN_FILE,
            {
                "options": self.chosen,
                "metric": metric,
                "higher_is_better": higher_is_better,
                "inner_steps": inner_steps,
                "split": VALIDATION,
                "space": self._space,
                "trials": [
                    {"options": trial.options, "score": trial.score, "seeds": self._seeds, "error": trial.error}
                    for trial in self._trials
                ],
            },
        )
        if best is not None and best.score is not None:
            settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in self.chosen.items())
            log.info(
                "%s: chosen by %d trials: %s, with a validation %s of %.4g.",
                self._arm, self.trials, settings or "the defaults", metric, best.score,
            )  # fmt: skip

    def _read_chosen(self) -> Settings | None:
        """Read settings that were chosen before; raise a `UsageError` if the tuning was configured differently."""
        file = self.folder / CHOSEN_FILE
        if not file.is_file():
            return None
        options, space, trials = (_read_key(file, key) for key in ("options", "space", "trials"))
        # Earlier versions did not extend small grids; their choices are kept.
        counts = {self.trials, self._own_trials}
        if (
            space != self._space
            or len(trials) not in counts
            or any(each.get("seeds") != self._seeds for each in trials)
        ):
            raise UsageError(
                f"The settings in {file} were chosen with another 'tune' than this comparison's; choose another folder."
            )
        return dict(options)


# -------------------------------------------------------------------------------------------------------------- search


def _list_dimensions(plan: Plan, arm: Arm) -> list[Dimension]:
    """List the search space of an arm with a `tune`."""
    tuning = plan.get_tuning(arm)
    assert tuning is not None
    run = plan.make_trial(arm, 0, plan.get_tuning_seeds(arm)[0], {})
    return list_dimensions(tuning, select_plugins(run))


def _build_grid(space: Sequence[Dimension]) -> list[Settings]:
    keys = [dimension.key for dimension in space]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(each.domain for each in space))]


def _find_span(dimension: Dimension) -> tuple[float, float] | None:
    """Return the smallest and the largest value of an option; None if it has other values than numbers, or only one."""
    values = dimension.domain
    if not isinstance(values, list) or any(
        isinstance(each, bool) or not isinstance(each, int | float) for each in values
    ):
        return None
    return (min(values), max(values)) if len(set(values)) > 1 else None


def _draw_value(dimension: Dimension, seed: int) -> Any:
    """Draw a value in addition to the grid: between the option's numbers (log-uniform if positive), or one of its values."""
    generator = np.random.default_rng(seed)
    span = _find_span(dimension)
    if span is None:
        assert isinstance(dimension.domain, list)
        return dimension.domain[int(generator.integers(len(dimension.domain)))]
    low, high = span
    value = math.exp(generator.uniform(math.log(low), math.log(high))) if low > 0 else generator.uniform(low, high)
    whole = all(isinstance(each, int) for each in dimension.domain)
    return round(value) if whole else float(f"{value:.{_DIGITS}g}")


def propose(space: Sequence[Dimension], history: Sequence[tuple[Settings, float]], seed: int) -> Settings:
    """Propose the settings of the next trial.

    Draws at random without any history, otherwise with Optuna's tree-structured Parzen estimator.

    Args:
        space: the search space.
        history: settings that were tried and their costs, which are minimised; infinite for a failed trial.
        seed: the seed of the draws.

    Reference:
        Bergstra, Bardenet, Bengio and Kégl, Algorithms for Hyper-Parameter Optimization, NeurIPS 2011, Section 4.
    """
    import optuna

    distributions = {each.key: _make_distribution(each) for each in space}
    seed %= 1 << 32  # NumPy's largest seed
    sampler: Any = optuna.samplers.RandomSampler(seed)
    if history:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=sampler)
        for values, cost in history:
            # A default can be outside the search space, or None; such a trial has no value for that option.
            known = {each.key: _encode(each, values[each.key]) for each in space}
            params = {key: position for key, position in known.items() if position is not None}
            tried = {key: distributions[key] for key in params}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=tried, value=cost))
        drawn = study.ask(distributions).params
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {each.key: _decode(each, drawn[each.key]) for each in space}


def _make_distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    domain = dimension.domain
    if isinstance(domain, Range):
        kind = IntDistribution if dimension.whole else FloatDistribution
        return kind(domain.low, domain.high, log=domain.log)  # type: ignore[arg-type]
    return CategoricalDistribution(range(len(domain)))


def _encode(dimension: Dimension, value: Any) -> Any:
    """Encode a value for Optuna; None if it is outside the search space."""
    domain = dimension.domain
    if isinstance(domain, list):
        return domain.index(value) if value in domain else None
    inside = isinstance(value, int | float) and domain.low <= value <= domain.high
    return value if inside else None


def _decode(dimension: Dimension, position: Any) -> Any:
    domain = dimension.domain
    if isinstance(domain, list):
        return domain[position]
    if dimension.whole:
        return int(position)
    return min(max(float(f"{position:.{_DIGITS}g}"), domain.low), domain.high)


def _read_trial(file: Path) -> tuple[Settings, str | None]:
    """Read a trial's settings, and why the arm does not allow them, if so."""
    error = _read_key(file, "error")
    with refuse_malformed(file, "a trial"):
        return dict(_read_key(file, "options")), None if error is None else str(error)


def _read_key(file: Path, key: str) -> Any:
    content = read_json(file)
    if not isinstance(content, Mapping) or key not in content:
        raise UsageError(f"{file} is not what metareg wrote there: it has no '{key}'.")
    return content[key]
