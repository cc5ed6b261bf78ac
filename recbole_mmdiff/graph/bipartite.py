"""The graph of users and the items they have: adjacency and averages."""

import torch
from torch import Tensor

from recbole_mmdiff.graph.edges import Edges, to_matrix
from recbole_mmdiff.graph.normalise import normalise
from recbole_mmdiff.graph.sparse import sparse_matrix


def bipartite_adjacency(users: Tensor, items: Tensor, num_users: int, num_items: int,
                        weights: Tensor | None = None, self_loops: bool = False,
                        kind: str = "symmetric") -> Tensor:
    """The normalised adjacency of users and items, D^-1/2 A D^-1/2 or D^-1 A.

    Args:
        users, items: (n,) int64 ids of the interactions; a pair may stand there several times.
        num_users, num_items: ids are below them.
        weights: (n,) of the interactions, without gradient; those of the same pair add up. None gives
            every pair the weight 1, however often it stands there.
        self_loops: A + I takes the place of A, also in the degrees D.
        kind: ``symmetric`` or ``random_walk``, as in ``normalise``. The latter is not symmetric:
            ``propagate`` needs its ``transpose``.

    Returns:
        CSR matrix of num_users + num_items nodes, users first; a node without an edge has an empty
        row and column.

    Raises:
        ValueError: another ``kind``, or not one weight an interaction.
    """
    users, items, values = _distinct(users, items, num_items, weights)
    nodes, total = items + num_users, num_users + num_items
    rows, columns, values = torch.cat([users, nodes]), torch.cat([nodes, users]), values.repeat(2)
    if self_loops:
        loops = torch.arange(total, device=rows.device)
        rows, columns = torch.cat([rows, loops]), torch.cat([columns, loops])
        values = torch.cat([values, values.new_ones(total)])
    return to_matrix(normalise(Edges(rows, columns, values), total, kind), (total, total))


def mean_of_items(users: Tensor, items: Tensor, num_users: int, num_items: int) -> Tensor:
    """The CSR matrix that averages over each user's items.

    Args:
        users, items: (n,) int64 ids of the interactions; a pair may stand there several times.
        num_users, num_items: ids are below them.

    Returns:
        (num_users, num_items) with 1 / (number of the user's items) at the user's items. The row of
        a user without items is empty: the mean is zero.
    """
    users, items, ones = _distinct(users, items, num_items)
    values = ones / torch.bincount(users, minlength=num_users)[users]
    return sparse_matrix(users, items, values, (num_users, num_items))


def _distinct(users: Tensor, items: Tensor, num_items: int,
              weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Users, items and weights of the distinct pairs."""
    keys, places = torch.unique(users * num_items + items, return_inverse=True)
    if weights is None:
        summed = torch.ones(len(keys), device=keys.device)
    elif weights.shape != users.shape:
        raise ValueError(f"weights has the shape {tuple(weights.shape)}; accepted: {tuple(users.shape)}, "
                         f"one an interaction")
    else:
        dtype = torch.promote_types(weights.dtype, torch.float32)
        summed = torch.zeros(len(keys), dtype=dtype, device=keys.device)
        summed.index_add_(0, places, weights.detach().to(dtype))
    return keys // num_items, keys % num_items, summed
