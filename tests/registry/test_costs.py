"""The descriptions of an algorithm's order and cost."""

from __future__ import annotations

import json

import pytest

from metareg.registry.costs import PATH, describe_order, find_cost
from metareg.registry.plugins import find_entry, list_entries


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("maml", "second, or first"),
        ("reptile", "its own"),
        ("metal", "learns nothing"),
        ("meta-lstm", "first recommended"),
    ],
)
def test_order_follows_from_hooks_and_recommendations(name: str, words: str) -> None:
    assert words in describe_order(find_entry("algorithms", name).load())


def test_figures_are_of_plugins_that_exist_and_maml_is_the_measure() -> None:
    figures = json.loads(PATH.read_text("utf-8"))["figures"]
    assert set(figures) <= {entry.target for entry in list_entries("algorithms")}
    cost = find_cost(find_entry("algorithms", "maml"))
    assert cost is not None
    assert (cost.state, cost.learned) == (0, 0)
    assert cost.time == pytest.approx(1, abs=0.1)
    assert cost.memory == pytest.approx(1, abs=0.1)
    assert cost.evaluation_time == pytest.approx(1, abs=0.1)
    assert cost.evaluation_memory == pytest.approx(1, abs=0.1)
