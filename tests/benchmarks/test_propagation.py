"""One propagation over a graph with its gradient: the stored transpose against autograd's own.

500,000 interactions of 20,000 users and 10,000 items, vectors of length 64, float32, CPU, one thread.
Both run in turn.
"""

import statistics
import time

import pytest
import torch

from recbole_mmdiff.graph import bipartite_adjacency, propagate

USERS, ITEMS, ROWS, SIZE = 20_000, 10_000, 500_000, 64
REQUIRED_RATIO = 2.0


@pytest.fixture(scope="module")
def graph():
    """The adjacency and start vectors."""
    generator = torch.Generator().manual_seed(3)
    users = torch.randint(USERS, (ROWS,), generator=generator)
    items = torch.randint(ITEMS, (ROWS,), generator=generator)
    vectors = torch.randn(USERS + ITEMS, SIZE, generator=generator)
    return bipartite_adjacency(users, items, USERS, ITEMS), vectors


def gradient(product, matrix, vectors):
    """Of the sum of squares of the product, after one forward and backward."""
    vectors = vectors.clone().requires_grad_()
    product(matrix, vectors).square().sum().backward()
    return vectors.grad


def test_equal_and_faster(graph):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    ways = {"ours": propagate, "autograd": lambda matrix, dense: matrix @ dense}
    try:
        gradients = {name: gradient(way, *graph) for name, way in ways.items()}
        torch.testing.assert_close(gradients["ours"], gradients["autograd"], rtol=1e-4, atol=1e-5)
        times = {name: [] for name in ways}
        for _ in range(5):
            for name, way in ways.items():
                started = time.perf_counter()
                gradient(way, *graph)
                times[name].append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    ours, autograd = (statistics.median(times[name]) for name in ("ours", "autograd"))
    print(f"\npropagation with gradient: {1000 * autograd:.0f} / {1000 * ours:.0f} ms "
          f"= {autograd / ours:.1f}x")
    assert autograd / ours >= REQUIRED_RATIO
