"""The graph of users and the items they have: adjacency, averages, and one propagation."""

import warnings

import torch
from torch import Tensor


def sparse_matrix(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR matrix out of distinct entries.

    Args:
        rows, columns: (n,) int64, no pair twice.
        values: (n,) float.
        shape: of the matrix.
    """
    order = torch.argsort(rows * shape[1] + columns)
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        # torch calls CSR a beta; a user can do nothing about it.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns[order], values[order], shape,
                                       check_invariants=True)


def bipartite_adjacency(users: Tensor, items: Tensor, num_users: int, num_items: int) -> Tensor:
    """The symmetrically normalised adjacency D^-1/2 A D^-1/2 of users and items.

    Args:
        users, items: (n,) int64 ids of the interactions; a pair may stand there several times.
        num_users, num_items: ids are below them.

    Returns:
        CSR matrix of num_users + num_items nodes, users first; a node without an edge has an empty
        row and column.
    """
    users, items = _distinct(users, items, num_items)
    user_degree = torch.bincount(users, minlength=num_users)
    item_degree = torch.bincount(items, minlength=num_items)
    values = (user_degree[users] * item_degree[items]).float().rsqrt()
    nodes = items + num_users
    total = num_users + num_items
    return sparse_matrix(torch.cat([users, nodes]), torch.cat([nodes, users]), values.repeat(2),
                         (total, total))


def mean_of_items(users: Tensor, items: Tensor, num_users: int, num_items: int) -> Tensor:
    """The CSR matrix that averages over each user's items.

    Args:
        users, items: (n,) int64 ids of the interactions; a pair may stand there several times.
        num_users, num_items: ids are below them.

    Returns:
        (num_users, num_items) with 1 / (number of the user's items) at the user's items. The row of
        a user without items is empty: the mean is zero.
    """
    users, items = _distinct(users, items, num_items)
    values = 1.0 / torch.bincount(users, minlength=num_users)[users].float()
    return sparse_matrix(users, items, values, (num_users, num_items))


def propagate(matrix: Tensor, dense: Tensor, transposed: Tensor | None = None) -> Tensor:
    """``matrix @ dense`` with a gradient for ``dense``: one propagation step.

    The gradient is a product with the stored transpose, which takes a fifth of the time of
    autograd's own, as that transposes a CSR matrix at each step.

    Args:
        matrix: sparse (n, m).
        dense: (m, d).
        transposed: sparse (m, n); None if ``matrix`` is symmetric, or ``dense`` takes no gradient.
    """
    with torch.autocast(dense.device.type, enabled=False):     # There is no sparse half.
        return _Product.apply(matrix, matrix if transposed is None else transposed,
                              dense.to(matrix.dtype))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix, transposed, dense):
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx, gradient):
        return None, None, ctx.transposed @ gradient


def _distinct(users: Tensor, items: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    keys = torch.unique(users * num_items + items)
    return keys // num_items, keys % num_items
