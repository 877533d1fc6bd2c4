"""Untrusted, mistyped or damaged files and command lines: no traceback, and no wrong result without a message."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from metareg import Episodes, MetaLearner, MetaregError, RunConfig, TaskSpec, UsageError
from metareg.cli.app import run as command
from metareg.learner.training import Progress
from metareg.runs.checkpoints import CheckpointManager, Checkpoints
from metareg.runs.options import assemble
from metareg.runs.run import Run
from metareg.runs.training import resume
from metareg.util.signals import StopRequest
from metareg.util.tensorfile import TensorFile, write_tensors
from metareg.util.yaml_files import read_yaml

pytestmark = pytest.mark.strangers

Tried = Callable[..., None]

_FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 3)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["maml", "cml", "sinusoid", "mlp", "none", "1e-3", "nan"])
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def _state() -> dict[str, Any]:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    return {"weight": weight, "step": 7, "loss": 0.1, "nested": {"moments": torch.ones(5)}}


def _learner() -> MetaLearner:
    return MetaLearner("mlp", loss="mse", spec=TaskSpec((1,), (1,)), model_options={"hidden": [3]}, inner_lr=0.01)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("checkpoints")
    store = Checkpoints(folder, 3)
    store.save(7, _state())
    return store.path(7), store.path(7).read_bytes()


@pytest.fixture(scope="module")
def learner_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("learner") / "learner.safetensors"
    _learner().save(path)
    return path, path.read_bytes()


_EPISODES = Episodes(torch.ones(2, 3, 1), torch.ones(2, 3, 1), torch.zeros(2, 3, 1), torch.ones(2, 3, 1))


# -------------------------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tried: Tried, checkpoint: tuple[Path, bytes]) -> None:
    path, good = checkpoint
    flips = range(8 * len(good))
    for flip in random.Random(0).sample(flips, 2000):
        damaged = bytearray(good)
        damaged[flip // 8] ^= 1 << flip % 8
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"step-000000007\.safetensors"):
            Checkpoints(path.parent, 3).load(7)
    tried("containers", 2000)


@_FUZZ
@given(st.data())
def test_damaged_checkpoints_are_skipped(tried: Tried, checkpoint: tuple[Path, bytes], data: st.DataObject) -> None:
    tried("containers")
    path, good = checkpoint
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, len(good)))
    damaged = good[:start] + data.draw(st.binary(max_size=20)) + good[end:]
    path.write_bytes(damaged)
    state = Checkpoints(path.parent, 3).load_newest()
    if damaged == good:
        assert state is not None
        assert torch.equal(state["weight"], _state()["weight"])
    else:
        assert state is None


@_FUZZ
@given(st.data())
def test_damaged_learners_are_refused(tried: Tried, learner_file: tuple[Path, bytes], data: st.DataObject) -> None:
    tried("containers")
    path, good = learner_file
    start = data.draw(st.integers(0, len(good) - 1))
    damaged = good[:start] + data.draw(st.binary(max_size=20)) + good[data.draw(st.integers(start, len(good))) :]
    if damaged != good:
        path.write_bytes(damaged)
        with pytest.raises(UsageError):
            MetaLearner.load(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, pickle.dumps({"a": 1}), b"PK\x03\x04" + b"\0" * 99, bytes(8)])
def test_files_of_other_kinds_are_refused(tried: Tried, tmp_path: Path, content: bytes) -> None:
    tried("containers")
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not a learner that metareg saved"):
        MetaLearner.load(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no learner at"):
        MetaLearner.load(tmp_path / "none")
    with pytest.raises(UsageError, match="is not a learner"):
        MetaLearner.load(tmp_path)


# --------------------------------------------------------------------------------------------------------- made-up files


@_FUZZ
@given(st.data())
def test_made_up_headers_are_refused_or_harmless(
    tried: Tried, learner_file: tuple[Path, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    tried("containers")
    path, good = learner_file
    path.write_bytes(good)
    file = TensorFile(path, "learner")
    header = dict(file.header)
    for key in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=2)):
        header[key] = data.draw(_VALUES)
    if data.draw(st.booleans()):
        header.pop(data.draw(st.sampled_from(sorted(header))))
    made_up = tmp_path / "made-up.safetensors"
    write_tensors(made_up, file.read(), {key: _finite(value) for key, value in header.items()})
    try:
        learner = MetaLearner.load(made_up)
    except MetaregError:
        return
    for name, value in learner.meta_parameters.items():
        assert torch.equal(value, file.read()[name])


def _finite(value: Any) -> Any:
    """Draw JSON like that of metareg."""
    return json.loads(json.dumps(value))


@_FUZZ
@given(st.data())
def test_made_up_checkpoints_are_refused_or_harmless(tried: Tried, tmp_path: Path, data: st.DataObject) -> None:
    tried("containers")
    folder = tmp_path / "made-up"
    folder.mkdir(exist_ok=True)
    learner, progress, store = _learner(), Progress(), Checkpoints(folder, 1)
    manager = CheckpointManager(store, learner, progress, [], every_steps=None, every_minutes=1, stop=StopRequest())
    learner.step(_EPISODES)
    manager.save()
    file = TensorFile(store.path(1), "checkpoint")
    content, tensors = dict(file.header["content"]), file.read()
    if data.draw(st.booleans()):
        tensors.pop(data.draw(st.sampled_from(sorted(tensors))))
    place = content
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place[key] = place = dict(place[key])
    place[key] = _finite(data.draw(_VALUES))
    write_tensors(store.path(1), tensors, file.header | {"content": content})
    try:
        manager.restore()
    except MetaregError:
        return
    learner.step(_EPISODES)


@pytest.mark.parametrize("strategy", [[None], "fastest", 3])
def test_a_made_up_strategy_is_refused(strategy: Any) -> None:
    learner = _learner()
    state = learner.state() | {"strategy": strategy}
    with pytest.raises(TypeError, match="is no strategy"):
        learner.load_state(state)


def test_names_and_shapes_are_compared_with_the_model(learner_file: tuple[Path, bytes], tmp_path: Path) -> None:
    path, good = learner_file
    path.write_bytes(good)
    file = TensorFile(path, "learner")
    tensors = file.read()
    tensors["head.weight"] = torch.zeros(2, 3)
    tensors["extra"] = tensors.pop("head.bias")
    other = tmp_path / "other.safetensors"
    write_tensors(other, tensors, file.header)
    with pytest.raises(UsageError) as caught:
        MetaLearner.load(other)
    assert str(caught.value).endswith(
        "does not fit the model: 'head.weight' has the shape (2, 3) instead of (1, 3); 'head.bias' is missing; "
        "'extra' is not in the model."
    )


# ------------------------------------------------------------------------------------------------------- configurations


@_FUZZ
@given(st.text() | st.binary().map(lambda content: content.decode("latin1")) | _VALUES.map(yaml.safe_dump))
@example("[" * 5000)
@example("a: 2020-99-99")
@example("a: &x 1\nb: *x")
@example("{" * 3000)
@example("? {a: 1}\n: 2")
@example("a: " + "9" * 5000)
@example("steps: !!python/object/apply:os.system ['touch /tmp/never']")
def test_any_text_as_configuration(tried: Tried, tmp_path: Path, text: str) -> None:
    tried("configurations")
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        base = read_yaml(path)
    except UsageError:
        return
    _assembled_or_refused(base)


@_FUZZ
@given(st.dictionaries(st.sampled_from(sorted(RunConfig.model_fields)), _VALUES, max_size=5))
def test_any_values_in_a_configuration(tried: Tried, base: dict[str, Any]) -> None:
    tried("configurations")
    _assembled_or_refused(base)


@_FUZZ
@given(st.dictionaries(st.text(max_size=10) | st.sampled_from(["inner_lr", "cml.gamma", "task.shots"]), _VALUES))
@example({"cml.gamma": 0.5, "task.shots": 3})
@example({"cml.gama": 0.5})
def test_any_options(tried: Tried, options: dict[str, Any]) -> None:
    tried("configurations")
    _assembled_or_refused({"augment": "cml"}, options)


def _assembled_or_refused(base: dict[str, Any], options: Mapping[str, Any] = MappingProxyType({})) -> None:
    try:
        selection = assemble(base, options)
    except MetaregError:
        return
    written = yaml.safe_load(selection.config.to_yaml())
    assert assemble(written, {}).config == selection.config
    assert {option.rpartition(".")[2] for option in options} <= set(_names(written))


def _names(value: Any) -> Iterator[str]:
    """Return the names in a configuration, including options of plugins."""
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _names(part)


@_FUZZ
@given(st.data())
def test_any_text_in_a_run_folder(tried: Tried, tmp_path: Path, data: st.DataObject) -> None:
    tried("reports")
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "results.json", "checkpoints/final.safetensors"):
        (folder / name).write_text(data.draw(st.sampled_from(["", "{}", "[]", "algo: maml\n", "null"]) | st.text()))
    for function in (Run.load, resume):
        try:
            function(folder)
        except MetaregError:
            continue
        pytest.fail("a run made of random text was taken for one")


# --------------------------------------------------------------------------------------------------------- command line

_COMMANDS = ["train", "eval", "resume", "export", "predict", "plugins", "show"]
_WORDS = st.sampled_from(
    ["--algo", "--augment", "--set", "--steps", "--out", "--task", "--inner-steps", "--to", "--support", "--query",
     "--config", "--on-nonfinite", "--resume", "--shots", "maml", "cml", "sinusoid", "none", "-1", "0", "1e9", "nan",
     "inner_lr=0", "a=b", "=", "x.y=[", "/dev/null", "/", ".", "algorithms", "algo=[1]", "--", "-h", "steps=1e400"]
)  # fmt: skip


def _refuse(*_: Any) -> None:
    raise MetaregError("Everything was well up to the training.")


@pytest.fixture
def _never_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Do everything except the training itself."""
    monkeypatch.chdir(tmp_path)
    for name in ("_carry_out", "_create_folder"):
        monkeypatch.setattr(f"metareg.runs.training.{name}", _refuse)


@pytest.mark.usefixtures("_never_trains")
@_FUZZ
@given(st.sampled_from(_COMMANDS), st.lists(_WORDS | st.text(max_size=6), max_size=5))
def test_any_command_line(tried: Tried, capsys: pytest.CaptureFixture[str], name: str, words: list[str]) -> None:
    tried("configurations")
    code = command([name, *words])
    printed = capsys.readouterr()
    assert code in (0, 1, 2)
    assert "Traceback" not in printed.err
    assert "This is a bug" not in printed.err
