"""Saved learners: what is loaded, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import AUGMENTERS, Plain, SignMAML, Source, TiedBody, same
from safetensors.torch import save_file
from torch import Tensor, nn

from metareg import MetaLearner, MetaregError, TaskSpec, UsageError
from samples import MLP, ConvNet, episodes


@pytest.mark.parametrize("algo", ["maml", "anil", "boil", "metasgd"])
def test_save_and_load(algo: str, tmp_path: Path) -> None:
    path = tmp_path / "learner.safetensors"
    learner = MetaLearner(ConvNet(), algo, AUGMENTERS, inner_lr=0.3, inner_steps=2, bn_statistics="support", seed=4)
    learner.fit(Source("conv"), 2, meta_batch=2)
    learner.save(path)
    loaded = MetaLearner.load(path, ConvNet(seed=9))
    own = {name: value for name, value in learner.meta_parameters.items() if not name.startswith("cml.")}
    assert same(loaded.meta_parameters, own)
    assert loaded.config == learner.config.model_copy(update={"strategy": loaded.config.strategy})
    assert (loaded.steps_done, loaded.algorithm.config, loaded.augmenters) == (2, learner.algorithm.config, [])
    scores = [each.evaluate(Source("conv"), 4).scores for each in (learner, loaded)]
    assert scores[0].equal(scores[1])
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert b"colearner" not in path.read_bytes()


def test_load_builds_a_model_plugin_again(tmp_path: Path) -> None:
    learner = MetaLearner("mlp", loss="mse", spec=TaskSpec((1,), (1,)), model_options={"hidden": [7]})
    learner.fit("sinusoid", 2)
    learner.save(tmp_path / "x")
    loaded = MetaLearner.load(tmp_path / "x")
    assert same(loaded.meta_parameters, learner.meta_parameters)
    assert loaded.evaluate("sinusoid", 3).scores.equal(learner.evaluate("sinusoid", 3).scores)


def test_algorithm_and_loss_that_are_not_installed(tmp_path: Path) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()

    learner = MetaLearner(MLP(), SignMAML, loss=loss, metric="mse", inner_lr=0.05)
    learner.save(tmp_path / "x")
    with pytest.raises(UsageError, match=r"'signmaml'.*algo="):
        MetaLearner.load(tmp_path / "x", MLP(), loss=loss)
    with pytest.raises(UsageError, match="custom loss; pass it as loss="):
        MetaLearner.load(tmp_path / "x", MLP(), algo=SignMAML)
    loaded = MetaLearner.load(tmp_path / "x", MLP(), algo=SignMAML, loss=loss, metric="mse")
    assert loaded.algorithm.config.inner_lr == 0.05
    assert loaded.metric.name == "mse"


def test_frozen_and_tied_parameters_are_saved(tmp_path: Path) -> None:
    def model(value: float) -> nn.Module:
        frozen = nn.Linear(2, 2)
        for p in frozen.parameters():
            nn.init.constant_(p, value).requires_grad_(False)
        return nn.Sequential(frozen, nn.ReLU(), frozen, nn.Linear(2, 1)).double()

    learner = MetaLearner(model(0.3), loss="mse", inner_lr=0.1)
    batch = episodes("mlp")
    learner.step(batch)
    learner.save(tmp_path / "x")
    loaded = MetaLearner.load(tmp_path / "x", model(0.7))
    assert loaded.meta_gradient(batch)[0].equal(learner.meta_gradient(batch)[0])


def damaged_files() -> dict[str, Callable[[Path], object]]:
    def header(**changes: Any) -> Callable[[Path], object]:
        def write(path: Path) -> None:
            MetaLearner(MLP(), loss="mse").save(path)
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                content = json.loads(file.metadata()["metareg"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            content |= changes
            content = {key: value for key, value in content.items() if value != "REMOVE"}
            save_file(tensors, path, metadata={"metareg": json.dumps(content)})

        return write

    def cut(path: Path) -> None:
        MetaLearner(MLP(), loss="mse").save(path)
        path.write_bytes(path.read_bytes()[:-9])

    def bit(path: Path) -> None:
        MetaLearner(MLP(), loss="mse").save(path)
        content = bytearray(path.read_bytes())
        content[40] ^= 0xFF
        path.write_bytes(bytes(content))

    return {
        "missing": lambda path: path.unlink(missing_ok=True),
        "folder": lambda path: path.mkdir(),
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("nothing of the kind, but long enough to be read as a header"),
        "pickle": lambda path: torch.save({"a": torch.ones(2)}, path),
        "cut off": cut,
        "damaged header": bit,
        "another program's": lambda path: save_file({"a": torch.ones(2)}, path),
        "header no JSON": lambda path: save_file({"a": torch.ones(2)}, path, metadata={"metareg": "{"}),
        "header a list": lambda path: save_file({"a": torch.ones(2)}, path, metadata={"metareg": "[]"}),
        "header empty": lambda path: save_file({"a": torch.ones(2)}, path, metadata={"metareg": "{}"}),
        "newer format": header(format=99),
        "no algorithm": header(algo="REMOVE"),
        "algorithm a number": header(algo=3),
        "unknown algorithm": header(algo={"name": "nosuch", "config": {}}),
        "impossible option": header(inner_steps=-1),
        "unknown option of the algorithm": header(algo={"name": "maml", "config": {"innerlr": 1}}),
        "unknown loss": header(loss="nosuch"),
        "unknown metric": header(metric="nosuch"),
        "steps a word": header(steps_done="many"),
        "model a word": header(model="mlp"),
        "head elsewhere": header(head="nosuch"),
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_damaged_files_are_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "learner.safetensors"
    damaged_files()[kind](path)
    with pytest.raises(UsageError) as error:
        MetaLearner.load(path, MLP())
    assert "\n" not in str(error.value)


def test_another_models_file(tmp_path: Path) -> None:
    MetaLearner(MLP(), loss="mse").save(tmp_path / "x")
    with pytest.raises(UsageError, match=r"'body\.0\.weight'.*\(6, 2\)"):
        MetaLearner.load(tmp_path / "x", ConvNet())


@pytest.mark.parametrize("model", ["of ones own", "tied", "frozen"])
def test_a_class_that_the_file_cannot_name_is_asked_for(model: str, tmp_path: Path) -> None:
    module = {"of ones own": lambda: Plain(), "tied": TiedBody, "frozen": MLP}[model]()
    if model == "frozen":
        module.body[0].weight.requires_grad_(False)
    MetaLearner(module, loss="mse").save(tmp_path / "x")
    with pytest.raises(UsageError, match=rf"{type(module).__name__}.*model="):
        MetaLearner.load(tmp_path / "x")


@pytest.mark.parametrize("target", ["a-file/below", "a-folder"])
def test_save_that_cannot_write_leaves_nothing(target: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("kept")
    (tmp_path / "a-folder").mkdir()
    with pytest.raises(MetaregError, match="cannot be written"):
        MetaLearner(MLP(), loss="mse").save(tmp_path / target)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["a-file", "a-folder"]
