"""Tasks on users' own tables, against a reference reader and a reference adaptation."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import metareg
from metareg import Run, UsageError, train
from metareg.cli.app import run as run_command
from metareg.registry.plugins import resolve
from metareg.testing import checks
from metareg_table import TableFolder

SMALL: dict[str, Any] = {
    "steps": 4, "meta_batch": 2, "eval_tasks": 2, "test_tasks": 6, "test_inner_steps": [0, 2], "strategy": "serial",
}  # fmt: skip
KINDS = ("a", "b", "")


def draw(number: int, rows: int = 16) -> list[dict[str, str]]:
    """Return the rows of a table: two numbers, a category with missing values, a target, and a class."""
    generator = np.random.default_rng(number)
    found = []
    for row in range(rows):
        u, v = generator.normal(10 * number, 3), generator.normal(-500, 50)
        y = 100 + number * u - v
        kind = KINDS[row % 2]
        label = "high" if row % 3 == 0 else "low"
        found.append({"u": f"{u:.3f}", "kind": kind, "v": f"{v:.2f}", "y": f"{y:.2f}", "label": label})
    return found


def write(path: Path, rows: Sequence[Mapping[str, str]], separator: str = ",", point: str = ".") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [separator.join(rows[0]), *(separator.join(row.values()).replace(".", point) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def without(rows: Sequence[Mapping[str, str]], *names: str) -> list[dict[str, str]]:
    return [{name: cell for name, cell in row.items() if name not in names} for row in rows]


def write_tables(folder: Path) -> Path:
    """Write six tables with numeric targets in several formats, one of them with another order of columns."""
    for number in range(6):
        rows = without(draw(number), "label")
        if number == 3:
            rows = [dict(reversed(row.items())) for row in rows]
        separator, point = (";", ",") if number % 2 else (",", ".")
        write(folder / f"t{number}.csv", rows, separator, point)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tables(tmp_path / "tables")


def make(folder: Path, **options: Any) -> TableFolder:
    values = {"data": str(folder), "target": "y", "shots": 4, "query": 3, **options}
    task: TableFolder = resolve("tasks", "table-folder", values).instance
    return task


def use(folder: Path, **options: Any) -> None:
    task = make(folder, **options)
    for split in ("train", "test"):
        _ = task.spec, task.loss, task.metric, task.episodes(split, [0], 0)


def split_names(task: TableFolder) -> dict[str, list[int]]:
    return {split: [int(name[-1]) for name in task._tables.select(split)] for split in ("train", "validation", "test")}


def read_plain(numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs (u, v, and one-hot kind) and targets of some tables."""
    rows = [row for number in numbers for row in draw(number)]
    inputs = [[float(row["u"]), float(row["v"]), row["kind"] == "a", row["kind"] == "b"] for row in rows]
    return np.array(inputs, dtype=float), np.array([float(row["y"]) for row in rows])


