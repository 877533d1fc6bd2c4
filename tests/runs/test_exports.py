"""Exported learners and programs, and predictions for users' own examples."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import metareg
from metareg import Episodes, MetaLearner, Run, UsageError, hookimpl
from metareg.cli.app import run as command
from metareg.cli.tables import print_results
from metareg.runs.programs import FACTS

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
    settings = SMALL | {"steps": 40, "inner_lr": 0.1}
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
    assert rows[0] == ["position", "height"]
    assert [row[0] for row in rows[1:]] == ["0.25", "-3"]
    torch.testing.assert_close(torch.tensor([[float(row[1])] for row in rows[1:]]), expected.detach())


def test_predictions_for_images(shades: Run, tmp_path: Path) -> None:
    support = _images(tmp_path / "support", {"dark": [5, 20], "grey": [110, 125], "light": [220, 240]})
    query = _images(tmp_path, {"query": [230, 10, 120]}) / "query"
    rows = list(csv.reader(io.StringIO(shades.predict(support, query, inner_steps=10))))
    assert rows[0] == ["image", "class", "probability"]
    assert [row[:2] for row in rows[1:]] == [["0.png", "light"], ["1.png", "dark"], ["2.png", "grey"]]


def test_images_are_predicted_one_by_one_as_together(shades: Run, tmp_path: Path) -> None:
    support = _images(tmp_path / "support", {"dark": [5, 20], "grey": [110, 125], "light": [220, 240]})
    query = _images(tmp_path, {"query": [230, 10, 120]}) / "query"
    together = shades.predict(support, query)
    alone = []
    for value in (230, 10, 120):
        alone.append(shades.predict(support, _images(tmp_path / str(value), {"one": [value]}) / "one"))
    cells = [text.splitlines()[1].split(",")[1:] for text in alone]
    assert cells == [line.split(",")[1:] for line in together.splitlines()[1:]]
    assert shades.predict(support, query, bn_statistics="transductive") != together


def test_results_say_what_predictions_one_by_one_reach(shades: Run, tmp_path: Path) -> None:
    content = json.loads((shades.path / "results.json").read_text())
    one_by_one = shades.evaluation_one_by_one
    assert one_by_one is not None
    assert content["one_by_one"] == one_by_one.to_dict()
    assert (content["bn_statistics"], content["one_by_one"]["bn_statistics"]) == ("transductive", "support")
    tested = Shades().episodes("test", [0, 1]).parts
    for column, steps in enumerate(one_by_one.inner_steps):
        for number in range(2):
            x, y, query_x, query_y = (part[number] for part in tested)
            module = shades.learner.adapt(x, y, steps)
            right = [
                int(module(one[None]).argmax()) == int(target) for one, target in zip(query_x, query_y, strict=True)
            ]
            assert one_by_one.scores[number, column].item() == pytest.approx(sum(right) / len(right))
    screen = io.StringIO()
    print_results(shades, Console(file=screen, width=80))
    assert f"{one_by_one.mean(1):.4f}" in screen.getvalue()
    support = _images(tmp_path / "support", {"dark": [5, 20], "grey": [110, 125], "light": [220, 240]})
    for given, statistics in ((None, "transductive"), (support, "support")):
        shades.export(tmp_path / "program.pt2", support=given)
        facts = {FACTS: ""}
        torch.export.load(tmp_path / "program.pt2", extra_files=facts)
        assert json.loads(facts[FACTS])["bn_statistics"] == statistics


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names there are Unicode")
def test_images_whose_names_are_not_utf8(shades: Run, tmp_path: Path) -> None:
    names = (os.fsdecode(b"caf\xe9"), "light")
    support = _images(tmp_path / "support", {name: [10 + 90 * number] for number, name in enumerate(names)})
    query = _images(tmp_path, {"query": [10]}) / "query"
    (query / "0.png").rename(query / os.fsdecode(b"\xff.png"))
    assert shades.predict(support, query).splitlines()[1].split(",")[0] == "\\xff.png"
    assert "caf\\xe9" in shades.predict(support, support / names[0], inner_steps=10)


def test_predictions_take_the_images_that_training_takes(
    shades: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    support = _images(tmp_path / "support" / "mine", {"warm/dark": [5, 20], "grey": [110, 125], "light": [220, 240]})
    query = _images(tmp_path, {"query": [230, 10], "query/more": [120]}) / "query"
    for folder in (support / "grey", query):
        Image.new("L", (9, 7), 115).save(folder / "x.jfif", format="JPEG")
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / "notes.md").write_text("")
    (support / "again").symlink_to("grey")
    rows = list(csv.reader(io.StringIO(shades.predict(support.parent, query, inner_steps=10))))
    assert {row[0]: row[1] for row in rows[1:]} == {
        "0.png": "light", "1.png": "warm/dark", "x.jfif": "grey", "more/0.png": "grey",
    }  # fmt: skip
    of_support, of_query = (record.getMessage() for record in caplog.records if "Ignored in" in record.getMessage())
    assert "mine/again" in of_support
    assert "1 .md" in of_query


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no rows"),
        ("x,y\n", "contains no rows"),
        ("1.5\n2\n", r"has 1 column \(x1\); this learner takes 1 input and 1 target"),
        ("1,2\n3,4\n", "could be column names or a row"),
        ("1.5,2\n3\n", "1 cell in line 2, where its first line has 2"),
        ("1.5,2\n3,four\n", "line 2, column 'y', contains 'four' instead of a finite number"),
        ("x,y\n3,nan\n", "line 2, column 'y', contains 'nan' instead of a finite number"),
        ("\udcff", "line 1 is not UTF-8"),
        ("y,z\n1,2\n", "has the column 'x', which is not in"),
        ("x,y,comment\n1,2,hello\n", r"has 3 columns \(x, y, comment\); this learner takes 1 input and 1 target"),
    ],
)
def test_tables_that_will_not_do(curves: Run, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "support.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    query = tmp_path / "query.csv"
    query.write_text("x\n0.5\n")
    with pytest.raises(UsageError, match=message):
        curves.predict(path, query)


def test_columns_go_by_their_names(curves: Run, tmp_path: Path) -> None:
    """Predictions do not depend on a table's order, separator or decimal sign; without names, columns match by position."""
    plain = [("x,y\n-1.5,0.5\n2,-1\n", "x\n0.25\n-3\n")]
    same = [
        ("y,x\n0.5,-1.5\n-1,2\n", "x\n0.25\n-3\n"), ("y;x\n0,5;-1,5\n-1;2\n\n", "\ufeffx\n0,25\n-3\n"),
        ("x\ty\n-1.5\t0.5\n2\t-1\n", "0.25\n-3\n"), ("-1.5,0.5\n2,-1\n", "x\n0.25\n-3\n"),
    ]  # fmt: skip
    answers = []
    for number, (support, query) in enumerate(plain + same):
        for name, text in (("s", support), ("q", query)):
            (tmp_path / f"{name}{number}.csv").write_text(text, encoding="utf-8")
        answers.append(curves.predict(tmp_path / f"s{number}.csv", tmp_path / f"q{number}.csv", inner_steps=2))
    assert set(answers) == {answers[0]}
    assert answers[0].startswith("x,y\n0.25,")
    (tmp_path / "q.csv").write_text("y,x\n9,0.25\n")
    with pytest.raises(UsageError, match="remove the target column"):
        curves.predict(tmp_path / "s0.csv", tmp_path / "q.csv")


