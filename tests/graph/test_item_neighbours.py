"""Nearest neighbours against a loop and scikit-learn; similarities of edges against torch."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional

from recbole_mmdiff.graph import Edges, grown_neighbours, nearest_neighbours, similarities


def draw(n, size, seed=0):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed))


def signs(n, size=4, seed=1):
    """Rows of -1 and 1 whose cosines are exact in float32, most of them ties."""
    return torch.randint(2, (n, size), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def by_hand(features, k, present=None):
    """(row, column, value) by a sort of the float64 cosines of each row."""
    rows = features.double().numpy()
    lengths = np.sqrt((rows**2).sum(1))
    members = [row for row in range(len(rows))
               if lengths[row] > 0 and (present is None or present[row])]
    found = []
    for row in members:
        alike = {column: rows[row] @ rows[column] / lengths[row] / lengths[column] for column in members}
        best = sorted(members, key=lambda column: (column != row, -alike[column], column))[:k]
        found += [(row, column, alike[column]) for column in best]
    return found


def assert_edges(edges, expected):
    assert list(zip(edges.rows.tolist(), edges.columns.tolist(), strict=True)) \
        == [(row, column) for row, column, _ in expected]
    np.testing.assert_allclose(edges.values, [value for *_, value in expected], atol=1e-6)


@pytest.mark.parametrize("n, size, k", [(40, 7, 5), (300, 33, 10), (25, 1024, 3)])
def test_as_scikit_learn(n, size, k):
    features = draw(n, size)
    search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(features.double())
    distances, columns = search.kneighbors(features.double())
    edges = nearest_neighbours(features, k)
    assert edges.rows.tolist() == np.repeat(np.arange(n), k).tolist()
    assert edges.columns.tolist() == columns.ravel().tolist()
    np.testing.assert_allclose(edges.values, 1 - distances.ravel(), atol=1e-6)
    assert edges.values.dtype == torch.float32 and edges.rows.dtype == torch.int64


def test_each_row_is_its_own_nearest():
    edges = nearest_neighbours(draw(30, 5), 4)
    assert edges.columns.view(30, 4)[:, 0].tolist() == list(range(30))


@pytest.mark.parametrize("k", [1, 3, 20])
def test_ties_go_to_the_row_itself_and_then_to_the_lower_column(k):
    features = signs(50)
    assert_edges(nearest_neighbours(features, k), by_hand(features, k))


@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize("k", [1, 4])
def test_equal_rows(n, k):
    """Each row itself and the lowest of the others: the candidates are more than k, and than are kept."""
    edges = nearest_neighbours(draw(1, 6).repeat(n, 1), k)
    assert edges.columns.view(n, k).tolist() == [
        [row, *(column for column in range(k) if column != row)][:k] for row in range(n)]
    assert len(edges.values.unique()) == 1


@pytest.mark.parametrize("block_elements", [1, 1000, 2**24])
@pytest.mark.parametrize("k", [1, 3, 90, 160])
def test_groups_of_equal_rows(k, block_elements):
    """Two groups, one larger than the candidates that are kept of it, among rows of their own; k is below
    either group, and above."""
    kinds = draw(2, 5)
    features = draw(250, 5, seed=2)
    features[:240:2], features[1:100:2] = kinds[0], kinds[1]
    assert_edges(nearest_neighbours(features, k, block_elements=block_elements), by_hand(features, k))


@pytest.mark.parametrize("k", [1, 2, 5, 100])
def test_no_row_loses_itself_by_rounding(k):
    """The unit vectors of parallel rows differ in their last bits, by which some are nearer to others."""
    features = draw(1, 6) * torch.linspace(0.1, 9, 200)[:, None]
    rows, columns, values = (part.view(200, k) for part in nearest_neighbours(features, k))
    assert torch.equal(columns[:, 0], rows[:, 0]) and (columns[:, 1:] != rows[:, 1:]).all()
    assert (values[:, 2:] <= values[:, 1:-1]).all()


@pytest.mark.parametrize("features", [
    draw(67, 37), signs(67), draw(23, 129).repeat(3, 1), draw(5, 3).repeat(20, 1) + 1e-7 * draw(100, 3),
    (1 + 1e-4 * draw(90, 50)),
], ids=["random", "ties", "equal rows", "nearly equal rows", "all alike"])
def test_any_block_size_gives_the_same_bits(features):
    n = len(features)
    whole = nearest_neighbours(features, 5)
    for block in (1, n - 1, n, 2 * n, 7 * n + 3, n * n - 1, n * n):
        for expected, found in zip(whole, nearest_neighbours(features, 5, block_elements=block),
                                   strict=True):
            assert torch.equal(expected, found), block
    assert torch.equal(whole.values, similarities(features, whole))


def test_sorted_by_row_and_falling_similarity():
    rows, columns, values = nearest_neighbours(signs(40), 9)
    keys = list(zip(rows.tolist(), (-values).tolist(), (columns != rows).tolist(), columns.tolist(),
                    strict=True))
    assert keys == sorted(keys)


@pytest.mark.parametrize("k", [2, 6, 50])
def test_absent_rows_and_rows_without_length_take_no_part(k):
    features, present = draw(12, 4), torch.ones(12, dtype=torch.bool)
    present[[0, 5]] = False
    features[[3, 5, 11]] = 0
    features[0] = torch.nan            # What stands in an absent row is not looked at.
    expected = by_hand(features.nan_to_num(), k, present)
    assert {row for row, *_ in expected} == {1, 2, 4, 6, 7, 8, 9, 10}
    assert_edges(nearest_neighbours(features, k, present), expected)


@pytest.mark.parametrize("n, members", [(1, 1), (3, 0), (0, 0)])
def test_one_row_or_none(n, members):
    edges = nearest_neighbours(draw(n, 4), 10, torch.arange(n) < members)
    assert edges.rows.tolist() == edges.columns.tolist() == [0] * members
    np.testing.assert_allclose(edges.values, [1.0] * members, atol=1e-6)
    assert edges.rows.dtype == torch.int64 and edges.values.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_float32(dtype):
    features = draw(40, 9).to(dtype)
    for found, expected in zip(nearest_neighbours(features, 5), nearest_neighbours(features.float(), 5),
                               strict=True):
        assert torch.equal(found, expected)


def test_autocast_does_not_make_it_coarse():
    features = draw(1500, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_neighbours(features, 5)
    assert torch.equal(found.columns, nearest_neighbours(features, 5).columns)


def test_no_gradient_and_features_unchanged():
    features = draw(10, 3).requires_grad_()
    before = features.detach().clone()
    assert not nearest_neighbours(features, 3).values.requires_grad
    assert torch.equal(features, before)


def test_nothing_is_n_by_n(largest_tensor):
    features = draw(400, 8)
    with largest_tensor:
        nearest_neighbours(features, 5, block_elements=4000)
    assert largest_tensor.numel <= 400 * 10        # The block, and the edges with their margin.


@pytest.mark.parametrize("change, message", [
    ({"k": 0}, "k: 0 is too small, use 1 or more"),
    ({"present": torch.ones(4, dtype=torch.bool)}, r"present is torch.bool of shape \(4,\); .*\(5,\)"),
    ({"present": torch.ones(5)}, r"present is torch.float32 of shape \(5,\); accepted: torch.bool"),
    ({"features": torch.tensor([[1.0], [torch.nan]])}, "row 1 of length nan; accepted: rows of finite"),
    ({"features": torch.full((2, 3), 1e30)}, "row 0 of length inf; accepted: rows of finite length"),
])
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbours(**{"features": draw(5, 3), "k": 2, **change})


# ---- similarities ------------------------------------------------------------------------------


def some_edges(n, count, seed=3):
    """Distinct pairs without an order."""
    pairs = torch.randperm(n * n, generator=torch.Generator().manual_seed(seed))[:count]
    return Edges(pairs // n, pairs % n, torch.zeros(count))


def test_similarities_and_their_gradient_as_torch():
    features, edges = draw(20, 6).double().requires_grad_(), some_edges(20, 70)
    found = similarities(features, edges)
    expected = functional.cosine_similarity(features[edges.rows], features[edges.columns])
    torch.testing.assert_close(found, expected)
    weights = draw(70, 1)[:, 0].double()
    for block in (1, 20, 2**20):
        gradients = [torch.autograd.grad((value * weights).sum(), features, retain_graph=True)[0]
                     for value in (similarities(features, edges, block), expected)]
        torch.testing.assert_close(*gradients)


def test_gradcheck_of_similarities():
    features = draw(6, 3).double().requires_grad_()
    edges = some_edges(6, 15)
    assert torch.autograd.gradcheck(lambda x: similarities(x, edges), features)
    assert torch.autograd.gradgradcheck(lambda x: similarities(x, edges), features)


def test_a_row_of_length_zero_has_no_gradient():
    features = draw(4, 3)
    features[2] = 0
    features.requires_grad_()
    found = similarities(features, Edges(*torch.tensor([[0, 2, 1], [2, 2, 3]]), torch.zeros(3)))
    found.sum().backward()
    assert found[:2].tolist() == [0, 0] and found[2] != 0
    assert features.grad[[0, 2]].tolist() == [[0] * 3] * 2 and features.grad[[1, 3]].abs().sum() > 0


def test_similarities_of_half_precision():
    features, edges = draw(10, 5).half().requires_grad_(), some_edges(10, 30)
    found = similarities(features, edges)
    assert found.dtype == torch.float32
    assert torch.equal(found, similarities(features.float(), edges))
    found.sum().backward()
    assert features.grad.dtype == torch.float16 and features.grad.isfinite().all()


def test_similarities_never_hold_a_vector_an_edge(largest_tensor):
    features, edges = draw(50, 16).requires_grad_(), some_edges(50, 1000)
    with largest_tensor:
        similarities(features, edges, block_elements=800).sum().backward()
    assert largest_tensor.numel <= 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_neighbours_stay_on_the_gpu():
    for features in (signs(50), draw(200, 64), draw(20, 64).repeat(5, 1)):
        expected = nearest_neighbours(features, 5)
        found = nearest_neighbours(features.cuda(), 5, torch.ones(len(features), dtype=torch.bool).cuda())
        assert all(part.is_cuda for part in found)
        assert torch.equal(found.columns.cpu(), expected.columns)
        torch.testing.assert_close(found.values.cpu(), expected.values)
        torch.testing.assert_close(similarities(features.cuda(), found), found.values)


@pytest.mark.parametrize("block_elements", [600, 2**24])
def test_hundreds_of_equal_rows(block_elements):
    """As features of few categories have them: a row itself and the first of its equals are neighbours."""
    features = draw(3, 16)[torch.arange(600) % 3]
    features[:5] = draw(5, 16, seed=1)
    edges = nearest_neighbours(features, 4, block_elements=block_elements)
    for row in (5, 300, 599):
        equal = [number for number in range(5, 600) if number % 3 == row % 3 and number != row]
        assert edges.columns[edges.rows == row].tolist() == [row, *equal[:3]]


# ---- grown graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw_rows, k", [(draw, 1), (draw, 4), (signs, 6), (draw, 40)])
@pytest.mark.parametrize("block_elements", [2**24, 7])
def test_each_further_row_comes_into_the_graph_alone(draw_rows, k, block_elements):
    features, count = draw_rows(24, 4, seed=3), 17
    features[5] = features[20] = 0
    present = torch.rand(24, generator=torch.Generator().manual_seed(2)) < 0.8
    grown = grown_neighbours(features, count, k, present, block_elements)
    before = nearest_neighbours(features[:count], k, present[:count])
    known = grown.rows < count
    assert all(torch.equal(part[known], other) for part, other in zip(grown, before, strict=True))
    for row in range(count, 24):
        alone = torch.cat([features[:count], features[row:row + 1]])
        expected = by_hand(alone, k, [*present[:count].tolist(), bool(present[row])])
        expected = {(row if column == count else column, round(value, 5)) for place, column, value in expected
                    if place == count}
        of_row = grown.rows == row
        assert {(column, round(value, 5)) for column, value in zip(
            grown.columns[of_row].tolist(), grown.values[of_row].tolist(), strict=True)} == expected


def test_nothing_to_grow_by():
    features = draw(12, 5)
    assert all(torch.equal(*parts) for parts in zip(grown_neighbours(features, 12, 3),
                                                    nearest_neighbours(features, 3), strict=True))
    assert grown_neighbours(features, 0, 3).columns.tolist() == list(range(12))
