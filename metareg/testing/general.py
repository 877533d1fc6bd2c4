"""Checks of plugins of every kind: contract version, hooks and configuration."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import ValidationError

from metareg.contract.config import PluginConfig
from metareg.contract.hookspecs import CONTRACT_VERSION
from metareg.contract.search import describe_search_space
from metareg.errors import UsageError
from metareg.registry.dispatch import create_plugin_manager
from metareg.registry.plugins import list_names
from metareg.runs.config import RunConfig
from metareg.runs.options import assemble
from metareg.testing.check import Subject, fail

__all__ = ["check_configuration", "check_contract_stated", "check_recommended"]

_DEFAULT_TASK = RunConfig().task.name


def check_contract_stated(subject: Subject) -> None:
    """It states its contract version, and all its hooks are hooks of metareg."""
    plugin = subject.resolve()
    create_plugin_manager([plugin])  # raises for misspelt hooks and arguments
    if not subject.hooks:
        fail(f"The {plugin.label} implements no hook.", "mark the methods that metareg should call with @hookimpl.")
    if subject.attribute("contract") is None:
        fail(
            f"The {plugin.label} does not state the contract that it was written for.",
            f"add the class attribute contract = {CONTRACT_VERSION}.",
        )


def check_configuration(subject: Subject) -> None:
    """Its options are documented, reject unknown names, and can be written to a file and read back."""
    plugin = subject.resolve()
    cls = getattr(type(plugin.instance), "Config", PluginConfig)
    if not issubclass(cls, PluginConfig):
        fail(f"The Config of the {plugin.label} is not a PluginConfig.", "derive it from metareg.PluginConfig.")
    for name, field in cls.model_fields.items():
        if not (field.description or "").strip():
            fail(
                f"The option '{name}' of the {plugin.label} has no description.",
                f"write {name}: … = Field(…, description='what it is, and its unit').",
            )
        describe_search_space(plugin.label, name, field)  # raises for search values that the option cannot have
    try:
        cls.model_validate({**subject.config, "no-such-option": 1})
    except ValidationError:
        pass
    else:
        fail(
            f"The {plugin.label} accepts options that it does not have, so that a misspelt one would pass unnoticed.",
            "do not override extra='forbid' of PluginConfig.",
        )
    written = yaml.safe_dump(plugin.config.model_dump(mode="json"))
    if cls.model_validate(yaml.safe_load(written)) != plugin.config:
        fail(
            f"The configuration of the {plugin.label} changes when it is written to YAML and read back, so a run's "
            "config.yaml would not repeat the run.",
            "use plain field types (numbers, strings, lists) and validators that do not change valid values.",
        )


def check_recommended(subject: Subject) -> None:
    """It recommends only existing options, each of exactly one plugin, with valid values."""
    own = subject.plugin, subject.config
    algorithms = sorted(list_names("algorithms") & (subject.attribute("recommended") or {}).keys())
    runs: dict[str, list[dict[str, Any]]] = {
        "algorithms": [{"algo": own}],
        "models": [{"model": own, "task": subject.attribute("example_task", _DEFAULT_TASK)}],
        "tasks": [{"task": own}, *({"task": own, "algo": name} for name in algorithms)],
    }
    for run in runs[subject.kind]:
        try:
            assemble(run, {})
        except UsageError as error:
            fail(
                f"A run with the {subject.label} and no other options cannot be configured. {error}",
                "recommend the run's options by name (steps), and plugins' options with their owner (algo.inner_lr).",
            )
