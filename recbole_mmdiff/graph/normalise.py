"""Weights of edges: normalised by degrees, and mixed from several graphs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from recbole_mmdiff.errors import one_of
from recbole_mmdiff.graph.edges import Edges

KINDS = ("symmetric", "random_walk")


def normalise(edges: Edges, n: int, kind: str) -> Edges:
    """The edges of D^-1/2 A D^-1/2 or of D^-1 A, with a gradient for the values.

    D holds the row sums of the values. They divide the columns, too, though a graph of neighbours is
    not symmetric, as in LATTICE (Zhang et al., ACM MM 2021) and FREEDOM (Zhou and Shen, ACM MM 2023).

    Args:
        edges: m entries of the (n, n) matrix A, in any order.
        n: number of nodes.
        kind: ``symmetric`` divides a value by sqrt(d_row d_col), ``random_walk`` by d_row.

    Returns:
        Edges in the same order. A value is 0 where a degree that divides it is not positive.

    Raises:
        ValueError: another ``kind``.
    """
    one_of("kind", kind, KINDS)
    rows, columns, values = edges
    degrees = values.new_zeros(n).index_add(0, rows, values)
    positive = degrees > 0
    degrees = degrees.where(positive, 1)      # What is masked below must not divide by zero either.
    if kind == "random_walk":
        return Edges(rows, columns, (values / degrees[rows]).where(positive[rows], 0))
    scaled = values * (degrees[rows] * degrees[columns]).rsqrt()
    return Edges(rows, columns, scaled.where(positive[rows] & positive[columns], 0))


def mix(parts: Sequence[Edges], weights: Sequence[float] | Tensor, n: int, present: bool = False) -> Edges:
    """The weighted sum of graphs, with a gradient for the values and the weights.

    Args:
        parts: graphs over the same ``n`` nodes.
        weights: one a graph; a (parts,) tensor may take a gradient.
        n: number of nodes.
        present: divide the weights of a row by the sum of those of the graphs in which it has an edge:
            where some items lack a modality, an item without an image is then all text. If that sum is
            0, the row keeps its edges, with the value 0.

    Returns:
        Edges sorted by row and column, with what falls on the same pair added together.

    Raises:
        ValueError: no graph, or not one weight a graph.
    """
    shares = _weights(parts, weights)[:, None].expand(-1, n)
    if present:
        shares = shares * torch.stack([torch.bincount(part.rows, minlength=n) > 0 for part in parts])
        total = shares.sum(0)
        shares = shares / total.where(total != 0, 1)
    keys = torch.cat([part.rows * n + part.columns for part in parts])
    values = torch.cat([share[part.rows] * part.values for share, part in zip(shares, parts, strict=True)])
    keys, places = torch.unique(keys, return_inverse=True)
    return Edges(keys // n, keys % n, values.new_zeros(len(keys)).index_add(0, places, values))


def _weights(parts: Sequence[Edges], weights: Sequence[float] | Tensor) -> Tensor:
    """(parts,) in the dtype of the values and on their device."""
    if not parts:
        raise ValueError("parts=[] has no graph; accepted: one at least")
    if len(weights) != len(parts):
        raise ValueError(f"weights={weights!r} has {len(weights)} of them; accepted: {len(parts)}, one a "
                         f"graph in parts")
    return torch.as_tensor(weights, dtype=parts[0].values.dtype, device=parts[0].values.device)
