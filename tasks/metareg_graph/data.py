"""Node-labelled graphs, and their loaders, which never unpickle anything."""

from __future__ import annotations

import dataclasses
import gzip
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metareg import (
    Table,
    UsageError,
    cache_folder,
    data_folder,
    download,
    find_split,
    open_arrays,
    parse_in_child,
    read_json,
    read_table,
)  # fmt: skip
from metareg_graph._dgl import import_dgl

__all__ = ["GraphData", "Normalisation", "Source", "fetch", "find_local", "join_graphs", "load", "locate"]

log = logging.getLogger("metareg")

_SOURCE, _DESTINATION = ("source", "src", "from", "s", "u"), ("destination", "dst", "target", "to", "t", "v", "dest")
"""Accepted names of the columns of edges.csv, ignoring case."""
_WHOLE = re.compile(r"-?\d+(\.0*)?")
_LEAST_NUMBERS, _MOST_NUMBERS = 1 << 26, 2000
"""Limits for dense features: this many numbers, or this many per nonzero number and node."""
_LEAST_TEXT, _MOST_TEXT = 1 << 26, 40
"""Limits for compressed text: it may unpack to this many characters, or this many per byte."""
_UNLABELLED = frozenset({"", "-1", "na", "n/a", "nan", "null"})

GNN_BENCHMARK = "https://github.com/shchur/gnn-benchmark/raw/master/data/npz/"


Normalisation = Literal["none", "binary", "sum"]
"""Normalisation of a node's features: none; 1 for each nonzero number, as for words in a text; or division by their
sum. It makes copies of a dataset that differ in this equal."""


