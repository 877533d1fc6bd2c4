"""What a user says beside a comparison's configuration stands before it; and options of which several values are tried."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from metareg.contract.search import check_distinct
from metareg.errors import UsageError
from metareg.runs.options import parse_assignments
from metareg.util.yaml_files import parse_yaml

__all__ = ["merge_options", "override", "split_assignments"]


def override(
    config: Mapping[str, Any],
    *,
    options: Mapping[str, Any] | None = None,
    space: Mapping[str, Any] | None = None,
    search: int | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """The values of a `ComparisonConfig` with others in their place; nothing is validated yet.

    Args:
        config: the values.
        options: for every run, whatever tasks, rules and tunings say of them.
        space: what every arm is tuned over, as in `Tuning`.
        search: a number of trials for each arm; without it, those of a grid over `space`.
        fields: other values, by the names of their fields.
    """
    values = {**config, **fields}
    options, space = options or {}, space or {}
    tune: dict[str, Any] = {"space": space} if space else {}
    if tune or search is not None:
        tune["trials"] = "grid" if search is None else search
    if options:
        _set_options(values, options)
    _set_tuning(values, tune, {*options, *space})
    return values


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


def merge_options(options: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Options with others that stand before them.

    Of two names of one option, as inner_lr and maml.inner_lr, the last one counts: all of `later` goes to the end.
    """
    return {**{key: value for key, value in options.items() if key not in later}, **later}


# Whatever is no mapping or list is left as it is, for `validate` to refuse.


def _set_options(values: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Give every run options that stand before all others in `values`."""
    values["options"] = _merged(values.get("options"), options)
    rules = values.get("arms") or []
    if not isinstance(rules, list) or not any(
        each.get("options") for each in _mappings(values.get("tasks")) + _mappings(rules)
    ):
        return
    # A last rule for all arms stands before tasks and other rules; the same call finds it again and adds no other.
    own: Mapping[str, Any] = {}
    if _mappings(rules[-1:]) and not any(rules[-1].get(key) for key in ("algo", "augment", "task")):
        *rules, own = rules
    values["arms"] = [*rules, {**own, "options": _merged(own.get("options"), options)}]


def _set_tuning(values: dict[str, Any], tune: Mapping[str, Any], said: Collection[str]) -> None:
    """Tune every task by what the user says; options that it names are none of the trials alone."""

    def tuned(given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        options = given.get("options")
        if isinstance(options, Mapping):
            given = {**given, "options": {key: value for key, value in options.items() if key not in said}}
        return {**given, **tune}

    if tune or values.get("tune"):
        values["tune"] = tuned(values.get("tune") or {})
    if isinstance(values.get("tasks"), list):
        values["tasks"] = [
            {**each, "tune": tuned(each["tune"])} if isinstance(each, Mapping) and each.get("tune") else each
            for each in values["tasks"]
        ]


def _merged(given: Any, more: Mapping[str, Any]) -> Any:
    return merge_options(given or {}, more) if isinstance(given or {}, Mapping) else given


def _mappings(listed: Any) -> list[Mapping[str, Any]]:
    return [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []
