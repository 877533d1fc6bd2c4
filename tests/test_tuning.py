"""Choosing settings: what may be written, what is searched, and that a search ends the same however often it is stopped."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from metareg import Field, PluginConfig, PluginError, UnknownNameError, UsageError, hookimpl
from metareg.comparison.space import Range, Tuning, check, dimensions, domain_text, split_assignments
from metareg.config import validated
from metareg.options import Selection, assemble

# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.01,1e-1", [0.01, 0.1]), ("a, 'b,c' ,d", ["a", "b,c", "d"]), ("true,false", [True, False]), ("null,3", [None, 3]),
        ("[40,40],[80]", [[40, 40], [80]]), ("it's,b", ["it's", "b"]), ("linspace(0,1,5)", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("linspace(1,3,3)", [1, 2, 3]), ("geomspace(0.001,10,5)", [0.001, 0.01, 0.1, 1.0, 10.0]),
        ("geomspace(1,8,4)", [1, 2, 4, 8]), ("range(2,5)", [2, 3, 4]), ("range(0,1,0.1)", [k / 10 for k in range(10)]),
        ("range(3,0,-1)", [3, 2, 1]), ("0,geomspace(0.1,10,3)", [0, 0.1, 1.0, 10.0]),
    ],
)  # fmt: skip
def test_sweeps(text: str, values: list[Any]) -> None:
    fixed, swept = split_assignments([f"key={text}"])
    assert (fixed, swept) == ({}, {"key": values})
    assert [type(value) for value in swept["key"]] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[0,1,5]", [0, 1, 5]), ("0.1", 0.1), ("'0.1,0.2'", "0.1,0.2"), ("{a: 1, b: 2}", {"a": 1, "b": 2}), ("", None),
        ("folder(1,2)", "folder(1,2)"), ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_what_is_one_value(text: str, value: Any) -> None:
    assert split_assignments([f"key={text}"]) == ({"key": value}, {})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1,", "a value is missing beside a comma"), ("1,,2", "a value is missing"), ("[1,2", r"\] is missing at the end"),
        ("'a,b", "' is missing at the end"), ("linspac(0,1,3)", "did you mean 'linspace'"),
        ("linspace(0,1)", r"write linspace\(FIRST,LAST,HOW_MANY\)"), ("linspace(0,1,x)", "its arguments are numbers"),
        ("linspace(0,inf,3)", "its arguments are numbers"), ("linspace(0,1,1)", "a whole one from 2 to 1000"),
        ("geomspace(0,1,3)", "above 0"), ("range(1,0)", "no step of 1 leads from 1 to 0"), ("range(0,1,0)", "no step of 0"),
        ("range(0,1e9)", "more than 1000"), ("1,2,1", "1 stands twice"), ("linspace(1,1,2)", "stands twice"),
    ],
)  # fmt: skip
def test_malformed_sweeps(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        split_assignments([f"key={text}"])


def test_an_option_given_twice_is_no_sweep() -> None:
    with pytest.raises(UsageError, match=r"--set a is given twice; to choose among values, write a=VALUE,VALUE"):
        split_assignments(["a=1", "a=2"])
    with pytest.raises(UsageError, match="KEY=VALUE; got 'a'"):
        split_assignments(["a"])


def tuning(**values: Any) -> Tuning:
    return validated(Tuning, values, "tune")


def test_tuning_survives_being_written() -> None:
    written = tuning(
        trials=5, seeds=2, space={"a": "0.1,geomspace(1,4,3)", "b": {"low": "1e-3", "high": 10, "log": True}}
    )
    assert written.space == {"a": [0.1, 1, 2, 4], "b": Range(low=0.001, high=10.0, log=True)}
    assert written.seeds == [0, 1]
    assert tuning(**written.model_dump(mode="json")) == written


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "a grid needs values in 'space'"), ({"trials": 1}, "a number from 2 on"), ({"trials": "all"}, "or grid"),
        ({"space": {"a": 0.1}}, "0.1 is neither. An option with one value belongs under 'options'"),
        ({"space": {"a": "0.1"}}, "'0.1' is neither"), ({"space": {"a": []}}, "'a' has no values"),
        ({"space": {"a": [1, 1]}}, "1 stands twice"), ({"space": {"a": {"low": 1}}}, "'high' is required"),
        ({"space": {"a": {"low": 2, "high": 1}}}, "low = 2 must be below high = 1"),
        ({"space": {"a": {"low": 0, "high": 1, "log": True}}}, "begins above 0"),
        ({"space": {"a": {"low": 0, "hihg": 1}}}, "did you mean 'high'"), ({"space": [1]}, "dictionary"),
        ({"space": {"a": [1, 2]}, "over": ["a"]}, "'a' stands twice"), ({"trials": 3, "seeds": []}, "seeds"),
        ({"space": {"a": [1, 2]}, "options": {"a": 1}}, "to be chosen and has one value"),
    ],
)  # fmt: skip
def test_bad_tuning(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        tuning(**values)


# ----------------------------------------------------------------------------------------------------- what is searched


def selection(algo: Any = "maml", augment: Any = None, task: str = "sinusoid", **options: Any) -> Selection:
    return assemble({"algo": algo, "augment": augment, "task": task}, options)


def searched(settings: Tuning, **chosen: Any) -> dict[str, str]:
    return dict(str(dimension).split(": ") for dimension in dimensions(settings, selection(**chosen)))


SEARCH = {"trials": 5}


@pytest.mark.parametrize(
    ("chosen", "space"),
    [
        ({}, {"inner_lr": "0.001 to 0.1, log"}),
        ({"inner_lr": 0.5}, {"inner_lr": "0.05 to 5, log"}),
        ({"task": "glyphs"}, {"inner_lr": "0.04 to 4, log"}),
        ({"algo": "metasgd"}, {"inner_lr": "0.001 to 0.1, log"}),
        ({"augment": "cml"}, {"inner_lr": "0.001 to 0.1, log", "cml.gamma": "0.005 to 10, log"}),
        (
            {"augment": "dropgrad,gradient-noise"},
            {
                "inner_lr": "0.001 to 0.1, log", "dropgrad.rate": "0 to 0.8", "dropgrad.kind": "bernoulli, gaussian",
                "gradient-noise.sigma": "0.01 to 1, log", "gradient-noise.where": "inner, outer",
            },
        ),
    ],
)  # fmt: skip
def test_what_the_shipped_plugins_have_searched(chosen: dict[str, Any], space: dict[str, str]) -> None:
    assert searched(tuning(**SEARCH), **chosen) == space


def test_keys_that_the_user_names() -> None:
    named = tuning(trials=5, over=["outer_lr", "first_order", "cml.width"], space={"mlp.hidden": [[4], [5]]})
    expected = {"mlp.hidden": "[4], [5]", "outer_lr": "0.0001 to 0.01, log", "first_order": "false, true"}
    assert searched(named) == expected
    assert searched(named, augment="cml", **{"cml.width": 20}) == {**expected, "cml.width": "2 to 200, log"}
    both = tuning(space={"inner_lr": [1, 2], "maml.inner_lr": ["1e-3", 4]})
    assert searched(both) == {"maml.inner_lr": "0.001, 4.0"}
    assert searched(both, algo="metasgd") == {"inner_lr": "1.0, 2.0"}


class Many:
    """An augmenter with options of every sort."""

    name = "many"

    class Config(PluginConfig):
        closed: float = Field(0.5, ge=-1, le=1, description="Linear between its bounds.")
        momentum: float = Field(0.9, ge=0, lt=1, description="One bound is not allowed.")
        wide: float = Field(1.0, gt=0, le=1000, description="Bounds far apart, the lower one not allowed.")
        decades: float = Field(1.0, ge=0.001, le=10, description="Bounds far apart.")
        clipped: float = Field(0.3, gt=0, le=1, description="Closed all the same.")
        upper: float = Field(0.5, lt=1, description="No lower bound.")
        count: int = Field(4, ge=1, lt=9, description="Whole.")
        layers: int = Field(3, ge=1, description="Whole and open.")
        maybe: int | None = Field(None, ge=1, description="No default to begin from.")
        zero: float = Field(0.0, ge=0, description="No scale to begin from.")
        kind: Literal["a", "b"] | None = Field(None, description="A choice.")
        mixed: float | Literal["auto"] = Field("auto", description="A number or a word.")
        text: str = Field("", description="A text.")
        flag: bool = Field(False, description="A switch.")
        said: float = Field(1.0, description="Searched as it says.", json_schema_extra={"search": [1, 2, 4]})
        left: bool = Field(False, description="Left alone.", json_schema_extra={"search": False})

    def __init__(self, config: Config) -> None:
        self.config = config

    @hookimpl
    def augment_outer_gradient(self, grads: Any) -> Any:
        return grads


def test_what_bounds_imply() -> None:
    expected = {
        "closed": "-1 to 1", "momentum": "0 to 0.99", "wide": "10 to 1000, log", "decades": "0.001 to 10, log",
        "clipped": "0.01 to 1, log", "upper": "0.05 to 0.99, log", "count": "1 to 8", "layers": "1 to 30, log",
        "kind": "a, b", "flag": "false, true", "said": "1.0, 2.0, 4.0",
    }  # fmt: skip
    found = searched(tuning(**SEARCH), augment=[Many])
    assert {key.removeprefix("many."): text for key, text in found.items() if key != "inner_lr"} == expected


def test_what_is_shown_of_an_option() -> None:
    fields = Many.Config.model_fields
    shown = {name: domain_text("augmenter 'many'", name, field) for name, field in fields.items()}
    assert shown["layers"] == "default ÷ 10 to × 10, log"
    assert shown["closed"] == "-1 to 1"
    assert {name for name, text in shown.items() if not text} == {"maybe", "zero", "mixed", "text", "left"}


@pytest.mark.parametrize("search", [{"low": -1, "high": 1}, {"low": 1}, "much", [0.5, -0.5], True])
def test_a_plugin_that_declares_what_cannot_be(search: Any) -> None:
    class Broken:
        class Config(PluginConfig):
            strength: float = Field(0.1, ge=0, description="Strength.", json_schema_extra={"search": search})

        def __init__(self, config: Config) -> None:
            self.config = config

        @hookimpl
        def augment_outer_gradient(self, grads: Any) -> Any:
            return grads

    with pytest.raises(
        PluginError, match="option 'strength' of the augmenter 'broken' declares a search that cannot be"
    ):
        dimensions(tuning(**SEARCH), selection(augment=[Broken]))


@pytest.fixture(scope="module")
def two_arms() -> dict[str, Selection]:
    return {"maml": selection(), "maml+cml": selection(augment="cml")}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"space": {"inner_rl": [1, 2]}}, "no option to choose named 'inner_rl'; did you mean 'inner_lr'"),
        ({"space": {"cml.gama": [1, 2]}}, "did you mean 'cml.gamma'"),
        ({"space": {"dropgrad.rate": [0.1, 0.2]}}, "no option to choose named 'dropgrad.rate'"),
        ({"trials": 4, "over": ["mlp.hiden"]}, "did you mean 'mlp.hidden'"),
        ({"space": {"inner_lr": [-1, 2]}}, "maml: inner_lr = -1 cannot be used: it should be greater than 0"),
        ({"trials": 4, "space": {"cml.gamma": {"low": -1, "high": 2}}}, r"maml\+cml: cml.gamma = -1.0 cannot be used"),
        ({"trials": 4, "space": {"inner_steps": {"low": 1.5, "high": 3}}}, "inner_steps = 1.5 cannot be used"),
        ({"trials": 4, "space": {"mlp.hidden": {"low": 1, "high": 3}}}, "'mlp.hidden' is no number"),
        ({"trials": 4, "over": ["mlp.hidden"]}, "'mlp.hidden' has no range of its own"),
        ({"trials": 4, "over": ["reset_optimizer_every"]}, "has no range of its own to search; give values"),
        ({"space": {"cml.gamma": {"low": 0.1, "high": 10, "log": True}}}, r"write cml.gamma=geomspace\(0.1,10,5\)"),
        ({"space": {"shots": [1, 5]}}, "'shots' cannot be chosen by validation"),
        ({"space": {"task.shots": [1, 5]}}, "'task.shots' cannot be chosen by validation"),
        ({"space": {"seed": [1, 5]}}, "'seed' cannot be chosen by validation"),
        ({"space": {"test_inner_steps": [[1], [5]]}}, "cannot be chosen by validation"),
        ({"space": {"algo.inner_lr": [1, 2], "maml.inner_lr": [1, 2]}}, "are one option"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen(values: dict[str, Any], sentence: str, two_arms: dict[str, Selection]) -> None:
    with pytest.raises(UsageError, match=sentence):
        check(tuning(**values), two_arms)


def test_an_option_of_two_plugins() -> None:
    class Rated(Many):
        name = "rated"

        class Config(PluginConfig):
            rate: float = Field(0.1, ge=0, le=1, description="Like dropgrad's.")

    with pytest.raises(UsageError, match=r"write it as PLUGIN\.rate"):
        dimensions(tuning(space={"rate": [0.1, 0.2]}), selection(augment=["dropgrad", Rated]))
    one_for_both = tuning(space={"augment.rate": [0.1, 0.2]})
    assert searched(one_for_both, augment=["dropgrad", Rated]) == {"augment.rate": "0.1, 0.2"}


def test_unknown_names_carry_the_known_ones() -> None:
    with pytest.raises(UnknownNameError) as caught:
        check(tuning(space={"zzz": [1, 2]}), {"maml": selection(augment="cml")})
    assert {"inner_lr", "cml.gamma", "outer_lr", "mlp.hidden"} <= set(caught.value.known)
