"""From the flags of ``metareg compare`` and a YAML file to what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metareg.comparison.plan import ComparisonConfig
from metareg.comparison.space import split_assignments
from metareg.config import read_yaml, validated
from metareg.errors import UsageError

__all__ = ["comparison_of", "parse_seeds"]


def comparison_of(
    file: Path | None,
    *,
    algo: str | None = None,
    augment: str | None = None,
    task: str | None = None,
    seeds: str | None = None,
    steps: int | None = None,
    assignments: Sequence[str] = (),
    search: int | None = None,
    search_over: str | None = None,
) -> ComparisonConfig | None:
    """What is compared; None where nothing was said, to go on with what a folder holds.

    Args:
        file: YAML with the fields of `ComparisonConfig`; the flags stand before it.
        algo: algorithms, with commas.
        augment: augmenters or chains of them, with commas.
        task: tasks, with commas.
        seeds: a number of seeds, or seeds with commas.
        steps: training steps of each run.
        assignments: ``KEY=VALUE``; several values of a key are tried on validation tasks.
        search: a number of trials for each arm.
        search_over: the options that they vary, with commas.

    Raises:
        UsageError: a flag or the file is malformed, or names what cannot be.
    """
    values: dict[str, Any] = read_yaml(file) if file else {}
    for key, given in (("algo", algo), ("augment", augment)):
        if given is not None:
            values[key] = given
    if task is not None:
        values["tasks"] = [name.strip() for name in task.split(",")]
    if seeds is not None:
        values["seeds"] = parse_seeds(seeds)
    fixed, swept = split_assignments(assignments)
    if steps is not None:
        fixed["steps"] = steps
    if fixed:
        values["options"] = {**(values.get("options") or {}), **fixed}
    tune: dict[str, Any] = {}
    if swept:
        tune = {"trials": "grid", "space": swept}
    if search is not None:
        keys = [key.strip() for key in (search_over or "").split(",") if key.strip()]
        tune = {"trials": search, "space": {**dict.fromkeys(keys), **swept}}
    elif search_over is not None:
        raise UsageError("--search-over names what --search N varies; give the number of trials too.")
    if tune:
        values["tune"] = {**(values.get("tune") or {}), **tune}
        for each in values.get("tasks") or ():
            if isinstance(each, dict) and isinstance(each.get("tune"), dict):
                each["tune"] = {**each["tune"], **tune}
    if not values:
        return None
    return validated(ComparisonConfig, values, str(file) if file else "the comparison")


def parse_seeds(text: str) -> list[int]:
    """``"5"`` as the seeds 0 to 4, ``"3,7"`` as these two.

    Raises:
        UsageError: it is neither.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--seeds takes a number of seeds, as 5, or seeds with commas, as 0,3,7; got '{text}'."
        ) from None
    return list(range(numbers[0])) if "," not in text else numbers
