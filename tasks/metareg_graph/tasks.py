"""Graph tasks: few-shot node classification on published, generated and users' own graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from metareg import (
    Dataset,
    Episodes,
    MetaLearner,
    NamedExamples,
    PathText,
    PluginConfig,
    Task,
    TaskSpec,
    UsageError,
    data_folder,
    derive_seed,
    format_count,
    hookimpl,
    task_uniform,
)
from metareg_graph.data import GNN_BENCHMARK, GraphData, Normalisation, Source, fetch, find_local, load, locate
from metareg_graph.nodes import Nodes
from metareg_graph.sampling import Inputs, Pools, Seeds
from metareg_graph.splits import SPLITS, ClassSplit, split_nodes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "CSBM", "AmazonComputer", "CiteSeer", "CoauthorCS", "Cora", "CoraFull", "GraphFolder", "OgbnArxiv", "PubMed",
]  # fmt: skip

_MODELS = {"gcn": "gcn", "sgc": "sgc", "mean": "graphsage", "nodes": None}


GraphInputs = Literal["gcn", "sgc", "mean", "nodes"]
_INPUTS = "The model's view of the graph; the shipped models set it. 'nodes' is the whole DGL graph."


class GraphTaskConfig(PluginConfig):
    """Options of every graph task."""

    ways: int = Field(2, ge=2, description="Classes of a task.")
    shots: int = Field(3, ge=1, description="Support nodes of each class.")
    query: int = Field(10, ge=1, description="Query nodes of each class.")
    inputs: GraphInputs = Field("gcn", description=_INPUTS)
    hops: int = Field(2, ge=1, description="Layers of propagation; the shipped models set it.")
    standardised: bool = Field(
        True,
        description="Centre the propagated features of a graph's nodes and scale each node's to the same length, whatever "
        "its number of neighbours.",
    )
    fanout: int | None = Field(
        None,
        ge=1,
        description="Maximum number of neighbours of a node per layer, drawn for each task; by default, all.",
    )


class FileConfig(GraphTaskConfig):
    """Options of tasks on a graph from files."""

    # On Cora's validation tasks, sgc is one point better than gcn at half the cost.
    inputs: GraphInputs = Field("sgc", description=_INPUTS)
    data: PathText | None = Field(
        None,
        description="The graph's file or its folder; by default, in METAREG_DATA or the cache.",
    )
    classes: dict[Literal["train", "validation", "test"], list[int]] | None = Field(
        None, description="The classes of each split, instead of the dataset's own rule."
    )


class _GraphTask(Task):
    """Tasks with a few labelled nodes."""

    contract = 1
    loss = "cross_entropy"
    # With two or three training classes, more or larger outer steps overfit the features to these classes.
    recommended: ClassVar[Mapping[str, Any]] = {
        "steps": 100,
        "meta_batch": 8,
        "inner_steps": 5,
        "algo.inner_lr": 1.0,
        "outer_lr": 3e-4,
        "eval_tasks": 50,
        "test_tasks": 200,
        "log_every": 10,
        # BOIL's head does not change within a task, so inputs that bypass the body are noise for the task.
        "boil": {"model.skip": False, "algo.inner_lr": 2.0},
    }
    config: GraphTaskConfig
    name: ClassVar[str]

    @property
    def default_model(self) -> str | None:  # type: ignore[override]
        """The shipped model for these inputs; None for the DGL graph itself."""
        return _MODELS[self.config.inputs]

    @property
    def stackable(self) -> bool:  # type: ignore[override]
        """False for modules on the DGL graph itself, which run one task at a time."""
        return self.config.inputs != "nodes"

    def _repeat_targets(self, tasks: int) -> tuple[torch.Tensor, torch.Tensor]:
        config, classes = self.config, torch.arange(self.config.ways)
        return (
            classes.repeat_interleave(config.shots).expand(tasks, -1),
            classes.repeat_interleave(config.query).expand(tasks, -1),
        )

    @hookimpl
    def figures(self, learner: MetaLearner, seed: int) -> Mapping[str, Figure]:
        """Draw the confusion matrix, and the adapted features of some test tasks in two dimensions."""
        from metareg_graph.figures import draw_confusion, draw_features  # imports matplotlib, which nothing else needs

        tasks = self._select_pictured(seed)
        return {"confusion": draw_confusion(learner, tasks), "features": draw_features(learner, tasks[:4])}

    @property
    def named_examples(self) -> NamedExamples:
        """The nodes of the graph, which users' tables refer to by name."""
        raise UsageError(
            f"Every task of '{self.name}' is a new graph, whose nodes a table cannot name; for your own graph, use "
            "`metareg train --task graph-folder`."
        )

    def _select_pictured(self, seed: int) -> list[tuple[Episodes, list[str]]]:
        """Select some test tasks, each with the names of its classes in order."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------- graphs from files


class _FileTask(_GraphTask):
    """Tasks on a graph from files; a subclass defines its location and split."""

    Config = FileConfig
    config: FileConfig
    source: ClassVar[Source]

    def __init__(self, config: FileConfig) -> None:
        self.config = config
        self._pools: dict[tuple[str, int], Pools] = {}

    @property
    def data(self) -> GraphData:
        """The graph, read on first use."""
        return self._inputs.data

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec((self.data.features.shape[1],), (self.config.ways,))

    @property
    def dataset(self) -> Dataset | None:
        """The location of the graph, and how to get it."""
        source = self.source
        found = find_local(source, self.config.data)
        return Dataset(
            location=found.parent if found is not None else self._root / "graphs",
            present=found is not None,
            obtain=f"It comes from {source.url}." if source.url else f"{source.advice[:1].upper()}{source.advice[1:]}.",
            download=self._download if source.url else None,
            verify=self._describe,
        )

    @property
    def _root(self) -> Path:
        """The folder for downloads."""
        return data_folder() if self.config.data is None else Path(self.config.data)

    def _download(self) -> None:
        fetch(self.source, self._root)

    def _describe(self) -> str:
        data = self.data
        classes = len(data.labels[data.labels >= 0].unique())
        counts = (
            format_count(data.graph.num_nodes(), "node"),
            format_count(data.graph.num_edges(), "directed edge"),
            format_count(data.features.shape[1], "feature"),
            format_count(classes, "class", "classes"),
        )
        return ", ".join(counts)

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> list[Episodes]:
        seeds = self._pool(split, seed).draw(split, indices, seed)
        return self._inputs.episodes(
            seeds,
            self._repeat_targets(len(indices)),
            lambda count, label: task_uniform(seed, split, indices, count, label),
        )

    @property
    def _inputs(self) -> Inputs:
        config = self.config
        path = self._path()
        return _prepare(
            path, _hash_files(path), torch.get_default_dtype(), self._directed(), self.source.normalisation, config.inputs,
            config.hops, config.fanout, config.standardised,
        )  # fmt: skip

    def _path(self) -> Path:
        return locate(self.name, self.source, self.config.data)

    def _directed(self) -> bool:
        return False

    def _rule(self) -> ClassSplit | str:
        return SPLITS[self.name]

    def _pool(self, split: str, seed: int) -> Pools:
        if (split, seed) not in self._pools:
            config, rule = self.config, self._rule()
            if config.classes is not None:
                rule = ClassSplit(fixed={str(name): labels for name, labels in config.classes.items()})
            groups, shared = split_nodes(self.data, rule, split, seed, config.ways, config.shots + config.query)
            where = f"the {split} split of '{self.name}'"
            self._pools[split, seed] = Pools(
                groups, where, config.ways, config.shots, config.query, shared_labels=shared
            )
        return self._pools[split, seed]

    @property
    def named_examples(self) -> NamedExamples:
        return Nodes(self._inputs)

    def _select_pictured(self, seed: int) -> list[tuple[Episodes, list[str]]]:
        return [
            (
                self.episodes("test", [number], seed)[0],
                [
                    self._name_class(int(self.data.labels[node]))
                    for node in self._pool("test", seed).draw("test", [number], seed).query[0][:: self.config.query]
                ],
            )
            for number in range(40)
        ]

    def _name_class(self, label: int) -> str:
        names = self.data.classes or self.data.captions
        return names[label] if names else f"class {label}"


@lru_cache(maxsize=2)
def _prepare(
    path: Path,
    stamp: int,  # noqa: ARG001 - a changed file is another key
    dtype: torch.dtype,  # noqa: ARG001 - as the tables are in torch's default type
    directed: bool,
    normalisation: Normalisation,
    kind: str,
    hops: int,
    fanout: int | None,
    standardised: bool,
) -> Inputs:
    data = load(path, directed=directed, normalisation=normalisation)
    return Inputs(data, kind, hops, fanout, standardised=standardised)


def _hash_files(path: Path) -> int:
    files = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
    return hash(tuple((str(file), file.stat().st_mtime_ns) for file in files if file.exists()))


def _gnn_benchmark(
    file: str, *others: str, checksum: str | None = None, normalisation: Normalisation = "none"
) -> Source:
    """A file of the GNN benchmark of Shchur et al. (2018, arXiv 1811.05868), or DGL's cached copy of the dataset."""
    return Source((file, *others), GNN_BENCHMARK + file, checksum, normalisation)