def test_folders_that_will_not_do(shades: Run, curves: Run, tmp_path: Path, support: Path) -> None:
    with pytest.raises(UsageError, match="needs a CSV file, not images"):
        curves.predict(_images(tmp_path / "one", {"a": [1]}), support)
    with pytest.raises(UsageError, match="has 4 classes; this learner distinguishes 3"):
        shades.predict(_images(tmp_path / "four", {name: [1] for name in "abcd"}), support)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="contains no images"):
        shades.predict(tmp_path / "empty", support)
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"0\.png cannot be read as an image"):
        shades.predict(tmp_path / "broken", support)


@pytest.mark.parametrize("name", ["run.pth", "run", "run.safetensors"])
def test_what_cannot_be_exported(curves: Run, tmp_path: Path, support: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"FILE\.pt2"):
        curves.export(tmp_path / name, support=support)
    with pytest.raises(UsageError, match="remove --support"):
        curves.export(tmp_path / "run.pt2", support=support, adaptive=True)
    assert not list(tmp_path.glob("run*"))


RUN_ALONE = """
import json, sys
sys.path[:] = {path!r}

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition("_")[0].partition(".")[0] == "metareg":
            raise ImportError(name)

sys.meta_path.insert(0, Nothing())
import torch

answers = []
for file, tasks in torch.load("tasks.pt"):
    facts = {{"metareg.json": ""}}
    program = torch.export.load(file, extra_files=facts).module()
    answers.append((json.loads(facts["metareg.json"]), [program(*task) for task in tasks]))
assert not [name for name in sys.modules if name.startswith("metareg")]
torch.save(answers, "answers.pt")
"""


