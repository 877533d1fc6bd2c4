"""Exported learners and programs, and predictions for a user's own examples."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import metareg
from metareg import Episodes, MetaLearner, Run, UsageError, hookimpl

SMALL: dict[str, Any] = {
    "steps": 3, "meta_batch": 2, "eval_tasks": 2, "test_tasks": 2, "test_inner_steps": [1], "strategy": "serial",
}  # fmt: skip


class Net:
    """A model for any shapes, with BatchNorm."""

    @hookimpl
    def build(self, spec: metareg.TaskSpec) -> nn.Module:
        inputs = torch.Size(spec.input_shape).numel()
        return nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, spec.output_shape[0])
        )


class Shades:
    """Three classes of 4×5 images in colour: dark, middle and light."""

    loss = "cross_entropy"
    metric = None
    default_model = None
    recommended: Mapping[str, Any] = {}
    spec = metareg.TaskSpec((3, 4, 5), (3,))

    @hookimpl
    def episodes(self, split: str, indices: list[int]) -> Episodes:
        generator = torch.Generator().manual_seed(len(split) + 1000 * indices[0])
        y = torch.tensor([0, 1, 2]).repeat(len(indices), 2)
        x = (y / 2).reshape(len(indices), 6, 1, 1, 1) * 0.8 + 0.2 * torch.rand(
            len(indices), 6, 3, 4, 5, generator=generator
        )
        return Episodes(x, y, x, y)


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small run on curves."""
    path = tmp_path_factory.mktemp("curves") / "run"
    metareg.train("metasgd", "cml", "sinusoid", out=path, **SMALL)
    return Run.load(path)


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small run on images."""
    path = tmp_path_factory.mktemp("shades") / "run"
    settings = SMALL | {"steps": 40, "inner_lr": 0.1, "bn_statistics": "support"}
    return metareg.train("maml", task=Shades(), model=Net, out=path, **settings)


@pytest.fixture
def support(tmp_path: Path) -> Path:
    path = tmp_path / "support.csv"
    path.write_text("position,height\n-1,0.5\n0,1.5\n2,-1\n")
    return path


def _images(folder: Path, shades: Mapping[str, list[int]]) -> Path:
    for name, values in shades.items():
        (folder / name).mkdir(parents=True)
        for number, value in enumerate(values):
            Image.new("RGB", (9, 7), (value, value, value)).save(folder / name / f"{number}.png")
    return folder


def test_exported_learner_adapts_as_the_run_does(curves: Run, tmp_path: Path) -> None:
    curves.export(tmp_path / "learner.safetensors")
    learner = MetaLearner.load(tmp_path / "learner.safetensors")
    assert not [name for name in learner.meta_parameters if "cml" in name]
    assert [name for name in learner.meta_parameters if name.startswith("metasgd.")]
    x, y = torch.randn(3, 1), torch.randn(3, 1)
    assert torch.equal(learner.adapt(x, y, 2)(x), curves.learner.adapt(x, y, 2)(x))


def test_exported_program_is_the_module(curves: Run, support: Path, tmp_path: Path) -> None:
    x = torch.randn(7, 1)
    curves.export(tmp_path / "plain.pt2")
    plain = torch.export.load(tmp_path / "plain.pt2").module()
    own = {name: value for name, value in curves.learner.meta_parameters.items() if not name.startswith("metasgd.")}
    assert torch.equal(plain(x), torch.func.functional_call(curves.learner.model.module, own, (x,)))
    curves.export(tmp_path / "adapted.pt2", support=support, inner_steps=3)
    adapted = torch.export.load(tmp_path / "adapted.pt2").module()
    inputs, targets = torch.tensor([[-1.0], [0.0], [2.0]]), torch.tensor([[0.5], [1.5], [-1.0]])
    assert torch.equal(adapted(x), curves.learner.adapt(inputs, targets, 3)(x))


def test_predictions_for_a_table(curves: Run, support: Path, tmp_path: Path) -> None:
    query = tmp_path / "query.csv"
    query.write_text("0.25\n-3\n")
    rows = list(csv.reader(io.StringIO(curves.predict(support, query, inner_steps=2))))
    inputs, targets = torch.tensor([[-1.0], [0.0], [2.0]]), torch.tensor([[0.5], [1.5], [-1.0]])
    expected = curves.learner.adapt(inputs, targets, 2)(torch.tensor([[0.25], [-3.0]]))
    assert rows[0] == ["x1", "y"]
    assert [row[0] for row in rows[1:]] == ["0.25", "-3"]
    torch.testing.assert_close(torch.tensor([[float(row[1])] for row in rows[1:]]), expected.detach())


def test_predictions_for_images(shades: Run, tmp_path: Path) -> None:
    support = _images(tmp_path / "support", {"dark": [5, 20], "grey": [110, 125], "light": [220, 240]})
    query = _images(tmp_path, {"query": [230, 10, 120]}) / "query"
    rows = list(csv.reader(io.StringIO(shades.predict(support, query, inner_steps=10))))
    assert rows[0] == ["image", "class", "probability"]
    assert [row[:2] for row in rows[1:]] == [["0.png", "light"], ["1.png", "dark"], ["2.png", "grey"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("x,y\n", "holds no rows"),
        ("1\n2\n", r"has 1 columns; this learner takes 1 input and 1 target"),
        ("1,2\n3\n", "1 cells in data row 2, where it has 2 columns"),
        ("1,2\n3,four\n", "'four' where a finite number belongs"),
        ("1,2\n3,nan\n", "'nan' where a finite number belongs"),
        ("1,2\n3,\0\n", "cannot be read as CSV|finite number"),
        ("\udcff", "cannot be read as CSV"),
    ],
)
def test_tables_that_will_not_do(curves: Run, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "support.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=message):
        curves.predict(path, path)


def test_folders_that_will_not_do(shades: Run, curves: Run, tmp_path: Path, support: Path) -> None:
    with pytest.raises(UsageError, match="takes no images but a CSV file"):
        curves.predict(_images(tmp_path / "one", {"a": [1]}), support)
    with pytest.raises(UsageError, match="has 4 classes; this learner tells 3 apart"):
        shades.predict(_images(tmp_path / "four", {name: [1] for name in "abcd"}), support)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        shades.predict(tmp_path / "empty", support)
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"0\.png cannot be read as an image"):
        shades.predict(tmp_path / "broken", support)


@pytest.mark.parametrize("name", ["run.onnx", "run", "run.safetensors"])
def test_what_cannot_be_exported(curves: Run, tmp_path: Path, support: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"FILE\.pt2"):
        curves.export(tmp_path / name, support=support)
    assert not (tmp_path / name).exists()
