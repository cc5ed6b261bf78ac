"""Hypergraph convolution against loops, and what follows from its degrees."""

import numpy as np
import pytest
import torch

from recbole_mmdiff.graph import hypergraph_convolution


def draw(n, k, d, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n * 100 + k)
    membership = torch.rand(n, k, generator=generator, dtype=torch.float64)
    membership = membership * (membership > 0.4)
    return membership.to(dtype), torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def by_loops(membership, vectors):
    """Each node tells its hyperedges, each hyperedge its nodes."""
    nodes, edges = membership.sum(1), membership.sum(0)
    found = np.zeros_like(vectors)
    for i in range(len(vectors)):
        for e in range(len(edges)):
            for j in range(len(vectors)):
                if membership[i, e] and membership[j, e]:
                    found[i] += membership[i, e] * membership[j, e] / edges[e] * vectors[j] \
                        / np.sqrt(nodes[i] * nodes[j])
    return found


@pytest.mark.parametrize(("n", "k"), [(7, 3), (1, 1), (4, 6)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_loops(n, k, dtype, error):
    membership, vectors = draw(n, k, 5, dtype)
    membership[0] = 0       # [PAD] is in no hyperedge.
    found = hypergraph_convolution(membership, vectors)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, by_loops(*(x.double().numpy() for x in (membership, vectors))),
                               atol=error)
    assert not found[0].any()


def test_a_partition_averages_its_groups():
    membership = torch.eye(3)[torch.tensor([0, 1, 1, 2, 2, 2])]
    found = hypergraph_convolution(membership, torch.arange(6.0)[:, None])
    torch.testing.assert_close(found[:, 0], torch.tensor([0, 1.5, 1.5, 4, 4, 4]))


def test_readers_take_as_a_node_does_and_give_nothing():
    membership, vectors = draw(7, 3, 5)
    readers = torch.cat([membership[2:4], 3 * membership[2:3], torch.zeros(1, 3).double()])
    found = hypergraph_convolution(membership, vectors, readers)
    nodes = by_loops(membership.numpy(), vectors.numpy())
    np.testing.assert_allclose(found, [nodes[2], nodes[3], nodes[2] * np.sqrt(3), np.zeros(5)], atol=1e-12)


def test_layers_do_not_grow():
    """Balanced shares with rows of 1 (SISHE's) keep a vector of ones through any number of layers."""
    membership = torch.full((40, 4), 0.25).double()
    ones = torch.ones(40, 2).double()
    torch.testing.assert_close(hypergraph_convolution(membership, ones), ones)
    membership, _ = draw(40, 4, 1)
    operator = hypergraph_convolution(membership, torch.eye(40).double())
    assert torch.linalg.matrix_norm(operator, 2) <= 1 + 1e-12
    torch.testing.assert_close(operator, operator.T)


def test_gradient():
    membership, vectors = draw(5, 2, 3)
    assert torch.autograd.gradcheck(lambda x: hypergraph_convolution(membership, x),
                                    vectors.requires_grad_())


def test_under_autocast():
    membership, vectors = draw(9, 3, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = hypergraph_convolution(membership, vectors)
    assert torch.equal(found, hypergraph_convolution(membership, vectors))


@pytest.mark.parametrize(("membership", "message"), [
    (torch.ones(3, 2), r"membership has the shape \(3, 2\); accepted: \(4, any\)"),
    (torch.ones(4), r"membership has the shape \(4,\)")])
def test_bad_arguments(membership, message):
    with pytest.raises(ValueError, match=message):
        hypergraph_convolution(membership, torch.ones(4, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_cuda():
    membership, vectors = draw(50, 6, 8)
    found = hypergraph_convolution(membership.cuda(), vectors.cuda())
    torch.testing.assert_close(found.cpu(), hypergraph_convolution(membership, vectors))