@dataclass(frozen=True, eq=False)
class GraphData:
    """Graphs with node features and labels, as one DGL graph that is their disjoint union.

    Args:
        graph: a `dgl.DGLGraph` without self-loops and parallel edges; edges run both ways in an undirected graph.
        features: ``[nodes, features]``, in torch's default float type.
        labels: class numbers ``[nodes]``; −1 for nodes without a label.
        members: the number of each node's graph ``[nodes]``.
        names: the graphs' names.
        splits: the splits from the files: ``{"classes" | "graphs" | "nodes": {split: numbers or names}}``.
        classes: the names of the classes; empty if the file's labels are class numbers.
        ids: the nodes' names in their files, with several graphs as ``GRAPH/ID``; empty if nodes are numbered from 0.
        captions: names of the classes for plots, if a file with class numbers has them; otherwise empty.
    """

    graph: Any
    features: Tensor
    labels: Tensor
    members: Tensor
    names: tuple[str, ...]
    splits: Mapping[str, Mapping[str, Any]]
    classes: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    @classmethod
    def from_edges(
        cls,
        source: Tensor,
        destination: Tensor,
        features: Tensor,
        labels: Tensor,
        *,
        directed: bool = False,
        name: str = "the graph",
        splits: Mapping[str, Mapping[str, Any]] | None = None,
        classes: tuple[str, ...] = (),
        ids: tuple[str, ...] = (),
    ) -> GraphData:
        """Create a graph from its edges, after checks; remove self-loops and parallel edges.

        Args:
            source: the source node of each edge ``[edges]``.
            destination: the destination node of each edge ``[edges]``.
            features: ``[nodes, features]``.
            labels: class numbers ``[nodes]``; −1 for no label.
            directed: keep the edges' directions; otherwise, each edge runs both ways.
            name: the graph's name in messages.
            splits: see `GraphData`.
            classes: see `GraphData`.
            ids: see `GraphData`.

        Raises:
            UsageError: features are not finite, an edge leads to a node that does not exist, or a label is not a class
                number.
        """
        nodes = len(features)
        if features.dim() != 2 or not features.shape[1] or not nodes:
            raise UsageError(
                f"The features of {name} have the shape {tuple(features.shape)}; they must be [nodes, features]."
            )
        bad = (~torch.isfinite(features)).any(1).nonzero()
        if len(bad):
            raise UsageError(
                f"The features of {name} are not all finite numbers; the first bad row is node {int(bad[0])}."
            )
        if labels.shape != (nodes,) or labels.is_floating_point():
            raise UsageError(
                f"The labels of {name} must be {nodes} whole numbers, one per node; they have shape "
                f"{tuple(labels.shape)} and type {str(labels.dtype).removeprefix('torch.')}."
            )
        labels = labels.long()
        if int(labels.min()) < -1 or int(labels.max()) >= nodes:
            wrong = labels[(labels < -1) | (labels >= nodes)][0]
            raise UsageError(
                f"The labels of {name} are out of range: {int(wrong)} is not a class number (0, 1, …, or −1 for no "
                "label)."
            )
        source, destination = source.long(), destination.long()
        for end in (source, destination):
            outside = end[(end < 0) | (end >= nodes)]
            if len(outside):
                raise UsageError(
                    f"An edge of {name} names node {int(outside[0])}, which does not exist: its {nodes} nodes have the "
                    f"numbers 0 to {nodes - 1}."
                )
        if not directed:
            source, destination = torch.cat([source, destination]), torch.cat([destination, source])
        # Unique keys, sorted by destination, without self-loops.
        keys = (destination * nodes + source)[source != destination].unique()
        graph = import_dgl().graph((keys % nodes, keys // nodes), num_nodes=nodes)
        return cls(
            graph,
            features.to(torch.get_default_dtype()),
            labels,
            torch.zeros(nodes, dtype=torch.int64),
            (name,),
            splits or {},
            classes,
            ids,
        )


def join_graphs(graphs: list[GraphData], splits: Mapping[str, Mapping[str, Any]]) -> GraphData:
    """Join several graphs with shared labels; classes with the same name are the same.

    Raises:
        UsageError: the numbers of features differ, or some graphs have class names and others numbers.
    """
    widths = {each.names[0]: each.features.shape[1] for each in graphs}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise UsageError(f"Graphs of one folder must have the same number of features; they have: {listed}.")
    classes = _sort_names({name for each in graphs for name in each.classes})
    if classes:
        graphs = [_renumber_labels(each, classes) for each in graphs]
    return GraphData(
        import_dgl().batch([each.graph for each in graphs]),
        torch.cat([each.features for each in graphs]),
        torch.cat([each.labels for each in graphs]),
        torch.cat([torch.full_like(each.members, number) for number, each in enumerate(graphs)]),
        tuple(name for each in graphs for name in each.names),
        _number_split(splits, classes),
        classes,
        tuple(f"{each.names[0]}/{name}" for each in graphs for name in each.ids or range(each.graph.num_nodes())),
    )


def _renumber_labels(data: GraphData, classes: tuple[str, ...]) -> GraphData:
    """Renumber a graph's labels by a longer list of classes."""
    if not data.classes:
        raise UsageError(
            f"The labels of {data.names[0]} are numbers, but those of other graphs in its folder are names "
            f"({classes[0]}, …); the graphs of one folder must share their labels."
        )
    numbers = torch.tensor([classes.index(name) for name in data.classes] + [-1])
    return replace(data, labels=numbers[data.labels], classes=classes)


def _number_split(splits: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Replace class names by numbers in the splits from files."""
    numbers = {name: number for number, name in enumerate(classes)}
    given = splits.get("classes")
    if not isinstance(given, Mapping):
        return dict(splits)
    return {**splits, "classes": {split: _replace_known(names, numbers) for split, names in given.items()}}


def _replace_known(names: Any, numbers: Mapping[str, int]) -> Any:
    """Replace names in a list by their numbers; keep unknown names, which the split then refuses."""
    return [numbers.get(str(name), name) for name in names] if isinstance(names, list) else names


# ------------------------------------------------------------------------------------------------------ finding the files


@dataclass(frozen=True)
class Source:
    """The location of a published dataset, and how to normalise its copies.

    Args:
        names: usual paths of the dataset, relative to a data folder.
        url: the address to download it from; None if there is none.
        checksum: ``"sha256:"`` and the file's checksum, if known.
        normalisation: the normalisation of the features, for copies that differ: DGL divides by the sum for some
            datasets.
        advice: advice for messages if it can be neither found nor downloaded.
    """

    names: tuple[str, ...]
    url: str | None = None
    checksum: str | None = None
    normalisation: Normalisation = "none"
    advice: str = ""


def find_local(source: Source, data: str | None) -> Path | None:
    """Find the file or folder of a dataset in `data`, otherwise in the data folder or the cache; None if missing."""
    if data is not None and Path(data).is_file():
        return Path(data)
    roots = [Path(data)] if data is not None else [data_folder(), cache_folder()]
    candidates = (root / folder / name for root in roots for folder in ("", "graphs") for name in source.names)
    return next((path for path in candidates if path.exists()), None)


def locate(name: str, source: Source, data: str | None) -> Path:
    """Return the file or folder of a dataset, without downloading anything.

    Args:
        name: the dataset's name.
        source: where to look.
        data: the user's option: the file itself, or a folder that contains it.

    Raises:
        UsageError: the dataset is missing; the message says how to get it.
    """
    found = find_local(source, data)
    if found is not None:
        return found
    if data is not None:
        if not Path(data).exists():
            raise UsageError(f"There is no {data}, the location given by --data for the data of '{name}'.")
        raise UsageError(f"{data} does not contain '{name}': none of {', '.join(source.names)} is there.")
    if source.url is None:
        raise UsageError(f"'{name}' is not here: {source.advice} and name its folder with --data or METAREG_DATA.")
    raise UsageError(
        f"The data of the task '{name}' is not in {data_folder()}: `metareg data {name} --download` downloads it. To "
        "use another folder, set --data DIR or METAREG_DATA."
    )


def fetch(source: Source, folder: Path) -> Path:
    """Download a dataset's file into the folder of graphs in a data folder.

    Raises:
        MetaregError: the download fails, or the file has another checksum.
    """
    assert source.url is not None
    path = folder / "graphs" / Path(source.url).name
    download(source.url, path, source.checksum)
    return path


# -------------------------------------------------------------------------------------------------------- reading them


def load(path: Path, *, directed: bool = False, normalisation: Normalisation = "none") -> GraphData:
    """Read a graph, or a folder of graphs.

    Args:
        path: an npz with CSR arrays, a graph in DGL's binary format, an OGB folder, a folder with ``edges.csv`` and
            ``nodes.csv``, or a folder with several of these and an optional ``splits.json``.
        directed: keep the direction of edges.
        normalisation: the normalisation of the features.

    Raises:
        UsageError: a file is missing, damaged or invalid.
    """
    data = _read(path, directed)
    return replace(data, features=_normalise(data.features, normalisation))


def _normalise(features: Tensor, normalisation: Normalisation) -> Tensor:
    if normalisation == "binary":
        return (features != 0).to(features.dtype)
    if normalisation == "sum":
        sums = features.sum(1, keepdim=True)
        return features / torch.where(sums == 0, 1, sums)
    return features


def _read(path: Path, directed: bool) -> GraphData:
    if not path.exists():
        raise UsageError(f"There is no graph at {path}.")
    if path.suffix == ".npz":
        return _read_npz(path, directed)
    if path.suffix == ".bin":
        return _read_dgl(path, directed, {})
    if path.is_dir():
        return _read_folder(path, directed)
    raise UsageError(f"{path} cannot be read as a graph: it must be .npz, .bin (DGL) or a folder.")


def _read_folder(folder: Path, directed: bool) -> GraphData:
    splits = _read_splits(folder / "splits.json")
    if (folder / "edges.csv").exists() or (folder / "nodes.csv").exists():
        return _read_csv(folder, directed, splits)
    if (folder / "raw" / "edge.csv.gz").exists():
        return _read_ogb(folder, directed)
    parts = sorted(
        each
        for each in folder.iterdir()
        if each.suffix in (".npz", ".bin") or (each / "edges.csv").is_file()  # a folder inside
    )
    if not parts:
        raise UsageError(
            f"{folder} contains no graph: it, or a folder in it, must contain an .npz, a .bin of DGL, or nodes.csv and "
            "edges.csv."
        )
    graphs = [_read(part, directed) for part in parts]
    if len(graphs) == 1:
        only = graphs[0]
        return replace(only, splits=_number_split(splits, only.classes) or only.splits)
    return join_graphs(graphs, splits)


def _read_splits(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or not content.keys() <= {"classes", "graphs", "nodes"}:
        raise UsageError(f'{path} must be {{"classes" or "graphs" or "nodes": {{"train": […], …}}}}.')
    return {kind: _name_splits(given) for kind, given in content.items()}


def _name_splits(given: Any) -> Any:
    """Rename a split's keys to the usual names."""
    return {find_split(name) or name: names for name, names in given.items()} if isinstance(given, dict) else given


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading a file, which can contain anything, into one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"There is no {path}.") from None
    except UsageError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise UsageError(f"{path} cannot be read as a graph: {reason.splitlines()[0].rstrip('.')}.") from error


def _read_npz(path: Path, directed: bool) -> GraphData:
    """Read gnn-benchmark's CSR arrays: ``adj_indptr, adj_indices``, ``attr_*`` or ``features``, and ``labels``."""
    with open_arrays(path, "a graph") as file:

        def array(*names: str) -> np.ndarray:
            for name in names:
                if name in file:
                    return np.asarray(file[name])
            raise KeyError(f"it has no array '{names[0]}'; there are {', '.join(sorted(file))}")

        pointers, columns = array("adj_indptr", "indptr"), array("adj_indices", "indices")
        for indices in (pointers, columns):
            if indices.dtype.kind not in "iu" and not (indices == np.round(indices)).all():
                raise ValueError("its adjacency contains numbers that are not whole")
        labels, classes = _number_labels(array("labels"))
        nodes = len(pointers) - 1
        if "attr_indptr" in file:
            width = int(array("attr_shape")[1])
            values = array("attr_data")
            _refuse_bombs(nodes * width, len(values) + nodes)
            features = np.zeros((nodes, width), dtype=np.float32)
            features[_repeat_rows(array("attr_indptr"), len(values)), array("attr_indices")] = values
        else:
            features = array("features", "attr_matrix")
            if features.dtype.kind not in "biuf":
                raise ValueError(f"its features have the type {features.dtype}; they must be real numbers")
            features = features.astype(np.float32)
        sources = _repeat_rows(pointers, len(columns))
        if len(features) != nodes:
            raise ValueError("its arrays do not fit together")
        splits = {
            "nodes": {
                split: np.flatnonzero(file[mask]).tolist()
                for split, mask in (("train", "train_mask"), ("validation", "val_mask"), ("test", "test_mask"))
                if mask in file
            }
        }
        captions = file["class_names"] if "class_names" in file else np.array([])
    data = GraphData.from_edges(
        torch.from_numpy(sources.astype(np.int64)),
        torch.from_numpy(columns.astype(np.int64)),
        torch.from_numpy(features),
        torch.from_numpy(labels),
        directed=directed,
        name=path.stem,
        splits=splits if splits["nodes"] else {},
        classes=classes,
    )
    fits = captions.dtype.kind == "U" and captions.ndim == 1 and len(captions) > int(data.labels.max())
    return dataclasses.replace(data, captions=tuple(captions.tolist())) if fits else data


def _repeat_rows(pointers: np.ndarray, count: int) -> np.ndarray:
    """Return the row of each of `count` entries of a CSR matrix."""
    if pointers.ndim != 1 or not len(pointers) or pointers[0] != 0 or pointers[-1] != count:
        raise ValueError("its arrays do not fit together")
    return np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))


