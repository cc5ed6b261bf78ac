"""Fused Gromov-Wasserstein matching against POT, its objective summed pair by pair, and closed cases."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_mmdiff.transport._log import NotConverged
from recbole_mmdiff.transport.goum import match_users
from recbole_mmdiff.transport.gromov import fused_gromov


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_masses(size, seed):
    masses = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    return masses / masses.sum()


def distances(left, right):
    left, right = (rows / rows.norm(dim=1, keepdim=True) for rows in (left.double(), right.double()))
    return ((left[:, None] - right) ** 2).sum(2).numpy()


def objective(plan, source, target, alpha, epsilon):
    """By all pairs of pairs."""
    within = distances(source, source)[:, :, None, None] - distances(target, target)
    within = np.einsum("ikjl,ij,kl->", within**2, plan, plan)
    entropy = -(plan * np.log(np.maximum(plan, 1e-300))).sum()
    return (1 - alpha) * (plan * distances(source, target)).sum() + alpha * within - epsilon * entropy


@pytest.mark.parametrize("alpha, epsilon", [(0.1, 0.05), (0.5, 0.2), (0.9, 0.4)])
def test_equals_pot(alpha, epsilon):
    source, target = draw(16, 3), draw(12, 3, seed=1)
    a, b = random_masses(16, 2), random_masses(12, 3)
    matching, log = fused_gromov(source, target, epsilon, alpha=alpha, source_mass=a, target_mass=b,
                                 tolerance=1e-7, max_steps=2000, max_sweeps=20_000)
    assert log.converged
    expected = ot.gromov.entropic_fused_gromov_wasserstein(
        distances(source, target), distances(source, source), distances(target, target), a.numpy(), b.numpy(),
        epsilon=epsilon, alpha=alpha, max_iter=1000, tol=1e-9, stopThr=1e-10, numItermax=5000)
    np.testing.assert_allclose(matching.dense().numpy(), expected, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 0.5, 1]), st.sampled_from([0.2, 0.5]),
       st.integers(0, 99))
def test_the_objective_is_that_of_all_pairs_and_never_rises(n, m, alpha, epsilon, seed):
    source, target = draw(n, 3, seed=seed), draw(m, 3, seed=seed + 1)
    a, b = random_masses(n, seed), random_masses(m, seed + 1)
    matching, log = fused_gromov(source, target, epsilon, alpha=alpha, source_mass=a, target_mass=b,
                                 tolerance=1e-6, max_steps=500, max_sweeps=20_000)
    start = torch.outer(a, b).numpy()
    assert log.objectives[0] == pytest.approx(objective(start, source, target, alpha, epsilon), abs=1e-9)
    found = objective(matching.dense().numpy(), source, target, alpha, epsilon)
    assert log.objectives[-1] == pytest.approx(found, abs=3e-6)
    assert len(log.objectives) == log.iterations + 1
    assert max(np.diff(log.objectives)) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginals_and_the_plans_last_change(dtype):
    source, target = draw(40, 6, dtype=dtype), draw(25, 6, seed=1, dtype=dtype)
    a, b = random_masses(40, 2), random_masses(25, 3)
    matching, log = fused_gromov(source, target, source_mass=a, target_mass=b, max_steps=500)
    assert log.converged and log.error <= 1e-4
    plan = matching.dense()
    assert plan.dtype == dtype
    assert (plan.double().sum(1) - a).abs().sum() < 1e-4 and (plan.double().sum(0) - b).abs().sum() < 1e-4


def test_without_distances_within_domains_it_is_unguided_matching():
    source, target = draw(20, 4), draw(30, 4, seed=1)
    fused, log = fused_gromov(source, target, alpha=0, tolerance=1e-8)
    plain = match_users(source, target, guidance="none", tolerance=1e-9)[0]
    torch.testing.assert_close(fused.dense(), plain.dense(), rtol=0, atol=1e-8)
    assert log.iterations == 2


def test_distances_within_domains_see_through_a_rotation():
    """Three tastes of different sizes, the target's axes turned against the source's: distances between the
    domains match each taste with another, those within them tell which is which."""
    taste = torch.repeat_interleave(torch.arange(3), torch.tensor([6, 10, 14]))
    corners = torch.tensor([[1.0, 0, 0], [0.5, 0.86, 0], [-0.9, 0.43, 0]])
    source, target = (corners[taste] + 0.01 * draw(30, 3, seed=seed).float() for seed in (0, 1))
    target = target @ torch.linalg.qr(draw(3, 3, seed=6).float())[0]
    links = torch.arange(30), torch.arange(30)
    seen = fused_gromov(source, target, 0.1, alpha=0.95, links=links, max_steps=500)[0]
    blind = match_users(source, target, 0.05, links=links, guidance="none", max_sweeps=20_000)[0]
    assert (taste[seen.best()[0]] == taste).float().mean() > 0.9
    assert (taste[blind.best()[0]] == taste).float().mean() < 0.6
    torch.testing.assert_close(seen.linked_mass(), seen.dense().diagonal() * 30)


def test_blocks_and_autocast_change_nothing():
    source, target = draw(30, 5), draw(22, 5, seed=1)
    whole, log = fused_gromov(source, target, 0.3, tolerance=1e-6)
    blocked, blocked_log = fused_gromov(source, target, 0.3, tolerance=1e-6, block_elements=100)
    torch.testing.assert_close(blocked.dense(), whole.dense(), rtol=0, atol=1e-10)
    assert blocked_log.objectives == pytest.approx(log.objectives, abs=1e-10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_gromov(source, target, 0.3, tolerance=1e-6)[0]
    assert torch.equal(inside.dense(), whole.dense())


def test_no_nan_at_a_thousandth_with_equal_and_zero_vectors():
    source, target = draw(30, 3, dtype=torch.float32), draw(20, 3, seed=1, dtype=torch.float32)
    source[:10] = target[3:6] = source[12]
    source[15] = target[8:10] = 0
    with pytest.warns(NotConverged, match="fused_gromov"):
        matching, log = fused_gromov(source, target, 1e-3, max_steps=2)
    assert matching.dense().isfinite().all() and np.isfinite(log.objectives).all()


def test_equal_users_everywhere():
    matching, log = fused_gromov(torch.ones(3, 2), torch.ones(4, 2))
    assert log.converged
    torch.testing.assert_close(matching.dense(), torch.full((3, 4), 1 / 12))


@pytest.mark.parametrize("arguments, message", [
    ({"alpha": 1.5}, "alpha=1.5; accepted: 0 to 1"), ({"alpha": float("nan")}, "alpha=nan"),
    ({"epsilon": 0}, "epsilon=0; accepted"), ({"max_steps": 0}, "max_steps=0; accepted: 1"),
    ({"tolerance": 0}, "tolerance=0"), ({"target": torch.ones(5, 2)}, "target has vectors of length 2"),
    ({"target_mass": torch.ones(5)}, "target_mass sums to 5.0")])
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fused_gromov(**{"source": torch.ones(4, 3), "target": torch.ones(5, 3), **arguments})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_cpu():
    source, target = draw(60, 5), draw(50, 5, seed=1)
    there = fused_gromov(source.cuda(), target.cuda(), tolerance=1e-7, max_steps=500)[0]
    here = fused_gromov(source, target, tolerance=1e-7, max_steps=500)[0]
    torch.testing.assert_close(there.dense().cpu(), here.dense(), rtol=0, atol=1e-8)
