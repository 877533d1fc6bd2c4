"""The base class of plugins' options, and the errors for invalid values."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from metareg.errors import UnknownNameError, UsageError, nearest
from metareg.util.data_files import absolute_path

__all__ = [
    "NO_PLUGIN",
    "Field",
    "PathText",
    "PluginConfig",
    "PluginSpec",
    "drop_paths",
    "split_names",
    "unknown_option_error",
    "update_names",
    "validate",
]

NO_PLUGIN = "none"
"""The name that stands for no plugin, as in ``--augment none,cml``."""


def _absolute(path: str) -> str:
    try:
        whole = absolute_path(path)
        str(whole).encode()
        whole.exists()
    except UsageError as error:
        raise ValueError(str(error).removesuffix(".")) from error
    except UnicodeEncodeError as error:
        raise ValueError("its name is not UTF-8, as a configuration file must be") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"the system says: {error.strerror}") from error
    return str(whole)


PathText = Annotated[str, AfterValidator(_absolute)]
"""A path as a string, made absolute so that a run finds its data from any working directory."""


class PluginConfig(BaseModel):
    """Base of a plugin's `Config`: unknown keys, infinities and NaN are refused; instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    former_names: ClassVar[Mapping[str, str]] = {}
    """Former names of options, mapped to their current names; stored configurations can contain either."""

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``yes``, ``on`` and ``true``, which YAML reads as truth values and pydantic as the number 1."""
        kinds = _list_kinds(cls.model_fields[info.field_name or ""].annotation)
        if _has_truth_value(value) and kinds & {int, float} and not kinds & {bool, Any}:
            raise ValueError("it should be a number")
        return value


def _list_kinds(annotation: Any) -> set[Any]:
    """List the types of an annotation: int and None of ``list[int] | None``."""
    return {annotation}.union(*(_list_kinds(each) for each in get_args(annotation)))


def _has_truth_value(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_truth_value, value)))


_Config = TypeVar("_Config", bound=BaseModel)


def validate(cls: type[_Config], values: Mapping[str, Any], where: str) -> _Config:
    """Build `cls` from `values`; an error names each bad key, its value, what is allowed and the nearest valid key."""
    values = update_names(cls, values)
    unknown = [key for key in values if key not in cls.model_fields]
    if unknown and cls.model_config.get("extra") == "forbid":
        raise UnknownNameError(f"option of {where}", unknown[0], cls.model_fields)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"In {where}, {'; '.join(_sentence(each) for each in error.errors())}.") from error


def update_names(cls: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Replace former names of options in a stored configuration of a class by the current ones."""
    former: Mapping[str, str] = getattr(cls, "former_names", {})
    return {key if former.get(key, key) in stored else former[key]: value for key, value in stored.items()}


def drop_paths(config: PluginConfig) -> dict[str, Any]:
    """Return a configuration's values without paths, which are meaningless on other machines."""
    paths = {name for name, field in type(config).model_fields.items() if PathText in get_args(field.annotation)}
    return config.model_dump(mode="json", exclude=paths)


def unknown_option_error(what: str, name: str, known: Iterable[str], present_names: Sequence[str] = ()) -> UsageError:
    """Create the error for an unknown option; `present_names` are current names of options formerly called `name`."""
    if present_names:
        present = " or ".join(f"'{each}'" for each in present_names)
        return UsageError(f"The {what} '{name}' has been renamed: it is {present} now.")
    return UnknownNameError(what, name, known)


def split_names(value: Any) -> list[Any]:
    """Split a comma-separated string into plugin names; a list can also contain classes, objects or pairs.

    `NO_PLUGIN`, empty strings and None mean no plugin.

    Raises:
        UsageError: it is not a list, or contains plugins beside `NO_PLUGIN`.
    """
    if value is None:
        return []
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, Sequence):
        raise UsageError(f"A list of plugins was expected, not {value!r}.")
    names: list[Any] = []
    for each in listed:
        names += [part.strip() for part in each.split(",")] if isinstance(each, str) else [each]
    plugins = [name for name in names if not (isinstance(name, str) and name in ("", NO_PLUGIN))]
    if plugins and any(isinstance(name, str) and name == NO_PLUGIN for name in names):
        raise UsageError(f"'{NO_PLUGIN}' stands for no plugin, but others are listed with it: {value!r}.")
    return plugins


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    problem = error["msg"].removeprefix("Value error, ").removesuffix(", unable to interpret input")
    problem = re.sub("^(Input|List) should", "it should", problem).replace(" after validation, not", "; it has")
    if not key:
        return problem
    if error["type"] == "missing":
        return f"'{key}' is required but has no value"
    hint = ""
    if error["type"] == "literal_error":
        close = nearest(str(error["input"]), re.findall("'(.*?)'", error["ctx"]["expected"]))
        hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"{key} = {error['input']!r} cannot be used: {problem[0].lower()}{problem[1:]}{hint}"


class PluginSpec(PluginConfig):
    """A plugin by name, with values for its configuration. In YAML a bare name is enough."""

    name: str = Field(description="The name of an installed plugin, or DIST:NAME.")
    config: dict[str, Any] = Field({}, description="Values for the plugin's own options.")
    program: bool = Field(
        False, description="Whether it is an object or class from a program instead of an installed plugin."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _leave_out_usual(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {key: value for key, value in values.items() if key != "program" or value}