def test_episodes_are_rows_of_one_table_standardised_by_the_training_tables(folder: Path) -> None:
    task = make(folder)
    numbers = split_names(task)
    assert [len(each) for each in numbers.values()] == [4, 1, 1]
    x, y = read_plain(numbers["train"])
    mean, deviation = x.mean(0), x.std(0)
    mean[2:], deviation[2:] = 0, 1
    assert task.encoding.numbers["u"] == pytest.approx((mean[0], deviation[0]))
    assert task.encoding.target_scale == pytest.approx((y.mean(), y.std()))
    tables = {n: [(a - mean) / deviation for a in read_plain([n])[0]] for n in range(6)}
    for split, members in numbers.items():
        episodes = task.episodes(split, range(8), 0)
        assert episodes.support_x.shape == (8, 4, 4)
        assert episodes.query_y.shape == (8, 3, 1)
        turns = []
        for index in range(8):
            inputs = torch.cat([episodes.support_x[index], episodes.query_x[index]]).numpy()
            targets = torch.cat([episodes.support_y[index], episodes.query_y[index]]).flatten().numpy()
            (table,) = [n for n in members if min(np.abs(row - inputs[0]).max() for row in tables[n]) < 1e-5]
            rows = [int(np.abs(np.array(tables[table]) - row).max(1).argmin()) for row in inputs]
            np.testing.assert_allclose(np.array(tables[table])[rows], inputs, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(
                (read_plain([table])[1][rows] - y.mean()) / y.std(), targets, rtol=1e-5, atol=1e-5
            )
            assert len(set(rows)) == 7
            turns.append(table)
        rounds = [turns[start : start + len(members)] for start in range(0, 8 - len(members) + 1, len(members))]
        assert all(sorted(each) == sorted(members) for each in rounds)


def test_standardisation_by_the_support_rows(folder: Path) -> None:
    raw = make(folder, standardise="none", standardise_target="none").episodes("train", range(5), 1)
    scaled = make(folder, standardise="support", standardise_target="support").episodes("train", range(5), 1)
    mean, deviation = raw.support_x.mean(1, keepdim=True), raw.support_x.std(1, keepdim=True, correction=0)
    mean[..., 2:], deviation[..., 2:] = 0, 1
    torch.testing.assert_close(scaled.query_x, (raw.query_x - mean) / deviation, rtol=1e-4, atol=1e-4)
    mean, deviation = raw.support_y.mean(1, keepdim=True), raw.support_y.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(scaled.query_y, (raw.query_y - mean) / deviation, rtol=1e-4, atol=1e-4)


def test_classes(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / f"t{number}.csv", without(draw(number, 30), "y"))
    write(tmp_path / "few.csv", without(draw(9, 30), "y")[1:3] * 10)  # no 'high' at all
    task = make(tmp_path, target="label", shots=3, query=4, standardise="none")
    assert task.encoding.classes == ["high", "low"]
    assert (task.loss, task.metric.name, task.spec.output_shape) == ("cross_entropy", "accuracy", (2,))
    for split in ("train", "test"):
        episodes = task.episodes(split, range(12), 0)
        assert (episodes.support_y == torch.tensor([0, 0, 0, 1, 1, 1])).all()
        assert episodes.query_y.shape == (12, 8)
        assert ((episodes.query_y == 0).any(1) & (episodes.query_y == 1).any(1)).all()
        x = torch.cat([episodes.support_x, episodes.query_x], 1)
        assert all(len(torch.unique(each, dim=0)) == 14 for each in x)
        labels = {(row["u"], row["v"]): row["label"] for number in range(5) for row in draw(number, 30)}
        y = torch.cat([episodes.support_y, episodes.query_y], 1)
        for (u, v, *_), label in zip(x.flatten(0, 1).tolist(), y.flatten().tolist(), strict=True):
            assert labels[f"{u:.3f}", f"{v:.2f}"] == ["high", "low"][label]
    pools = task._pools.values()
    assert [name for pool in pools for name in pool.small] == ["few"]


@pytest.mark.parametrize("layout", ["folders", "file", "column", "one", "npz", "parquet"])
def test_the_same_tasks_in_every_layout(folder: Path, tmp_path: Path, layout: str) -> None:
    split = {"train": [0, 1, 2], "validation": [3], "test": [4, 5]}
    rows = {n: without(draw(n), "label") for n in range(6)}
    where = tmp_path / "other"
    options: dict[str, Any] = {}
    of_row = {n: name for name, members in split.items() for n in members}
    if layout == "folders":
        for n, name in of_row.items():
            write(where / {"train": "Training", "validation": "dev", "test": "TEST"}[name] / f"t{n}.csv", rows[n])
    elif layout == "file":
        shutil.copytree(folder, where)
        given = {"train": ["t0", "t1", "t2"], "val": ["t3"], "testing": ["t4", "t5"]}
        (where / "splits.json").write_text(json.dumps(given))
    elif layout == "column":
        for n in range(6):
            write(where / f"t{n}.csv", [{**row, "part": of_row[n]} for row in rows[n]])
        options = {"split_column": "part"}
    elif layout == "one":
        write(where / "all.csv", [{"of": f"t{n}", "part": of_row[n], **row} for n in range(6) for row in rows[n]])
        options = {"split_column": "part", "task_column": "of"}
        where = where / "all.csv"
    else:
        pyarrow = pytest.importorskip("pyarrow") if layout == "parquet" else None
        for n, name in of_row.items():
            columns = {key: np.array([float(row[key]) for row in rows[n]]) for key in "uvy"}
            columns["kind"] = np.array([row["kind"] for row in rows[n]])
            (where / name).mkdir(parents=True, exist_ok=True)
            if pyarrow:
                from pyarrow import parquet

                parquet.write_table(pyarrow.table(columns), where / name / f"t{n}.parquet")
            else:
                np.savez(where / name / f"t{n}.npz", **columns)
    task = make(where, **options)
    x, _ = read_plain(split["train"])
    assert task.encoding.numbers["v"] == pytest.approx((x[:, 1].mean(), x[:, 1].std()))
    assert {name: [int(each[-1]) for each in task._tables.select(name)] for name in split} == split
    assert sorted(task.encoding.inputs) == ["kind", "u", "v"]


def test_missing_values(tmp_path: Path) -> None:
    for number in range(4):
        rows = without(draw(number), "label")
        rows[2]["u"], rows[5]["kind"], rows[7]["y"] = "NA", "", ""
        write(tmp_path / f"t{number}.csv", rows)
    with pytest.raises(UsageError, match=r"line 4, column 'u', is empty.*missing=drop.*missing=mean"):
        make(tmp_path)
    assert set(make(tmp_path, missing="drop")._pools["train"].counts) == {13}
    task = make(tmp_path, missing="mean", shots=10, query=5)
    assert set(task._pools["train"].counts) == {15}
    episodes = task.episodes("train", range(4), 0)
    x = torch.cat([episodes.support_x, episodes.query_x], 1)
    assert ((x[..., 0] == 0).sum(1) == 1).all()
    assert ((x[..., 2:] == 0).all(-1).sum(1) == 1).all()
    (train,) = [
        np.array(
            [float(row["u"]) for n in split_names(task)["train"] for i, row in enumerate(draw(n)) if i not in (2, 7)]
        )
    ]
    assert task.encoding.numbers["u"] == pytest.approx((train.mean(), train.std()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "yy"}, "no column 'yy'; did you mean 'y'"),
        ({"target": None}, "Name the column to predict with --target; the tables have u, kind, v, y"),
        ({"columns": ["u", "w"]}, "no column 'w'"),
        ({"categorical": "kinds"}, "no column 'kinds'; did you mean 'kind'"),
        ({"numeric": ["kind"]}, "column 'kind', contains 'a' instead of a finite number"),
        ({"loss": "cross_entropy"}, "loss 'cross_entropy' does not suit .* numbers: mse, mae, huber"),
        ({"metric": "auroc"}, "metric 'auroc' does not suit"),
        ({"shots": 14}, "none of its 4 tasks has 14 support and 3 query rows"),
        ({"task_column": "of"}, "no column 'of'"),
        ({"split_column": "kind"}, "must contain train, validation or test"),
        ({"data": "/nowhere"}, "There is no file or folder /nowhere"),
        ({"ratios": [1, 0, 0]}, "The test split of .* cannot be used"),
        ({"kind": "classification"}, "different texts, too many|not one of the classes of the training tasks"),
    ],
)
def test_refused_options(folder: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        use(folder, **options)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: write(folder / "t1.csv", without(draw(1), "label", "v")), "t1.csv has no column 'v'"),
        (lambda folder: write(folder / "t1.csv", draw(1)), "column 'label'"),
        (lambda folder: (folder / "t1.csv").write_text("1.5,2\n3,4\n"), "does not name its columns"),
        (lambda folder: write(folder / "sub" / "test" / "x.csv", draw(1)), "column 'label'"),
        (lambda folder: (folder / "t1.csv").write_text("u,kind,v,y\n1,a,2,\n"), "'y', is empty.*to drop such rows.$"),
        (lambda folder: (folder / "t9.csv").symlink_to("nowhere.csv"), "t9.csv is a broken link"),
        (lambda folder: write(folder / "test" / "x.csv", draw(1)), "look like a split, and 't0'.* outside them"),
        (lambda folder: shutil.copy(folder / "t1.csv", folder / "t1.tsv"), "would be tasks with the same name"),
        (lambda folder: (folder / "t1.csv").write_text("u,kind,v,y\n1,a,2,3\nx,b,3,4\n"), "column 'u', contains 'x'"),
        (lambda folder: [path.unlink() for path in sorted(folder.iterdir())[2:]], "need at least three tasks; there are 2"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "There are no tables in"),
        (lambda folder: [path.unlink() for path in sorted(folder.iterdir())[1:]], "is one table: name the column"),
    ],
)  # fmt: skip
def test_refused_tables(folder: Path, change: Any, says: str) -> None:
    change(folder)
    with pytest.raises(UsageError, match=says):
        make(folder, ratios=[1, 0.01, 0.01]).episodes("train", [0], 0)


