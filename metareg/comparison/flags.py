"""From the flags of ``metareg compare`` and a YAML file to what is compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from metareg.comparison.plan import FILE, ComparisonConfig, stacked
from metareg.comparison.space import seeds_of
from metareg.contract.config import validate
from metareg.contract.search import check_distinct
from metareg.errors import UsageError
from metareg.runs.options import parse_assignments
from metareg.util.yaml_files import parse_yaml, read_yaml

__all__ = ["comparison_of", "parse_seeds", "split_assignments"]


def comparison_of(
    file: Path | None,
    folder: Path | None = None,
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
        folder: the comparison's; without a file the flags stand before what was begun there.
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
    source = file or (folder / FILE if folder and (folder / FILE).is_file() else None)
    base = read_yaml(source) if source else {}
    values = dict(base)
    for key, given in (("algo", algo), ("augment", augment), ("tasks", task)):
        if given is not None:
            values[key] = given
    if seeds is not None:
        values["seeds"] = parse_seeds(seeds)
    fixed, swept = split_assignments(assignments)
    if steps is not None:
        fixed["steps"] = steps
    tune: dict[str, Any] = {"trials": "grid", "space": swept} if swept else {}
    if search is not None:
        keys = [key.strip() for key in (search_over or "").split(",") if key.strip()]
        space = {**dict.fromkeys(keys), **swept}
        tune = {"trials": search, **({"space": space} if space else {})}
    elif search_over is not None:
        raise UsageError("--search-over names what --search N varies; give the number of trials too.")
    if fixed:
        _set_options(values, fixed)
    _set_tuning(values, tune, {*fixed, *swept})
    if file is None and values == base:
        return None
    return validate(ComparisonConfig, values, str(file) if file else "the comparison")


def split_assignments(assignments: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """``["steps=300", "inner_lr=0.01,0.1"]`` as the options with one value, and those with several.

    Several values are a YAML list without its brackets. What has brackets is one value, as in ``metareg train``:
    ``hidden=[40,40]`` is a list, and ``hidden=[40,40],[80]`` are two.

    Raises:
        UsageError: one is malformed, or an option is given twice.
    """
    fixed: dict[str, Any] = {}
    swept: dict[str, list[Any]] = {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        key = key.strip()
        if key in fixed or key in swept:
            raise UsageError(f"--set {key} is given twice; to choose among values, write {key}=VALUE,VALUE.")
        values = None
        with suppress(ValueError):
            values = parse_yaml(f"[{text}]")
        if key and isinstance(values, list) and len(values) > 1:
            swept[key] = check_distinct(key, values)
        else:
            fixed |= parse_assignments([assignment])
    return fixed, swept


def parse_seeds(text: str) -> list[int]:
    """``"5"`` as the seeds 0 to 4, ``"3,7"`` as these two.

    Raises:
        UsageError: it is neither.
    """
    try:
        seeds: list[int] = seeds_of(text)
    except ValueError:
        raise UsageError(
            f"--seeds takes a number of seeds from 1 on, as 5, or seeds with commas, as 0,3,7; got '{text}'."
        ) from None
    return seeds


# Whatever is no mapping or list is left as it is, for `validate` to refuse.


def _set_options(values: dict[str, Any], options: dict[str, Any]) -> None:
    """Give every run options that stand before all others in `values`."""
    values["options"] = _merged(values.get("options"), options)
    rules = values.get("arms") or []
    if not isinstance(rules, list) or not any(
        each.get("options") for each in _mappings(values.get("tasks")) + _mappings(rules)
    ):
        return
    # A last rule for all arms stands before tasks and other rules; the same command finds it again and adds no other.
    own: Mapping[str, Any] = {}
    if _mappings(rules[-1:]) and not any(rules[-1].get(key) for key in ("algo", "augment", "task")):
        *rules, own = rules
    values["arms"] = [*rules, {**own, "options": _merged(own.get("options"), options)}]


def _set_tuning(values: dict[str, Any], tune: Mapping[str, Any], flags: Collection[str]) -> None:
    """Tune every task by what flags say; options that they name are none of the trials alone."""

    def tuned(given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        options = given.get("options")
        if isinstance(options, Mapping):
            given = {**given, "options": {key: value for key, value in options.items() if key not in flags}}
        return {**given, **tune}

    if tune or values.get("tune"):
        values["tune"] = tuned(values.get("tune") or {})
    if isinstance(values.get("tasks"), list):
        values["tasks"] = [
            {**each, "tune": tuned(each["tune"])} if isinstance(each, Mapping) and each.get("tune") else each
            for each in values["tasks"]
        ]


def _merged(given: Any, more: dict[str, Any]) -> Any:
    return stacked(given or {}, more) if isinstance(given or {}, Mapping) else given


def _mappings(listed: Any) -> list[Mapping[str, Any]]:
    return [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []
