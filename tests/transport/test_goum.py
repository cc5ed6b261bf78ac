"""Matching of users against exact assignment, POT, the plain log-domain form and the paper's literal one."""

import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from recbole_mmdiff.transport import sweeps
from recbole_mmdiff.transport._log import NotConverged
from recbole_mmdiff.transport.goum import match_users

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.float64]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_masses(size, seed):
    masses = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    return masses / masses.sum()


def some_links(n, m, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:count], torch.randperm(m, generator=generator)[:count]


def costs_by_hand(source, target, scale="unit", links=None):
    """Q (n, m) in float64, pair by pair."""
    source, target = source.double().numpy(), target.double().numpy()
    if scale == "unit":
        source, target = ([row / (np.linalg.norm(row) or 1) for row in rows] for rows in (source, target))
    costs = np.array([[np.sum((i - j) ** 2) for j in target] for i in source])
    if scale == "mean":
        costs /= costs.mean()
    if links is not None:
        costs[links[0], links[1]] = 0
    return costs


def plain_sweeps(costs, a, b, epsilon, sweeps):
    """The plan after so many sweeps in logarithms, of omega then kappa, from omega = 0."""
    omega = np.zeros(len(a))
    for sweep in range(sweeps + 1):
        kappa = epsilon * (np.log(b) - logsumexp((omega[:, None] - costs) / epsilon, axis=0))
        if sweep < sweeps:
            omega = epsilon * (np.log(a) - logsumexp((kappa - costs) / epsilon, axis=1))
    return np.exp((omega[:, None] + kappa - costs) / epsilon)


def swept(source, target, epsilon, sweeps, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        return match_users(source, target, epsilon, tolerance=1e-30, max_sweeps=sweeps,
                           epsilon_scaling=False, **options)[0]


def without_momentum(monkeypatch):
    """Sweeps as the paper has them."""
    monkeypatch.setattr(sweeps, "WINDOW", 10**9)


def worst_marginal(matching, a, b):
    plan = matching.dense().double()
    assert plan.isfinite().all() and (plan >= 0).all()
    return max(float((plan.sum(1) - a).abs().sum()), float((plan.sum(0) - b).abs().sum()))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(DTYPES), st.sampled_from([1, 0.1, 0.01]),
       st.sampled_from(["mask", "hard", "none"]), st.integers(0, 99))
