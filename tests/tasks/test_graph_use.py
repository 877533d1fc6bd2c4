"""Predictions and programs of a graph run on the nodes of its graph, against a reference loop."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import metareg
from metareg import Run, UsageError
from processes import environment

pytest.importorskip("dgl", reason="DGL is not installed")

NODES, WAYS = 120, 2
SMALL: dict[str, Any] = {
    "steps": 3, "meta_batch": 2, "inner_steps": 2, "eval_tasks": 2, "test_tasks": 2, "test_inner_steps": [1],
    "strategy": "serial", "inner_lr": 0.5, "ways": WAYS, "shots": 2, "query": 3,
}  # fmt: skip


def write_graph(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write a graph of six classes with texts as ids; return its features and adjacency matrix."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = np.arange(NODES) % 6
    features = (rng.normal(size=(6, 5))[labels] + rng.normal(size=(NODES, 5))).astype(np.float32)
    edges = [
        (a, b) for a in range(NODES) for b in range(a) if rng.random() < (0.15 if labels[a] == labels[b] else 0.01)
    ]
    rows = [f"p{n},{'abcdef'[labels[n]]},{','.join(map(repr, features[n].tolist()))}" for n in range(NODES)]
    (folder / "nodes.csv").write_text("\n".join(["id,label,u,v,w,x,y", *rows]))
    (folder / "edges.csv").write_text("\n".join(["source,target", *(f"p{a},p{b}" for a, b in edges)]))
    adjacency = np.zeros((NODES, NODES), np.float32)
    for a, b in edges:
        adjacency[a, b] = adjacency[b, a] = 1
    return features, adjacency


def propagate(kind: str, adjacency: np.ndarray) -> Tensor:
    """Return the dense matrix of one propagation."""
    if kind == "mean":
        return torch.tensor(adjacency / np.maximum(adjacency.sum(1, keepdims=True), 1))
    loops = adjacency + np.eye(NODES, dtype=np.float32)
    root = 1 / np.sqrt(loops.sum(1))
    return torch.tensor(root[:, None] * loops * root)


def compute_outputs(kind: str, params: dict[str, Tensor], features: np.ndarray, adjacency: np.ndarray) -> Tensor:
    """Compute a two-layer model's outputs for all nodes from its equations."""
    near, x = propagate(kind, adjacency), torch.tensor(features)
    table = {"gcn": lambda: near @ x, "sgc": lambda: near @ near @ x, "mean": lambda: torch.cat([x, near @ x], 1)}[
        kind
    ]()
    centred = table - table.mean(0)
    rows = 4 * centred / centred.norm(dim=1, keepdim=True)
    hidden = torch.relu(rows @ params["body.layers.0.weight"].T + params["body.layers.0.bias"])
    if kind != "sgc":
        joined = torch.cat([hidden, near @ hidden], 1) if kind == "mean" else near @ hidden
        hidden = torch.relu(joined @ params["body.layers.1.weight"].T + params["body.layers.1.bias"])
        rows = near @ rows
    return torch.cat([hidden, rows], 1) @ params["head.weight"].T + params["head.bias"]


def adapt(kind: str, run: Run, support: list[int], y: list[int], *graph: np.ndarray) -> Tensor:
    """Compute the scores of all nodes after the run's inner steps with a reference loop."""
    params = {name: p.clone().requires_grad_() for name, p in run.learner.meta_parameters.items()}
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(compute_outputs(kind, params, *graph)[support], torch.tensor(y))
        grads = torch.autograd.grad(loss, list(params.values()))
        params = {
            name: (p - 0.5 * g).detach().requires_grad_() for (name, p), g in zip(params.items(), grads, strict=True)
        }
    return compute_outputs(kind, params, *graph).detach()


def train(model: str, folder: Path) -> tuple[Run, tuple[np.ndarray, ...]]:
    """A run on a user's graph, and the graph."""
    graph = write_graph(folder / "papers")
    data = str(folder / "papers")
    return metareg.train(task="graph-folder", model=model, data=data, fanout=3, out=folder / "run", **SMALL), graph


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train("sgc", tmp_path_factory.mktemp("sgc"))[0]


SUPPORT, LABELS = [3, 9, 15, 4, 10], ["ten", "ten", "ten", "nine", "nine"]


def write_tables(folder: Path) -> tuple[Path, Path]:
    rows = [f"{label};p{node}" for node, label in zip(SUPPORT, LABELS, strict=True)]
    (folder / "support.csv").write_text("\n".join(["label;node", *rows]))
    (folder / "query.csv").write_text("\n".join(["node", *(f"p{node}" for node in range(NODES))]))
    return folder / "support.csv", folder / "query.csv"


