"""The check whether the runs of a recipe reach its expected value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metareg.comparison.config import is_location
from metareg.comparison.recipe import SHIPPED, Expected, Recipe
from metareg.contract.config import validate
from metareg.errors import Interrupted, MetaregError, UnknownNameError, UsageError
from metareg.printable import format_count
from metareg.util.data_files import absolute_path
from metareg.util.files import read_json, write_json

if TYPE_CHECKING:
    from metareg.comparison.plan import PlannedRun
    from metareg.comparison.runner import ComparisonObserver

__all__ = ["Verdict", "find_recipe", "reproduce"]

FILE = "reproduction.json"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a recipe, compared with the expected value.

    Args:
        by_seed: the mean over test tasks for each seed.
        tasks: the number of test tasks of each seed.
        mean: the mean over seeds.
        interval: the 95 % interval.
        over: what the interval covers: seeds, or test tasks if there is only one seed.
        reached: whether the mean is at least as good as the worse end of the expected interval. Without an expected
            interval, whether `interval` includes the expected mean or is better. None without an expected value.
    """

    recipe: Recipe
    higher_is_better: bool
    by_seed: dict[int, float]
    tasks: int
    mean: float
    interval: tuple[float, float]
    over: str
    reached: bool | None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of reproduction.json."""
        recipe = self.recipe
        return {
            "recipe": recipe.name,
            "reached": self.reached,
            "sentence": str(self),
            "metric": recipe.metric,
            "higher_is_better": self.higher_is_better,
            "inner_steps": recipe.inner_steps,
            "found": {
                "mean": self.mean,
                "interval": list(self.interval),
                "over": self.over,
                "by_seed": self.by_seed,
                "tasks": self.tasks,
            },
            "expected": None if recipe.expected is None else recipe.expected.model_dump(mode="json"),
        }

    def __str__(self) -> str:
        recipe, expected = self.recipe, self.recipe.expected
        value, interval = recipe.format_value, recipe.format_interval
        after = f"after {format_count(recipe.inner_steps, 'inner step')}"
        found = f"{recipe.metric} {after} is {value(self.mean)} ({interval(self.interval)} over {self.over})"
        if expected is None:
            return f"Nothing to compare with: {found}. {recipe.unknown}"
        reached, source = "Reached" if self.reached else "Not reached", expected.source.rstrip(".")
        if expected.interval is None:
            return f"{reached}: {found}; {value(expected.mean)}, without an interval, was reached before: {source}."
        over = f" over {expected.over}" if expected.over else ""
        bound, least = (expected.interval[0], "least") if self.higher_is_better else (expected.interval[1], "most")
        return (
            f"{reached}: {found}; at {least} {value(bound)} was expected, for {value(expected.mean)} "
            f"({interval(expected.interval)}{over}) was reached before: {source}."
        )


def find_recipe(name: str, row: str | None = None) -> Recipe:
    """Find a shipped recipe by name, the user's own by file, or a row of a comparison.

    Args:
        name: the name, the path of a YAML file, or the path of a comparison's folder or archive.
        row: the row of the comparison.

    Raises:
        UsageError: there is none, or `row` is missing, or given without a comparison.
    """
    from metareg.comparison.rows import find_row, has_rows  # imports NumPy, which the list of recipes does not need

    if has_rows(name):
        if row is None:
            raise UsageError(f"Name a row of the comparison with --row; `metareg reproduce {name}` lists them.")
        return find_row(name, row)
    if row is not None:
        raise UsageError(f"--row names a row of a comparison's folder or archive; {name} is neither.")
    if name.endswith((".yaml", ".yml")):
        return Recipe.read(Path(name))
    known = [path.stem for path in SHIPPED.glob("*.yaml")]
    if name not in known:
        hint = "`metareg reproduce` lists them; your own recipe is a file NAME.yaml."
        raise UnknownNameError("recipe", name, known, hint)
    return Recipe.read(SHIPPED / f"{name}.yaml")


def reproduce(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    row: str | None = None,
    seeds: int | str | Sequence[int] | None = None,
    jobs: int | None = None,
    device: str | None = None,
    data: str | Path | None = None,
    observer: ComparisonObserver | None = None,
) -> Verdict:
    """Run a recipe, or continue it, and judge its result, like ``metareg reproduce``.

    The result is written into its folder, as reproduction.json.

    Args:
        recipe: the recipe: its name, the path of a YAML file, or the recipe itself; or the path of a comparison's
            folder or archive.
        out: its folder, which is a comparison's; by default, one under ``reproductions/``.
        row: the row of that comparison: ``TASK/METHOD``, as its folder is named.
        seeds: other seeds than the recipe's, or a number n for 0 to n − 1.
        jobs: runs at a time; by default, as in `metareg.compare`.
        device: where to compute; by default, a GPU if there is one.
        data: the location of the task's data, as in `metareg.train`.
        observer: receives the progress of the runs.

    Returns:
        The verdict: the result and the expected value; as a string, a sentence.

    Raises:
        UsageError: an argument is invalid, or data is missing; nothing was written.
        MetaregError: a run could not be finished.
        Interrupted: it was stopped; call it again to continue.
    """
    from metareg.comparison.runner import compare

    if not isinstance(recipe, Recipe):
        recipe = find_recipe(str(recipe), row)
    out = Path("reproductions", recipe.name) if out is None else Path(out)
    options = recipe.options | ({} if device is None else {"device": device})
    if data is not None:
        kept = {key: value for key, value in options.items() if not is_location(key)}
        options = kept | {"task.data": str(absolute_path(data))}
    values = recipe.to_comparison() | {"options": options} | ({} if seeds is None else {"seeds": seeds})
    _check_judged(recipe, values, out)
    try:
        comparison = compare(config=values, out=out, jobs=jobs, observer=observer)
    except Interrupted as error:
        raise Interrupted(f"Stopped. Repeat the command to continue the recipe in {out}.") from error
    if comparison.broken:
        outcome = next(iter(comparison.broken.values()))
        failed = f"{len(comparison.broken)} of the runs of the recipe '{recipe.name}' could not be finished"
        raise MetaregError(f"{failed}. {outcome.run}: {outcome.error}")
    verdict = judge(recipe, comparison.plan.list_runs())
    write_json(out / FILE, verdict.to_dict())
    return verdict


def _check_judged(recipe: Recipe, values: dict[str, Any], out: Path) -> None:
    """Raise a UsageError if the runs could not be judged, or the folder belongs to another recipe."""
    from metareg.comparison.config import ComparisonConfig
    from metareg.comparison.plan import Plan
    from metareg.contract.losses import find_metric
    from metareg.runs.options import assemble

    if (out / FILE).is_file():
        written = read_json(out / FILE)
        other = written.get("recipe") if isinstance(written, dict) else None
        if other != recipe.name:
            raise UsageError(f"{out} contains results of the recipe '{other}'; choose another folder with --out.")
    run = Plan(out, validate(ComparisonConfig, values, f"the recipe {recipe.name}")).list_runs()[0]
    selection = assemble(run.config, run.options)
    tested = selection.config.test_inner_steps
    if recipe.inner_steps not in tested:
        raise UsageError(
            f"The recipe '{recipe.name}' judges the score after {recipe.inner_steps} inner steps, but its runs are tested "
            f"after {', '.join(map(str, tested))} (test_inner_steps)."
        )
    task = selection.task.instance
    metric = find_metric(getattr(task, "metric", None), task.loss).name
    if metric != recipe.metric:
        raise UsageError(f"The recipe '{recipe.name}' judges {recipe.metric}, but its runs are tested by {metric}.")


def judge(recipe: Recipe, runs: Sequence[PlannedRun]) -> Verdict:
    """Compute the verdict on finished runs of a recipe."""
    from metareg.comparison.statistics import summarise
    from metareg.runs.run import read_evaluations

    found = {run.seed: read_evaluations(run.path)[0] for run in runs}
    one = next(iter(found.values()))
    by_seed = {seed: evaluation.mean(recipe.inner_steps) for seed, evaluation in found.items()}
    scores = [evaluation.get_scores(recipe.inner_steps).numpy() for evaluation in found.values()]
    estimate, over = summarise(list(by_seed.values()), scores)
    # A score that is not finite makes the mean not finite, so the expected value is not reached.
    mean, interval = sum(by_seed.values()) / len(by_seed), (estimate.low, estimate.high)
    better = one.higher_is_better
    reached = None if recipe.expected is None else _is_reached(recipe.expected, mean, interval, better)
    return Verdict(recipe, better, by_seed, one.tasks, mean, interval, over, reached)


def _is_reached(expected: Expected, mean: float, interval: tuple[float, float], higher_is_better: bool) -> bool:
    sign = 1 if higher_is_better else -1
    if expected.interval is not None:
        return sign * mean >= min(sign * end for end in expected.interval)
    return math.isfinite(mean) and max(sign * end for end in interval) >= sign * expected.mean