def test_marginals(n, m, dtype, epsilon, guidance, seed):
    a, b = random_masses(n, seed), random_masses(m, seed + 1)
    links = some_links(n, m, min(n, m) // 2, seed)
    matching, log = match_users(draw(n, 4, seed=seed, dtype=dtype), draw(m, 4, seed=seed + 1, dtype=dtype),
                                epsilon, links=links, guidance=guidance, source_mass=a, target_mass=b,
                                max_sweeps=100_000)
    assert log.converged and log.error <= 1e-4
    assert worst_marginal(matching, a, b) < 1.01e-4
    torch.testing.assert_close(matching.marginals()[0], matching.dense().sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(matching.marginals()[1], matching.dense().sum(0), rtol=1e-4, atol=1e-6)
    assert matching.linked_mass().numel() == len(links[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_that_of_the_plan(dtype):
    matching, log = match_users(draw(40, 5, dtype=dtype), draw(30, 5, seed=1, dtype=dtype), 0.02)
    rows = matching.dense().double().sum(1)
    assert log.error == pytest.approx(float((rows - 1 / 40).abs().sum()), rel=0.02)
    torch.testing.assert_close(matching.dense().double().sum(0), torch.full((30,), 1 / 30).double(),
                               rtol=2e-6, atol=0)


@pytest.mark.parametrize("users", [50, 100, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_epsilon_costs_what_the_exact_assignment_does(users, dtype):
    source, target = draw(users, 8, dtype=dtype), draw(users, 8, seed=1, dtype=dtype)
    matching, log = match_users(source, target, 1e-3, max_sweeps=20_000)
    costs = costs_by_hand(source, target)
    exact = costs[linear_sum_assignment(costs)].mean()
    assert log.converged
    assert matching.cost() == pytest.approx(exact, rel=0.01)
    plan = matching.dense().double().numpy()
    assert matching.cost() == pytest.approx(float((plan * costs).sum()), rel=1e-4)


@pytest.mark.parametrize("scale", ["unit", "mean", "none"])
@pytest.mark.parametrize("guidance", ["mask", "none"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_equals_pot(scale, guidance, dtype, tolerance):
    source, target = draw(40, 6, dtype=dtype), draw(25, 6, seed=1, dtype=dtype) + 0.3
    a, b, links = random_masses(40, 3), random_masses(25, 4), some_links(40, 25, 8)
    costs = costs_by_hand(source, target, scale, links if guidance == "mask" else None)
    epsilon = 0.05 * costs.mean()
    matching, _ = match_users(source, target, epsilon, links=links, guidance=guidance, cost_scale=scale,
                              source_mass=a, target_mass=b, tolerance=tolerance, max_sweeps=100_000)
    expected = ot.bregman.sinkhorn_log(a.numpy(), b.numpy(), costs, epsilon, numItermax=20_000, stopThr=1e-12)
    assert np.abs(matching.dense().double().numpy() - expected).sum() < 1e-5
    assert matching.dense().dtype == dtype


@pytest.mark.parametrize("epsilon, made", [(0.1, 7), (0.02, 40), (0.005, 60), (0.001, 30)])
@pytest.mark.parametrize("block_elements", [2**24, 100])
def test_equals_the_plain_form_sweep_by_sweep(monkeypatch, epsilon, made, block_elements):
    """At .001 scalings grow until they are absorbed, and some sweeps overflow."""
    without_momentum(monkeypatch)
    source, target = draw(30, 5), draw(20, 5, seed=1)
    a, b = random_masses(30, 2), random_masses(20, 3)
    matching = swept(source, target, epsilon, made, source_mass=a, target_mass=b,
                     block_elements=block_elements)
    expected = plain_sweeps(costs_by_hand(source, target), a.numpy(), b.numpy(), epsilon, made)
    np.testing.assert_allclose(matching.dense().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("epsilon", "guidance", "saved"), [
    (0.1, "none", 1), (0.1, "hard", 1), (0.02, "none", 2), (0.02, "mask", 2), (0.02, "hard", 2),
    (0.005, "none", 4), (0.005, "mask", 4)])
def test_momentum_finds_the_same_plan_in_fewer_sweeps(monkeypatch, epsilon, guidance, saved):
    source, target, links = draw(60, 5), draw(50, 5, seed=1), some_links(60, 50, 12)
    options = {"links": links, "guidance": guidance, "tolerance": 1e-10, "max_sweeps": 10**5}
    found, log = match_users(source, target, epsilon, **options)
    without_momentum(monkeypatch)
    plain, plain_log = match_users(source, target, epsilon, **options)
    assert log.converged and plain_log.converged
    torch.testing.assert_close(found.dense(), plain.dense(), rtol=0, atol=1e-8)
    assert saved * log.iterations < plain_log.iterations


@pytest.mark.parametrize("rate", [0.9, 0.99, 0.999])
def test_momentum_of_a_linear_iteration(rate):
    """Errors along 40 eigenvectors, the slowest of which falls by ``rate`` a plain sweep, are a million times
    smaller after at most twice the sweeps that the heavy ball needs if it is told that rate; then errors that
    grow begin it anew."""
    rates = np.linspace(0, rate, 40)
    momentum, last, errors, made = sweeps.Momentum(), np.ones(40), np.ones(40), 0
    while np.abs(errors).sum() > 40e-6:
        momentum.see(np.abs(errors).sum())
        errors, last = (1 + momentum.carried - momentum.length * (1 - rates)) * errors \
            - momentum.carried * last, errors
        made += 1
    root = np.sqrt(1 - rate)
    assert made < 2 * np.log(1e-6) / np.log((1 - root) / (1 + root))
    for _ in range(2 * sweeps.WINDOW):
        momentum.see(1e9)
    assert momentum.carried == 0 and momentum.length == 1


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_float32_equals_the_plain_form(monkeypatch, epsilon):
    without_momentum(monkeypatch)
    source, target = draw(30, 5, dtype=torch.float32), draw(20, 5, seed=1, dtype=torch.float32)
    a, b = np.full(30, 1 / 30), np.full(20, 1 / 20)
    expected = plain_sweeps(costs_by_hand(source, target), a, b, epsilon, 20)
    found = swept(source, target, epsilon, 20).dense().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def grounded_wafi(costs, a, b, epsilon, tolerance):
    """Eqs. 25-28 as they stand: omega_N is never updated. The plan by Eq. 22 times b, and the sweeps."""
    omega = np.zeros(len(a))
    for sweep in range(20_000):
        below = logsumexp((omega[:, None] - costs) / epsilon, axis=0)
        plan = np.exp((omega[:, None] - costs) / epsilon - below) * b
        if np.abs(plan.sum(1) - a).sum() < tolerance:
            return plan, omega, sweep
        omega[:-1] = epsilon * (np.log(a) - logsumexp(np.log(b) - costs / epsilon - below, axis=1))[:-1]
    raise AssertionError("not converged")


def test_the_literal_form_reaches_the_same_plan_later():
    source, target, links = draw(24, 4), draw(30, 4, seed=1), some_links(24, 30, 6)
    a, b = np.full(24, 1 / 24), np.full(30, 1 / 30)
    costs = costs_by_hand(source, target, links=links)
    plan, omega, sweeps = grounded_wafi(costs, a, b, 0.5, 1e-9)
    matching, log = match_users(source, target, 0.5, links=links, tolerance=1e-9)
    np.testing.assert_allclose(matching.dense().numpy(), plan, rtol=0, atol=1e-8)
    np.testing.assert_allclose(matching.omega.numpy(), omega, rtol=0, atol=1e-6)
    assert matching.omega[-1] == 0
    assert sweeps > 10 * log.iterations


def test_the_plan_is_that_of_the_potentials():
    source, target, links = draw(20, 4), draw(30, 4, seed=1), some_links(20, 30, 6)
    matching, _ = match_users(source, target, 0.05, links=links, tolerance=1e-9, max_sweeps=20_000)
    costs = torch.from_numpy(costs_by_hand(source, target, links=links))
    plan = ((matching.omega[:, None] + matching.kappa - costs) / matching.epsilon).exp()
    torch.testing.assert_close(plan, matching.dense(), rtol=0, atol=1e-10)


def turned_clusters(dtype=torch.float32, clusters=5, each=20, linked=6):
    """Users of ``clusters`` tastes, vectors around as many axes, noise of length .7 to them. In each
    cluster, ``linked`` source users are known in the target, where they stand around the next axis, as if
    that domain had learnt its axes for them in another order; all others keep theirs. Links from cluster to
    cluster go around, so the rest of each cluster still finds as many in its own."""
    size = clusters + 27
    taste = torch.arange(clusters).repeat_interleave(each)
    is_linked = torch.arange(each).repeat(clusters) < linked
    shifted = torch.where(is_linked, (taste + 1) % clusters, taste)
    source, target = (torch.eye(size, dtype=torch.float64)[axis] + 0.7 * size**-0.5 * draw(
        len(axis), size, seed=seed) for axis, seed in ((taste, 1), (shifted, 2)))
    order = torch.randperm(len(taste), generator=torch.Generator().manual_seed(3))
    links = torch.arange(len(taste))[is_linked], order.argsort()[is_linked]
    return source.to(dtype), target[order].to(dtype), links


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_matches_linked_users_that_vectors_mismatch(dtype):
    source, target, links = turned_clusters(dtype)
    held = {guidance: match_users(source, target, 0.01, links=links, guidance=guidance)[0].linked_mass()
            for guidance in ("none", "mask", "hard")}
    assert held["none"].max() < 0.5 and held["none"].mean() < 0.05
    assert held["mask"].min() > 0.95
    assert held["hard"].min() > 0.95


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 25), st.integers(1, 25), st.floats(0, 1), st.sampled_from(DTYPES),
       st.sampled_from([1, 0.1, 0.01]), st.booleans(), st.integers(0, 99))
def test_hard_guidance_gives_linked_users_to_each_other(n, m, share, dtype, epsilon, uneven, seed):
    """On points of a plane, where a mask does not; up to all users linked; of what the marginals permit."""
    links = some_links(n, m, round(share * min(n, m)), seed)
    a = random_masses(n, seed) if uneven else torch.full((n,), 1 / n, dtype=torch.float64)
    b = random_masses(m, seed + 1) if uneven else torch.full((m,), 1 / m, dtype=torch.float64)
    matching, log = match_users(draw(n, 2, seed=seed, dtype=dtype), draw(m, 2, seed=seed + 1, dtype=dtype),
                                epsilon, links=links, guidance="hard", source_mass=a, target_mass=b,
                                max_sweeps=100_000)
    assert log.converged
    assert worst_marginal(matching, a, b) < 1.01e-4
    most = torch.minimum(a[links[0]], b[links[1]])
    assert (matching.dense().double()[links] > 0.95 * most).all()
    torch.testing.assert_close(matching.dense()[links], matching.linked_mass() * most.to(dtype), rtol=1e-5,
                               atol=1e-9)


def test_a_mask_alone_does_not_force_them():
    source, target, links = draw(60, 2), draw(60, 2, seed=1), some_links(60, 60, 20)
    held = {guidance: match_users(source, target, 0.05, links=links, cost_scale="none", guidance=guidance,
                                  max_sweeps=20_000)[0].linked_mass() for guidance in ("mask", "hard")}
    assert held["mask"].mean() < 0.95 < held["hard"].min()


def test_hard_is_the_limit_of_large_costs():
    """With all entries of linked users but their own at a large cost, and sides of unequal size."""
    source, target, links = draw(12, 3), draw(18, 3, seed=1), some_links(12, 18, 5)
    costs = costs_by_hand(source, target)
    barrier = np.zeros_like(costs)
    barrier[links[0]] = barrier[:, links[1]] = 6
    barrier[links[0], links[1]] = -costs[links]
    a, b = np.full(12, 1 / 12), np.full(18, 1 / 18)
    plan = plain_sweeps(costs + barrier, a, b, 0.1, 3000)
    matching, _ = match_users(source, target, 0.1, links=links, guidance="hard", tolerance=1e-9)
    np.testing.assert_allclose(matching.dense().numpy(), plan, rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance", ["mask", "hard", "none"])
def test_parts_equal_the_dense_plan(guidance):
    source, target, links = draw(30, 5), draw(22, 5, seed=1), some_links(30, 22, 7)
    values = draw(22, 3, seed=2), draw(30, 4, seed=3)
    whole = match_users(source, target, 0.05, links=links, guidance=guidance)[0]
    plan = whole.dense()
    for block_elements in (2**24, 23, 60):
        matching = match_users(source, target, 0.05, links=links, guidance=guidance,
                               block_elements=block_elements)[0]
        torch.testing.assert_close(matching.dense(), plan, rtol=0, atol=1e-12)
        torch.testing.assert_close(matching.transport_to_source(values[0]),
                                   plan @ values[0] / plan.sum(1, keepdim=True))
        torch.testing.assert_close(matching.transport_to_target(values[1]),
                                   plan.T @ values[1] / plan.T.sum(1, keepdim=True))
        assert torch.equal(matching.best()[0], plan.argmax(1))
        assert torch.equal(matching.best()[1], plan.argmax(0))
        assert matching.cost() == pytest.approx(whole.cost(), rel=1e-10)
        torch.testing.assert_close(matching.linked_mass(), plan[links] / min(1 / 30, 1 / 22))
        other = matching.transposed()
        torch.testing.assert_close(other.dense(), plan.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(other.linked_mass(), matching.linked_mass())
        rows = torch.randperm(22, generator=torch.Generator().manual_seed(4))[:15]
        part = other.of_source(rows)
        torch.testing.assert_close(part.dense(), plan.T[rows], rtol=0, atol=1e-12)
        torch.testing.assert_close(part.transport_to_source(values[1]),
                                   matching.transport_to_target(values[1])[rows])
        assert torch.equal(part.best()[0], matching.best()[1][rows])


@pytest.mark.parametrize("block_elements", [2**24, 50])
def test_values_take_a_gradient_and_plans_none(block_elements):
    source, target = draw(9, 3).requires_grad_(), draw(7, 3, seed=1).requires_grad_()
    matching, _ = match_users(source, target, 0.1, links=some_links(9, 7, 3), guidance="hard",
                              block_elements=block_elements)
    assert not matching.dense().requires_grad
    for transport, size in ((matching.transport_to_source, 7), (matching.transport_to_target, 9)):
        values = draw(size, 2, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(transport, (values,))
    (matching.transport_to_source(target) * draw(9, 2, seed=4)[:, :1]).sum().backward()
    assert source.grad is None and target.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", ["mask", "hard", "none"])
def test_no_nan_at_a_thousandth_with_equal_and_zero_vectors(dtype, guidance):
    source, target = draw(40, 4, dtype=dtype), draw(30, 4, seed=1, dtype=dtype)
    source[5:15] = source[4]
    target[:5] = source[4]
    source[20:23] = target[10:12] = 0
    links = some_links(40, 30, 10)
    matching, log = match_users(source, target, 1e-3, links=links, guidance=guidance, max_sweeps=50_000)
    assert log.converged
    assert worst_marginal(matching, 1 / 40, 1 / 30) < 1.01e-4
    for found in (matching.omega, matching.kappa, matching.linked_mass(),
                  matching.transport_to_source(target), matching.transport_to_target(source)):
        assert found.isfinite().all()
    cold = swept(source, target, 1e-3, 3, links=links, guidance=guidance)
    assert cold.dense().isfinite().all() and cold.transport_to_source(target).isfinite().all()


@pytest.mark.parametrize("scale", ["unit", "mean", "none"])
def test_users_that_are_all_alike(scale):
    matching, log = match_users(torch.ones(4, 3), torch.ones(5, 3), cost_scale=scale)
    assert log.converged
    torch.testing.assert_close(matching.dense(), torch.full((4, 5), 1 / 20))


def test_vectors_far_from_zero_keep_their_distances():
    source, target = draw(20, 4), draw(20, 4, seed=1)
    near = match_users(source, target, 0.5, cost_scale="none")[0].dense()
    far = match_users((source + 1000).float(), (target + 1000).float(), 0.5, cost_scale="none")[0].dense()
    torch.testing.assert_close(far.double(), near, rtol=0, atol=1e-4)


def test_a_former_omega_saves_sweeps():
    source, target = draw(100, 8), draw(80, 8, seed=1)
    cold, cold_log = match_users(source, target, 0.02, tolerance=1e-6, max_sweeps=20_000,
                                 epsilon_scaling=False)
    later = source + 0.01 * draw(100, 8, seed=2)
    runs = {start: match_users(later, target, 0.02, tolerance=1e-4, max_sweeps=20_000, epsilon_scaling=False,
                               start=cold.omega if start else None)[1] for start in (False, True)}
    assert runs[True].iterations < 0.7 * runs[False].iterations
    again, log = match_users(source, target, 0.02, tolerance=1e-6, start=cold.omega)
    assert log.iterations <= 1 and cold_log.iterations > 20
    torch.testing.assert_close(again.dense(), cold.dense(), rtol=0, atol=1e-6)


def test_epsilon_scaling_saves_sweeps():
    source, target = draw(100, 8), draw(100, 8, seed=1)
    runs = {scaling: match_users(source, target, 2e-3, epsilon_scaling=scaling, max_sweeps=50_000)
            for scaling in (False, True)}
    assert runs[True][1].iterations < runs[False][1].iterations
    assert runs[True][0].cost() == pytest.approx(runs[False][0].cost(), rel=1e-3)


def test_deterministic_and_in_half_precision_and_under_autocast():
    source, target = draw(20, 4, dtype=torch.bfloat16), draw(20, 4, seed=1, dtype=torch.bfloat16)
    matching = match_users(source, target, 0.05)[0]
    assert matching.dense().dtype == torch.float32
    assert torch.equal(matching.dense(), match_users(source.float(), target.float(), 0.05)[0].dense())
    moved = matching.transport_to_source(target.float())
    for block_elements in (2**24, 100):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = match_users(source, target, 0.05, block_elements=block_elements)[0]
            assert inside.dense().dtype == torch.float32
            torch.testing.assert_close(inside.dense(), matching.dense(), rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(inside.transport_to_source(target.float()), moved, rtol=1e-4,
                                       atol=1e-5)
            assert inside.cost() == pytest.approx(matching.cost(), rel=1e-5)


def test_a_warning_tells_of_sweeps_that_were_too_few():
    with pytest.warns(NotConverged, match="match_users: error"):
        _, log = match_users(draw(30, 4), draw(30, 4, seed=1), 0.001, max_sweeps=3)
    assert log.iterations == 3 and not log.converged


WRONG = [
    ({"epsilon": 0.0}, r"epsilon=0\.0; accepted: finite"),
    ({"epsilon": float("nan")}, "epsilon=nan"),
    ({"tolerance": -1}, "tolerance=-1"),
    ({"max_sweeps": 0}, "max_sweeps=0; accepted: 1"),
    ({"block_elements": 0}, "block_elements=0"),
    ({"guidance": "soft"}, "guidance='soft'; accepted: mask, hard, none"),
    ({"cost_scale": "max"}, "cost_scale='max'; accepted: unit"),
    ({"source": torch.ones(4)}, r"source is torch.float32 of shape \(4,\)"),
    ({"source": torch.ones(0, 3)}, "source is"),
    ({"target": torch.ones(5, 3, dtype=torch.int64)}, "target is torch.int64"),
    ({"target": torch.ones(5, 2)}, "target has vectors of length 2; accepted: 3"),
    ({"target": torch.full((5, 3), float("nan"))}, "target has a row 0 of length nan"),
    ({"source_mass": torch.ones(3)}, r"source_mass has shape \(3,\); accepted: \(4,\)"),
    ({"source_mass": torch.tensor([1.0, 0, 0, 0])}, "source_mass goes from 0.0 to 1.0"),
    ({"target_mass": torch.ones(5)}, "target_mass sums to 5.0; accepted: 1.0"),
    ({"start": torch.ones(5)}, r"start is of shape \(5,\)"),
    ({"start": torch.full((4,), float("inf"))}, "start is"),
    ({"links": (torch.tensor([0]), torch.tensor([0, 1]))}, "links has shapes"),
    ({"links": (torch.tensor([0.0]), torch.tensor([1]))}, "links has source rows of torch.float32"),
    ({"links": (torch.tensor([0]), torch.tensor([5]))}, "links has target rows from 5 to 5; accepted: 0"),
    ({"links": (torch.tensor([-1]), torch.tensor([0]))}, "links has source rows from -1"),
    ({"links": (torch.tensor([0, 0]), torch.tensor([1, 2]))}, "links names 1 source rows again"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[message for _, message in WRONG])
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        match_users(**{"source": torch.ones(4, 3), "target": torch.ones(5, 3), **arguments})


def test_values_of_the_wrong_users_are_refused():
    matching, _ = match_users(draw(4, 3), draw(5, 3, seed=1))
    with pytest.raises(ValueError, match=r"values has shape \(4, 3\); accepted: \(5, any\)"):
        matching.transport_to_source(draw(4, 3))


@CUDA
@pytest.mark.parametrize("guidance", ["mask", "hard", "none"])
@pytest.mark.parametrize("block_elements", [2**24, 1000])
def test_cuda_equals_the_cpu(guidance, block_elements):
    source, target, links = draw(100, 8), draw(80, 8, seed=1), some_links(100, 80, 20)
    there = match_users(source.cuda(), target.cuda(), 0.02, guidance=guidance, max_sweeps=20_000,
                        links=tuple(side.cuda() for side in links), block_elements=block_elements)[0]
    here = match_users(source, target, 0.02, guidance=guidance, links=links, max_sweeps=20_000)[0]
    assert there.dense().is_cuda
    torch.testing.assert_close(there.dense().cpu(), here.dense(), rtol=0, atol=1e-9)
    torch.testing.assert_close(there.transport_to_source(target.cuda()).cpu(),
                               here.transport_to_source(target))
