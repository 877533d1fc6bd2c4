"""Parser of DGL's binary files for `metareg.parse_in_child`, because DGL aborts the process if one is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from metareg import UsageError
from metareg_graph._dgl import import_dgl

__all__ = ["read_graphs"]

_dgl = import_dgl()


def read_graphs(path: Path) -> dict[str, np.ndarray]:
    """Read a file of `dgl.save_graphs`: for graph n, ``n.source, n.destination, n.feat, n.label``."""
    graphs, _ = _dgl.load_graphs(str(path))
    arrays: dict[str, np.ndarray] = {}
    for number, graph in enumerate(graphs):
        name = path.stem if len(graphs) == 1 else f"{path.stem}-{number}"
        for kind in ("feat", "label"):
            if kind not in graph.ndata:
                known = ", ".join(graph.ndata) or "none"
                raise UsageError(f"The graph '{name}' of {path} has no node data '{kind}'; it has {known}.")
            arrays[f"{number}.{kind}"] = graph.ndata[kind].numpy()
        ends = graph.edges()
        arrays |= {f"{number}.{end}": ends[place].numpy() for place, end in enumerate(("source", "destination"))}
    return arrays