def test_programs_that_adapt_run_without_metareg(curves: Run, shades: Run, tmp_path: Path) -> None:
    """They predict what the learner predicts, for any number of examples, including one."""
    curves.export(tmp_path / "curves.pt2", adaptive=True, inner_steps=3)
    shades.export(tmp_path / "shades.pt2", adaptive=True)
    of_curves = [(torch.randn(n, 1), torch.randn(n, 1), torch.randn(q, 1)) for n, q in ((3, 5), (12, 1))]
    of_shades = [(torch.rand(n, 3, 4, 5), torch.arange(n) % 3, torch.rand(q, 3, 4, 5)) for n, q in ((6, 1), (9, 40))]
    torch.save([("curves.pt2", of_curves), ("shades.pt2", of_shades)], tmp_path / "tasks.pt")
    script = RUN_ALONE.format(path=sys.path)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    answers = torch.load(tmp_path / "answers.pt")
    for run, steps, tasks, (facts, found) in zip(
        (curves, shades), (3, 1), (of_curves, of_shades), answers, strict=True
    ):
        assert (facts["support_examples"], facts["query_examples"]) == ("any", "any")
        assert (facts["algorithm"], facts["inner_steps"]) == (run.learner.algorithm.name, steps)
        for (x, y, query_x), predicted in zip(tasks, found, strict=True):
            module = run.learner.adapt(x, y, steps)
            alone = torch.cat([module(one[None]) for one in query_x])
            torch.testing.assert_close(predicted, alone.detach(), rtol=1e-5, atol=1e-5)
    facts = answers[1][0]
    assert facts["bn_statistics"] == "support"
    assert "BICUBIC" in facts["image"].pop("prepared")
    assert facts["image"] == {"channels": 3, "height": 4, "width": 5, "black": [0.0] * 3, "white": [1.0] * 3}


def test_programs_say_what_their_numbers_mean(curves: Run, shades: Run, support: Path, tmp_path: Path) -> None:
    images = _images(tmp_path / "support", {"dark": [5], "grey": [110], "light": [220]})
    facts = {}
    for run, given in ((curves, support), (shades, images)):
        run.export(tmp_path / "site.pt2", support=given)
        extra = {FACTS: ""}
        torch.export.load(tmp_path / "site.pt2", extra_files=extra)
        facts[given] = json.loads(extra[FACTS])
    assert (facts[support]["inputs"], facts[support]["targets"]) == (["position"], ["height"])
    assert facts[images]["classes"] == ["dark", "grey", "light"]


def test_onnx_is_the_same_function(shades: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = _images(tmp_path / "support", {"dark": [5, 20], "grey": [110, 125], "light": [220, 240]})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(UsageError, match=r"pip install 'metareg\[onnx\]'"):
            shades.export(tmp_path / "site.onnx", support=images)
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shades.export(tmp_path / "site.onnx", support=images)
    shades.export(tmp_path / "site.pt2", support=images)
    session = runtime.InferenceSession(str(tmp_path / "site.onnx"))
    facts = json.loads(session.get_modelmeta().custom_metadata_map[FACTS])
    assert facts["classes"] == ["dark", "grey", "light"]
    expected = torch.export.load(tmp_path / "site.pt2").module()
    for count in (1, 6):
        x = torch.rand(count, 3, 4, 5)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected(x).detach(), rtol=1e-5, atol=1e-5)


def test_many_sites_at_once(curves: Run, shades: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each site's rows equal its separate predictions; the learner's file works in place of the run."""
    tables = {"north": "x,y\n-1,0.5\n0,1.5\n", "south": "x,y\n1,-0.5\n3,0\n2,2\n"}
    expected = ["site,x,y"]
    for name, text in tables.items():
        site = tmp_path / "curves" / name
        site.mkdir(parents=True)
        (site / "support.csv").write_text(text)
        (site / "query.csv").write_text("x\n0.25\n-3\n")
        alone = curves.predict(site / "support.csv", site / "query.csv")
        expected += [f"{name},{line}" for line in alone.splitlines()[1:]]
    assert curves.predict_sites(tmp_path / "curves").splitlines() == expected
    curves.export(tmp_path / "learner.safetensors")
    assert command(["predict", str(tmp_path / "learner.safetensors"), "--sites", str(tmp_path / "curves")]) == 0
    assert capsys.readouterr().out.splitlines() == expected
    (tmp_path / "curves" / "south" / "query.csv").unlink()
    with pytest.raises(UsageError, match="south has no query"):
        curves.predict_sites(tmp_path / "curves")
    for name, values in (("a", [10, 240]), ("b", [250, 5])):
        _images(tmp_path / "shades" / name / "support", {"dark": [values.index(min(values)) + 5], "light": [235]})
        _images(tmp_path / "shades" / name, {"query": values})
    rows = [line.split(",")[:3] for line in shades.predict_sites(tmp_path / "shades", inner_steps=10).splitlines()]
    assert rows == [
        ["site", "image", "class"], ["a", "0.png", "dark"], ["a", "1.png", "light"],
        ["b", "0.png", "light"], ["b", "1.png", "dark"],
    ]  # fmt: skip
