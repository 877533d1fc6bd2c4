"""From a user's options to a run's configuration: routing, precedence, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from metareg import PluginConfig, PluginError, Task, TaskSpec, UnknownNameError, UsageError
from metareg.contract.config import update_names
from metareg.learner.config import LearnerConfig
from metareg.runs.config import RunConfig
from metareg.runs.options import assemble, parse_assignments
from metareg.util.yaml_files import read_yaml


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
    """An augmenter with the name of one of dropgrad's options."""

    class Config(PluginConfig):
        rate: float = 0.1

    def __init__(self, config: Config) -> None:
        self.config = config


def test_option_of_two_plugins() -> None:
    with pytest.raises(UsageError, match=r"'dropgrad\.rate' or 'rated\.rate'"):
        assemble({"augment": ["dropgrad", Rated]}, {"rate": 0.5})
    selection = assemble({"augment": ["dropgrad", Rated]}, {"rated.rate": 0.5})
    assert [plugin.config.rate for plugin in selection.augmenters] == [0.1, 0.5]


def test_option_of_two_plugins_with_one_part_in_the_run() -> None:
    with pytest.raises(UsageError, match=r"'dropgrad\.rate' or 'rated\.rate'"):
        assemble({"augment": ["dropgrad", Rated]}, {"augment.rate": 0.5})
    selection = assemble({"augment": [Rated, "cml"]}, {"augment.rate": 0.5, "augment.gamma": 0.2})
    assert selection.augmenters[0].config == Rated.Config(rate=0.5)
    assert selection.augmenters[1].config.gamma == 0.2


def test_option_of_two_plugins_of_one_name() -> None:
    class Twin(Rated):
        name = "rated"

    class Of(Wishing):
        name = "rated"

        class Config(PluginConfig):
            rate: float = 0.3

    with pytest.raises(UsageError, match=r"'augment\.rate' or 'task\.rate'"):
        assemble({"augment": [Twin], "task": Of}, {"rated.rate": 0.5})
    selection = assemble({"augment": [Twin], "task": Of}, {"task.rate": 0.5})
    assert (selection.task.config.rate, selection.augmenters[0].config.rate) == (0.5, 0.1)


def test_option_of_the_task_and_of_the_model_that_it_names() -> None:
    class Wide(Wishing):
        class Config(PluginConfig):
            hidden: int = 1

    with pytest.raises(UsageError, match=r"write 'wide\.hidden' or 'mlp\.hidden'"):
        assemble({"task": Wide}, {"hidden": 3})
    assert assemble({"task": Wide}, {"task.hidden": 3}).task.config.hidden == 3


# ------------------------------------------------------------------------------------------------------ recommendations


class Wishing(Task):
    """A task whose recommendations a test sets."""

    default_model = "mlp"

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec((1,), (1,))


class Careful(Rated):
    """An algorithm with two options, whose recommendations a test sets."""

    recommended: ClassVar[dict[str, Any]] = {}

    class Config(PluginConfig):
        inner_lr: float = 0.5
        size: int = 1


def recommending(name: str, cls: type, recommended: dict[str, Any]) -> type:
    return type(name, (cls,), {"recommended": {key.replace("__", "."): value for key, value in recommended.items()}})


def wishing(**recommended: Any) -> type:
    return recommending("Folk", Wishing, recommended)


def careful(**recommended: Any) -> type:
    return recommending("Careful", Careful, recommended)


def test_the_order_of_all_that_say_something() -> None:
    """Each layer decides what no higher layer decides; lower layers always have other values."""

    class Preparing:
        recommended: ClassVar[dict[str, Any]] = {f"task.{name}": 6 for name in "abcdef"}

        def __init__(self, config: Any) -> None: ...

    class Folk(Wishing):
        recommended: ClassVar[dict[str, Any]] = {
            "task.a": 5, "task.b": 5, "task.c": 5, "task.d": 5, "task.e": 5,
            "careful": {"task.a": 3, "task.b": 3, "task.c": 3},
        }  # fmt: skip

        class Config(PluginConfig):
            a: int = 7
            b: int = 7
            c: int = 7
            d: int = 7
            e: int = 7
            f: int = 7
            g: int = 7

    algorithm = careful(task__a=4, task__b=4, task__c=4, task__d=4)
    base = {"algo": algorithm, "task": (Folk, {"a": 2, "b": 2}), "model": Preparing}
    found = assemble(base, {"task.a": 1}).task.config
    assert found.model_dump() == {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "g": 7}
    other = assemble({**base, "algo": "maml"}, {}).task.config
    assert other.model_dump() == {"a": 2, "b": 2, "c": 5, "d": 5, "e": 5, "f": 6, "g": 7}


def test_an_algorithm_stands_before_the_task_in_general_for_options_of_the_run_and_its_own() -> None:
    task = wishing(steps=20, inner_steps=1, algo__inner_lr=0.01, careful={"steps": 10})
    algorithm = careful(steps=30, inner_steps=5, algo__inner_lr=0.2)
    selection = assemble({"algo": algorithm, "task": task}, {})
    assert (selection.config.steps, selection.config.inner_steps) == (10, 5)
    assert selection.algorithm.config.inner_lr == 0.2


