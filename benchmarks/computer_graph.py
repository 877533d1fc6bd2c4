"""Draw a graph of the shape of Amazon-Computer, for comparisons where the dataset is out of reach.

    python benchmarks/computer_graph.py comparisons/graphs/computer.npz
    metareg train --task graph-folder --data comparisons/graphs/computer.npz

The graph is a degree-corrected stochastic block model (Karrer and Newman, Physical Review E, 2011). Its numbers of nodes,
edges, classes and features are the dataset's (Shchur et al., Pitfalls of Graph Neural Network Evaluation, 2018). A node's
features say which words occur. How the words differ between classes is ours: accuracies say nothing about Amazon-Computer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy import sparse

NODES, EDGES, FEATURES = 13_752, 245_861, 767
CLASS_SIZES = (436, 2_142, 1_414, 542, 5_158, 308, 487, 818, 2_156, 291)
HOMOPHILY = 0.78  # fraction of edges within a class
DEGREE_SPREAD = 1.2  # standard deviation of the logarithm of a node's expected degree
WORD_RATE, WORD_SPREAD = -1.0, 1.0  # mean and standard deviation of the logit of a word's frequency
CLASS_SPREAD = 0.25  # standard deviation of the logit's change from class to class


def draw_edges(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw undirected edges, each once.

    Args:
        labels: the class of each node.
        generator: source of randomness.

    Returns:
        The two ends of each edge, ``[EDGES, 2]``, the smaller one first.
    """
    weights = generator.lognormal(sigma=DEGREE_SPREAD, size=len(labels))
    members = [np.flatnonzero(labels == label) for label in range(len(CLASS_SIZES))]
    inside = [weights[nodes] / weights[nodes].sum() for nodes in members]
    edges = np.empty((0, 2), dtype=np.int64)
    while len(edges) < EDGES:
        first = generator.choice(len(labels), size=EDGES, p=weights / weights.sum())
        second = generator.choice(len(labels), size=EDGES, p=weights / weights.sum())
        within = generator.random(EDGES) < HOMOPHILY
        for label, nodes in enumerate(members):
            chosen = within & (labels[first] == label)
            second[chosen] = generator.choice(nodes, size=chosen.sum(), p=inside[label])
        allowed = (first != second) & (within | (labels[first] != labels[second]))
        drawn = np.sort(np.stack([first[allowed], second[allowed]], axis=1), axis=1)
        edges = np.unique(np.concatenate([edges, drawn]), axis=0)
    return generator.permutation(edges)[:EDGES]


def draw_features(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw which words occur at each node: ``[nodes, FEATURES]``, zeros and ones."""
    base = generator.normal(WORD_RATE, WORD_SPREAD, size=FEATURES)
    change = generator.normal(0, CLASS_SPREAD, size=(len(CLASS_SIZES), FEATURES))
    rate = 1 / (1 + np.exp(-(base + change)))
    return (generator.random((len(labels), FEATURES)) < rate[labels]).astype(np.float32)


def draw_graph(path: Path, seed: int) -> None:
    """Write the graph of a seed as an npz file of gnn-benchmark's format."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(CLASS_SIZES)), CLASS_SIZES))
    edges = draw_edges(labels, generator)
    adjacency = sparse.csr_matrix((np.ones(EDGES, dtype=np.float32), (edges[:, 0], edges[:, 1])), (NODES, NODES))
    words = sparse.csr_matrix(draw_features(labels, generator))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        adj_indptr=adjacency.indptr,
        adj_indices=adjacency.indices,
        attr_indptr=words.indptr,
        attr_indices=words.indices,
        attr_data=words.data,
        attr_shape=np.array(words.shape),
        labels=labels,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the npz file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw_graph(arguments.path, arguments.seed)


if __name__ == "__main__":
    main()