class Cora(_FileTask):
    """2,708 papers on machine learning in 7 classes, with their citations; features: which of 1,433 words occur.

    Classes are split 3 / 2 / 2, drawn anew for each seed.
    """

    name = "cora"
    source = _gnn_benchmark(
        "cora.npz",
        "cora_v2_d697a464/cora_v2_dgl_graph.bin",
        checksum="sha256:068e22d90c3849b4057dfb05851741428992af058efcd4e7ebb4186f3d581de2",
        normalisation="binary",
    )


class CiteSeer(_FileTask):
    """3,312 papers on computer science in 6 classes, with their citations; features: which of 3,703 words occur.

    Classes are split 2 / 2 / 2, drawn anew for each seed.
    """

    name = "citeseer"
    source = _gnn_benchmark(
        "citeseer.npz",
        "citeseer_d6836239/citeseer_dgl_graph.bin",
        checksum="sha256:280278b21b434c047922e8389518861416fb3ad39389c27865ff0e6bbb0aaab7",
        normalisation="binary",
    )


class PubMed(_FileTask):
    """19,717 papers on diabetes in 3 classes, with their citations; the shares of 500 words as features.

    Three classes are too few to split by class: the nodes are split 60 / 20 / 20 % instead, drawn for each seed, and
    the splits share the labels.
    """

    name = "pubmed"
    source = _gnn_benchmark("pubmed.npz", "pubmed_35464cad/pubmed_dgl_graph.bin", normalisation="sum")


