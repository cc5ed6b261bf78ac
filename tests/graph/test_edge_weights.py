"""Normalised and mixed edges against dense tables."""

import numpy as np
import pytest
import torch

from recbole_mmdiff.graph import Edges, mix, nearest_neighbours, normalise

N = 6


def some_edges(seed, count=14, absent=()):
    """Distinct pairs of an (N, N) matrix with positive values, rows sorted; none in ``absent`` rows."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(N * N, generator=generator)[:count].sort().values
    pairs = pairs[~torch.isin(pairs // N, torch.tensor(absent))]
    return Edges(pairs // N, pairs % N,
                 torch.rand(len(pairs), generator=generator, dtype=torch.float64) + 0.1)


def normalised(table, kind):
    """Written out with dense diagonal matrices; a degree that is not positive gives zeros."""
    degrees = table.sum(1)
    positive = degrees > 0
    inverse = np.divide(1, degrees, out=np.zeros(len(table)), where=positive)
    if kind == "random_walk":
        return np.diag(inverse) @ table
    return np.diag(np.sqrt(inverse)) @ table @ np.diag(np.sqrt(inverse))


@pytest.mark.parametrize("kind", ["symmetric", "random_walk"])
@pytest.mark.parametrize("signed", [False, True], ids=["positive", "signed"])
def test_normalise_as_dense_products(table_of, kind, signed):
    edges = some_edges(1, absent=[4])
    if signed:
        edges = edges._replace(values=edges.values - 0.6)
        assert (table_of(edges, (N, N)).sum(1) < 0).any()
    found = normalise(edges, N, kind)
    assert torch.equal(found.rows, edges.rows) and torch.equal(found.columns, edges.columns)
    np.testing.assert_allclose(table_of(found, (N, N)), normalised(table_of(edges, (N, N)), kind), rtol=1e-12)


def test_rows_of_a_random_walk_sum_to_one(table_of):
    sums = table_of(normalise(some_edges(2, 20), N, "random_walk"), (N, N)).sum(1)
    np.testing.assert_allclose(sums, 1, rtol=1e-12)


def test_equal_weights_of_k_neighbours_are_one_kth():
    edges = nearest_neighbours(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), 4)
    ones = edges._replace(values=torch.ones_like(edges.values))
    for kind in ("symmetric", "random_walk"):
        np.testing.assert_allclose(normalise(ones, 20, kind).values, 0.25, rtol=1e-6)


@pytest.mark.parametrize("kind", ["symmetric", "random_walk"])
def test_gradient_of_normalise(kind):
    edges = some_edges(3, absent=[2])
    values = edges.values.clone()
    values[edges.rows == 0] -= 1.5            # A negative degree, whose edges have no gradient.
    assert values[edges.rows == 0].sum() < -0.1
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalise(edges._replace(values=x), N, kind).values, values)


@pytest.mark.parametrize("kind", ["symmetric", "random_walk"])
def test_a_degree_of_zero_gives_zero_and_no_nan(kind):
    values = torch.tensor([0.0, 0.0, 1.0, 2.0], requires_grad=True)
    found = normalise(Edges(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), values), 2, kind).values
    found.sum().backward()
    assert found[:2].tolist() == [0, 0] and found.isfinite().all() and values.grad.isfinite().all()


def test_normalise_names_the_kind():
    with pytest.raises(ValueError, match=r"kind: 'symetric' is not known.*did you mean 'symmetric'"):
        normalise(some_edges(1), N, "symetric")


# ---- mix ---------------------------------------------------------------------------------------


PARTS = [some_edges(4), some_edges(5, absent=[0, 3]), some_edges(6, absent=[3])]


@pytest.mark.parametrize("weights", [[0.1, 0.9, 0.5], torch.tensor([0.2, 0.3, 0.5])], ids=["list", "tensor"])
def test_mix_as_a_dense_sum(table_of, weights):
    found = mix(PARTS, weights, N)
    expected = sum(float(weight) * table_of(part, (N, N))
                   for weight, part in zip(weights, PARTS, strict=True))
    # A float32 weight is not its decimal in float64.
    np.testing.assert_allclose(table_of(found, (N, N)), expected, rtol=1e-12)
    keys = (found.rows * N + found.columns).tolist()
    assert keys == sorted(keys) and len(keys) == np.count_nonzero(expected)


def test_mix_of_one_is_that_one(table_of):
    np.testing.assert_array_equal(table_of(mix(PARTS[:1], [1.0], N), (N, N)), table_of(PARTS[0], (N, N)))


def test_mix_of_what_a_row_has(table_of):
    weights = [0.2, 0.3, 0.5]
    tables = [table_of(part, (N, N)) for part in PARTS]
    expected = np.zeros((N, N))
    for row in range(N):
        has = [part for part, table in enumerate(tables) if table[row].any()]
        for part in has:
            expected[row] += weights[part] / sum(weights[other] for other in has) * tables[part][row]
    found = table_of(mix(PARTS, weights, N, present=True), (N, N))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(found[3], tables[0][3], rtol=1e-12)          # It has only the first.


def test_rows_of_mixed_random_walks_sum_to_one(table_of):
    parts = [normalise(part, N, "random_walk") for part in PARTS]
    rows = np.unique(np.concatenate([part.rows for part in parts]))
    found = table_of(mix(parts, [0.1, 0.9, 3.0], N, present=True), (N, N))
    np.testing.assert_allclose(found.sum(1)[rows], 1, rtol=1e-12)


def test_weights_that_sum_to_zero_give_zero():
    weights = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    found = mix(PARTS, weights, N, present=True)
    found.values.sum().backward()
    assert not found.values[found.rows == 3].any() and (found.rows == 3).any()
    assert found.values.isfinite().all() and weights.grad.isfinite().all()


@pytest.mark.parametrize("present", [False, True])
def test_gradient_of_mix(present):
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    values = [part.values.clone().requires_grad_() for part in PARTS]

    def mixed(weights, *values):
        parts = [part._replace(values=value) for part, value in zip(PARTS, values, strict=True)]
        return mix(parts, weights, N, present).values

    assert torch.autograd.gradcheck(mixed, (weights, *values))


@pytest.mark.parametrize("parts, weights, message", [
    ([], [], r"parts=\[\] has no graph; accepted: one at least"),
    (PARTS, [0.5, 0.5], r"weights=\[0.5, 0.5\] has 2 of them; accepted: 3, one a graph"),
])
def test_errors_of_mix(parts, weights, message):
    with pytest.raises(ValueError, match=message):
        mix(parts, weights, N)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_weights_stay_on_the_gpu():
    moved = [Edges(*(column.cuda() for column in part)) for part in PARTS]
    for kind in ("symmetric", "random_walk"):
        expected, found = (mix([normalise(part, N, kind) for part in parts], [0.2, 0.3, 0.5], N, True)
                           for parts in (PARTS, moved))
        assert found.values.is_cuda
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other.cpu(), one)
