"""Solvers on any small problem: constraints, symmetries, and exact solvers."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from recbole_mmdiff.graph.edges import Edges
from recbole_mmdiff.transport import (
    balanced_assignment,
    cluster_items,
    fuse_graphs,
    fused_gromov,
    match_users,
    user_costs,
)

SEEDS = st.integers(0, 999)


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def permutation(size, seed):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def assert_plan(plan, rows, columns, tolerance):
    assert plan.isfinite().all() and (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), torch.as_tensor(rows).expand(len(plan)).double(), rtol=0,
                               atol=tolerance)
    torch.testing.assert_close(plan.sum(0), torch.as_tensor(columns).expand(plan.shape[1]).double(), rtol=0,
                               atol=tolerance)


@settings(max_examples=10)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([0.02, 0.3, 5]), SEEDS)
def test_a_balanced_assignment(n, k, eta, seed):
    """Marginals; no part in what a row or a column costs throughout, nor in the order of either; and the
    conditions of an optimum: no other plan is cheaper along the gradient (a linear programme)."""
    cost = draw(n, k, seed=seed)
    plan, log = balanced_assignment(cost, eta, tolerance=1e-9)
    assert log.converged
    assert_plan(plan, 1.0, n / k, 1e-7 * max(1, n / k))
    shifted = cost + draw(n, 1, seed=seed + 1) + draw(1, k, seed=seed + 2)
    rows, columns = permutation(n, seed), permutation(k, seed)
    for other, expected in ((shifted, plan), (cost[rows][:, columns], plan[rows][:, columns])):
        found = balanced_assignment(other, eta, tolerance=1e-9)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    gradient = (cost + eta * plan).numpy()
    sums = np.vstack([np.kron(np.eye(n), np.ones(k)), np.kron(np.ones(n), np.eye(k))])
    best = linprog(gradient.ravel(), A_eq=sums, b_eq=[*[1.0] * n, *[n / k] * k])
    assert float((gradient * plan.numpy()).sum()) <= best.fun + 1e-5 * n


@settings(max_examples=12)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from(["unit", "mean", "none"]), SEEDS)
def test_matched_users(n, m, scale, seed):
    """Other orders of users and swapped domains give the same plan; so do vectors that are all turned, and
    without a scale moved, as distances stay; the cost is that of the exact plan, and what epsilon allows."""
    source, target = draw(n, 3, seed=seed), draw(m, 3, seed=seed + 1)
    costs = user_costs(source, target, scale).rows(slice(0, n)).numpy()
    epsilon = float(0.2 * costs.mean())
    options = {"cost_scale": scale, "guidance": "none", "tolerance": 1e-8, "max_sweeps": 10**4}
    matching, log = match_users(source, target, epsilon, **options)
    plan = matching.dense()
    assert log.converged
    assert_plan(plan, 1 / n, 1 / m, 1e-7)
    rows, columns = permutation(n, seed), permutation(m, seed)
    turn = torch.linalg.qr(draw(3, 3, seed=seed + 2))[0]
    moved = draw(1, 3, seed=seed + 3) if scale != "unit" else 0
    for pair, expected in (((source[rows], target[columns]), plan[rows][:, columns]),
                           ((target, source), plan.T),
                           ((source @ turn + moved, target @ turn + moved), plan)):
        found = match_users(*pair, epsilon, **options)[0].dense()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    exact = linprog(costs.ravel(), A_eq=sums, b_eq=[*[1 / n] * n, *[1 / m] * m]).fun
    # The exact plan has no less entropy than 0, and the found one no more than that of independent users.
    assert exact - 1e-7 <= matching.cost() <= exact + epsilon * np.log(n * m) + 1e-7


@settings(max_examples=10)
@given(st.integers(2, 6), st.integers(2, 6), st.sampled_from([0.0, 0.5, 1.0]), SEEDS)
def test_fused_gromov(n, m, alpha, seed):
    """Marginals, an objective that never rises, and no part in the order of users."""
    source, target = draw(n, 3, seed=seed), draw(m, 3, seed=seed + 1)
    matching, log = fused_gromov(source, target, 0.3, alpha=alpha, tolerance=1e-5, max_steps=300,
                                 max_sweeps=10**4)
    assert_plan(matching.dense(), 1 / n, 1 / m, 1e-6)
    assert all(after <= before + 1e-9 for before, after in pairwise(log.objectives))
    rows, columns = permutation(n, seed), permutation(m, seed)
    other, again = fused_gromov(source[rows], target[columns], 0.3, alpha=alpha, tolerance=1e-5,
                                max_steps=300, max_sweeps=10**4)
    if log.converged and again.converged:
        torch.testing.assert_close(other.dense(), matching.dense()[rows][:, columns], rtol=0, atol=1e-4)


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.1, 0.7]), SEEDS)
def test_fused_graphs_follow_items_that_change_places(size, count, mu, seed):
    masks = draw(count, size, size, seed=seed) > 0
    order = permutation(size, seed)

    def fused(masks):
        graphs = [Edges(*mask.nonzero().T, torch.ones(int(mask.sum())).double()) for mask in masks]
        found = fuse_graphs(graphs, size, mu)[0]
        return torch.zeros(size, size).double().index_put((found.rows, found.columns), found.values)

    whole = fused(masks)
    assert (whole >= 0).all() and (whole <= 1).all() and not whole[~masks.any(0)].any()
    assert torch.equal(fused(masks[:, order][:, :, order]), whole[order][:, order])
    assert torch.equal(fused(masks.flip(0)), whole)
    assert torch.equal(fused(masks.transpose(1, 2)), whole.T)


@settings(max_examples=6)
@given(st.integers(2, 10), st.integers(1, 4), st.sampled_from([0.1, 2]), SEEDS)
def test_clusters_of_any_graph_are_balanced(size, clusters, eta, seed):
    clusters = min(clusters, size)
    weights = draw(size, size, seed=seed).abs() * (draw(size, size, seed=seed + 1) > 0)
    gamma, log = cluster_items(weights.to_sparse_csr(), clusters, eta, num_starts=1, seed=seed)
    assert_plan(gamma, 1.0, size / clusters, 1e-5 * max(1, size / clusters))
    assert all(after <= before + 1e-9 for before, after in pairwise(log.objectives))
