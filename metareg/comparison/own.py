"""Comparisons of a user's own objects, which run in the user's process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metareg.comparison.config import ComparisonConfig
from metareg.comparison.plan import Objects, PlannedRun
from metareg.comparison.pool import Outcome, carry_out
from metareg.contract.config import PluginSpec
from metareg.errors import UsageError
from metareg.registry.own_tasks import wrap_tasks
from metareg.registry.plugins import get_name

__all__ = ["ThisProcess", "name_objects", "refuse_missing_objects"]


def name_objects(fields: Mapping[str, Any], model: Any) -> tuple[dict[str, Any], Any, dict[tuple[str, str], Any]]:
    """Replace objects by names, which a configuration can contain.

    Args:
        fields: ``algo``, ``augment`` and ``tasks`` as `metareg.compare` takes them.
        model: the option `model`.

    Returns:
        The fields and the model with names, and the objects by field and name.

    Raises:
        UsageError: two objects of one field have the same name.
    """
    objects: dict[tuple[str, str], Any] = {}

    def name(field: str, given: Any, label: str = "") -> Any:
        plugin = given[0] if isinstance(given, tuple) and len(given) == 2 else given
        if isinstance(plugin, str | PluginSpec) or (isinstance(given, Mapping) and "name" in given) or given is None:
            return given
        text = label or get_name(plugin)
        if objects.setdefault((field, text), given) is not given:
            advice = ' Give it as {"task": …, "label": …}.' if field == "task" else ""
            raise UsageError(f"Two objects passed as {field} have the name '{text}'.{advice}")
        return text

    def name_task(given: Any) -> Any:
        if isinstance(given, Mapping) and "task" in given:
            return {**given, "task": name("task", wrap_tasks(given["task"]), given.get("label", ""))}
        return name("task", wrap_tasks(given))

    named: dict[str, Any] = dict(fields)
    for field, function in (("algo", name), ("augment", name), ("tasks", name_task)):
        given = fields.get(field)
        if given is None or isinstance(given, str):
            continue
        listed = given if isinstance(given, list | tuple) else [given]
        named[field] = [name_task(each) if function is name_task else name(field, each) for each in listed]
    return named, name("model", model), objects


def refuse_missing_objects(config: ComparisonConfig, objects: Objects) -> None:
    """Refuse to continue a comparison without the user's own objects.

    Raises:
        UsageError: an object is missing.
    """
    missing = [
        (field, name) for field, names in config.program.items() for name in names if (field, name) not in objects
    ]
    if missing:
        listed = ", ".join(f"{field} '{name}'" for field, name in missing)
        raise UsageError(
            f"The comparison uses objects from a program, which commands cannot create ({listed}): continue in Python, "
            "with metareg.compare and the same objects."
        )


class ThisProcess:
    """Executes runs in this process, one after the other, because other processes lack its objects."""

    capacity = 1

    def __init__(self) -> None:
        self._waiting: list[PlannedRun] = []

    def submit(self, run: PlannedRun) -> None:
        """Queue a run for `wait`."""
        self._waiting.append(run)

    def wait(self, seconds: float) -> list[Outcome]:  # noqa: ARG002
        """Execute the queued runs."""
        runs, self._waiting = self._waiting, []
        return [carry_out(run) for run in runs]

    def stop(self) -> None:
        """Do nothing: no run is active between calls."""

    def close(self) -> None:
        """Do nothing: there are no processes to end."""
