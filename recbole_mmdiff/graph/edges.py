"""Weighted edges, and products over them with a gradient for the weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from recbole_mmdiff.graph.sparse import sparse_matrix


class Edges(NamedTuple):
    """The entries of a sparse matrix, no pair twice.

    Attributes:
        rows, columns: (m,) int64.
        values: (m,) float32 or float64; may take a gradient.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor


def to_matrix(edges: Edges, shape: tuple[int, int]) -> Tensor:
    """The CSR matrix of ``edges``. The values lose their gradient; ``weighted_product`` keeps it."""
    return sparse_matrix(edges.rows, edges.columns, edges.values.detach(), shape)


def weighted_product(edges: Edges, dense: Tensor, num_rows: int, block_elements: int = 2**20) -> Tensor:
    """The matrix of ``edges`` times ``dense``, with a gradient for the values and for ``dense``.

    The gradient of a value is <gradient of its row, ``dense`` of its column>, which is computed for the
    edges alone. For a matrix that does not change, ``propagate`` is faster.

    Args:
        edges: m entries of a (num_rows, n) matrix, in any order.
        dense: (n, d); taken in the dtype of the values.
        num_rows: rows are below it.
        block_elements: how many products of single numbers the gradient of the values holds at once
            (at least d).

    Returns:
        (num_rows, d); a row without an edge is zero.
    """
    rows, columns, values = edges
    with torch.autocast(dense.device.type, enabled=False):     # There is no sparse half.
        return _Product.apply(values, dense.to(values.dtype), rows, columns, num_rows, block_elements)


def edge_dots(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor,
              block_elements: int = 2**20) -> Tensor:
    """<left[row], right[column]> of each edge, with a gradient for both.

    A dot product depends on its two vectors alone, to the last bit: not on the other edges, nor on the
    size of the blocks.

    Args:
        left: (a, d).
        right: (b, d).
        rows, columns: (m,) int64, for a gradient no pair twice.
        block_elements: how many products of single numbers are held at once (at least d); fastest is
            what a cache holds.

    Returns:
        (m,)
    """
    return _Dots.apply(left, right, rows, columns, block_elements)


class _Product(torch.autograd.Function):
    """Product and dots are each other's gradients."""

    @staticmethod
    def forward(ctx, values, dense, rows, columns, num_rows, block_elements):
        ctx.save_for_backward(values, dense, rows, columns)
        ctx.block_elements = block_elements
        return sparse_matrix(rows, columns, values, (num_rows, len(dense))) @ dense

    @staticmethod
    def backward(ctx, gradient):
        values, dense, rows, columns = ctx.saved_tensors
        of_values = of_dense = None
        if ctx.needs_input_grad[0]:
            of_values = _Dots.apply(gradient, dense, rows, columns, ctx.block_elements)
        if ctx.needs_input_grad[1]:
            of_dense = _Product.apply(values, gradient, columns, rows, len(dense), ctx.block_elements)
        return of_values, of_dense, None, None, None, None


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left, right, rows, columns, block_elements):
        ctx.save_for_backward(left, right, rows, columns)
        ctx.block_elements = block_elements
        dots, step = left.new_empty(len(rows)), max(1, block_elements // max(1, left.shape[1]))
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            # No matrix product: its last bits depend on the shape.
            dots[block] = (left[rows[block]] * right[columns[block]]).sum(1)
        return dots

    @staticmethod
    def backward(ctx, gradient):
        left, right, rows, columns = ctx.saved_tensors
        of_left = of_right = None
        if ctx.needs_input_grad[0]:
            of_left = _Product.apply(gradient, right, rows, columns, len(left), ctx.block_elements)
        if ctx.needs_input_grad[1]:
            of_right = _Product.apply(gradient, left, columns, rows, len(right), ctx.block_elements)
        return of_left, of_right, None, None, None
