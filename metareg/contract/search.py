"""Search spaces of options, which plugins declare as ``json_schema_extra={"search": …}``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from metareg.contract.config import Field, PluginConfig, validate
from metareg.errors import PluginError, UsageError

__all__ = [
    "Domain", "Range", "RelativeRange", "check_distinct", "check_domain", "describe_search_space", "format_domain",
    "get_declared_domain", "parse_domain",
]  # fmt: skip


class Range(PluginConfig):
    """Numbers between two bounds, inclusive."""

    low: float = Field(description="The least.")
    high: float = Field(description="The greatest.")
    log: bool = Field(False, description="Search on a logarithmic scale.")

    @model_validator(mode="after")
    def _check_bounds(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g} must be below high = {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic scale must start above 0, not at low = {self.low:g}")
        return self

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"


class RelativeRange(PluginConfig):
    """Numbers around an option's default, on a logarithmic scale: from the default ÷ `factor` to the default × `factor`."""

    factor: float = Field(gt=1, description="How far from the default, up and down.")

    def around(self, default: Any) -> Range | None:
        """Return the range around a default; None if that is not a number above 0."""
        if not isinstance(default, int | float) or default <= 0:
            return None
        return Range(low=default / self.factor, high=default * self.factor, log=True)

    def __str__(self) -> str:
        return f"default ÷ {self.factor:g} to × {self.factor:g}, log"


Domain = Range | RelativeRange | list[Any]


def parse_domain(key: str, value: Any) -> Domain:
    """Parse a search space: ``[VALUE, VALUE]``, ``{"low": …, "high": …, "log": …}`` or ``{"factor": …}``."""
    if isinstance(value, Range | RelativeRange):
        return value
    if isinstance(value, Mapping):
        kind: type[Range | RelativeRange] = RelativeRange if "factor" in value else Range
        return validate(kind, value, f"the range of '{key}'")
    if isinstance(value, list | tuple):
        return check_distinct(key, value)
    raise UsageError(
        f"The values of '{key}' must be [VALUE, VALUE], {{low: …, high: …}} or {{factor: …}}, not {value!r}."
    )


def check_distinct(key: str, values: Sequence[Any]) -> list[Any]:
    """Refuse an empty list of values, and duplicates."""
    if not values:
        raise UsageError(f"'{key}' has no values to choose from; write them as {key}: [VALUE, VALUE].")
    texts = [json.dumps(value, default=str) for value in values]
    twice = [text for text in texts if texts.count(text) > 1]
    if twice:
        raise UsageError(f"The values of '{key}' contain {twice[0]} twice.")
    return [*values]


def check_domain(key: str, field: FieldInfo, domain: Range | list[Any]) -> Range | list[Any]:
    """Check a domain against the option's field, and convert it to the field's type, for example to whole numbers."""
    typed: Any = Annotated[field.annotation, field]  # with the field's own bounds

    def convert(given: Any) -> Any:
        try:
            return TypeAdapter(typed).validate_python(given)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].replace("Input should be", "it should be")
            raise UsageError(f"{key} = {given!r} cannot be used: {problem[0].lower()}{problem[1:]}.") from error

    if isinstance(domain, list):
        return check_distinct(key, [convert(each) for each in domain])
    low, high = convert(domain.low), convert(domain.high)
    if isinstance(low, bool) or not isinstance(low, int | float):
        raise UsageError(f"'{key}' is not a number; give a list of values, such as [VALUE, VALUE].")
    return domain.model_copy(update={"low": low, "high": high})


def get_declared_domain(plugin_label: str, option_name: str, field: FieldInfo) -> Domain | None:
    """Return the search space that a plugin declares for an option, after checking it; None if there is none."""
    extra = field.json_schema_extra
    declared = extra.get("search") if isinstance(extra, Mapping) else None
    if declared is None or declared is False:
        return None
    try:
        domain = parse_domain(option_name, declared)
        if not isinstance(domain, RelativeRange):
            return check_domain(option_name, field, domain)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if around := domain.around(default):
            check_domain(option_name, field, around)
    except UsageError as error:
        where = f"The option '{option_name}' of the {plugin_label}"
        raise PluginError(f"{where} declares an invalid search range: {error}") from error
    return domain


def describe_search_space(plugin_label: str, option_name: str, field: FieldInfo) -> str:
    """Describe the declared search space of an option; empty if there is none."""
    domain = get_declared_domain(plugin_label, option_name, field)
    return "" if domain is None else format_domain(domain)


def format_domain(domain: Domain) -> str:
    """Format values or a range: ``0.01, 0.1`` or ``0.005 to 10, log``."""
    if isinstance(domain, list):
        return ", ".join(value if isinstance(value, str) else json.dumps(value) for value in domain)
    return str(domain)