@pytest.mark.parametrize(("model", "kind"), [("gcn", "gcn"), ("sgc", "sgc"), ("graphsage", "mean")])
def test_predictions_and_programs_are_those_of_a_loop(
    model: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, graph = train(model, tmp_path)
    support, query = write_tables(tmp_path)
    y = torch.tensor([["nine", "ten"].index(label) for label in LABELS])
    scores = adapt(kind, run, SUPPORT, y.tolist(), *graph)
    chances = scores.softmax(1)

    monkeypatch.setattr("metareg.runs.exports._AT_ONCE", 50)
    answer = list(csv.DictReader(run.predict(support, query).splitlines()))
    assert [row["node"] for row in answer] == [f"p{node}" for node in range(NODES)]
    assert [row["label"] for row in answer] == [["nine", "ten"][best] for best in chances.argmax(1).tolist()]
    found = [float(row["probability"]) for row in answer]
    assert found == pytest.approx(chances.max(1).values.tolist(), abs=2e-4)

    run.export(tmp_path / "papers.pt2", support=support)
    facts = {"metareg.json": ""}
    program = torch.export.load(str(tmp_path / "papers.pt2"), extra_files=facts).module()
    torch.testing.assert_close(program(torch.arange(NODES)), scores, rtol=0, atol=1e-4)
    content = json.loads(facts["metareg.json"])
    assert (content["numbers_of"], content["names"][7], content["classes"]) == ("node", "p7", ["nine", "ten"])

    if kind != "sgc":
        with pytest.raises(UsageError, match="neighbourhood of a node"):
            run.export(tmp_path / "learner.pt2", adaptive=True)
        return
    run.export(tmp_path / "learner.pt2", adaptive=True)
    outputs = run_without_metareg(tmp_path / "learner.pt2", torch.tensor(SUPPORT), y, torch.arange(NODES))
    torch.testing.assert_close(outputs, scores, rtol=0, atol=1e-4)


def run_without_metareg(program: Path, *inputs: Tensor) -> Tensor:
    """Return the outputs of a program in a process that can import neither metareg nor DGL."""
    torch.save(inputs, program.with_suffix(".in"))
    script = (
        "import sys\nsys.modules['metareg'] = sys.modules['dgl'] = None\nimport torch\nprogram, given, to = sys.argv[1:]\n"
        "torch.save(torch.export.load(program).module()(*torch.load(given)), to)"
    )
    files = [str(program), str(program.with_suffix(".in")), str(program.with_suffix(".out"))]
    subprocess.run([sys.executable, "-c", script, *files], check=True, env=environment(), timeout=120)
    outputs: Tensor = torch.load(files[2])
    return outputs


@pytest.mark.parametrize(
    ("support", "query", "says"),
    [
        ("node,label\np3,a\npp4,b", "node\np5", r"line 3, column 'node', contains 'pp4', which .* did you mean 'p4'"),
        ("node,label\np3,a\np3,b", "node\np5", r"line 3, column 'node', contains 'p3' a second time"),
        ("node,lable\np3,a", "node\np5", "label"),
        ("node,label\np3,a\np4,", "node\np5", r"line 3, column 'label', is empty"),
        ("node,label\np3,a\np4,b\np5,c", "node\np5", r"3 classes; this learner distinguishes 2"),
        ("node,label\np3,a", "node,label\np5,a", "column 'label', which is not used"),
        ("node,label\np3,a", "u,v,w,x,y\n1,2,3,4,5", "node"),
        ("node,label\np3,a", "node\nq5", "'q5'"),
    ],
)
def test_tables_that_name_no_nodes_are_refused(
    smoothed: Run, support: str, query: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "support.csv").write_text(support)
    (tmp_path / "query.csv").write_text(query)
    with pytest.raises(UsageError, match=says):
        smoothed.predict(tmp_path / "support.csv", tmp_path / "query.csv")


def test_numbers_name_the_nodes_of_files_without_ids(data_folder: Path) -> None:
    from metareg.registry.plugins import resolve

    learner_task = resolve("tasks", "cora", {"data": str(data_folder / "graphs"), "ways": 2})
    nodes = learner_task.instance.named_examples
    assert nodes.names is None
    assert nodes.number(["0", "2707"]).tolist() == [0, 2707]
    with pytest.raises(KeyError):
        nodes.number(["2708"])


def test_graphs_of_one_folder_have_ids_of_their_own(tmp_path: Path) -> None:
    from metareg_graph.data import load

    (tmp_path / "both").mkdir()
    for name in ("north", "south"):
        write_graph(tmp_path / "both" / name)
    data = load(tmp_path / "both")
    assert (data.ids[0], data.ids[NODES + 5]) == ("north/p0", "south/p5")


def test_tasks_that_draw_their_graphs_have_no_nodes_to_name(tmp_path: Path) -> None:
    run = metareg.train(task="csbm", out=tmp_path / "run", **SMALL)
    support, query = write_tables(tmp_path)
    for use in (lambda: run.predict(support, query), lambda: run.export(tmp_path / "a.pt2", adaptive=True)):
        with pytest.raises(UsageError, match="is a new graph"):
            use()


@pytest.mark.parametrize("options", [{"model": "mlp"}, {"algo": "cavia"}])
def test_a_model_for_vectors_is_refused_with_what_the_task_needs(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="inputs are a dict of x, blocks; the task's own model is 'gcn'"):
        metareg.train(**{"algo": "maml", **options}, task="csbm", out=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()
