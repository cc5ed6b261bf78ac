"""Products over edges and their gradients against dense tables; matrices against scipy."""

import numpy as np
import pytest
import scipy.sparse
import torch

from recbole_mmdiff.graph import Edges, edge_dots, to_matrix, transpose, weighted_product

ROWS, COLUMNS, SIZE = 7, 5, 3


def some_edges(count=12, dtype=torch.float64):
    """Distinct pairs of a (ROWS, COLUMNS) matrix without an order; row 6 has none."""
    generator = torch.Generator().manual_seed(5)
    pairs = torch.randperm((ROWS - 1) * COLUMNS, generator=generator)[:count]
    values = torch.randn(count, generator=generator, dtype=dtype)
    return Edges(pairs // COLUMNS, pairs % COLUMNS, values)


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6), dtype=dtype)


def test_product_as_a_dense_one(table_of):
    edges, dense = some_edges(), draw(COLUMNS, SIZE)
    found = weighted_product(edges, dense, ROWS)
    np.testing.assert_allclose(found, table_of(edges, (ROWS, COLUMNS)) @ dense.numpy(), rtol=1e-12)
    assert found[6].tolist() == [0] * SIZE


@pytest.mark.parametrize("block", [1, SIZE, 5 * SIZE, 2**20])
def test_gradients_of_the_product(block):
    edges, dense = some_edges(), draw(COLUMNS, SIZE).requires_grad_()
    values = edges.values.clone().requires_grad_()

    def product(values, dense):
        return weighted_product(edges._replace(values=values), dense, ROWS, block)

    assert torch.autograd.gradcheck(product, (values, dense))
    assert torch.autograd.gradgradcheck(product, (values, dense))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradient_that_is_asked_for(needs):
    edges, dense = some_edges(), draw(COLUMNS, SIZE).requires_grad_(needs[1])
    values = edges.values.clone().requires_grad_(needs[0])
    weighted_product(edges._replace(values=values), dense, ROWS).sum().backward()
    assert (values.grad is not None, dense.grad is not None) == needs


def test_product_without_an_edge():
    nothing = torch.zeros(0, dtype=torch.int64)
    values = torch.zeros(0, requires_grad=True)
    found = weighted_product(Edges(nothing, nothing, values), draw(COLUMNS, SIZE), ROWS)
    found.sum().backward()
    assert found.shape == (ROWS, SIZE) and not found.any() and values.grad.shape == (0,)


def test_half_precision_is_taken_in_the_dtype_of_the_values():
    edges, dense = some_edges(dtype=torch.float32), draw(COLUMNS, SIZE).half().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = weighted_product(edges, dense, ROWS)
    assert torch.equal(found, weighted_product(edges, dense.float(), ROWS))
    found.sum().backward()
    assert dense.grad.dtype == torch.float16


def test_the_product_never_holds_a_vector_an_edge(largest_tensor):
    pairs = torch.arange(900)
    values = draw(900, dtype=torch.float32).requires_grad_()
    dense = draw(30, 16, dtype=torch.float32).requires_grad_()
    with largest_tensor:
        weighted_product(Edges(pairs // 30, pairs % 30, values), dense, 30, 500).sum().backward()
    assert largest_tensor.numel <= 900


@pytest.mark.parametrize("size", [1, 2, 5, 8, 31, 64, 300])
def test_dots_depend_on_their_two_vectors_alone(size):
    """To the last bit, for any number of edges and any blocks."""
    left, right = draw(9, size, dtype=torch.float32), draw(11, size, dtype=torch.float32)
    rows, columns = torch.arange(99) // 11, torch.arange(99) % 11
    whole = edge_dots(left, right, rows, columns)
    np.testing.assert_allclose(whole.view(9, 11), left.double() @ right.double().T, rtol=1e-4, atol=1e-5)
    for block in (1, 2 * size, 50 * size):
        assert torch.equal(edge_dots(left, right, rows, columns, block), whole)
    for edge in (0, 40, 98):
        alone = slice(edge, edge + 1)
        assert torch.equal(edge_dots(left, right, rows[alone], columns[alone]), whole[alone])


def test_gradients_of_dots():
    edges = some_edges()
    left, right = draw(ROWS, SIZE).requires_grad_(), draw(COLUMNS, SIZE).requires_grad_()
    for block in (1, 2**20):
        assert torch.autograd.gradcheck(
            lambda a, b, block=block: edge_dots(a, b, edges.rows, edges.columns, block), (left, right))


def test_matrix_and_transpose_as_scipy():
    edges = some_edges()
    expected = scipy.sparse.coo_array(
        (edges.values.numpy(), (edges.rows.numpy(), edges.columns.numpy())), (ROWS, COLUMNS)).tocsr()
    matrix = to_matrix(edges._replace(values=edges.values.requires_grad_()), (ROWS, COLUMNS))
    for found, csr in ((matrix, expected), (transpose(matrix), expected.T.tocsr())):
        csr.sort_indices()
        assert found.layout == torch.sparse_csr and found.shape == csr.shape
        assert found.crow_indices().tolist() == csr.indptr.tolist()
        assert found.col_indices().tolist() == csr.indices.tolist()
        assert found.values().tolist() == csr.data.tolist()
        assert not found.requires_grad


def test_transpose_of_an_empty_matrix():
    nothing = torch.zeros(0, dtype=torch.int64)
    found = transpose(to_matrix(Edges(nothing, nothing, torch.zeros(0)), (2, 3)))
    assert found.shape == (3, 2) and not found.to_dense().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_products_stay_on_the_gpu():
    edges, dense = some_edges(dtype=torch.float32), draw(COLUMNS, SIZE, dtype=torch.float32)
    results = []
    for device in ("cpu", "cuda"):
        values, vectors = (part.detach().to(device).requires_grad_() for part in (edges.values, dense))
        moved = Edges(edges.rows.to(device), edges.columns.to(device), values)
        product = weighted_product(moved, vectors, ROWS)
        product.square().sum().backward()
        matrix = transpose(to_matrix(moved, (ROWS, COLUMNS))).to_dense()
        results.append([product, values.grad, vectors.grad, matrix])
        assert all(part.device.type == device for part in results[-1])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), expected)
