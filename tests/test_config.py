"""From what a user says to a run's configuration: routing, precedence, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from metareg import PluginConfig, UnknownNameError, UsageError
from metareg.config import RunConfig, read_yaml
from metareg.options import assemble, parse_assignments


def config(base: dict[str, Any] | None = None, **options: Any) -> RunConfig:
    return assemble(base or {}, options).config


def test_defaults_then_recommended_then_file_then_options() -> None:
    assert RunConfig().steps == 10_000
    assert config().steps == 20_000
    assert config({"steps": 300}).steps == 300
    assert config({"steps": 300}, steps=7).steps == 7


def test_recommended_options_of_plugins() -> None:
    assert config().algo.config == {"inner_lr": 0.01}
    in_file = {"algo": {"name": "metasgd", "config": {"inner_lr": 0.3}}}
    assert config(in_file).algo.config["inner_lr"] == 0.3
    assert config(in_file, inner_lr=0.7).algo.config["inner_lr"] == 0.7


@pytest.mark.parametrize("key", ["gamma", "cml.gamma", "augment.gamma"])
def test_routing_to_an_augmenter(key: str) -> None:
    assert config({"augment": "cml"}, **{key: 0.25}).augment[0].config["gamma"] == 0.25


@pytest.mark.parametrize("key", ["inner_lr", "maml.inner_lr", "algo.inner_lr"])
def test_routing_to_the_algorithm(key: str) -> None:
    assert config(**{key: 0.25}).algo.config["inner_lr"] == 0.25


@pytest.mark.parametrize("key", ["shots", "sinusoid.shots", "task.shots"])
def test_routing_to_the_task(key: str) -> None:
    assert config(**{key: 3}).task.config["shots"] == 3


@pytest.mark.parametrize("key", ["hidden", "mlp.hidden", "model.hidden"])
def test_routing_to_the_tasks_own_model(key: str) -> None:
    chosen = config(**{key: [5]}).model
    assert chosen is not None
    assert (chosen.name, chosen.config) == ("mlp", {"hidden": [5]})


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, []), ("none", []), ([], []), ("", []), ("cml", ["cml"]), ("cml, dropgrad", ["cml", "dropgrad"]),
        (["cml,dropgrad", "gradient-noise"], ["cml", "dropgrad", "gradient-noise"]), (["none"], []),
        ([{"name": "cml", "config": {"gamma": 1}}], ["cml"]), ([("cml", {"gamma": 1})], ["cml"]),
        (["metareg:cml"], ["metareg:cml"]),
    ],
)  # fmt: skip
def test_lists_of_augmenters(given: Any, names: list[str]) -> None:
    assert [choice.name for choice in config({"augment": given}).augment] == names


def test_a_complete_configuration_is_its_own_fixed_point() -> None:
    first = config({"augment": "cml,dropgrad", "algo": "boil"}, shots=7, gamma=0.3, steps=12)
    again = yaml.safe_load(yaml.safe_dump(first.model_dump(mode="json")))
    assert config(again) == first


class Rated:
    """An augmenter with an option that dropgrad has too."""

    class Config(PluginConfig):
        rate: float = 0.1

    def __init__(self, config: Config) -> None:
        self.config = config


def test_option_of_two_plugins() -> None:
    with pytest.raises(UsageError, match=r"several plugins of this run; write 'dropgrad\.rate' or 'rated\.rate'"):
        assemble({"augment": ["dropgrad", Rated]}, {"rate": 0.5})
    selection = assemble({"augment": ["dropgrad", Rated]}, {"rated.rate": 0.5})
    assert [plugin.config.rate for plugin in selection.augmenters] == [0.1, 0.5]


@pytest.mark.parametrize(
    ("base", "options", "sentence"),
    [
        ({"stepz": 3}, {}, "no run option named 'stepz'; did you mean 'steps'"),
        ({}, {"stepz": 3}, "no option of this run named 'stepz'; did you mean 'steps'"),
        ({}, {"inner_rl": 3}, "did you mean 'inner_lr'"),
        ({}, {"cml.gamma": 1}, "no plugin of this run named 'cml'"),
        ({"augment": "cml"}, {"cml.gama": 1}, "no option of augmenter 'cml' named 'gama'; did you mean 'gamma'"),
        ({}, {"ways": 5}, "no option of this run named 'ways'"),
        ({}, {"steps": 0}, "steps = 0 cannot be used: it should be greater than or equal to 1"),
        ({}, {"steps": "many"}, "steps = 'many' cannot be used"),
        ({}, {"steps": 1.5}, "steps = 1.5 cannot be used"),
        ({}, {"seed": -1}, "seed = -1 cannot be used"),
        ({}, {"seed": 2**64}, "cannot be used"),
        ({}, {"meta_batch": None}, "meta_batch = None cannot be used"),
        ({}, {"test_inner_steps": [1, -1]}, r"test_inner_steps\.1 = -1 cannot be used"),
        ({}, {"test_inner_steps": []}, "test_inner_steps"),
        ({}, {"inner_lr": float("nan")}, "inner_lr = nan cannot be used"),
        ({}, {"outer_lr": float("inf")}, "outer_lr = inf cannot be used"),
        ({"algo": None}, {}, "'algo' takes the name of a plugin; got None"),
        ({"algo": 3}, {}, "'algo' takes the name of a plugin; got 3"),
        ({"algo": ["maml"]}, {}, r"'algo' takes a name, a class or a pair \(name, config\)"),
        ({"algo": {"name": "maml", "confg": {}}}, {}, "no option of 'algo' named 'confg'; did you mean 'config'"),
        ({"algo": {"config": {}}}, {}, "'name' is required"),
        ({"algo": {"name": "maml", "config": {"lr": 1}}}, {}, "no option of algorithm 'maml' named 'lr'"),
        ({"augment": 3}, {}, "list of plugins was expected, not 3"),
        ({"augment": [3]}, {}, "'augment' takes the name of a plugin; got 3"),
        ({"task": "sinsoid"}, {}, "no task named 'sinsoid'; did you mean 'sinusoid'"),
        ({"model": "mpl"}, {}, "no model named 'mpl'; did you mean 'mlp'"),
        ({"observers": ["nosuch"]}, {}, "no observer named 'nosuch'"),
    ],
)  # fmt: skip
def test_mistakes_in_one_sentence(base: dict[str, Any], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as error:
        assemble(base, options)
    text = str(error.value)
    assert "\n" not in text
    assert "  " not in text
    assert text[-1] in ".?"
    assert error.value.exit_code == 2


def test_assignments() -> None:
    assert parse_assignments(["a=1", "b.c=1e-3", "d=[1, 2]", "e=null", "f=x=y", "g=true", " h = 2"]) == {
        "a": 1, "b.c": 0.001, "d": [1, 2], "e": None, "f": "x=y", "g": True, "h": 2,
    }  # fmt: skip


@pytest.mark.parametrize("assignment", ["inner_lr", "=3", " =3", "a=[1", "a={", ""])
def test_malformed_assignments(assignment: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        parse_assignments([assignment])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is empty"),
        (b"- a\n- b\n", "it is a list"),
        (b"just words", "it is a str"),
        (b"a: [1", "malformed at line 1, column 6"),
        (b"a: b: c", "malformed at line 1, column 5"),
        (b"a: \x00", "malformed"),
        (b"\xff\xfe\x00a", "cannot be read"),
        (b"a: !!python/object/apply:os.getcwd []", "malformed at line 1"),
    ],
)
def test_malformed_files(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=sentence) as error:
        read_yaml(path)
    assert str(path) in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no configuration file"):
        read_yaml(tmp_path / "nosuch.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_yaml(tmp_path)


def test_unknown_names_carry_what_is_known() -> None:
    with pytest.raises(UnknownNameError) as error:
        assemble({}, {"stepz": 1})
    assert error.value.name == "stepz"
    assert "steps" in error.value.known