def _refuse_bombs(numbers: int, entries: int) -> None:
    """Refuse a sparse matrix whose dense form would be far larger."""
    if numbers > max(_LEAST_NUMBERS, _MOST_NUMBERS * entries):
        raise ValueError(f"its features are {numbers} numbers, but it contains {entries}")


def _read_dgl(path: Path, directed: bool, splits: Mapping[str, Mapping[str, Any]]) -> GraphData:
    """Read DGL's binary format, as written by `dgl.save_graphs` and DGL's own datasets: only tensors, no pickle."""
    from metareg_graph.dgl_files import read_graphs

    if not path.is_file():
        raise UsageError(f"There is no {path}, or it is no file.")
    with path.open("rb") as file:
        if file.read(1) == b"\x80":
            raise UsageError(f"{path} is a pickle, which could run code; metareg does not read it.")
    (arrays,) = parse_in_child(read_graphs, [path], "a DGL graph")
    count = len(arrays) // 4
    found = [
        GraphData.from_edges(
            *(torch.from_numpy(arrays[f"{number}.{part}"]) for part in ("source", "destination", "feat", "label")),
            directed=directed, name=path.stem if count == 1 else f"{path.stem}-{number}", splits=splits,
        )
        for number in range(count)
    ]  # fmt: skip
    if not found:
        raise UsageError(f"{path} contains no graph.")
    return found[0] if len(found) == 1 else join_graphs(found, splits)


