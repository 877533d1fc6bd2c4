"""Graph files: every format, the splits, and one clear sentence for each problem."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from downloads import cut_off, serve
from metareg import MetaregError, UsageError, data_folder

if sys.version_info >= (3, 12):
    pytest.skip("DGL has no wheels for this Python", allow_module_level=True)

from metareg_graph import AmazonComputer, CiteSeer, CoauthorCS, Cora, CoraFull, GraphFolder, OgbnArxiv, PubMed
from metareg_graph.data import Source, fetch, load, locate
from metareg_graph.splits import SPLITS, split_nodes

dgl = pytest.importorskip("dgl", reason="DGL is not installed")

NODES = 60
LABELS = np.arange(NODES) % 6
FEATURES = np.random.default_rng(0).random((NODES, 3)).astype(np.float32)
EDGES = np.random.default_rng(1).integers(NODES, size=(150, 2))


def simple(edges: np.ndarray) -> set[tuple[int, int]]:
    """Return the edges in both directions, without loops."""
    return {(int(a), int(b)) for one, two in edges for a, b in ((one, two), (two, one)) if a != b}


def npz(path: Path, **changes: Any) -> Path:
    order = np.argsort(EDGES[:, 0], kind="stable")
    arrays = {
        "adj_indptr": np.concatenate([[0], np.bincount(EDGES[:, 0], minlength=NODES).cumsum()]),
        "adj_indices": EDGES[order, 1],
        "features": FEATURES,
        "labels": LABELS,
    }
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path


def binary(path: Path, count: int = 1, features: np.ndarray = FEATURES) -> Path:
    graph = dgl.graph((torch.from_numpy(EDGES[:, 0]), torch.from_numpy(EDGES[:, 1])), num_nodes=NODES)
    graph.ndata["feat"], graph.ndata["label"] = torch.from_numpy(features), torch.from_numpy(LABELS)
    dgl.save_graphs(str(path), [graph] * count)
    return path


def tables(path: Path, edges: str | None = None, nodes: str | None = None) -> Path:
    path.mkdir(exist_ok=True)
    rows = [f"n{i},{LABELS[i]}," + ",".join(repr(float(x)) for x in FEATURES[i]) for i in range(NODES)]
    (path / "nodes.csv").write_text(nodes or "\n".join(["id,label,a,b,c", *rows]))
    lines = [f"n{a},n{b}" for a, b in EDGES]
    (path / "edges.csv").write_text(edges or "\n".join(["source,destination", *lines]))
    return path


def ogb(path: Path) -> Path:
    (path / "raw").mkdir(parents=True)
    for name, table in (("edge", EDGES), ("node-feat", FEATURES), ("node-label", LABELS[:, None])):
        text = io.StringIO()
        np.savetxt(text, table, delimiter=",", fmt="%r" if table.dtype.kind == "f" else "%d")
        with gzip.open(path / "raw" / f"{name}.csv.gz", "wt") as file:
            file.write(text.getvalue().replace("np.float32(", "").replace(")", ""))
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {
    "npz": lambda folder: npz(folder / "graph.npz"),
    "dgl": lambda folder: binary(folder / "graph.bin"),
    "csv": lambda folder: tables(folder / "tables"),
    "ogb": lambda folder: ogb(folder / "ogbn_arxiv"),
}


@pytest.mark.parametrize("form", MAKERS)
def test_every_format_holds_the_same_graph(form: str, tmp_path: Path) -> None:
    data = load(MAKERS[form](tmp_path))
    torch.testing.assert_close(data.features, torch.from_numpy(FEATURES))
    assert data.labels.tolist() == LABELS.tolist()
    source, destination = data.graph.edges()
    found = list(zip(source.tolist(), destination.tolist(), strict=True))
    assert set(found) == simple(EDGES)
    assert len(found) == len(set(found))


def test_directions_are_kept_where_asked_for(tmp_path: Path) -> None:
    source, destination = load(npz(tmp_path / "g.npz"), directed=True).graph.edges()
    assert set(zip(source.tolist(), destination.tolist(), strict=True)) == {(a, b) for a, b in EDGES.tolist() if a != b}


def test_what_a_file_calls_its_classes_is_for_pictures_alone(tmp_path: Path) -> None:
    names = [f"kind {label}" for label in range(int(LABELS.max()) + 1)]
    named = load(npz(tmp_path / "named.npz", class_names=np.array(names)))
    assert named.captions == tuple(names)
    assert named.classes == ()
    for bad in (np.array(names[:-1]), np.arange(len(names))):
        assert load(npz(tmp_path / "other.npz", class_names=bad)).captions == ()


def test_gnn_benchmark_files_are_read(data_folder: Path) -> None:
    for name, nodes, classes, words in (("cora", 2708, 7, 1433), ("citeseer", 3312, 6, 3703)):
        data = load(data_folder / "graphs" / f"{name}.npz")
        assert data.features.shape == (nodes, words)
        assert len(data.labels.unique()) == classes
        assert set(data.features.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("task", "own", "expected"),
    [
        (Cora, lambda words: (words > 0.5).astype(np.float32), lambda words: words > 0.5),
        (CiteSeer, lambda words: (words > 0.5).astype(np.float32), lambda words: words > 0.5),
        (PubMed, lambda words: words / 10, lambda words: words / np.maximum(words.sum(1, keepdims=True), 1e-30)),
    ],
)
def test_copies_of_a_dataset_have_the_same_features(
    task: Any, own: Callable[..., np.ndarray], expected: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    words = FEATURES.copy()
    words[7] = 0
    features = own(words)
    shares = features / np.maximum(features.sum(1, keepdims=True), 1e-30)  # what DGL stores
    copies = npz(tmp_path / "gnn-benchmark.npz", features=features), binary(tmp_path / "dgl.bin", features=shares)
    for path in copies:
        found = task(task.Config(data=str(path))).data.features
        torch.testing.assert_close(found, torch.from_numpy(expected(words).astype(np.float32)))


def test_rows_are_normalised_where_asked_for(tmp_path: Path) -> None:
    features = FEATURES / 10
    features[7] = 0
    path = npz(tmp_path / "g.npz", features=features)
    found = folder_task(path, row_normalised=True).data.features
    torch.testing.assert_close(found.sum(1), (torch.arange(NODES) != 7).float())
    assert folder_task(path).data.features.equal(torch.from_numpy(features))


# ------------------------------------------------------------------------------------------------------------ bad input


def bad(mask: str) -> Any:
    features = FEATURES.copy()
    features[11, 1] = np.nan
    return {
        "nan": {"features": features},
        "range": {"labels": np.where(LABELS == 5, -3, LABELS)},
        "float labels": {"labels": LABELS + 0.5},
        "too few labels": {"labels": LABELS[:-1]},
        "edge": {"adj_indices": np.full(150, 4711)},
        "missing": {"labels": None},
        "pointers": {"adj_indices": EDGES[:-3, 1]},
        "pickle": {"labels": np.array([{}] * NODES, dtype=object)},
    }[mask]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "not all finite numbers; the first bad row is node 11"),
        ("range", "out of range: -3 is not a class number"),
        ("float labels", "must be 60 whole numbers"),
        ("too few labels", "must be 60 whole numbers"),
        ("edge", "names node 4711, which does not exist: its 60 nodes have the numbers 0 to 59"),
        ("missing", "has no array 'labels'; there are adj_indices, adj_indptr, features"),
        ("pointers", "do not fit together"),
        ("pickle", "contains pickled objects, which could run code"),
    ],
)
def test_bad_arrays(what: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load(npz(tmp_path / "g.npz", **bad(what)))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no graph at"):
        load(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(UsageError, match=r"text\.npz cannot be read as a graph"):
        load(tmp_path / "text.npz")
    (tmp_path / "graph.txt").write_text("0 1")
    with pytest.raises(UsageError, match=r"must be \.npz, \.bin \(DGL\) or a folder"):
        load(tmp_path / "graph.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="contains no graph"):
        load(tmp_path / "empty")
    (tmp_path / "pickle.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(UsageError, match="is a pickle, which could run code"):
        load(tmp_path / "pickle.bin")
    (tmp_path / "damaged.bin").write_bytes(b"not a graph at all, but long enough")
    with pytest.raises(UsageError, match=r"damaged\.bin cannot be read as a DGL graph"):
        load(tmp_path / "damaged.bin")
    with pytest.raises(
        UsageError, match=r"edges\.csv, line 2, column 'destination', names node 'n99', which does not exist"
    ):
        load(tables(tmp_path / "a", edges="source,destination\nn0,n99"))
    with pytest.raises(UsageError, match="has no column 'label'"):
        load(tables(tmp_path / "b", nodes="id,a\nn0,1"))
    with pytest.raises(UsageError, match=r"nodes\.csv.*'x'"):
        load(tables(tmp_path / "c", nodes="id,label,a\nn0,1,x"))
    folder = tables(tmp_path / "d")
    (folder / "splits.json").write_text('{"classs": {}}')
    with pytest.raises(UsageError, match=r"splits\.json must be"):
        load(folder)
    (folder / "splits.json").write_text('{"nodes": {"train": ["n0"], "train": ["n1"]}}')
    with pytest.raises(UsageError, match=r"splits\.json.*'train'.*twice"):
        load(folder)


@pytest.mark.parametrize(
    ("nodes", "edges"),
    [
        ("id,label,a\nu,0,1\nv,1,2\nw,0,3\n", "source,target\nu,v\nw,u\n"),
        ("\ufeffa;Label;Id\n1,0;0;u\n2,0;1;v\n3,0;0;w\n\n", "\ufeffid;Target;weight;Source\n0;v;0,5;u\n1;u;1;w\n\n"),
        ("id\tlabel\ta\nu\tAI\t1\nv\tTheory\t2\nw\tAI\t3\n", "w,u\nu,v\n"),
        ("label,a,id\n10,1,u\n2000,2,v\n10,3,w\n", "to,from\nv,u\nu,w\n"),
    ],
)
def test_tables_by_the_names_of_their_columns(tmp_path: Path, nodes: str, edges: str) -> None:
    data = load(tables(tmp_path / "g", edges, nodes), directed=True)
    assert data.features.tolist() == [[1], [2], [3]]
    assert data.labels.tolist() == [0, 1, 0]
    source, destination = data.graph.edges()
    assert {("uvw"[a], "uvw"[b]) for a, b in zip(source.tolist(), destination.tolist(), strict=True)} == {
        ("u", "v"), ("w", "u"),
    }  # fmt: skip


def test_a_first_line_that_could_be_an_edge_or_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="could be an edge or column names"):
        load(tables(tmp_path / "g", "u,v\nv,u\n", "id,label,a\nu,0,1\nv,1,2\n"))


def test_edges_of_numbered_nodes_without_a_header(tmp_path: Path) -> None:
    folder = tables(tmp_path / "g", "0,1\n1,2\n", "id,label,a\n0,0,1\n1,1,2\n2,0,3\n")
    assert load(folder, directed=True).graph.num_edges() == 2


def test_names_in_the_split_file(tmp_path: Path) -> None:
    folder = tables(tmp_path / "g", "source,target\n10,11\n", "id,label,a\n10,AI,1\n11,1e3,2\n12,Theory,3\n")
    path = folder / "splits.json"
    path.write_text('\ufeff{"classes": {"Train": ["AI"], "val": ["1e3"], "testing": ["Theory"]}}')
    data = load(folder)
    assert data.classes == ("1e3", "AI", "Theory")
    assert data.splits["classes"] == {"train": [1], "validation": [0], "test": [2]}
    path.write_text('{"nodes": {"train": [12], "val": ["10"], "test": [11]}}')
    assert load(folder).splits["nodes"] == {"train": [2], "validation": [0], "test": [1]}
    path.write_text('{"nodes": {"train": [0], "val": ["10"], "test": [11]}}')
    with pytest.raises(UsageError, match="names node '0', which does not exist"):
        load(folder)


def test_graphs_of_a_folder_share_the_names_of_classes(tmp_path: Path) -> None:
    for name, labels in (("a", "red blue"), ("b", "green red")):
        first, second = labels.split()
        tables(tmp_path / name, "source,target\nu,v\n", f"id,label,a\nu,{first},1\nv,{second},2\n")
    data = load(tmp_path)
    assert [data.classes[label] for label in data.labels] == ["red", "blue", "green", "red"]
    tables(tmp_path / "b", "source,target\nu,v\n", "id,label,a\nu,0,1\nv,1,2\n")
    with pytest.raises(UsageError, match="labels of b are numbers"):
        load(tmp_path)


def test_where_data_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("METAREG_DATA", raising=False)
    local = npz(tmp_path / "upstream.npz")
    with serve(tmp_path) as address:
        source = Source(("mine.npz",), url=f"{address}/upstream.npz")
        with pytest.raises(UsageError, match="the location given by --data"):
            locate("mine", source, str(tmp_path / "nowhere"))
        with pytest.raises(UsageError, match=r"does not contain 'mine': none of mine\.npz"):
            locate("mine", source, str(tmp_path))
        with pytest.raises(UsageError, match="`metareg data mine --download` downloads it"):  # only on request
            locate("mine", source, None)
        assert not (tmp_path / "cache").exists()
        downloaded = fetch(source, data_folder())
        assert downloaded == tmp_path / "cache" / "data" / "graphs" / "upstream.npz"
        assert downloaded.read_bytes() == local.read_bytes()
        assert locate("mine", replace(source, names=("upstream.npz",)), None) == downloaded
    cut_off(monkeypatch)
    with pytest.raises(MetaregError, match="cannot be downloaded: there is no connection"):
        fetch(Source(("other.npz",), url="https://host.invalid/gone.npz"), data_folder())
    # The folder of downloads of earlier versions.
    (tmp_path / "cache" / "graphs").mkdir(parents=True)
    earlier = npz(tmp_path / "cache" / "graphs" / "mine.npz")
    assert locate("mine", source, None) == earlier
    (tmp_path / "data" / "graphs").mkdir(parents=True)
    kept = npz(tmp_path / "data" / "graphs" / "mine.npz")
    assert locate("mine", source, str(tmp_path / "data")) == kept
    monkeypatch.setenv("METAREG_DATA", str(tmp_path / "data"))
    assert locate("mine", source, None) == kept


def test_arxiv_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREG_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"download https://snap\.stanford\.edu/ogb/"):
        _ = OgbnArxiv(OgbnArxiv.Config()).spec
    ogb(tmp_path / "ogbn_arxiv")
    assert OgbnArxiv(OgbnArxiv.Config()).spec.input_shape == (3,)


# --------------------------------------------------------------------------------------------------------------- splits


def folder_task(path: Path, **options: Any) -> GraphFolder:
    return GraphFolder(GraphFolder.Config(data=str(path), **{"shots": 1, "query": 3, **options}))


def split_labels(task: Any, split: str, seed: int = 0) -> set[int]:
    return set(task.data.labels[torch.from_numpy(task._pool(split, seed).nodes)].tolist())


@pytest.mark.parametrize("task", [Cora, CiteSeer, CoraFull, CoauthorCS, AmazonComputer, OgbnArxiv])
def test_published_splits_are_disjoint_and_complete(task: Any, tmp_path: Path) -> None:
    sizes = {
        "cora": (3, 2, 2), "citeseer": (2, 2, 2), "cora-full": (25, 20, 25), "coauthor-cs": (5, 5, 5),
        "amazon-computer": (4, 3, 3), "ogbn-arxiv": (20, 10, 10),
    }  # fmt: skip
    count = sum(sizes[task.name])
    labels = np.arange(count * 6) % count
    path = tmp_path / "g.npz"
    indices = np.zeros(0, dtype=np.int64)
    np.savez(path, adj_indptr=np.zeros(len(labels) + 1, dtype=np.int64), adj_indices=indices,
             features=np.ones((len(labels), 2)), labels=labels)  # fmt: skip
    made = task(task.Config(data=str(path), shots=1, query=3))
    found = [split_labels(made, split) for split in ("train", "validation", "test")]
    assert tuple(map(len, found)) == sizes[task.name]
    assert len(set.union(*found)) == count
    drawn_anew = split_labels(made, "train", 1) != found[0]
    assert drawn_anew == (SPLITS[task.name].counts is not None)  # type: ignore[union-attr]


def test_pubmed_shares_its_labels(tmp_path: Path) -> None:
    task = PubMed(PubMed.Config(data=str(npz(tmp_path / "g.npz", labels=LABELS % 3)), shots=1, query=2))
    pools = [task._pool(split, 0) for split in ("train", "validation", "test")]
    nodes = [set(pool.nodes.tolist()) for pool in pools]
    assert [len(each) for each in nodes] == [36, 12, 12]
    assert len(set.union(*nodes)) == NODES
    drawn = pools[0].draw("train", range(50), 0).query.reshape(50, 2, 2)
    assert (LABELS[drawn[:, 0, 0]] % 3 < LABELS[drawn[:, 1, 0]] % 3).all()


def test_own_classes(tmp_path: Path) -> None:
    path = npz(tmp_path / "g.npz")
    given = {"train": [0, 1], "validation": [2, 5], "test": [3, 4]}
    task = folder_task(path, classes=given)
    assert split_labels(task, "validation") == {2, 5}
    for wrong, message in (
        ({**given, "test": [3, 9]}, "names class 9, which no node has"),
        ({**given, "test": [3, 0]}, "Class 0 is in train and in test"),
        ({"train": [0, 1]}, "needs the lists train, validation, test"),
    ):
        with pytest.raises(UsageError, match=message):
            split_labels(folder_task(path, classes=wrong), "test")


def test_splits_file_of_a_folder(tmp_path: Path) -> None:
    folder = tables(tmp_path / "graph")
    (folder / "splits.json").write_text(
        json.dumps({"classes": {"train": [5, 4], "validation": [3, 2], "test": [1, 0]}})
    )
    assert split_labels(folder_task(folder), "test") == {0, 1}
    thirds = np.split(np.arange(NODES), 3)
    names = ("train", "validation", "test")
    nodes = {name: part.tolist() for name, part in zip(names, thirds, strict=True)}
    (folder / "splits.json").write_text(json.dumps({"nodes": nodes}))
    load_again = folder_task(folder, query=2)
    assert set(load_again._pool("validation", 0).nodes.tolist()) == set(range(20, 40))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"nodes": {"train": [0, 1, 2], "validation": [3], "test": [4, 2, 1]}},
            "Node 1 is in train and in test, and 1 more",
        ),
        ({"nodes": {"train": [0, 0], "validation": [3], "test": [4]}}, "Node 0 is in train and in train"),
        (
            {"nodes": {"train": ["n1"], "validation": [3], "test": [4]}},
            "names 'n1'; it must name nodes by their numbers",
        ),
        ({"graphs": {"train": ["g0"], "validation": ["g1"], "test": ["g0"]}}, "Graph 'g0' is in train and in test"),
        ({"graphs": {"train": ["g0"], "validation": ["g1"], "test": [["g2"]]}}, "must name graphs by their names"),
    ],
)
def test_what_is_tested_was_not_trained_on(splits: dict[str, Any], message: str, tmp_path: Path) -> None:
    for number in range(1 if "nodes" in splits else 3):
        npz(tmp_path / f"g{number}.npz")
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(UsageError, match=message):
        folder_task(tmp_path)._pool("validation", 0)


def test_several_graphs_share_labels_and_are_kept_apart(tmp_path: Path) -> None:
    for number in range(5):
        npz(tmp_path / f"g{number}.npz", labels=LABELS % 3, features=FEATURES + number)
    task = folder_task(tmp_path, query=2)
    assert task.data.names == tuple(f"g{number}" for number in range(5))
    graphs = {}
    for split in ("train", "validation", "test"):
        seeds = task._pool(split, 0).draw(split, range(60), 0)
        members = task.data.members.numpy()[np.concatenate([seeds.support, seeds.query], 1)]
        assert (members == members[:, :1]).all()
        graphs[split] = set(members[:, 0].tolist())
    assert [len(each) for each in graphs.values()] == [3, 1, 1]
    assert len(set.union(*graphs.values())) == 5
    given = {"graphs": {"train": ["g0"], "validation": ["g1"], "test": ["g9"]}}
    (tmp_path / "splits.json").write_text(json.dumps(given))
    with pytest.raises(UsageError, match=r"'g9'.*g0"):
        folder_task(tmp_path, ways=3)._pool("test", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shots": 8},
            r"Class \d has 10 nodes in the train split of 'graph-folder'; 8 support and 3 query nodes need 11",
        ),
        ({"ways": 5}, "a split by class needs 15 for 5-way tasks"),
        ({"split": "graphs"}, "A split by graph needs at least three graphs; there are 1"),
        ({"ways": 7, "split": "nodes"}, "A task of 7 classes needs as many in the train split"),
    ],
)
def test_impossible_tasks(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    task = folder_task(npz(tmp_path / "g.npz"), **{"split": "classes", **options})
    with pytest.raises(UsageError, match=message):
        task.episodes("train", range(2), 0)


def test_no_such_split(tmp_path: Path) -> None:
    data = load(npz(tmp_path / "g.npz"))
    with pytest.raises(UsageError, match="there is no 'dev'"):
        split_nodes(data, "auto", "dev", 0, 2, 4)


def test_graphs_of_different_widths(tmp_path: Path) -> None:
    npz(tmp_path / "a.npz")
    npz(tmp_path / "b.npz", features=FEATURES[:, :2])
    with pytest.raises(UsageError, match="the same number of features; they have: a 3, b 2"):
        load(tmp_path)


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = npz(tmp_path / "g.npz")
    assert folder_task(path).spec.input_shape == (3,)
    npz(path, features=FEATURES[:, :2])
    assert folder_task(path).spec.input_shape == (2,)
    assert binary(tmp_path / "two.bin", 2).is_file()
    assert load(tmp_path / "two.bin").names == ("two-0", "two-1")


def test_what_metareg_data_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("METAREG_DATA", str(tmp_path / "data"))
    missing = Cora(Cora.Config()).dataset
    assert missing is not None
    assert (missing.present, missing.location) == (False, tmp_path / "data" / "graphs")
    assert missing.download is not None
    (tmp_path / "data" / "graphs").mkdir(parents=True)
    npz(tmp_path / "data" / "graphs" / "cora.npz")
    there = Cora(Cora.Config()).dataset
    assert there is not None
    assert (there.present, there.location) == (True, tmp_path / "data" / "graphs")
    assert there.verify() == f"60 nodes, {len(simple(EDGES))} directed edges, 3 features, 6 classes"
    assert GraphFolder(GraphFolder.Config()).dataset is None
    arxiv = OgbnArxiv(OgbnArxiv.Config()).dataset
    assert arxiv is not None
    assert arxiv.download is None


def test_the_drawn_graph_has_the_shape_that_its_script_states(tmp_path: Path) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "computer_graph.py"))
    script["draw_graph"](tmp_path / "computer.npz", 0)
    graph = load(tmp_path / "computer.npz")
    assert graph.graph.num_nodes() == 13_752
    assert graph.graph.num_edges() == 491_722
    assert tuple(graph.features.shape) == (13_752, 767)
    assert sorted(np.bincount(graph.labels.numpy()).tolist()) == sorted(script["CLASS_SIZES"])
    source, target = graph.graph.edges()
    assert (graph.labels[source] == graph.labels[target]).float().mean().item() == pytest.approx(0.78, abs=0.03)