class CoraFull(_FileTask):
    """19,793 papers in 70 classes, with their citations; 8,710 words as features. Classes are split 25 / 20 / 25, fixed."""

    name = "cora-full"
    source = _gnn_benchmark("cora_full.npz", "cora_full_659794fa/dgl_graph_v1.bin")


class CoauthorCS(_FileTask):
    """18,333 authors in 15 fields, joined by common papers; 6,805 keywords. Classes are split 5 / 5 / 5, fixed."""

    name = "coauthor-cs"
    source = _gnn_benchmark("ms_academic_cs.npz", "coauthor_cs.npz", "coauthor_cs_10782e7c/dgl_graph_v1.bin")


class AmazonComputer(_FileTask):
    """13,752 goods in 10 categories, joined where bought together; 767 words of reviews.

    Classes are split 4 / 3 / 3, drawn anew for each seed.
    """

    name = "amazon-computer"
    source = _gnn_benchmark(
        "amazon_electronics_computers.npz",
        "amazon_co_buy_computer.npz",
        "amazon_co_buy_computer_b5999b2e/dgl_graph_v1.bin",
    )


class OgbnArxiv(_FileTask):
    """169,343 papers in 40 subjects, with their citations taken both ways; 128 numbers as features.

    Classes are split 20 / 10 / 10, drawn anew for each seed. A hub has thousands of neighbours: at most 16 are drawn
    per task, unless you set `fanout`.
    """

    class Config(FileConfig):
        fanout: int | None = Field(
            16, ge=1, description="Maximum number of neighbours of a node per layer, drawn for each task; null for all."
        )

    name = "ogbn-arxiv"
    source = Source(
        ("ogbn_arxiv", "arxiv"),
        advice="download https://snap.stanford.edu/ogb/data/nodeproppred/arxiv.zip, unpack it",
    )