def _read_ogb(folder: Path, directed: bool) -> GraphData:
    """Read an unpacked folder of the Open Graph Benchmark's node property prediction from its raw CSV files."""
    raw = folder / "raw"
    edges, features, labels = (
        _read_table(raw / f"{name}.csv.gz", kind)
        for name, kind in (("edge", np.int64), ("node-feat", np.float32), ("node-label", np.float64))
    )
    if edges.shape[1:] != (2,) or labels.shape[1:] != (1,):
        raise UsageError(f"{raw} must contain two columns of edges and one of labels.")
    ends = torch.from_numpy(edges)
    classes = torch.from_numpy(np.nan_to_num(labels[:, 0], nan=-1).astype(np.int64))
    return GraphData.from_edges(
        ends[:, 0], ends[:, 1], torch.from_numpy(features), classes, directed=directed, name=folder.name
    )


def _read_csv(folder: Path, directed: bool, splits: Mapping[str, Mapping[str, Any]]) -> GraphData:
    """Read ``nodes.csv`` (id, label and any number of features) and ``edges.csv`` (source and destination)."""
    nodes = read_table(folder / "nodes.csv", ("id", "label"))
    id_column, label_column = (_find_column(nodes, (name,)) for name in ("id", "label"))
    ids = nodes.get_texts(id_column)
    numbers = {name: number for number, name in enumerate(ids)}
    if len(numbers) != len(ids):
        twice = next(name for number, name in enumerate(ids) if numbers[name] != number)
        raise UsageError(f"The id '{twice}' occurs twice in {nodes.path}.")
    labels, classes = _number_labels(np.array(nodes.get_texts(label_column), dtype=np.str_))
    features = [nodes.get_numbers(name) for name in nodes.names if name not in (id_column, label_column)]
    ends = _read_edges(folder / "edges.csv", numbers)
    return GraphData.from_edges(
        ends[0],
        ends[1],
        torch.tensor(np.array(features, dtype=np.float32).reshape(-1, len(ids)).T),
        torch.from_numpy(labels),
        directed=directed,
        name=folder.name,
        splits=_number_nodes(_number_split(splits, classes), numbers),
        classes=classes,
        ids=tuple(ids),
    )


