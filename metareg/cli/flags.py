"""Flags for a run's options, created from the fields of `RunConfig`."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from metareg.cli.common import complete_names
from metareg.errors import UsageError

if TYPE_CHECKING:
    from metareg.runs.config import RunConfig

__all__ = ["Command", "RunCommand", "takes_run_options"]

_Function = TypeVar("_Function", bound=Callable[..., None])


def takes_run_options(choose: Callable[[type[RunConfig]], Collection[str]]) -> Callable[[_Function], _Function]:
    """Replace the ``**options`` of a `RunCommand`'s function with a flag for each chosen field of `RunConfig`."""

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        function.choose = choose  # type: ignore[attr-defined]
        return function

    return decorate


class Command(TyperCommand):
    """A command that prints only its results to standard output."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and redirect what plugins print to standard error."""
        with redirect_stdout(sys.stderr):
            return super().invoke(ctx)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; typer's help would say that a flag takes a bool."""
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class RunCommand(Command):
    """A command whose function is decorated with `takes_run_options`.

    Creates its flags when it is used, because importing `RunConfig` takes 0.1 s.
    """

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        from metareg.runs.config import PLUGIN_FIELDS, RunConfig

        function: Any = inspect.unwrap(self.callback)  # type: ignore[arg-type]
        taken = RunConfig.list_flags().keys() & set(function.choose(RunConfig))
        own = function.__signature__.parameters.values()
        plugins = [_create_parameter(name) for name in PLUGIN_FIELDS if name in taken]
        others = [_create_parameter(name) for name in RunConfig.model_fields if name in taken - PLUGIN_FIELDS.keys()]

        def call(**values: Any) -> None:
            function(**{name: value for name, value in values.items() if value is not None})

        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*plugins, *own, *others)]
        )
        app = typer.Typer(add_completion=False)
        app.command()(call)
        complete = typer.main.get_command(app)
        self.params, self.callback = complete.params, complete.callback
        return super().make_context(*arguments, **more)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = {flag for param in self.params for flag in param.opts}
        for word in args:
            given = word.partition("=")[0]
            if given.startswith("--") and given not in flags:
                _refuse_wrong_flag(given, flags)
        return super().parse_args(ctx, args)


def _refuse_wrong_flag(given: str, flags: Collection[str]) -> None:
    """Raise a UsageError if a run has the option, but this command has no flag for it or another name."""
    from metareg.contract.config import unknown_option_error
    from metareg.runs.config import RunConfig

    name = given.removeprefix("--").replace("-", "_")
    option = RunConfig.former_names.get(name, name)
    if option in RunConfig.model_fields:
        flag = RunConfig.list_flags().get(option, "")
        # `metareg compare` takes --seeds where `metareg train` takes --seed.
        right = next((each for each in (flag, f"{flag}s") if each in flags), f"--set {option}=VALUE")
        if option != name:
            raise unknown_option_error("option", given, (), [right])
        raise UsageError(f"There is no option named '{given}' in this command; write '{right}'.")


def _create_parameter(name: str) -> inspect.Parameter:
    """Create a typer option with the flag, type, choices, description and default of a field of `RunConfig`."""
    from metareg.contract.config import PluginSpec
    from metareg.runs.config import PLUGIN_FIELDS, RunConfig

    field = RunConfig.model_fields[name]
    kind, default = field.annotation, field.default
    text = (field.description or "").removesuffix(".")
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    option = partial(typer.Option, RunConfig.list_flags()[name], show_default=False)
    if get_origin(kind) is Literal:
        # RunConfig checks the choices, here as everywhere.
        choices, kind = get_args(kind), str
        option = partial(
            option, metavar="NAME", autocompletion=lambda incomplete: [c for c in choices if c.startswith(incomplete)]
        )
        text += f": {', '.join(choices)}"
    elif name in PLUGIN_FIELDS:
        kind = list[str] if get_origin(kind) is list else str
        option = partial(option, metavar="NAME", autocompletion=complete_names(PLUGIN_FIELDS[name]))
        default = default.name if isinstance(default, PluginSpec) else None
    elif kind is not bool:
        option = partial(option, metavar="N" if kind is int else "NAME")
    text += "." if default is None or default is False else f" ({default})."
    if kind == list[str]:
        text += " Repeatable, takes commas."
    annotation: Any = Annotated[kind | None, option(help=text)]  # type: ignore[operator]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
