"""Fused graphs against scipy on dense matrices, the paper's alternation in dense loops, and closed forms."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from recbole_mmdiff.graph import Edges, nearest_neighbours
from recbole_mmdiff.transport import risgf
from recbole_mmdiff.transport._log import NotConverged
from recbole_mmdiff.transport.risgf import fuse_graphs

UNHURRIED = settings(deadline=None)      # the machine may be busy
MUS = (0.02, 0.1, 0.3, 0.5, 0.7, 1.5)


def graph(pairs, dtype=torch.float64):
    """Edges of (row, column) pairs; their values are not to be used."""
    rows, columns = torch.tensor(sorted(pairs), dtype=torch.int64).view(-1, 2).unbind(1)
    return Edges(rows, columns, torch.full((len(rows),), 0.3, dtype=dtype))


def tops(size, z, count, seed):
    """``count`` graphs in which each item has itself and z - 1 random others."""
    draw = np.random.default_rng(seed)
    others = [[np.delete(np.arange(size), row) for row in range(size)] for _ in range(count)]
    return [graph([(row, column) for row in range(size)
                   for column in [row, *draw.choice(rest[row], z - 1, replace=False)]]) for rest in others]


def tables(graphs, size):
    """(M, size, size) of 0 and 1."""
    made = np.zeros((len(graphs), size, size))
    for table, edges in zip(made, graphs, strict=True):
        table[edges.rows, edges.columns] = 1
    return made


def table_of(edges, size):
    made = np.zeros((size, size))
    made[edges.rows, edges.columns] = edges.values
    return made


def shrunk(x, mu):
    """Eq. 4, line by line."""
    return np.where(x >= mu, x - mu, np.where(x <= -mu, x + mu, 0))


def objective(fused, delta, held, mu):
    """Eq. 3."""
    return (((fused + delta - held) ** 2).sum() / 2 + mu * np.abs(delta).sum()) / len(held)


def objective_of(fused, held, mu):
    return objective(fused, shrunk(held - fused, mu), held, mu)


def dense_solution(held, mu, seed=0):
    """A and the objective by L-BFGS-B on all entries of A and of p, q >= 0, whose difference is Delta."""
    count, size = len(held), held.shape[1]
    bounds = [(0, 1)] * size**2 + [(0, None)] * (2 * held.size)

    def both(x):
        fused = x[:size**2].reshape(size, size)
        p, q = x[size**2:].reshape(2, *held.shape)
        rest = fused + p - q - held
        value = ((rest**2).sum() / 2 + mu * (p + q).sum()) / count
        return value, np.concatenate([rest.sum(0).ravel(), (rest + mu).ravel(), (mu - rest).ravel()]) / count

    start = np.random.default_rng(seed).random(len(bounds))
    found = minimize(both, start, jac=True, method="L-BFGS-B", bounds=bounds,
                     options={"maxiter": 5000, "maxfun": 50000, "ftol": 1e-15, "gtol": 1e-9})
    return found.x[:size**2].reshape(size, size), found.fun


def dense_alternation(held, mu, tolerance):
    """A and the objectives by Eqs. 4 and 5 on whole matrices, from the mean."""
    fused, objectives, move = held.mean(0), [], np.inf
    delta = shrunk(held - fused, mu)
    objectives.append(objective(fused, delta, held, mu))
    while move > tolerance:
        before, fused = fused, np.clip((held - delta).mean(0), 0, 1)
        delta = shrunk(held - fused, mu)
        objectives.append(objective(fused, delta, held, mu))
        move = np.abs(fused - before).max()
    return fused, objectives


def closed_form(held, compared, mu):
    """In fractions, for an entry in ``held`` of ``compared`` graphs."""
    mu, share = Fraction(mu), Fraction(held, compared)
    if share == Fraction(1, 2):
        return share
    if share > Fraction(1, 2):
        return 1 - closed_form(compared - held, compared, mu)
    return min(held * mu / (compared - held), share)


#: up to four graphs of up to 20 of the pairs of five items, and mu
FUSIONS = st.tuples(
    st.lists(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=20).map(graph),
             min_size=1, max_size=4),
    st.floats(0.01, 2))


# ---- the optimum -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("mu", MUS)
def test_objective_of_a_dense_solver(count, mu):
    graphs = tops(5, 3, count, seed=count)
    held = tables(graphs, 5)
    edges, log = fuse_graphs(graphs, 5, mu)
    solution, best = dense_solution(held, mu)
    assert objective_of(table_of(edges, 5), held, mu) == pytest.approx(best, abs=1e-7)
    assert log.objectives[-1] == pytest.approx(best, abs=1e-7)
    outside = ~held.any(0)
    assert outside.any() and np.abs(solution[outside]).max() < 1e-3


@pytest.mark.parametrize("compared", range(1, 8))
@pytest.mark.parametrize("mu", [0.003, *MUS])
def test_alternation_reaches_the_closed_form(compared, mu):
    """And the closed form is the optimum, by a search over A for each number of graphs."""
    graphs = [graph([(0, column) for column in range(number + 1)]) for number in range(compared)]
    edges, log = fuse_graphs(graphs, compared, mu)
    assert log.converged and log.error <= 1e-6
    for column, value in zip(edges.columns.tolist(), edges.values.tolist(), strict=True):
        held = np.arange(compared) >= column
        expected = float(closed_form(int(held.sum()), compared, mu))
        assert abs(value - expected) < 1e-6
        searched = minimize_scalar(objective_of, bounds=(0, 1), args=(held, mu), method="bounded",
                                   options={"xatol": 1e-9})
        assert objective_of(expected, held, mu) <= searched.fun + 1e-12


@UNHURRIED
@given(FUSIONS)
def test_first_order_conditions(fusion):
    """In Delta as Eq. 4 gives it for A, and in A on [0, 1] up to the tolerance."""
    graphs, mu = fusion
    held = tables(graphs, 5)
    fused = table_of(fuse_graphs(graphs, 5, mu)[0], 5)
    delta = shrunk(held - fused, mu)
    rest = fused + delta - held
    np.testing.assert_allclose(rest[delta > 0], -mu)
    np.testing.assert_allclose(rest[delta < 0], mu)
    assert (np.abs(rest) <= mu * (1 + 1e-12)).all()
    slope = rest.mean(0)
    assert fused.min() >= 0 and fused.max() <= 1
    assert (slope[fused > 0] <= 1e-6).all() and (slope[fused < 1] >= -1e-6).all()


@UNHURRIED
@given(FUSIONS)
def test_each_iteration_is_that_of_whole_matrices(fusion):
    graphs, mu = fusion
    fused, objectives = dense_alternation(tables(graphs, 5), mu, 1e-6)
    edges, log = fuse_graphs(graphs, 5, mu)
    np.testing.assert_allclose(table_of(edges, 5), fused, atol=1e-12)
    assert log.iterations == len(objectives) - 1
    np.testing.assert_allclose(log.objectives, objectives, atol=1e-12)


@UNHURRIED
@given(FUSIONS, st.sampled_from([torch.float32, torch.float64]))
def test_the_objective_never_rises(fusion, dtype):
    graphs, mu = fusion
    graphs = [edges._replace(values=edges.values.to(dtype)) for edges in graphs]
    edges, log = fuse_graphs(graphs, 5, mu)
    falls = -np.diff(log.objectives)
    assert (falls >= -1e-13).all()
    assert edges.values.dtype == dtype
    last = objective_of(table_of(edges, 5), tables(graphs, 5), mu)
    assert last == pytest.approx(log.objectives[-1], abs=1e-14 if dtype == torch.float64 else 1e-5)
    if len(edges.values) and log.iterations > 1:
        assert log.objectives[-1] < log.objectives[0]


# ---- what it says of the graphs ----------------------------------------------------------------


@pytest.mark.parametrize("mu", MUS)
def test_one_graph_stays_and_two_give_their_mean(mu):
    first, second = tops(12, 4, 2, seed=5)
    alone, log = fuse_graphs([first], 12, mu)
    np.testing.assert_array_equal(table_of(alone, 12), tables([first], 12)[0])
    assert log.iterations == 1 and log.error == 0
    both, log = fuse_graphs([first, second], 12, mu)
    np.testing.assert_array_equal(table_of(both, 12), tables([first, second], 12).mean(0))
    assert log.iterations == 1 and log.error == 0


def test_what_one_of_three_holds_shrinks_and_what_one_lacks_grows():
    """Below the mean and above it, the more the smaller mu is; itself stays 1."""
    graphs = [graph([(0, 0), (0, 1), (0, 2)]), graph([(0, 0), (0, 2)]), graph([(0, 0)])]
    found = {mu: fuse_graphs(graphs, 3, mu)[0].values.tolist() for mu in (0.01, 0.1, 0.5, 1.0)}
    np.testing.assert_allclose(found[0.1], [1, 0.05, 0.95], atol=1e-6)
    assert found[0.01][1] < found[0.1][1] < found[0.5][1] < found[1.0][1] == pytest.approx(1 / 3)
    assert found[0.01][2] > found[0.1][2] > found[0.5][2] > found[1.0][2] == pytest.approx(2 / 3)
    assert {values[0] for values in found.values()} == {1.0}
    assert min(values[1] for values in found.values()) > 0


@pytest.mark.parametrize("count, mu", [(3, 0.1), (3, 0.003), (4, 0.1), (5, 0.1), (7, 0.02)])
def test_iterations(count, mu):
    """Straight on for (M - 1) / (2 mu) iterations at most, then the distance halves at least."""
    log = fuse_graphs(tops(20, 3, count, seed=2), 20, mu)[1]
    assert log.converged
    assert log.iterations <= (count - 1) / (2 * mu) + np.log2(1e6) + 2


def test_distance_shrinks_geometrically():
    """One of three: to a third of itself an iteration."""
    graphs = [graph([(0, 1)]), graph([]), graph([])]
    distances = []
    for iterations in range(9, 15):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)
            edges, log = fuse_graphs(graphs, 2, 0.1, tolerance=1e-12, max_iterations=iterations)
        assert log.iterations == iterations
        distances.append(float(edges.values) - 0.05)
    np.testing.assert_allclose(np.divide(distances[1:], distances[:-1]), 1 / 3, rtol=1e-4)


@UNHURRIED
@given(FUSIONS, st.randoms())
def test_order_does_not_matter(fusion, shuffle):
    graphs, mu = fusion
    expected, log = fuse_graphs(graphs, 5, mu)
    other = []
    for edges in shuffle.sample(graphs, len(graphs)):
        order = torch.tensor(shuffle.sample(range(len(edges.rows)), len(edges.rows)), dtype=torch.int64)
        other.append(Edges(*(part[order] for part in edges)))
    found, other_log = fuse_graphs(other, 5, mu)
    assert all(torch.equal(*parts) for parts in zip(found, expected, strict=True))
    assert other_log == log


def test_entries_are_the_sorted_union():
    graphs = tops(9, 3, 3, seed=8)
    edges, _ = fuse_graphs(graphs, 9, 0.1)
    expected = sorted(set().union(*(zip(part.rows.tolist(), part.columns.tolist(), strict=True)
                                    for part in graphs)))
    assert list(zip(edges.rows.tolist(), edges.columns.tolist(), strict=True)) == expected
    assert edges.rows.dtype == edges.columns.dtype == torch.int64


def test_only_entries_take_memory():
    """A billion items, three entries."""
    last = 10**9 - 1
    edges, _ = fuse_graphs([graph([(0, last), (last, last)]), graph([(last, 0), (last, last)])], 10**9, 0.1)
    assert edges.rows.tolist() == [0, last, last] and edges.columns.tolist() == [last, 0, last]
    assert edges.values.tolist() == [0.5, 0.5, 1]


@pytest.mark.parametrize("block", [1, 7, 40, 2**20])
@pytest.mark.parametrize("shuffled", [False, True])
def test_any_block_size_gives_the_same(block, shuffled, monkeypatch):
    graphs = [*tops(12, 4, 3, seed=9), graph([(3, 4), (3, 5), (11, 0)])]
    expected, log = fuse_graphs(graphs, 12, 0.1)
    monkeypatch.setattr(risgf, "BLOCK", block)
    if shuffled:
        graphs = [Edges(*(part.flip(0) for part in edges)) for edges in graphs]
    found, other = fuse_graphs(graphs, 12, 0.1)
    assert all(torch.equal(*parts) for parts in zip(found, expected, strict=True)) and other == log


@pytest.mark.parametrize("mu", [0.1, 0.4])
def test_from_features(mu):
    """Eqs. 1-5 on whole matrices: exponentials of cosines, their top z, and the dense solution."""
    draw = torch.Generator().manual_seed(4)
    features = [torch.randn(8, dim, generator=draw) for dim in (5, 9, 4)]
    held = np.zeros((3, 8, 8))
    for table, rows in zip(held, features, strict=True):
        unit = (rows / rows.norm(dim=1, keepdim=True)).double().numpy()
        best = np.argsort(-np.exp(unit @ unit.T), axis=1)[:, :3]
        np.put_along_axis(table, best, 1, axis=1)
    edges, _ = fuse_graphs([nearest_neighbours(rows, 3) for rows in features], 8, mu)
    assert edges.values.dtype == torch.float32
    solution, best = dense_solution(held, mu)
    np.testing.assert_allclose(table_of(edges, 8), solution, atol=2e-3)
    assert objective_of(table_of(edges, 8), held, mu) == pytest.approx(best, abs=1e-5)


# ---- absent modalities -------------------------------------------------------------------------


def test_an_absent_modality_is_no_disagreement():
    """Item 2 has no image: what its text says stands, from it and to it."""
    text = graph([(0, 0), (0, 1), (0, 2), (1, 1), (2, 2), (2, 0)])
    image = graph([(0, 0), (1, 1), (1, 0)])
    present = torch.tensor([[True, True], [True, True], [True, False]])
    edges, _ = fuse_graphs([text, image], 3, 0.1, present=present)
    values = dict(zip(zip(edges.rows.tolist(), edges.columns.tolist(), strict=True), edges.values.tolist(),
                      strict=True))
    assert values == {(0, 0): 1, (0, 1): 0.5, (0, 2): 1, (1, 0): 0.5, (1, 1): 1, (2, 0): 1, (2, 2): 1}


@pytest.mark.parametrize("mu", MUS)
def test_with_absent_modalities_each_entry_has_its_own_number_of_them(mu):
    draw = np.random.default_rng(6)
    present = draw.random((10, 4)) < 0.7
    graphs = [graph([(row, column) for row in range(10) for column in range(10)
                     if present[row, number] and present[column, number] and draw.random() < 0.4])
              for number in range(4)]
    edges, log = fuse_graphs(graphs, 10, mu, present=torch.tensor(present))
    held, fused, total = tables(graphs, 10), table_of(edges, 10), 0.0
    for row, column in zip(edges.rows.tolist(), edges.columns.tolist(), strict=True):
        compare = present[row] & present[column]
        expected = closed_form(int(held[:, row, column].sum()), int(compare.sum()), mu)
        assert abs(fused[row, column] - float(expected)) < 1e-6
        total += objective_of(fused[row, column], held[compare, row, column], mu)
    assert log.objectives[-1] == pytest.approx(total)


def test_all_present_is_the_same_as_nothing_said():
    graphs = tops(9, 3, 3, seed=8)
    expected, log = fuse_graphs(graphs, 9, 0.1)
    found, other = fuse_graphs(graphs, 9, 0.1, present=torch.ones(9, 3, dtype=torch.bool))
    assert all(torch.equal(*parts) for parts in zip(found, expected, strict=True)) and log == other


# ---- edges of the domain -----------------------------------------------------------------------


def test_nothing_to_fuse():
    edges, log = fuse_graphs([graph([]), graph([])], 4, 0.1)
    assert [len(part) for part in edges] == [0, 0, 0]
    assert log.converged and log.objectives == (0, 0)


def test_half_precision_gives_float32():
    assert fuse_graphs([graph([(0, 1)], torch.float16)], 2, 0.1)[0].values.dtype == torch.float32


def test_autocast_changes_nothing():
    graphs = [edges._replace(values=edges.values.float()) for edges in tops(9, 3, 3, seed=8)]
    expected, log = fuse_graphs(graphs, 9, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found, other = fuse_graphs(graphs, 9, 0.1)
    assert torch.equal(found.values, expected.values) and found.values.dtype == torch.float32 and log == other


def test_too_few_iterations_warn_where_it_was_called():
    with pytest.warns(NotConverged, match=r"fuse_graphs: error .* after 3 iterations") as caught:
        log = fuse_graphs(tops(9, 3, 3, seed=8), 9, 0.1, max_iterations=3)[1]
    assert caught[0].filename == __file__
    assert not log.converged and log.iterations == 3 and len(log.objectives) == 4


@pytest.mark.parametrize("change, message", [
    ({"graphs": []}, r"graphs=\[\] has no graph; accepted: one at least"),
    ({"graphs": [graph([(0, 1)]), graph([(2, 3)])]}, r"graphs\[1\] has the pair \(2, 3\); .* from 0 to 2"),
    ({"graphs": [graph([(0, -1)])]}, r"graphs\[0\] has the pair \(0, -1\); accepted: items from 0"),
    ({"graphs": [graph([(0, 1)]), graph([(1, 2), (0, 1), (1, 2)])]}, r"graphs\[1\] has the pair \(1, 2\) tw"),
    ({"graphs": [graph([])], "size": 0}, "size=0 is too small; accepted: 1 or more"),
    ({"mu": 0.0}, "mu=0.0 is out of range; accepted: a finite number above 0"),
    ({"mu": float("nan")}, "mu=nan"),
    ({"mu": float("inf")}, "mu=inf"),
    ({"tolerance": 0.0}, "tolerance=0.0 .* above 0 and below mu / 2 = 0.05"),
    ({"tolerance": 0.05}, "tolerance=0.05 .* below mu / 2 = 0.05"),
    ({"max_iterations": 0}, "max_iterations=0 is too small; accepted: 1 or more"),
    ({"present": torch.ones(3, 2)}, r"present is torch.float32 of shape \(3, 2\); accepted: torch.bool"),
    ({"present": torch.ones(2, 3) > 0}, r"torch.bool of shape \(2, 3\); accepted: .* of shape \(3, 2\)"),
    ({"present": torch.tensor([[True, True], [True, True], [True, False]])},
     r"present lacks modality 1 for one of the items \(2, 0\).*accepted: True for all items in graphs\[1\]"),
])
def test_errors(change, message):
    plain = {"graphs": [graph([(0, 1)]), graph([(1, 0), (2, 0)])], "size": 3, "mu": 0.1}
    with pytest.raises(ValueError, match=message):
        fuse_graphs(**{**plain, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_on_the_gpu(dtype):
    graphs = [edges._replace(values=edges.values.to(dtype)) for edges in tops(60, 5, 4, seed=1)]
    present = torch.ones(60, 4, dtype=torch.bool)
    expected, log = fuse_graphs(graphs, 60, 0.1, present=present)
    with torch.autocast("cuda", torch.float16):
        found, other = fuse_graphs([Edges(*(part.cuda() for part in edges)) for edges in graphs], 60, 0.1,
                                   present=present.cuda())
    assert all(part.is_cuda for part in found) and found.values.dtype == dtype
    assert torch.equal(found.rows.cpu(), expected.rows) and torch.equal(found.columns.cpu(), expected.columns)
    torch.testing.assert_close(found.values.cpu(), expected.values)
    assert other.iterations == log.iterations
    np.testing.assert_allclose(other.objectives, log.objectives, rtol=1e-12)