def _read_edges(path: Path, numbers: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Return the numbers of each edge's source and destination nodes."""

    def is_edge(cells: Sequence[str]) -> bool:
        if not all(cell in numbers for cell in cells):
            return False
        if all(cell.casefold() in (*_SOURCE, *_DESTINATION) for cell in cells):
            raise UsageError(
                f"The first line of {path}, '{', '.join(cells)}', could be an edge or column names: put the line "
                "'source,target' before it, or replace it."
            )
        return True

    edges = read_table(path, is_data=is_edge)
    columns = edges.names
    if edges.named or len(columns) != 2:
        columns = [_find_column(edges, names) for names in (_SOURCE, _DESTINATION)]
    unused = [name for name in edges.names if name not in columns]
    if unused:
        log.info("%s: ignoring the columns %s; edge weights and types are not supported.", path, ", ".join(unused))
    source, destination = (_number_ends(edges, name, numbers) for name in columns)
    return source, destination


def _number_ends(edges: Table, column: str, numbers: Mapping[str, int]) -> Tensor:
    ends = edges.get_texts(column)
    for row, end in enumerate(ends):
        if end not in numbers:
            where = edges.locate(row, column)
            raise UsageError(f"{where} names node '{end}', which does not exist in nodes.csv.")
    return torch.tensor([numbers[end] for end in ends], dtype=torch.int64)


def _find_column(table: Table, names: Sequence[str]) -> str:
    """Find the column with one of some names, ignoring case.

    Raises:
        UsageError: there is no such column, or several.
    """
    found = [name for name in table.names if name.casefold() in names]
    if len(found) > 1:
        raise UsageError(f"{table.path} has the columns {' and '.join(found)}, which mean the same; keep one of them.")
    if not found:
        table.require(names[0])
    return found[0]


def _number_labels(labels: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return class numbers (−1 for no label) and the classes' names; no names if labels are numbers from 0."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "f" and (np.isnan(labels) | (labels == np.round(labels))).all():
        labels = np.nan_to_num(labels, nan=-1)
    if labels.dtype.kind not in "US":
        whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and (labels == np.round(labels)).all())
        return (labels.astype(np.int64) if whole else labels), ()
    names = [str(label).strip() for label in labels.astype(np.str_)]
    found = {name for name in names if name.casefold() not in _UNLABELLED}
    numbers = {name: int(float(name)) for name in found if _WHOLE.fullmatch(name)}
    classes: tuple[str, ...] = ()
    if len(numbers) < len(found) or max(numbers.values(), default=0) >= len(names):
        classes = _sort_names(found)
        numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers.get(name, -1) for name in names], dtype=np.int64), classes


