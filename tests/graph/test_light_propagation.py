"""LightGCN's propagation against powers of a dense matrix."""

import numpy as np
import pytest
import torch

from recbole_mmdiff.graph import bipartite_adjacency, light_propagation, propagated_layers, transpose

USERS, ITEMS = 6, 5
USER_IDS, ITEM_IDS = torch.tensor([(0, 0), (0, 1), (1, 1), (2, 3), (3, 4), (3, 0), (4, 1)]).T


def adjacency(kind):
    """The matrix and its transpose, None where it is symmetric."""
    matrix = bipartite_adjacency(USER_IDS, ITEM_IDS, USERS, ITEMS, self_loops=kind == "random_walk",
                                 kind=kind).double()
    return matrix, None if kind == "symmetric" else transpose(matrix)


@pytest.fixture
def vectors():
    return torch.randn(USERS + ITEMS, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["symmetric", "random_walk"])
@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_layers_and_their_mean(kind, num_layers, vectors):
    matrix, transposed = adjacency(kind)
    powers = [np.linalg.matrix_power(matrix.to_dense().numpy(), power) @ vectors.numpy()
              for power in range(num_layers + 1)]
    layers = propagated_layers(matrix, vectors, num_layers, transposed)
    assert isinstance(layers, list) and len(layers) == num_layers + 1
    for found, expected in zip(layers, powers, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(light_propagation(matrix, vectors, num_layers, transposed),
                               np.mean(powers, 0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["symmetric", "random_walk"])
def test_gradient(kind, vectors):
    matrix, transposed = adjacency(kind)
    vectors.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: light_propagation(matrix, x, 2, transposed), vectors)
    assert torch.autograd.gradcheck(lambda x: propagated_layers(matrix, x, 2, transposed)[-1], vectors)


def test_the_mean_is_not_stacked(vectors, largest_tensor):
    matrix, _ = adjacency("symmetric")
    with largest_tensor:
        light_propagation(matrix, vectors, 4)
    assert largest_tensor.numel == vectors.numel()
