"""Graphs of the items that are most alike: exact nearest neighbours by cosine."""

import torch
from torch import Tensor

from recbole_mmdiff.errors import at_least
from recbole_mmdiff.graph.edges import Edges, edge_dots

#: of more rows than these that are as near as the last neighbour, up to rounding, the first are taken
TIES = 64
#: so many of them cost nothing
FEW_TIES = 8


@torch.no_grad()
def nearest_neighbours(features: Tensor, k: int, present: Tensor | None = None,
                       block_elements: int = 2**24) -> Edges:
    """Each row's ``k`` rows of the highest cosine similarity, itself the first of them.

    Rows that are not ``present``, and rows of length zero, are nobody's neighbours and have none. If
    fewer than ``k`` rows are left, all of them are neighbours. Neighbours and values are the same for
    every ``block_elements``, and the values are those of ``similarities``, to the last bit.

    Blocks of a matrix product tell the candidates, with a margin for its rounding, and the dot products
    of these alone decide. The margin is that of float32: on a device whose float32 products are set to
    a lower precision (TF32), a neighbour that is alike by as little may be missed. Of hundreds of rows
    that are as near as the last neighbour, the first are taken. A row never loses itself: not to its
    equals, nor to a row whose similarity comes out larger by rounding.

    Args:
        features: (n, d) of any floating type; computed in float32.
        k: neighbours a row.
        present: (n,) bool; None means all.
        block_elements: how many similarities are held at once (at least one row of them).

    Returns:
        Edges with float32 values: sorted by row; of a row itself first, then by falling similarity, then
        by column.

    Raises:
        ValueError: ``k`` below 1, ``features`` or ``present`` of a wrong shape, or a row that takes
            part has no finite length.

    Source: Zhang et al., Mining Latent Structures for Multimedia Recommendation (LATTICE), ACM MM 2021;
    the blocks are ours.
    """
    at_least("k", k, 1)
    features = features.detach().float()
    lengths = torch.linalg.vector_norm(features, dim=1)
    members = _members(lengths, present)
    unit = features[members].div_(lengths[members, None])
    if not len(members):
        return Edges(members, members, unit.new_zeros(0))
    step = max(1, block_elements // len(members))
    with torch.autocast(features.device.type, enabled=False):
        blocks = [_neighbours_of(slice(start, start + step), unit, min(k, len(members)))
                  for start in range(0, len(members), step)]
    rows, columns, values = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Edges(members[rows], members[columns], values)


@torch.no_grad()
def grown_neighbours(features: Tensor, count: int, k: int, present: Tensor | None = None,
                     block_elements: int = 2**24) -> Edges:
    """``nearest_neighbours`` of the first ``count`` rows, and those of the rows behind them.

    A row behind comes into the graph as if it came alone: its neighbours are itself and ``k`` - 1 of the
    first ``count`` rows. It is nobody else's neighbour, so that the graph of these stays as it is.

    Args:
        features, k, present, block_elements: as in ``nearest_neighbours``.
        count: rows from here on are the new ones.

    Returns:
        Edges as those of ``nearest_neighbours``; of the rows behind in no given order.

    Raises:
        ValueError: as ``nearest_neighbours``.
    """
    features = features.detach().float()
    present = torch.ones(len(features), dtype=torch.bool, device=features.device) if present is None \
        else present
    grown = [nearest_neighbours(features[:count], k, present[:count], block_elements)]
    lengths = torch.linalg.vector_norm(features, dim=1)
    members = _members(lengths, present)
    unit = features[members] / lengths[members, None]
    old, new = members[members < count], members[members >= count]
    known, others = unit.split([len(old), len(new)])
    itself = torch.arange(len(new), device=members.device)
    grown.append(Edges(new, new, edge_dots(others, others, itself, itself)))
    wanted = min(k - 1, len(old))
    with torch.autocast(features.device.type, enabled=False):
        for places in itself.split(max(1, block_elements // max(1, len(old)))) if wanted else ():
            rows, columns = _candidates(others[places] @ known.T, wanted, known.shape[1])
            values = edge_dots(others[places], known, rows, columns)
            order = _best(rows, values, wanted)
            grown.append(Edges(new[places[rows[order]]], old[columns[order]], values[order]))
    return Edges(*(torch.cat(parts) for parts in zip(*grown, strict=True)))


def similarities(features: Tensor, edges: Edges, block_elements: int = 2**20) -> Tensor:
    """The cosine similarity of each edge's two rows, with a gradient for ``features``.

    Nothing of size m x d is made, neither here nor for the gradient.

    Args:
        features: (n, d); half precision is computed in float32.
        edges: m pairs of rows; their values are not used.
        block_elements: how many products of single numbers are held at once (at least d).

    Returns:
        (m,); zero, and without a gradient, where a row has the length zero.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    unit = features / lengths.masked_fill(lengths == 0, torch.inf)
    return edge_dots(unit, unit, edges.rows, edges.columns, block_elements)


def _members(lengths: Tensor, present: Tensor | None) -> Tensor:
    """The rows that take part, (m,) int64."""
    if present is None:
        present = torch.ones_like(lengths, dtype=torch.bool)
    if present.shape != lengths.shape or present.dtype != torch.bool:
        raise ValueError(f"present is {present.dtype} of shape {tuple(present.shape)}; accepted: "
                         f"torch.bool of shape {tuple(lengths.shape)}, one a row of features")
    bad = present & ~lengths.isfinite()
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"features has a row {row} of length {float(lengths[row])}; accepted: rows of "
                         f"finite length; leave it out by present, or scale it")
    return (present & (lengths > 0)).nonzero().squeeze(1)


def _neighbours_of(block: slice, unit: Tensor, k: int) -> tuple[Tensor, ...]:
    """Rows, columns and values of the neighbours of a block of ``unit`` (m, d)."""
    similar = unit[block] @ unit.T
    similar.diagonal(block.start).fill_(torch.inf)      # A row is always its own candidate.
    rows, columns = _candidates(similar, k, unit.shape[1])
    values = edge_dots(unit[block], unit, rows, columns)
    order = _best(rows, values.masked_fill(rows + block.start == columns, torch.inf), k)
    return rows[order] + block.start, columns[order], values[order]


def _best(rows: Tensor, values: Tensor, k: int) -> Tensor:
    """Places of the ``k`` largest values of each row, by row and falling value; ``rows`` (m,) are sorted."""
    counts = rows.bincount()
    rank = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    order = values.argsort(descending=True, stable=True)
    return order[rows[order].argsort(stable=True)][rank < k]


def _candidates(similar: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, in order, of what may be among the ``k`` largest of each row of ``similar`` (b, m),
    inner products of length ``dim``: all that rounding cannot tell from the last of them."""
    # Rounding errors of a dot product grow like sqrt(d); 2^-24 is half a step below 1.
    margin = 2**-22 * dim ** 0.5
    values, columns = similar.topk(min(k + FEW_TIES, similar.shape[1]))
    last = values[:, k - 1:k]
    if columns.shape[1] == similar.shape[1] or (values[:, -1:] < last - margin).all():
        rows = torch.arange(len(similar), device=similar.device).repeat_interleave(columns.shape[1])
        return rows, columns.sort(dim=1).values.flatten()
    near = similar >= last - margin
    if near.sum(1).max() > k + TIES:
        # Equal rows by the hundred: what is nearer than they are, and the first of them.
        near &= (near.cumsum(1, dtype=torch.int32) <= k + TIES) | (similar > last + margin)
    return near.nonzero(as_tuple=True)
