"""Graphs of users and items as sparse matrices: plain torch, usable alone.

    from recbole_mmdiff.graph import bipartite_adjacency, light_propagation
    from recbole_mmdiff.graph import mix, nearest_neighbours, normalise, to_matrix
"""

from recbole_mmdiff.graph.bipartite import bipartite_adjacency, mean_of_items
from recbole_mmdiff.graph.dropping import keep_by_degree
from recbole_mmdiff.graph.edges import Edges, edge_dots, to_matrix, weighted_product
from recbole_mmdiff.graph.hypergraph import hypergraph_convolution
from recbole_mmdiff.graph.neighbours import grown_neighbours, nearest_neighbours, similarities
from recbole_mmdiff.graph.normalise import mix, normalise
from recbole_mmdiff.graph.propagation import light_propagation, propagate, propagated_layers
from recbole_mmdiff.graph.sparse import sparse_matrix, transpose

__all__ = [
    "Edges",
    "bipartite_adjacency",
    "edge_dots",
    "grown_neighbours",
    "hypergraph_convolution",
    "keep_by_degree",
    "light_propagation",
    "mean_of_items",
    "mix",
    "nearest_neighbours",
    "normalise",
    "propagate",
    "propagated_layers",
    "similarities",
    "sparse_matrix",
    "to_matrix",
    "transpose",
    "weighted_product",
]
