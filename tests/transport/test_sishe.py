"""Balanced clusters: Eq. 7 against SLSQP, POT, linear programs and the paper's loop; planted clusters."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linear_sum_assignment, linprog, minimize
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_mmdiff.graph.sparse import sparse_matrix
from recbole_mmdiff.transport._log import NotConverged
from recbole_mmdiff.transport.balanced import balanced_assignment
from recbole_mmdiff.transport.sishe import cluster_items

KINDS = ("normal", "ties", "one column is cheap", "heavy tail")


def draw_cost(n, k, kind="normal", seed=0):
    draw = np.random.default_rng(seed)
    if kind == "ties":
        return torch.tensor(draw.integers(0, 3, (n, k)), dtype=torch.float64)
    if kind == "heavy tail":
        return torch.tensor(draw.random((n, k)) ** 8 * 50)
    cost = torch.tensor(draw.normal(size=(n, k)))
    cost[:, 0] -= 5 * (kind == "one column is cheap")
    return cost


def assert_margins(gamma, atol=1e-6):
    n, k = gamma.shape
    gamma = gamma.double()
    assert (gamma >= 0).all()
    assert (gamma.sum(1) - 1).abs().max() <= atol
    assert (gamma.sum(0) * k / n - 1).abs().max() <= atol


def objective(cost, gamma, eta):
    return float((cost * gamma).sum() + eta / 2 * (gamma**2).sum())


def margins_of(n, k):
    """Matrix and right-hand side of the equations for gamma.ravel(); the last follows from the others."""
    matrix = np.concatenate([np.kron(np.eye(n), np.ones(k)), np.kron(np.ones(n), np.eye(k))])
    return matrix[:-1], np.concatenate([np.ones(n), np.full(k, n / k)])[:-1]


def quadratic_program(cost, eta):
    """gamma by scipy's sequential least squares."""
    n, k = cost.shape
    matrix, right = margins_of(n, k)
    c = cost.numpy().ravel() / eta
    done = minimize(lambda x: c @ x + x @ x / 2, np.full(n * k, 1 / k), jac=lambda x: c + x,
                    bounds=[(0, None)] * (n * k), method="SLSQP", options={"ftol": 1e-14, "maxiter": 1000},
                    constraints={"type": "eq", "fun": lambda x: matrix @ x - right, "jac": lambda x: matrix})
    assert done.status in (0, 8), done.message      # 8: rounding lets it come no nearer.
    return torch.tensor(done.x).view(n, k)


def linear_gap(gradient, gamma):
    """How much lower <gradient, .> can be than at ``gamma``: nothing at a point that meets KKT."""
    n, k = gamma.shape
    rows, columns = sparse.kron(sparse.eye(n), np.ones((1, k))), sparse.kron(np.ones((1, n)), sparse.eye(k))
    done = linprog(gradient.numpy().ravel(), A_eq=sparse.vstack([rows, columns]).tocsr()[:-1],
                   b_eq=margins_of(n, k)[1], method="highs")
    assert done.status == 0, done.message
    return float((gradient * gamma).sum()) - done.fun


def level(values, amount):
    """Eq. 9 or 10 for one row or column: the sum runs to kappa."""
    ordered = sorted(values)
    for count in range(1, len(ordered) + 1):
        found = (amount + sum(ordered[:count])) / count
        if count == len(ordered) or ordered[count - 1] <= found <= ordered[count]:
            return found


def alternation(cost, eta, sweeps):
    """Eqs. 9 and 10 in turn, as printed but for the ends of the sums; gamma by Eq. 8."""
    n, k = cost.shape
    rows, g = cost.tolist(), [0.0] * k
    for _ in range(sweeps):
        f = [level([rows[i][j] - g[j] for j in range(k)], eta) for i in range(n)]
        g = [level([rows[i][j] - f[i] for i in range(n)], eta * n / k) for j in range(k)]
    return torch.tensor([[max(0, f[i] + g[j] - rows[i][j]) / eta for j in range(k)] for i in range(n)],
                        dtype=torch.float64)