def _sort_names(names: set[str]) -> tuple[str, ...]:
    """Sort names, or numbers by value."""
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _number_nodes(splits: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Any]:
    """Replace node ids by numbers in the splits from a file."""
    given = splits.get("nodes")
    if not isinstance(given, Mapping):
        return dict(splits)
    chosen: dict[str, Any] = {}
    by_id = all(name.isdecimal() for name in numbers)
    for split, names in given.items():
        listed = names if isinstance(names, list) else []
        for name in listed:
            if (by_id or isinstance(name, str)) and str(name) not in numbers:
                raise UsageError(f"The {split} split names node '{name}', which does not exist in nodes.csv.")
        chosen[split] = [numbers[str(name)] if by_id or isinstance(name, str) else name for name in listed]
    return {**splits, "nodes": chosen}


def _read_table(path: Path, kind: type) -> np.ndarray:
    if not path.is_file():
        raise UsageError(f"There is no {path}, or it is no file.")
    most = max(_LEAST_TEXT, _MOST_TEXT * path.stat().st_size)
    with _explain_errors(path), gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read(most + 1)
        if len(text) > most:
            raise ValueError(f"it unpacks to more than {most >> 20} MiB")
        return np.loadtxt(io.StringIO(text), delimiter=",", dtype=kind, ndmin=2)
