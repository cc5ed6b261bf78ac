"""Propagation over graphs: one product, and the layers of LightGCN."""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor


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


def propagated_layers(adjacency: Tensor, vectors: Tensor, num_layers: int,
                      transposed: Tensor | None = None) -> list[Tensor]:
    """The vectors after 0 .. ``num_layers`` propagations.

    Args:
        adjacency: sparse (n, n).
        vectors: (n, d), layer 0.
        num_layers: L, 0 or more.
        transposed: sparse (n, n); None if ``adjacency`` is symmetric, or nothing takes a gradient.

    Returns:
        L + 1 tensors (n, d), ``vectors`` first.
    """
    return list(_layers(adjacency, vectors, num_layers, transposed))


def light_propagation(adjacency: Tensor, vectors: Tensor, num_layers: int,
                      transposed: Tensor | None = None) -> Tensor:
    """LightGCN: the mean (n, d) of the layers 0 .. L, without holding them all.

    Arguments as those of ``propagated_layers``.

    Source: He et al., LightGCN, SIGIR 2020, Eq. 3 and 4 with alpha_k = 1 / (L + 1).
    """
    return reduce(torch.add, _layers(adjacency, vectors, num_layers, transposed)) / (num_layers + 1)


def _layers(adjacency: Tensor, vectors: Tensor, num_layers: int,
            transposed: Tensor | None) -> Iterator[Tensor]:
    yield vectors
    for _ in range(num_layers):
        vectors = propagate(adjacency, vectors, transposed)
        yield vectors


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix, transposed, dense):
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx, gradient):
        return None, None, ctx.transposed @ gradient