def test_tasks_in_two_splits_are_refused(folder: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(folder, folder.parent / "split" / split)
    with pytest.raises(UsageError, match="'t0' is in test and in train"):
        make(folder.parent / "split")


# ------------------------------------------------------------------------------------------------------------- whole runs


def adapt_by_hand(
    weights: Mapping[str, Tensor], x: Tensor, y: Tensor, query: Tensor, steps: int, rate: float
) -> Tensor:
    """Run a reference gradient descent on the support set's squared error, for two hidden layers and one category."""

    def predict(w: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        hidden = torch.cat([inputs[:, :2], inputs[:, 2:] @ w["body.0.tables.0.weight"].T], 1)
        for layer in ("body.1", "body.3"):
            hidden = (hidden @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]).clamp(min=0)
        return hidden @ w["head.weight"].T + w["head.bias"]

    own = {name: value.clone().requires_grad_() for name, value in weights.items()}
    for _ in range(steps):
        loss = (predict(own, x) - y).square().mean()
        grads = torch.autograd.grad(loss, list(own.values()))
        own = {name: (p - rate * g).detach().requires_grad_() for (name, p), g in zip(own.items(), grads, strict=True)}
    return predict(own, query).detach()


def train_small(folder: Path, out: Path, **others: Any) -> Run:
    options = {"data": str(folder), "target": "y", "shots": 4, "query": 3, "inner_steps": 2, "inner_lr": 0.05}
    return train(task="table-folder", out=out, **options, **others, **SMALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    where = tmp_path_factory.mktemp("run")
    return train_small(write_tables(where / "tables"), where / "run")


def test_the_figure_has_true_and_predicted_values_in_the_targets_units(run: Run) -> None:
    task = run.source.plugin.instance
    axes = task.figures(run.learner, 0)["predictions"].axes
    _, y = read_plain([int(name[-1]) for name in task._tables.select("train")])
    tested = task.episodes("test", range(len(axes)), 0)
    assert {each.get_title() for each in axes} == {*task._tables.select("test")}
    for number, each in enumerate(axes):
        support_x, support_y, query_x, query_y = tested.unstack(number)
        for line, steps in zip(each.lines[:2], (0, 2), strict=True):
            outputs = run.learner.adapt(support_x, support_y, steps=steps)(query_x)
            assert line.get_xdata() == pytest.approx(query_y.flatten() * y.std() + y.mean(), rel=1e-4)
            assert line.get_ydata() == pytest.approx(outputs.detach().flatten() * y.std() + y.mean(), rel=1e-4)


def test_predictions_are_those_of_the_saved_weights_in_the_targets_units(folder: Path, tmp_path: Path) -> None:
    """Also if the training data is gone, for any order of columns and any file format."""
    run = train_small(folder, tmp_path / "run")
    numbers = [int(name[-1]) for name in run.source.plugin.instance._tables.select("train")]
    shutil.rmtree(folder)
    new = without(draw(7), "label")
    support = write(tmp_path / "s.csv", [dict(reversed(row.items())) for row in new[:5]], ";", ",")
    query = write(tmp_path / "q.csv", without(new[5:], "y"))
    rows = list(csv.DictReader(io.StringIO(Run.load(run.path).predict(support, query))))

    x, y = read_plain(numbers)
    mean, deviation = x.mean(0), x.std(0)
    mean[2:], deviation[2:] = 0, 1
    own_x, own_y = read_plain([7])
    scaled = torch.from_numpy((own_x - mean) / deviation).float()
    targets = torch.from_numpy((own_y - y.mean()) / y.std()).float()[:, None]
    weights = load_file(run.path / "checkpoints" / "final.safetensors")
    outputs = adapt_by_hand(weights, scaled[:5], targets[:5], scaled[5:], 2, 0.05)
    expected = outputs.flatten().numpy() * y.std() + y.mean()
    assert list(rows[0]) == ["u", "v", "kind", "y"]
    assert [float(row["u"]) for row in rows] == pytest.approx(own_x[5:, 0])
    assert [float(row["y"]) for row in rows] == pytest.approx(expected, rel=1e-5)


def test_the_learners_file_is_enough(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its predictions, and those of the program adapted with it, equal the run's; it contains no path."""
    new = without(draw(7), "label")
    support, query = write(tmp_path / "s.csv", new[:5]), write(tmp_path / "q.csv", without(new[5:], "y"))
    run.export(tmp_path / "learner.safetensors")
    assert str(tmp_path.parent).encode() not in (tmp_path / "learner.safetensors").read_bytes()
    assert (
        run_command(
            ["predict", str(tmp_path / "learner.safetensors"), "--support", str(support), "--query", str(query)]
        )
        == 0
    )
    answer = capsys.readouterr().out
    assert answer == run.predict(support, query)

    run.export(tmp_path / "new.pt2", support=support)
    files = {"metareg.json": ""}
    program = torch.export.load(tmp_path / "new.pt2", extra_files=files).module()
    facts = json.loads(files["metareg.json"])
    assert facts["inputs"] == ["u", "v", "kind=a", "kind=b"]
    assert facts["targets"] == ["y"]
    inputs = torch.from_numpy(read_plain([7])[0][5:]).float()
    expected = [float(row["y"]) for row in csv.DictReader(io.StringIO(answer))]
    assert program(inputs).flatten().tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UsageError, match="give its labelled rows with --support"):
        run.export(tmp_path / "plain.pt2")


def test_program_that_adapts_standardises_by_its_own_support_set(folder: Path, tmp_path: Path) -> None:
    """It takes the tables' own numbers and predicts in the target's units, like predict."""
    options = {"standardise": "support", "standardise_target": "support"}
    run = train_small(folder, tmp_path / "run", **options)
    run.export(tmp_path / "learner.pt2", adaptive=True)
    files = {"metareg.json": ""}
    program = torch.export.load(tmp_path / "learner.pt2", extra_files=files).module()
    facts = json.loads(files["metareg.json"])
    assert (facts["inputs"], facts["targets"]) == (["u", "v", "kind=a", "kind=b"], ["y"])
    for number, rows in ((7, 5), (8, 9)):
        new = without(draw(number), "label")
        support, query = write(tmp_path / "s.csv", new[:rows]), write(tmp_path / "q.csv", without(new[rows:], "y"))
        expected = [float(row["y"]) for row in csv.DictReader(io.StringIO(run.predict(support, query)))]
        x, y = (torch.from_numpy(values).float() for values in read_plain([number]))
        found = program(x[:rows], y[:rows].reshape(-1, 1), x[rows:])
        assert found.flatten().tolist() == pytest.approx(expected, rel=1e-4)


def test_scores_are_in_the_targets_units_whoever_computes_them(run: Run) -> None:
    assert run.evaluation is not None
    task = run.source.plugin.instance
    scale = task.encoding.target_scale[1]
    episodes = task.episodes("test", range(6), 0)
    by_hand = []
    for index in range(6):
        x, y, query_x, query_y = episodes.unstack(index)
        outputs = run.learner.adapt(x, y, 2)(query_x).detach()
        by_hand.append(float((outputs - query_y).square().mean()) * scale**2)
    assert run.evaluation.scores[:, 1].tolist() == pytest.approx(by_hand, rel=1e-5)
    assert Run.load(run.path).evaluate(6, [0, 2]).scores.tolist() == run.evaluation.scores.tolist()


def test_other_training_tables_are_refused_where_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    run = train_small(folder, tmp_path / "run")
    (run.path / "results.json").unlink()
    write(folder / "t0.csv", without(draw(8), "label"))
    with pytest.raises(UsageError, match="differ from those of the configuration's 'encoding'"):
        metareg.resume(run.path)


@pytest.mark.parametrize(
    ("support", "query", "says"),
    [
        ("u,kind,v\n1,a,2\n", "u,kind,v\n1,a,2\n", "s.csv has no column 'y'"),
        ("u,kind,v,y,w\n1,a,2,3,4\n", "u,kind,v\n1,a,2\n", "the column 'w', which is not used"),
        ("u,kind,v,y\n1,a,2,3\n", "u,kimd,v\n1,a,2\n", "no column 'kind'; did you mean 'kimd'"),
        ("u,kind,v,y\n1,a,2,\n", "u,kind,v\n1,a,2\n", "line 2, column 'y', is empty"),
        ("u,kind,v,y\n1,a,2,3\n", "u,kind,v\n1,a,\n", "q.csv, line 2, column 'v', is empty"),
        ("1.5,2,3,4\n", "u,kind,v\n1,a,2\n", "s.csv does not name its columns; they must be u, v, kind, y"),
    ],
)
def test_refused_tables_for_predictions(run: Run, tmp_path: Path, support: str, query: str, says: str) -> None:
    (tmp_path / "s.csv").write_text(support)
    (tmp_path / "q.csv").write_text(query)
    with pytest.raises(UsageError, match=says):
        run.predict(tmp_path / "s.csv", tmp_path / "q.csv")


def test_predicted_classes(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "t" / f"t{number}.csv", without(draw(number, 30), "y"))
    options = {"data": str(tmp_path / "t"), "target": "label", "shots": 3, "query": 2, "metric": "auroc", **SMALL}
    run = train(task="table-folder", out=tmp_path / "run", **options)
    assert run.evaluation is not None
    assert run.evaluation.metric == "auroc"
    rows = without(draw(8), "y")
    support, query = write(tmp_path / "s.csv", rows[:6]), write(tmp_path / "q.csv", rows[6:])
    found = list(csv.DictReader(io.StringIO(Run.load(run.path).predict(support, query))))
    assert list(found[0]) == ["u", "v", "kind", "label", "probability"]
    assert {row["label"] for row in found} <= {"high", "low"}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in found)
    rows[0]["label"] = "hihg"
    with pytest.raises(UsageError, match="contains 'hihg', which is not one of the classes"):
        run.predict(write(support, rows[:6]), query)


@pytest.mark.parametrize("name", ["table-folder", "table-mlp"])
def test_conformance(folder: Path, name: str) -> None:
    kind = "tasks" if name == "table-folder" else "models"
    config: dict[str, Any] = (
        {"data": str(folder), "target": "y", "shots": 4, "query": 3} if kind == "tasks" else {"categories": [1]}
    )
    for check in checks(kind, name, config):
        if check.name not in ("strategies", "whole-steps", "composition"):
            check()


@pytest.mark.slow
def test_adaptation_beats_a_constant_and_the_model_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["data", "table-folder", "--example", str(tmp_path / "new")]) == 0
    assert "metareg train --task table-folder" in capsys.readouterr().out
    run = train(
        task="table-folder", data=str(tmp_path / "new" / "sensors"), target="y", steps=300, out=tmp_path / "run"
    )
    assert run.evaluation is not None
    task = run.source.plugin.instance
    episodes = task.episodes("test", range(200), 0)
    scale = task.encoding.target_scale[1]
    constant = (episodes.query_y - episodes.support_y.mean(1, keepdim=True)).square().mean() * scale**2
    assert run.evaluation.mean(5) < 0.5 * float(constant)
    assert run.evaluation.mean(5) < 0.2 * run.evaluation.mean(0)
    assert run_command(["data", "table-folder", "--example", str(tmp_path / "new")]) == 2