class GraphFolder(_FileTask):
    """Your own graph or graphs, from the file or folder `data`.

    A graph is an npz with CSR arrays (``adj_indptr``, ``adj_indices``, ``features`` or CSR ``attr_*``, ``labels``), a file
    of `dgl.save_graphs` with the node data ``feat`` and ``label``, or a folder with ``nodes.csv`` (id, label, features) and
    ``edges.csv`` (source, destination). Several graphs in one folder share their labels. ``splits.json`` assigns
    classes, graphs or nodes to training, validation and test.
    """

    class Config(FileConfig):
        split: Literal["auto", "classes", "nodes", "graphs"] = Field(
            "auto",
            description="What differs between training and test. auto: as in splits.json; without one, graphs if there are "
            "several, otherwise classes if there are enough, otherwise nodes, drawn for each seed.",
        )
        directed: bool = Field(False, description="Keep the direction of edges.")
        row_normalised: bool = Field(False, description="Divide each node's features by their sum.")

    name = "graph-folder"
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.source = Source((), normalisation="sum" if config.row_normalised else "none")  # type: ignore[misc]

    @property
    def dataset(self) -> Dataset | None:
        """The graph in `data`, if it is set."""
        if self.config.data is None:
            return None
        path = self._path()
        return Dataset(
            path, path.exists(), "It is your own: give its file or folder with --data.", None, self._describe
        )

    def _path(self) -> Path:
        if self.config.data is None:
            raise UsageError("The task 'graph-folder' needs the file or folder of your graph: --data PATH.")
        return Path(self.config.data)

    def _directed(self) -> bool:
        return self.config.directed

    def _rule(self) -> str:
        return self.config.split


# ------------------------------------------------------------------------------------------------------- generated graphs