def test_a_recommendation_reaches_its_owner_alone() -> None:
    """An augmenter keeps its own default for an option that has the same name as one of the model's."""
    selection = assemble({"task": wishing(model__hidden=[7]), "augment": [Hidden]}, {})
    assert selection.model.config.hidden == [7]
    assert selection.augmenters[0].config.hidden == 3
    selection = assemble({"task": wishing(hidden__hidden=9), "augment": [Hidden]}, {})
    assert selection.augmenters[0].config.hidden == 9


class Hidden(Rated):
    """An augmenter with the name of one of the model mlp's options."""

    class Config(PluginConfig):
        hidden: int = 3


def test_the_shipped_images_tasks_leave_the_co_learners_width_alone() -> None:
    pytest.importorskip("metareg_image")
    chosen = config({"task": "glyphs", "augment": "cml"}, **{"model.width": 16})
    assert chosen.model is not None
    assert (chosen.model.config["width"], chosen.augment[0].config["width"]) == (16, None)


@pytest.mark.parametrize(
    "recommended",
    [
        {"cml__gamma": 0.5}, {"augment__gamma": 0.5}, {"algo__gamma": 0.5}, {"model__width": 3},
        {"anil": {"steps": 3}}, {"zyx__gamma": 3}, {"zyx": {"steps": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_recommendations_for_other_runs_are_left_out(recommended: dict[str, Any]) -> None:
    found, without = config({"task": wishing(**recommended)}), config({"task": wishing()})
    assert found.model_dump(exclude={"task"}) == without.model_dump(exclude={"task"})


def test_recommendations_are_for_what_is_still_to_be_built() -> None:
    algorithm = Careful(Careful.Config(inner_lr=0.25))
    assert assemble({"algo": algorithm, "task": wishing(algo__inner_lr=0.01)}, {}).algorithm.instance is algorithm


def test_recommendations_for_a_plugin_that_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREG_DISABLE_PLUGINS", "anil,cml")
    assert config({"task": wishing(anil={"steps": 3}, cml__gamma=0.5)}).steps == 10_000


@pytest.mark.parametrize(
    ("recommended", "sentence"),
    [
        ({"stepz": 3}, "there is no option of this run named 'stepz'; did you mean 'steps'"),
        ({"inner_rl": 3}, "did you mean 'inner_lr'"),
        ({"modle__hidden": 3}, "there is no plugin of this run named 'modle'"),
        ({"size": 3}, r"'size' is an option of several plugins of this run; write 'careful\.size' or 'sized\.size'"),
        ({"anill": {"steps": 3}}, "no algorithm named 'anill'; did you mean 'anil'"),
        ({"careful": {"stepz": 3}}, "no option of this run named 'stepz'; did you mean 'steps'"),
        ({"model": "mlp"}, r"'model' is chosen by the user and is not an option; its own options are 'model\.OPTION'"),
        ({"model": {"hidden": [3]}}, "'model' is chosen by the user and is not an option"),
    ],
)  # fmt: skip
def test_faults_of_a_recommendation(recommended: dict[str, Any], sentence: str) -> None:
    class Sized(Rated):
        class Config(PluginConfig):
            size: int = 2

    for source, base in (
        ("task 'folk'", {"algo": careful(), "task": wishing(**recommended)}),
        ("algorithm 'careful'", {"algo": careful(**recommended), "task": wishing()}),
    ):
        if source.startswith("algorithm") and any(isinstance(value, dict) for value in recommended.values()):
            continue
        with pytest.raises(PluginError, match=sentence) as error:
            assemble({**base, "augment": [Sized]}, {})
        assert str(error.value).startswith(f"The recommendation of the {source} cannot be used: ")


def test_what_is_recommended_is_a_mapping() -> None:
    algorithm = type("Careful", (Careful,), {"recommended": property(lambda self: {"steps": 3})})
    with pytest.raises(PluginError, match=r"'recommended'.*'careful'"):
        assemble({"algo": algorithm}, {})


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


@pytest.mark.parametrize(
    ("base", "options", "names"),
    [
        ({}, {"norm": "group"}, "'bn_statistics' now"),
        ({"norm": "support"}, {}, "'bn_statistics' now"),
        ({"task": "glyphs"}, {"norm": "group"}, "'bn_statistics' or 'conv4.norm_layer' now"),
        ({"task": "glyphs"}, {"model.norm": "group"}, "'conv4.norm_layer' now"),
    ],
)
def test_a_former_name_is_told_its_successors(base: dict[str, Any], options: dict[str, Any], names: str) -> None:
    with pytest.raises(UsageError, match=f"norm' has been renamed: it is {names}"):
        assemble(base, options)


def test_stored_options_are_read_under_their_present_names() -> None:
    class Normed(Rated):
        class Config(PluginConfig):
            norm: int = 2

    assert assemble({"augment": [Normed]}, {"norm": 1}).augmenters[0].config.norm == 1
    stored = {"norm": "support", "augment": [{"name": "normed", "config": {"norm": 1}}]}
    assert update_names(LearnerConfig, stored) == {
        "bn_statistics": "support", "augment": [{"name": "normed", "config": {"norm": 1}}],
    }  # fmt: skip
    model = {"name": "conv4", "config": {"norm": "group"}}
    assert assemble({"task": "glyphs", "model": model}, {}).config.model.config["norm_layer"] == "group"  # type: ignore[union-attr]
    both = {"norm": 1, "bn_statistics": "support"}
    assert update_names(LearnerConfig, both) == both


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
