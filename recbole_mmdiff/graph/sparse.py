"""CSR matrices out of entries, and their transposes."""

import warnings

import torch
from torch import Tensor


def sparse_matrix(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR matrix out of distinct entries.

    Args:
        rows, columns: (n,) int64, no pair twice.
        values: (n,) float.
        shape: of the matrix.

    Returns:
        The matrix, with indices of 32 bits where they are enough: torch's libraries take no others, and
        would convert them at every product.
    """
    order = torch.argsort(rows * shape[1] + columns)
    kind = torch.int32 if max(*shape, len(rows)) < 2**31 else torch.int64
    starts = torch.zeros(shape[0] + 1, dtype=kind, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    columns = columns.to(kind)
    with warnings.catch_warnings():
        # torch calls CSR a beta; a user can do nothing about it.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns[order], values[order], shape,
                                       check_invariants=True)


def transpose(matrix: Tensor) -> Tensor:
    """The transpose (m, n) of a CSR matrix (n, m), again as CSR."""
    counts = matrix.crow_indices().diff()
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    shape = matrix.shape[1], matrix.shape[0]
    return sparse_matrix(matrix.col_indices().long(), rows, matrix.values(), shape)
