"""Search spaces that plugins declare: how they are read, checked and shown."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic.fields import FieldInfo

from metareg import Field, PluginConfig, PluginError, UsageError
from metareg.contract.search import (
    Range,
    RelativeRange,
    check_domain,
    describe_search_space,
    get_declared_domain,
    parse_domain,
)


def declare(search: Any, default: float = 0.1) -> FieldInfo:
    class Config(PluginConfig):
        strength: float = Field(default, ge=0, le=1, description="Strength.", json_schema_extra={"search": search})

    return Config.model_fields["strength"]


@pytest.mark.parametrize(
    ("value", "domain"),
    [
        ([1, 2], [1, 2]), ((1, 2), [1, 2]), ({"low": "1e-3", "high": 1}, Range(low=0.001, high=1)),
        ({"factor": 10}, RelativeRange(factor=10)), (Range(low=0, high=1), Range(low=0, high=1)),
    ],
)  # fmt: skip
def test_what_may_be_written(value: Any, domain: Any) -> None:
    assert parse_domain("a", value) == domain


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (0.1, "not 0.1"), ("geomspace(1,4,3)", r"not 'geomspace\(1,4,3\)'"),
        ([], "'a' has no values"), ([1, 1], "contain 1 twice"), ({"low": 1}, "'high' is required"),
        ({"low": 2, "high": 1}, "low = 2 must be below high = 1"), ({"factor": 1}, "greater than 1"),
        ({"low": 0, "high": 1, "log": True}, "must start above 0"), ({"low": 0, "hihg": 1}, "did you mean 'high'"),
    ],
)  # fmt: skip
def test_what_may_not_be_written(value: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_domain("a", value)


@pytest.mark.parametrize(
    ("default", "domain"), [(0.5, Range(low=0.05, high=5, log=True)), (0.0, None), (None, None), ("auto", None)]
)
def test_a_range_around_a_default(default: Any, domain: Range | None) -> None:
    assert RelativeRange(factor=10).around(default) == domain


def test_the_values_are_of_the_option_s_type() -> None:
    class Config(PluginConfig):
        count: int | None = Field(None, ge=1)
        kind: Literal["a", "b"] = "a"
        flag: bool = False

    fields = Config.model_fields
    whole = check_domain("count", fields["count"], Range(low=1, high=8))
    assert isinstance(whole, Range)
    assert [type(bound) for bound in (whole.low, whole.high)] == [int, int]
    assert check_domain("count", fields["count"], ["3", 4]) == [3, 4]
    for name, domain in (("count", Range(low=0, high=8)), ("count", Range(low=1.5, high=8)), ("kind", ["a", "c"])):
        with pytest.raises(UsageError, match=f"{name} = .* cannot be used"):
            check_domain(name, fields[name], domain)
    with pytest.raises(UsageError, match="'flag' is not a number"):
        check_domain("flag", fields["flag"], Range(low=0, high=1))


@pytest.mark.parametrize(
    ("search", "text"),
    [
        ({"low": 0, "high": 1}, "0 to 1"), ({"factor": 4}, "default ÷ 4 to × 4, log"), ([0.1, 1], "0.1, 1.0"),
        (None, ""), (False, ""),
    ],
)  # fmt: skip
def test_what_is_shown_of_an_option(search: Any, text: str) -> None:
    assert describe_search_space("augmenter 'x'", "strength", declare(search)) == text


@pytest.mark.parametrize(
    "search", [{"low": -1, "high": 1}, {"low": 1}, {"factor": 0.5}, {"factor": 50}, "much", [0.5, -0.5], True]
)
def test_a_plugin_that_declares_what_cannot_be(search: Any) -> None:
    with pytest.raises(PluginError, match=r"'strength'.*'x'.*search"):
        get_declared_domain("augmenter 'x'", "strength", declare(search))
