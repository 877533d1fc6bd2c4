"""Few-shot node classification on graphs, through DGL.

DGL is imported when a graph is first used. Without it, this module can still be imported, and the tasks say what to
install.
"""

from metareg_graph.data import GraphData
from metareg_graph.models import GCN, SGC, BlockNetwork, GraphSAGE, OnGraph
from metareg_graph.sampling import Inputs, Pools, Seeds
from metareg_graph.tasks import (
    CSBM,
    AmazonComputer,
    CiteSeer,
    CoauthorCS,
    Cora,
    CoraFull,
    GraphFolder,
    OgbnArxiv,
    PubMed,
)

__all__ = [
    "CSBM",
    "GCN",
    "SGC",
    "AmazonComputer",
    "BlockNetwork",
    "CiteSeer",
    "CoauthorCS",
    "Cora",
    "CoraFull",
    "GraphData",
    "GraphFolder",
    "GraphSAGE",
    "Inputs",
    "OgbnArxiv",
    "OnGraph",
    "Pools",
    "PubMed",
    "Seeds",
]