class CSBM(_GraphTask):
    """Every task is a new graph: a contextual stochastic block model.

    A node's features are its class's mean plus normal noise. The means of a task are drawn, with the length `signal`, in a
    subspace of `rank` dimensions that all tasks of a seed share and that meta-learning can find. A fraction `homophily`
    of the edges is drawn within a class. Test graphs are not used in training.

    Reference:
        Deshpande, Montanari, Mossel and Sen, Contextual Stochastic Block Models, NeurIPS 2018, arXiv 1807.09596.
    """

    class Config(GraphTaskConfig):
        nodes: int = Field(100, ge=4, description="Nodes of a graph, in classes of equal size.")
        features: int = Field(16, ge=1, description="Features of a node.")
        rank: int = Field(4, ge=1, description="Dimensions of the subspace with the class means of all tasks.")
        signal: float = Field(2.0, ge=0, description="Length of a class mean; the noise has standard deviation 1.")
        degree: float = Field(6.0, gt=0, description="Mean number of neighbours.")
        homophily: float = Field(0.8, ge=0, le=1, description="Fraction of edges within a class.")

    recommended: ClassVar[Mapping[str, Any]] = {
        **_GraphTask.recommended,
        "steps": 500,
        "meta_batch": 8,
        "outer_lr": 3e-3,
        "boil": {"model.skip": False},
    }
    config: Config
    name = "csbm"

    def __init__(self, config: Config) -> None:
        needed = config.ways * (config.shots + config.query)
        if needed > config.nodes:
            raise UsageError(
                f"A graph of {config.nodes} nodes is too small for {config.ways} classes of {config.shots} support and "
                f"{config.query} query nodes; set nodes={needed} or more."
            )
        if config.rank > config.features:
            raise UsageError(f"rank={config.rank} must not exceed features={config.features}.")
        self.config = config

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec((self.config.features,), (self.config.ways,))

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> list[Episodes]:
        if not self.stackable and len(indices) > 1:  # each task has its own graph
            return [self.episodes(split, [index], seed)[0].placed([place]) for place, index in enumerate(indices)]
        config, tasks = self.config, len(indices)
        inputs = Inputs(
            self._generate_graphs(split, indices, seed),
            config.inputs,
            config.hops,
            config.fanout,
            config.degree,
            standardised=config.standardised,
        )
        # Nodes of a class are exchangeable, so the first ones are as good as random ones.
        nodes = np.arange(tasks)[:, None, None] * config.nodes + self._members[:, : config.shots + config.query]
        seeds = Seeds(nodes[:, :, : config.shots].reshape(tasks, -1), nodes[:, :, config.shots :].reshape(tasks, -1))
        return inputs.episodes(
            seeds,
            self._repeat_targets(tasks),
            lambda count, label: task_uniform(seed, split, indices, count, label),
        )

    @property
    def _members(self) -> np.ndarray:
        """Return the nodes of each class in a graph ``[ways, nodes // ways]``."""
        config = self.config
        return np.arange(config.ways)[:, None] + config.ways * np.arange(config.nodes // config.ways)

    def _generate_graphs(self, split: str, indices: Sequence[int], seed: int) -> GraphData:
        """Generate the graphs of some tasks as one."""
        config, tasks = self.config, len(indices)
        labels = np.arange(config.nodes) % config.ways
        draw = partial(task_uniform, seed, split, indices)
        generator = torch.Generator().manual_seed(derive_seed(seed, "csbm", "subspace"))
        basis, _ = torch.linalg.qr(torch.randn(config.features, config.rank, generator=generator, dtype=torch.float64))
        directions = _to_normal(draw(config.ways * config.rank, "means")).view(tasks, config.ways, config.rank)
        means = config.signal * directions / directions.norm(dim=-1, keepdim=True) @ basis.T
        noise = _to_normal(draw(config.nodes * config.features, "noise")).view(tasks, config.nodes, config.features)
        features = means[:, torch.from_numpy(labels)] + noise

        first, second = np.triu_indices(config.nodes, 1)
        within = labels[first] == labels[second]
        edges = config.nodes * config.degree / 2
        shares = np.where(within, config.homophily / within.sum(), (1 - config.homophily) / (~within).sum())
        task, pair = np.nonzero(draw(len(first), "edges") < edges * shares)
        offset = task * config.nodes
        data = GraphData.from_edges(
            torch.from_numpy(offset + first[pair]),
            torch.from_numpy(offset + second[pair]),
            features.reshape(-1, config.features),
            torch.from_numpy(np.tile(labels, tasks)),
            name="csbm",
        )
        members = torch.arange(tasks).repeat_interleave(config.nodes)
        return GraphData(data.graph, data.features, data.labels, members, data.names, data.splits)

    def _select_pictured(self, seed: int) -> list[tuple[Episodes, list[str]]]:
        names = [f"class {label}" for label in range(self.config.ways)]
        return [(self.episodes("test", [number], seed)[0], names) for number in range(40)]


def _to_normal(u: np.ndarray) -> torch.Tensor:
    """Convert uniform to standard normal numbers."""
    return math.sqrt(2) * torch.erfinv(2 * torch.from_numpy(u).clamp(min=1e-15) - 1)
