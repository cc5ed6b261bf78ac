"""The sparse matrices of users and items against dense ones."""

import numpy as np
import pytest
import torch

from recbole_mmdiff.graph import bipartite_adjacency, mean_of_items, propagate, sparse_matrix

USERS, ITEMS = 5, 4
#: one pair twice; user 0 and 4 and item 3 have nothing
PAIRS = [(1, 0), (1, 2), (2, 0), (3, 1), (3, 2), (3, 0), (1, 2)]


@pytest.fixture
def edges():
    users, items = torch.tensor(PAIRS).T
    return users, items


def dense_interactions():
    table = np.zeros((USERS, ITEMS))
    for user, item in PAIRS:
        table[user, item] = 1.0
    return table


def test_adjacency_is_symmetrically_normalised(edges):
    table, expected = dense_interactions(), np.zeros((USERS + ITEMS, USERS + ITEMS))
    for user in range(USERS):
        for item in range(ITEMS):
            if table[user, item]:
                value = 1 / np.sqrt(table[user].sum() * table[:, item].sum())
                expected[user, USERS + item] = expected[USERS + item, user] = value
    found = bipartite_adjacency(*edges, USERS, ITEMS)
    assert found.layout == torch.sparse_csr
    np.testing.assert_allclose(found.to_dense(), expected, rtol=1e-6)


def test_mean_of_items(edges):
    table = dense_interactions()
    expected = table / np.maximum(table.sum(1, keepdims=True), 1)
    mean = mean_of_items(*edges, USERS, ITEMS)
    np.testing.assert_allclose(mean.to_dense(), expected, rtol=1e-6)


def test_no_interaction_at_all():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert bipartite_adjacency(nothing, nothing, 2, 3).to_dense().abs().sum() == 0
    assert mean_of_items(nothing, nothing, 2, 3).shape == (2, 3)


def test_sparse_matrix_in_any_order():
    rows, columns = torch.tensor([2, 0, 2]), torch.tensor([1, 3, 0])
    found = sparse_matrix(rows, columns, torch.tensor([1.0, 2.0, 3.0]), (3, 4))
    assert found.to_dense().tolist() == [[0, 0, 0, 2], [0, 0, 0, 0], [3, 1, 0, 0]]


def test_propagation_and_its_gradient(edges):
    adjacency = bipartite_adjacency(*edges, USERS, ITEMS).double()
    mean = mean_of_items(*edges, USERS, ITEMS).double()
    transposed = mean.to_dense().T.to_sparse_csr()
    nodes = torch.randn(USERS + ITEMS, 3, dtype=torch.float64, requires_grad=True)
    items = torch.randn(ITEMS, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(propagate(adjacency, nodes), adjacency.to_dense() @ nodes)
    torch.testing.assert_close(propagate(mean, items, transposed), mean.to_dense() @ items)
    assert torch.autograd.gradcheck(lambda x: propagate(adjacency, x), nodes)
    assert torch.autograd.gradcheck(lambda x: propagate(mean, x, transposed), items)


# ---- weights, self loops, random walk ------------------------------------------------------------


def random_pairs():
    generator = torch.Generator().manual_seed(4)
    return torch.randint(40, (500,), generator=generator), torch.randint(30, (500,), generator=generator)


def test_the_plain_adjacency_keeps_its_bits():
    """1 / sqrt of the integer product of the degrees, rounded to float32 once."""
    users, items = random_pairs()
    pairs = sorted({(user, item) for user, item in zip(users.tolist(), items.tolist(), strict=True)})
    users_of, items_of = (torch.tensor(side) for side in zip(*pairs, strict=True))
    degrees = users_of.bincount()[users_of] * items_of.bincount()[items_of]
    expected = torch.zeros(70, 70)
    expected[users_of, items_of + 40] = expected[items_of + 40, users_of] = degrees.float().rsqrt()
    assert torch.equal(bipartite_adjacency(users, items, 40, 30).to_dense(), expected)


@pytest.mark.parametrize("kind", ["symmetric", "random_walk"])
@pytest.mark.parametrize("self_loops", [False, True], ids=["plain", "loops"])
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
def test_adjacency_of_every_kind(edges, kind, self_loops, weighted):
    weights = torch.arange(1, len(PAIRS) + 1).double() / 4 if weighted else None
    table = np.zeros((USERS + ITEMS, USERS + ITEMS))
    for place, (user, item) in enumerate(PAIRS):
        # The weights of a pair that stands there twice add up; without weights it counts once.
        value = table[user, USERS + item] + float(weights[place]) if weighted else 1.0
        table[user, USERS + item] = table[USERS + item, user] = value
    table += np.eye(len(table)) * self_loops
    inverse = 1 / np.where(table.sum(1) > 0, table.sum(1), np.inf)
    expected = np.diag(inverse) @ table if kind == "random_walk" \
        else np.diag(np.sqrt(inverse)) @ table @ np.diag(np.sqrt(inverse))
    found = bipartite_adjacency(*edges, USERS, ITEMS, weights, self_loops, kind)
    assert found.dtype == (torch.float64 if weighted else torch.float32)
    np.testing.assert_allclose(found.to_dense(), expected, rtol=1e-6)
    if kind == "random_walk" and self_loops:
        np.testing.assert_allclose(found.to_dense().sum(1), 1, rtol=1e-6)


def test_half_weights_are_summed_in_float32(edges):
    found = bipartite_adjacency(*edges, USERS, ITEMS, torch.ones(len(PAIRS)).half())
    assert found.dtype == torch.float32


def test_errors_of_the_adjacency(edges):
    with pytest.raises(ValueError, match=r"weights has the shape \(2,\); accepted: \(7,\), one an"):
        bipartite_adjacency(*edges, USERS, ITEMS, torch.ones(2))
    with pytest.raises(ValueError, match="kind: 'left' is not known"):
        bipartite_adjacency(*edges, USERS, ITEMS, kind="left")
