"""Graphs of users and items as sparse matrices: plain torch, usable alone.

    from recbole_mmdiff.graph import bipartite_adjacency, propagate
"""

from recbole_mmdiff.graph.bipartite import (
    bipartite_adjacency,
    mean_of_items,
    propagate,
    sparse_matrix,
)

__all__ = ["bipartite_adjacency", "mean_of_items", "propagate", "sparse_matrix"]