# ---- the inner problem -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k, eta", [(8, 4, 0.1), (8, 4, 3), (11, 3, 0.5), (13, 5, 0.1), (6, 6, 0.3),
                                       (5, 1, 0.1), (10, 4, 0.02), (4, 7, 0.5), (1, 1, 1)])
def test_as_a_quadratic_program(n, k, eta, kind):
    cost = draw_cost(n, k, kind, seed=n)
    expected = quadratic_program(cost, eta)
    gamma, log = balanced_assignment(cost, eta, tolerance=1e-10)
    assert_margins(gamma, 1e-10)
    np.testing.assert_allclose(gamma, expected, atol=2e-6)
    # The program's rounding is the larger one.
    np.testing.assert_allclose(objective(cost, gamma, eta), objective(cost, expected, eta), rtol=1e-5)
    np.testing.assert_allclose(log.objectives[-1], objective(cost, gamma, eta), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n, k, eta", [(60, 7, 0.1), (100, 15, 1)])
def test_as_pot(n, k, eta):
    """The smooth transport of POT, by L-BFGS."""
    cost = draw_cost(n, k)
    expected = ot.smooth.smooth_ot_dual(np.ones(n), np.full(k, n / k), cost.numpy(), eta, reg_type="l2",
                                        stopThr=1e-12, numItermax=5000)
    np.testing.assert_allclose(balanced_assignment(cost, eta)[0], expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k, eta", [(20, 4, 3), (17, 5, 1), (9, 9, 2), (6, 1, 0.1)])
def test_as_the_alternation_of_the_paper(n, k, eta, kind):
    cost = draw_cost(n, k, kind, seed=k) / 2
    expected = alternation(cost, eta, sweeps=600)
    assert_margins(expected, 1e-8)
    np.testing.assert_allclose(balanced_assignment(cost, eta, tolerance=1e-10)[0], expected, atol=1e-7)


def test_where_the_alternation_is_slow():
    cost = draw_cost(40, 5, "one column is cheap")
    slow = alternation(cost, 0.02, sweeps=200)
    assert (slow.sum(1) - 1).abs().max() > 1e-2
    gamma, log = balanced_assignment(cost, 0.02)
    assert_margins(gamma)
    assert log.converged and log.iterations < 60


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 24), st.integers(1, 8), st.sampled_from([1e-3, 0.03, 0.1, 1, 30]),
       st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
def test_no_point_of_the_constraints_is_lower_to_first_order(n, k, eta, kind, seed):
    """KKT: gamma minimises the linear function of its own gradient, which a linear program confirms."""
    cost = draw_cost(n, k, kind, seed)
    gamma, log = balanced_assignment(cost, eta)
    assert log.converged and log.error <= 1e-6
    assert_margins(gamma)
    assert linear_gap(cost + eta * gamma, gamma) <= 1e-5 * n * (1 + float(cost.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n, k, kind", [(3001, 30, "normal"), (20_000, 15, "ties"), (50_000, 5, "normal")])
def test_margins_in_any_precision(n, k, kind, dtype):
    cost = draw_cost(n, k, kind).to(dtype)
    gamma, log = balanced_assignment(cost, 0.1)
    assert gamma.dtype == torch.promote_types(dtype, torch.float32)
    assert log.converged and log.iterations < 30
    assert_margins(gamma, 1.2e-6)


def test_a_large_constant_changes_nothing():
    """f and g take it, before it rounds the differences away."""
    cost = draw_cost(50, 6)
    moved = cost + 1e6 * torch.arange(50)[:, None]
    np.testing.assert_allclose(balanced_assignment(moved, 0.1)[0], balanced_assignment(cost, 0.1)[0],
                               atol=1e-6)


@pytest.mark.parametrize("n, k, eta, seed", [(300, 8, 0.5, 0), (10, 12, 1e-3, 2), (5, 9, 0.01, 3),
                                             (5, 9, 0.1, 2)])
def test_the_dual_rises_to_the_minimum(n, k, eta, seed):
    cost = draw_cost(n, k, "one column is cheap", seed)
    gamma, log = balanced_assignment(cost, eta)
    assert len(log.objectives) > 3 and (np.diff(log.objectives) >= -1e-9).all()
    np.testing.assert_allclose(log.objectives[-1], objective(cost, gamma, eta), rtol=1e-5)


def test_equal_costs_are_shared_evenly_and_small_eta_is_an_assignment():
    assert (balanced_assignment(torch.zeros(10, 4), 0.1)[0] == 0.25).all()
    cost = draw_cost(12, 12)
    gamma = balanced_assignment(cost, 1e-3)[0]
    np.testing.assert_allclose(gamma.argmax(1), linear_sum_assignment(cost.numpy())[1])


def test_autocast_grad_and_input(monkeypatch):
    cost = draw_cost(200, 6).float().requires_grad_()
    before = cost.detach().clone()
    expected = balanced_assignment(cost, 0.1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = balanced_assignment(cost, 0.1)[0]
    assert torch.equal(found, expected) and not found.requires_grad and torch.equal(cost, before)
    # Sums over other blocks round otherwise.
    monkeypatch.setattr("recbole_mmdiff.transport.balanced.CACHED", 50)
    np.testing.assert_allclose(balanced_assignment(cost, 0.1)[0], expected, atol=1e-6)


def test_warns_if_it_does_not_converge():
    with pytest.warns(NotConverged, match="balanced_assignment: error"):
        _, log = balanced_assignment(draw_cost(200, 10), 1e-3, max_iterations=1)
    assert not log.converged and log.error > 1e-6


@pytest.mark.parametrize("change, message", [
    ({"cost": torch.zeros(3)}, r"cost is torch.float32 of shape \(3,\); accepted: a floating type"),
    ({"cost": torch.zeros(3, 2, dtype=torch.int64)}, "cost is torch.int64"),
    ({"cost": torch.zeros(0, 2)}, r"shape \(0, 2\)"),
    ({"cost": torch.tensor([[0, torch.nan]])}, "cost has 1 entries that are not finite; accepted"),
    ({"eta": 0}, "eta=0 is out of range; accepted: a number above 0"),
    ({"eta": float("nan")}, "eta=nan"),
    ({"eta": 1e-13}, "eta=1e-13 is lost in rounding beside costs that differ by 3; accepted: 1e-12 of that"),
    ({"tolerance": -1.0}, "tolerance=-1.0"),
    ({"max_iterations": 0}, "max_iterations=0 is no count; accepted: a whole number from 1"),
])
def test_errors_of_the_inner_problem(change, message):
    with pytest.raises(ValueError, match=message):
        balanced_assignment(**{"cost": torch.tensor([[0.0, 3.0]]), "eta": 0.1, **change})


# ---- clusters ----------------------------------------------------------------------------------


def planted(n, k, noise, seed, z=5, spread=1.0, size=16):
    """Clusters of equal sizes, features around their centres, and a CSR graph of ``z`` edges an item, of
    which a share of ``noise`` leads to any item, and its self-loop."""
    draw = np.random.default_rng(seed)
    clusters = draw.permutation(np.arange(n) % k)
    features = draw.normal(size=(k, size))[clusters] + spread * draw.normal(size=(n, size))
    members = np.argsort(clusters, kind="stable").reshape(k, n // k)
    rows = np.repeat(np.arange(n), z)
    inside = members[clusters[rows], draw.integers(n // k, size=n * z)]
    columns = np.where(draw.random(n * z) < noise, draw.integers(n, size=n * z), inside)
    table = sparse.csr_matrix((np.ones(n * z), (rows, columns)), (n, n)) + sparse.eye(n)
    return clusters, torch.tensor(features, dtype=torch.float32), csr((table > 0).astype(np.float32))


def csr(table):
    table = sparse.coo_matrix(table)
    rows, columns = (torch.tensor(part).long() for part in (table.row, table.col))
    return sparse_matrix(rows, columns, torch.tensor(table.data), table.shape)


def dense(graph):
    return graph.to_dense().double()


def accuracy(gamma, clusters):
    """Of the largest entries, with the best names for the clusters."""
    table = np.zeros((gamma.shape[1],) * 2)
    np.add.at(table, (gamma.argmax(1).numpy(), clusters), 1)
    return table[linear_sum_assignment(table, maximize=True)].sum() / len(clusters)


def halved(table, gamma, eta):
    gamma = gamma.double()
    return float(-((table + table.T) / 2 @ gamma * gamma).sum() / 2 + eta / 2 * (gamma**2).sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n, k, noise, spread", [(300, 5, 0.2, 1.0), (600, 15, 0.3, 1.0), (600, 6, 0.4, 1.5)])
def test_planted_clusters_are_found(n, k, noise, spread, seed):
    clusters, features, graph = planted(n, k, noise, seed, spread=spread)
    gamma, log = cluster_items(graph, k, features=features, seed=seed)
    assert log.converged and gamma.dtype == torch.float32
    assert_margins(gamma)
    assert accuracy(gamma, clusters) >= 0.95


@pytest.mark.parametrize("seed", range(4))
def test_planted_clusters_are_found_without_features(seed):
    clusters, _, graph = planted(600, 15, 0.2, seed)
    gamma, _ = cluster_items(graph, 15, seed=seed)
    assert_margins(gamma)
    assert accuracy(gamma, clusters) >= 0.95


def test_the_graph_corrects_its_features():
    """What k-means alone finds is less."""
    clusters, features, graph = planted(600, 6, 0.2, 3, spread=2.5)
    alone = csr(sparse.eye(600, dtype=np.float32))
    assert accuracy(cluster_items(alone, 6, features=features)[0], clusters) < 0.8
    assert accuracy(cluster_items(graph, 6, features=features)[0], clusters) >= 0.95


def test_the_start_of_the_paper_is_stationary():
    _, _, graph = planted(120, 4, 0.2, 0)
    uniform = torch.full((120, 4), 0.25)
    gamma, log = cluster_items(graph, 4, start=uniform)
    np.testing.assert_allclose(gamma, uniform, atol=1e-7)
    assert log.iterations == 1 and log.error <= 1e-7
    # The paper's loop does not leave it either, though it is far from lowest.
    by_hand = alternation(-dense(graph) @ uniform.double(), 0.1, sweeps=5)
    np.testing.assert_allclose(by_hand, uniform, atol=1e-7)
    assert cluster_items(graph, 4)[1].objectives[-1] < 3 * log.objectives[-1] < 0


@pytest.mark.parametrize("anneal_from", [None, 3.0])
@pytest.mark.parametrize("eta, loops", [(0.1, True), (2.0, True), (0.3, False)])
def test_the_result_is_stationary_and_the_objective_never_rises(eta, loops, anneal_from):
    _, features, graph = planted(60, 4, 0.5, 1)
    table = dense(graph) - (0 if loops else torch.eye(60))
    graph = csr(table.numpy())
    gamma, log = cluster_items(graph, 4, eta, features, anneal_from=anneal_from, tolerance=1e-6)
    assert gamma.dtype == torch.float64
    assert (np.diff(log.objectives) <= 1e-8).all() and log.converged
    assert len(log.objectives) == log.iterations + 1
    np.testing.assert_allclose(log.objectives[-1], halved(table, gamma, eta), rtol=1e-10)
    gradient = eta * gamma - (table + table.T) / 2 @ gamma
    assert linear_gap(gradient, gamma) <= 1e-3


def alternate_sides(n=12):
    """A graph whose edges lead between two halves, indefinite, and clusters that favour the halves."""
    half = np.arange(n) < n // 2
    table = (half[:, None] != half).astype(float)
    start = torch.tensor(np.where(half[:, None] == [True, False], 0.6, 0.4))
    return table, start


def test_whole_steps_swing_where_the_graph_is_indefinite():
    table, start = alternate_sides()
    whole, values = start, []
    for _ in range(4):
        whole = alternation(-torch.tensor(table) @ whole, 0.1, sweeps=20)
        values.append(halved(torch.tensor(table), whole, 0.1))
    _, log = cluster_items(csr(table), 2, start=start)
    assert max(values) > log.objectives[0], "the paper's step rises"
    assert (np.diff(log.objectives) <= 1e-9).all() and log.converged
    assert log.objectives[-1] < min(values)


def test_the_objective_as_printed_may_rise():
    """Eq. 6 with eta is twice the halved one with eta / 2, whose lowest point the iteration leaves."""
    _, features, graph = planted(120, 4, 0.5, 0)
    lowest, _ = cluster_items(graph, 4, 1.5, features, tolerance=1e-8)
    after, log = cluster_items(graph, 4, 3.0, start=lowest, tolerance=1.0)
    assert log.iterations == 1 and log.objectives[1] < log.objectives[0]
    assert halved(dense(graph), after, 1.5) > halved(dense(graph), lowest, 1.5) + 0.5


def test_only_the_mean_of_both_directions_counts():
    _, features, graph = planted(90, 3, 0.3, 2)
    both = csr(((dense(graph) + dense(graph).T) / 2).float().numpy())
    assert not torch.equal(dense(graph), dense(both))
    for keys in ({"features": features}, {}):
        assert torch.equal(cluster_items(graph, 3, **keys)[0], cluster_items(both, 3, **keys)[0])


def test_the_best_start_is_kept():
    _, _, graph = planted(300, 12, 0.5, 0)
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    values = [cluster_items(graph, 12, features=noise, num_starts=count)[1].objectives[-1]
              for count in (1, 2, 4, 8)]
    assert (np.diff(values) <= 0).all() and values[-1] < values[0] - 5


@pytest.mark.parametrize("seed", range(3))
def test_annealing_finds_from_noise_what_a_plain_start_misses(seed):
    clusters, _, graph = planted(300, 5, 0.2, seed)
    start = 0.2 + 1e-3 * torch.rand(300, 5, generator=torch.Generator().manual_seed(seed))
    plain, log = cluster_items(graph, 5, start=start)
    annealed, after = cluster_items(graph, 5, start=start, anneal_from=3.0)
    assert accuracy(annealed, clusters) >= 0.95 > accuracy(plain, clusters)
    assert after.objectives[-1] < log.objectives[-1]


def test_another_order_of_the_items_gives_the_same_gamma_in_that_order():
    clusters, features, graph = planted(240, 6, 0.2, 5)
    order = torch.tensor(np.random.default_rng(1).permutation(240))
    moved = csr(dense(graph)[order][:, order].float().numpy())
    start = torch.tensor(clusters).where(torch.arange(240) % 3 > 0, 0)
    gamma, log = cluster_items(graph, 6, start=start)
    found, again = cluster_items(moved, 6, start=start[order])
    np.testing.assert_allclose(found, gamma[order], atol=1e-6)
    np.testing.assert_allclose(again.objectives, log.objectives, rtol=1e-9)
    assert log.iterations > 1
    # K-means draws others, so that the clusters get other names.
    gamma, found = (cluster_items(a, 6, features=b)[0] for a, b in ((graph, features),
                                                                   (moved, features[order])))
    names = (gamma[order].T @ found).argmax(1)
    np.testing.assert_allclose(found[:, names], gamma[order], atol=1e-6)


def test_starts_of_both_kinds_and_their_projection():
    clusters, _, graph = planted(60, 3, 0.2, 1)
    one_hot = torch.nn.functional.one_hot(torch.tensor(clusters), 3)
    first, _ = cluster_items(graph, 3, start=torch.tensor(clusters))
    second, log = cluster_items(graph, 3, start=one_hot.double())
    assert torch.equal(first, second)
    np.testing.assert_allclose(log.objectives[0], halved(dense(graph), one_hot, 0.1), rtol=1e-9)
    lopsided = torch.zeros(60, dtype=torch.int64)
    _, log = cluster_items(graph, 3, start=lopsided)
    np.testing.assert_allclose(log.objectives[0], halved(dense(graph), torch.full((60, 3), 1 / 3), 0.1))


@pytest.mark.parametrize("n, k", [(7, 1), (7, 7), (7, 3), (1, 1)])
def test_sizes_that_do_not_divide(n, k):
    graph = csr(np.eye(n) + np.eye(n, k=1))
    for keys in ({}, {"features": torch.ones(n, 2)}, {"features": torch.randn(n, 3)}):
        gamma, log = cluster_items(graph, k, **keys)
        assert gamma.shape == (n, k) and log.converged
        assert_margins(gamma)


def test_items_without_an_edge_fill_what_is_left():
    clusters, features, graph = planted(90, 3, 0.1, 4)
    table = dense(graph)
    table[:6], table[:, :6] = 0, 0
    gamma, _ = cluster_items(csr(table.float().numpy()), 3, features=features)
    assert_margins(gamma)
    assert accuracy(gamma[6:], clusters[6:]) >= 0.95
    empty, _ = cluster_items(csr(np.zeros((9, 9))), 3)
    assert_margins(empty)


def test_the_same_twice_another_seed_and_autocast():
    _, features, graph = planted(300, 12, 0.5, 0)
    first = cluster_items(graph, 12, features=features.half())
    with torch.autocast("cpu", torch.bfloat16):
        again = cluster_items(graph, 12, features=features.half().requires_grad_())
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert not again[0].requires_grad
    assert not torch.equal(first[0], cluster_items(graph, 12, features=features.half(), seed=1)[0])


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made inside."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                self.numel = max(self.numel, value.numel())
        return made


def test_nothing_is_n_by_n():
    _, features, graph = planted(1200, 4, 0.1, 0)
    entries = graph.values().numel()
    with Largest() as largest:
        cluster_items(graph, 4, features=features, num_starts=1)
        cluster_items(graph, 4)
    assert largest.numel <= max(2 * entries, 1200 * 16)


def test_warns_if_it_stops_early():
    _, features, graph = planted(300, 12, 0.5, 0)
    with pytest.warns(NotConverged, match="cluster_items: error"):
        gamma, log = cluster_items(graph, 12, features=features, max_iterations=1)
    assert_margins(gamma)
    assert not log.converged and log.iterations == 1


EYE = csr(np.eye(4, dtype=np.float32))


@pytest.mark.parametrize("change, message", [
    ({"adjacency": torch.eye(4)}, r"adjacency is torch.strided of shape \(4, 4\); accepted: torch.sparse"),
    ({"adjacency": csr(np.ones((4, 3)))}, r"shape \(4, 3\)"),
    ({"adjacency": csr(-np.eye(4))}, "adjacency has values from -1.0 to -1.0; accepted: finite values that"),
    ({"adjacency": csr(np.diag([1, 2, 3, np.inf]))}, "adjacency has values from 1.0 to inf"),
    ({"num_clusters": 0}, "num_clusters=0 is no count; accepted"),
    ({"num_clusters": 5}, "num_clusters=5 is too large; accepted: up to 4"),
    ({"eta": 0.0}, "eta=0.0 is out of range"),
    ({"num_starts": 0}, "num_starts=0"),
    ({"anneal_from": 0.0}, "anneal_from=0.0"),
    ({"max_iterations": 1.5}, "max_iterations=1.5"),
    ({"tolerance": float("inf")}, "tolerance=inf"),
    ({"features": torch.zeros(3, 2)}, r"features has shape \(3, 2\) .* finite numbers of shape \(4, any"),
    ({"features": torch.full((4, 2), torch.nan)}, "8 entries that are not finite"),
    ({"start": torch.tensor([0, 1, 2, 0])}, r"start is torch.int64 of shape \(4,\); .* from 0 to 1"),
    ({"start": torch.zeros(4, 3)}, r"start is torch.float32 of shape \(4, 3\); .*\(4, 2\)"),
])
def test_errors_of_the_clusters(change, message):
    with pytest.raises(ValueError, match=message):
        cluster_items(**{"adjacency": EYE, "num_clusters": 2, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_the_gpu():
    cost = draw_cost(3000, 15)
    found, _ = balanced_assignment(cost.cuda(), 0.1)
    assert found.is_cuda
    np.testing.assert_allclose(found.cpu(), balanced_assignment(cost, 0.1)[0], atol=1e-5)
    clusters, features, graph = planted(600, 6, 0.2, 0)
    for keys in ({"features": features.cuda()}, {}, {"start": torch.tensor(clusters).cuda()}):
        gamma, _ = cluster_items(graph.cuda(), 6, **keys)
        assert gamma.is_cuda
        assert_margins(gamma.cpu())
        assert accuracy(gamma.cpu(), clusters) >= 0.95
