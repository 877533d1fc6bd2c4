"""One check of one plugin, and the plugin as the checks see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from metareg.errors import MetaregError
from metareg.registry.dispatch import list_hooks
from metareg.registry.plugins import Plugin, resolve

__all__ = ["Check", "CheckFailed", "Subject", "fail"]


class CheckFailed(AssertionError):
    """A plugin does not do what every plugin of its kind must do.

    Args:
        problem: what is wrong, and where.
        remedy: how to mend it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} To mend it: {remedy}")
        self.problem = problem
        self.remedy = remedy


def fail(problem: str, remedy: str) -> NoReturn:
    """End a check that found something."""
    raise CheckFailed(problem, remedy)


@dataclass(frozen=True)
class Subject:
    """The plugin under check: its name, class or object, and the options to check it with."""

    kind: str
    plugin: str | type | object
    config: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self, **config: Any) -> Plugin:
        """The plugin built anew, so that no check sees what another left behind."""
        return resolve(self.kind, self.plugin, {**self.config, **config})

    @property
    def label(self) -> str:
        return self.resolve().label

    def attribute(self, attribute: str, default: Any = None) -> Any:
        """What the class says about itself."""
        return getattr(self.resolve().instance, attribute, default)

    @property
    def hooks(self) -> list[str]:
        """The hooks that it implements."""
        return list_hooks(type(self.resolve().instance))


@dataclass(frozen=True)
class Check:
    """A check, ready to be called; `str` gives its name, which serves as pytest's id."""

    name: str
    summary: str
    subject: Subject
    function: Callable[[Subject], None]

    def __call__(self) -> None:
        """Carry it out.

        Raises:
            CheckFailed: the plugin does not pass.
            MetaregError: the plugin cannot even be used; the message says why.
        """
        try:
            self.function(self.subject)
        except (CheckFailed, MetaregError):
            raise
        except Exception as error:
            problem = f"The check '{self.name}' of {self.subject.label} ended in {type(error).__name__}: {error}."
            raise CheckFailed(problem, "follow the traceback to what the plugin returned or raised.") from error

    def problem(self) -> str | None:
        """What it finds: None where the plugin passes."""
        try:
            self()
        except (CheckFailed, MetaregError) as error:
            return str(error)
        return None

    def __str__(self) -> str:
        return self.name
