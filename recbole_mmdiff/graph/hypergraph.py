"""Hypergraphs: vectors averaged over groups of nodes, and given back to their members."""

import torch
from torch import Tensor


def hypergraph_convolution(membership: Tensor, vectors: Tensor, readers: Tensor | None = None) -> Tensor:
    """D_V^-1/2 H D_E^-1 H^T D_V^-1/2 X, with a gradient for ``vectors``.

    D_V holds the row sums of H, D_E its column sums: the spectral norm is at most 1, so that layers
    neither grow nor, for vectors in proportion to D_V^1/2, shrink.

    Args:
        membership: H (n, k), not negative: the share of each of k hyperedges that a node has.
        vectors: X (n, d).
        readers: (m, k) shares of other nodes, whose vectors are wanted; they take from the hyperedges and
            give them nothing. None: the nodes themselves.

    Returns:
        (n, d), or (m, d); zero for a node without a hyperedge.

    Raises:
        ValueError: ``membership`` has another number of rows.

    Source: Feng et al., Hypergraph Neural Networks, AAAI 2019, Eq. 11 without its weights and activation.
    SIEOUG (WWW 2025), Eq. 13 prints D_E^-1/2, with which a vector of equal numbers grows by a factor of
    sqrt(n / k) in each layer.
    """
    if membership.dim() != 2 or len(membership) != len(vectors):
        raise ValueError(f"membership has the shape {tuple(membership.shape)}; accepted: ({len(vectors)}, "
                         f"any), a row for each of the vectors")
    with torch.autocast(vectors.device.type, enabled=False):
        dtype = torch.promote_types(membership.dtype, vectors.dtype)
        edges, vectors = membership.to(dtype), vectors.to(dtype)
        groups, weighted = _inverse(edges.sum(0)), _by_node(edges)
        readers = weighted if readers is None else _by_node(readers.to(dtype))
        return readers @ (groups[:, None] * (weighted.T @ vectors))


def _by_node(edges: Tensor) -> Tensor:
    """D_V^-1/2 H."""
    return edges * _inverse(edges.sum(1)).sqrt()[:, None]


def _inverse(degrees: Tensor) -> Tensor:
    return torch.where(degrees > 0, 1 / degrees.where(degrees > 0, 1), 0)
