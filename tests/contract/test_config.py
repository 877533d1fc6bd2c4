"""Values that users write for options."""

from __future__ import annotations

from typing import Any

import pytest

from metareg import UsageError
from metareg.contract.config import split_names


class Plugin:
    pass


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, []),
        ("", []),
        ("none", []),
        ("cml", ["cml"]),
        (" cml, dropgrad,,", ["cml", "dropgrad"]),
        (["cml,dropgrad", "boil"], ["cml", "dropgrad", "boil"]),
        (("cml", Plugin, ("cml", {"gamma": 1})), ["cml", Plugin, ("cml", {"gamma": 1})]),
    ],
)
def test_names_of_a_list(value: Any, names: list[Any]) -> None:
    assert split_names(value) == names


@pytest.mark.parametrize("value", ["none,cml", ["cml", "none"], (Plugin, "none")])
def test_no_plugin_beside_others_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="'none' stands for no plugin"):
        split_names(value)


@pytest.mark.parametrize("value", [Plugin, 3, {"cml": 1}])
def test_what_is_no_list_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="A list of plugins was expected"):
        split_names(value)
