"""Samplers against the closed-form probability flow, the papers' formulas and diffusers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from recbole_mmdiff.diffusion import (
    CosineVPSchedule,
    NoiseSchedule,
    VPSchedule,
    ddim,
    ddim_plan,
    ddpm,
    dpm_solver,
    dpm_solver_plan,
    dpm_solver_pp,
    fold_in,
    keyed_normal,
    linear_schedule,
    noise_from_x0,
    posterior,
    run_plan,
    step_orders,
    time_nodes,
    torch_noise,
)

SCHEDULES = [VPSchedule(t_end=0.01), CosineVPSchedule(t_end=0.01)]


def error(oracle, result, start):
    schedule = oracle.schedule
    return np.abs(result - oracle.flow(start, schedule.t_start, schedule.t_end)).max()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_single_step_order(gaussian, start_state, fitted_order, schedule, order):
    oracle, errors = gaussian(schedule), {}
    for steps in (40, 80, 160, 320):
        result = dpm_solver(oracle.denoise, start_state, schedule, steps * order, order, True)
        errors[steps] = error(oracle, result, start_state)
    assert fitted_order(errors) == pytest.approx(order, abs=0.3)


def graded_nodes(schedule, steps):
    """Uniform in log-SNR after two starting steps too short for their lower order to show."""
    low, high = schedule.half_logsnr(schedule.t_start), schedule.half_logsnr(schedule.t_end)
    step = (high - low) / steps
    points = [low + step**2 / 4, *np.linspace(low + (step**2 + step**1.5) / 4, high, steps - 1)]
    times = [schedule.inverse_half_logsnr(point) for point in points]
    return [schedule.t_start, *times[:-1], schedule.t_end]


# They end earlier than the others: near t = 0 order 3 shows its asymptotic rate only at step counts
# where its error is already rounding.
@pytest.mark.parametrize(
    "schedule", [VPSchedule(t_end=0.1), CosineVPSchedule(t_end=0.2)], ids=["linear", "cosine"]
)
@pytest.mark.parametrize(
    ("order", "form", "expected"),
    [(1, "exact", 1), (2, "exact", 2), (3, "exact", 3), (3, "released", 2)],
)
def test_multistep_order(gaussian, start_state, fitted_order, schedule, order, form, expected):
    oracle, errors = gaussian(schedule), {}
    for steps in (160, 320, 640, 1280):
        nodes = graded_nodes(schedule, steps)
        result = dpm_solver_pp(oracle.denoise, start_state, schedule, steps, order, False, form, nodes)
        errors[steps] = error(oracle, result, start_state)
    assert fitted_order(errors) == pytest.approx(expected, abs=0.3)


def test_ddim_order(gaussian, start_state, fitted_order):
    schedule = VPSchedule(t_end=0.01)
    oracle, errors = gaussian(schedule), {}
    for steps in (80, 160, 320, 640):
        result = ddim(oracle.denoise, start_state, schedule, steps)
        errors[steps] = error(oracle, result, start_state)
    assert fitted_order(errors) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("spacing", ["logsnr", "time"])
def test_ddim_without_noise_is_dpm_solver_1(gaussian, start_state, spacing):
    schedule = VPSchedule()
    oracle, nodes = gaussian(schedule), time_nodes(schedule, 12, spacing)
    expected = dpm_solver(oracle.denoise, start_state, schedule, 12, 1, nodes=nodes)
    result = ddim(oracle.denoise, start_state, schedule, 12, spacing=spacing)
    np.testing.assert_allclose(result, expected, rtol=1e-12)
    alpha, sigma = schedule.alpha, schedule.sigma
    for start, end in pairwise(nodes):  # Song et al. 2021, Eq. 12
        eps = oracle.denoise(start_state, start)
        data = (start_state - sigma(start) * eps) / alpha(start)
        start_state = alpha(end) * data + sigma(end) * eps
    np.testing.assert_allclose(result, start_state, rtol=1e-9)


def solve_by_the_book(denoise, x, schedule, nodes, orders):
    """Lu et al. 2022, Equation 3.7 and Algorithms 1 and 2, written out."""
    lam, alpha, sigma = schedule.half_logsnr, schedule.alpha, schedule.sigma
    for s, t, order in zip(nodes, nodes[1:], orders, strict=False):
        h, e0 = lam(t) - lam(s), denoise(x, s)
        base = alpha(t) / alpha(s) * x - sigma(t) * math.expm1(h) * e0
        if order == 1:
            x = base
            continue
        r1 = 1 / 2 if order == 2 else 1 / 3
        s1 = schedule.inverse_half_logsnr(lam(s) + r1 * h)
        u1 = alpha(s1) / alpha(s) * x - sigma(s1) * math.expm1(r1 * h) * e0
        d1 = denoise(u1, s1) - e0
        if order == 2:
            x = base - sigma(t) / (2 * r1) * math.expm1(h) * d1
            continue
        r2 = 2 / 3
        s2 = schedule.inverse_half_logsnr(lam(s) + r2 * h)
        u2 = alpha(s2) / alpha(s) * x - sigma(s2) * math.expm1(r2 * h) * e0
        u2 = u2 - sigma(s2) * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
        d2 = denoise(u2, s2) - e0
        x = base - sigma(t) / r2 * (math.expm1(h) / h - 1) * d2
    return x


@pytest.mark.parametrize("schedule", [VPSchedule(), CosineVPSchedule(), linear_schedule(100)])
@pytest.mark.parametrize(("evaluations", "order"), [(30, 3), (31, 3), (32, 3), (7, 2), (4, 1)])
def test_dpm_solver_is_the_papers(start_state, schedule, evaluations, order):
    calls = []

    def denoise(x, t):
        return np.tanh(x + t)

    def counted(x, t):
        calls.append(t)
        return denoise(x, t)

    result = dpm_solver(counted, start_state, schedule, evaluations, order)
    orders = step_orders(evaluations, order)
    nodes = time_nodes(schedule, len(orders))
    assert len(calls) == sum(orders) == evaluations
    expected = solve_by_the_book(denoise, start_state, schedule, nodes, orders)
    np.testing.assert_allclose(result, expected, rtol=1e-9)


def test_inner_nodes_lie_at_thirds_of_the_log_snr():
    schedule, nodes = VPSchedule(), (1.0, 0.6, 0.2)
    low, middle, high = map(schedule.half_logsnr, nodes)
    times = dpm_solver_plan(schedule, 6, 3, True, nodes).times
    expected = [low + k / 3 * (middle - low) for k in range(3)]
    expected += [middle + k / 3 * (high - middle) for k in range(3)]
    assert [schedule.half_logsnr(t) for t in times] == pytest.approx(expected, rel=1e-10)
    assert schedule.half_logsnr(dpm_solver_plan(schedule, 2, 2, True, (1.0, 0.6)).times[1]) == (
        pytest.approx((low + middle) / 2, rel=1e-10)
    )


def test_step_orders():
    assert step_orders(30) == (3,) * 9 + (2, 1)
    assert step_orders(31) == (3,) * 10 + (1,)
    assert step_orders(32) == (3,) * 10 + (2,)
    assert step_orders(3) == (2, 1) and step_orders(2) == (2,) and step_orders(1) == (1,)
    assert step_orders(7, 2) == (2, 2, 2, 1) and step_orders(30, 3, True) == (3,) * 10


def test_float32_tensors_agree_with_float64(gaussian, start_state):
    """Down to t = 1e-4, where float32 coefficients would have lost half their digits."""
    schedule = VPSchedule()
    oracle = gaussian(schedule)
    exact = dpm_solver(oracle.denoise, start_state, schedule)

    def denoise(x, t):
        return oracle.denoise(x.double(), t).float()

    result = dpm_solver(denoise, torch.from_numpy(start_state).float(), schedule)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), exact, rtol=2e-5, atol=2e-6)


def test_gradient_flows_through_a_sampler():
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = torch.ones(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w: dpm_solver(lambda state, t: torch.tanh(w * state), x, VPSchedule(), 6), (weight,)
    )


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_moments(gaussian, variance):
    """Against the exact recursion of mean and variance, and that against the data's."""
    schedule = linear_schedule(200)
    oracle, keys = gaussian(schedule), torch.arange(20_000)

    def noise(step, x):
        return keyed_normal(keys, 3, fold_in(0, step), torch.float64)

    mean, spread = np.zeros(3), np.ones(3)
    for step in range(200, 0, -1):
        beta, t = schedule.betas[step - 1], step / 200
        marginal_mean, marginal_variance = oracle.marginal(t)
        shrink = (1 - beta / marginal_variance) / math.sqrt(1 - beta)
        mean = shrink * mean + beta / marginal_variance * marginal_mean / math.sqrt(1 - beta)
        added = beta if variance == "beta" else schedule.posterior_coefficients(step)[2]
        spread = shrink**2 * spread + (added if step > 1 else 0.0)
    np.testing.assert_allclose(mean, oracle.mean, atol=0.01)
    np.testing.assert_allclose(spread, oracle.variance, rtol=0.15)

    result = ddpm(oracle.denoise, noise(-1, None), schedule, noise, variance).numpy()
    np.testing.assert_allclose(result.mean(0), mean, atol=4 * np.sqrt(spread.max() / 20_000))
    np.testing.assert_allclose(result.var(0), spread, rtol=4 * math.sqrt(2 / 20_000))


def test_ddim_with_noise_has_the_same_moments(gaussian):
    schedule = VPSchedule(t_end=1e-3)
    oracle, generator = gaussian(schedule), torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    noise = torch_noise(generator)
    result = ddim(oracle.denoise, x, schedule, 200, eta=1.0, noise=noise).numpy()
    np.testing.assert_allclose(result.mean(0), oracle.mean, atol=0.06)
    np.testing.assert_allclose(result.var(0), oracle.variance, rtol=0.08)


def test_ddpm_is_the_posterior_of_predicted_data():
    """A loop over steps with the true posterior mean, for a network that predicts data."""
    schedule, seen = linear_schedule(10), []
    x = start = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)

    def predict(state, t):
        return torch.tanh(state * t)

    def noise(step, state):
        return torch.full_like(state, 0.1 * step - 0.3)

    for step in range(10, 0, -1):
        mean, variance = posterior(predict(x, step / 10), x, step, schedule)
        x = mean + math.sqrt(variance) * noise(10 - step, x)
        seen.append(x)
    states = {}
    result = ddpm(noise_from_x0(predict, schedule), start, schedule, noise, callback=states.__setitem__)
    torch.testing.assert_close(result, x)
    for done, state in enumerate(seen, start=1):
        torch.testing.assert_close(states[done], state)


class Tabulated(NoiseSchedule):
    """A schedule known only at the nodes of another library."""

    def __init__(self, times, sigma_ratios):
        self.table = dict(zip(times, sigma_ratios, strict=True))
        self.t_start, self.t_end = times[0], times[-1]

    def log_alpha(self, t):
        return -0.5 * math.log1p(self.table[t] ** 2)

    def inverse_log_alpha(self, log_alpha):
        raise NotImplementedError

    def log_alpha_tensor(self, t):
        raise NotImplementedError


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("steps", "lower"), [(10, True), (10, False), (25, False)])
def test_multistep_equals_diffusers(order, steps, lower):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear",
        solver_order=order,
        algorithm_type="dpmsolver++",
        lower_order_final=lower,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(steps)
    start = torch.linspace(-2, 2, 12).view(4, 3)

    def denoise(x, step):
        return torch.sin(x + 0.002 * step)

    expected = start
    for step in scheduler.timesteps:
        expected = scheduler.step(denoise(expected, step.item()), step, expected).prev_sample
    # Its nodes and its sigma/alpha ratios; times are moved by one, since ours are positive.
    times = [float(step + 1) for step in scheduler.timesteps.tolist()] + [1.0]
    schedule = Tabulated(times, scheduler.sigmas.double().tolist())
    result = dpm_solver_pp(
        lambda x, t: denoise(x, t - 1),
        start.double(),
        schedule,
        steps,
        order,
        lower,
        "released",
        times,
    )
    # diffusers' own coefficients are float32.
    scale = expected.abs().max().item()
    torch.testing.assert_close(result.float(), expected, rtol=1e-5, atol=1e-5 * max(scale, 1.0))


def test_plans_are_cached():
    assert dpm_solver_plan(VPSchedule(), 30) is dpm_solver_plan(VPSchedule(), 30)
    assert ddim_plan(linear_schedule(50), 10) is ddim_plan(linear_schedule(50), 10)


def identity(x, t):
    return x


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, s: dpm_solver(identity, x, s, order=4), "order=4.*1, 2, 3"),
        (lambda x, s: dpm_solver(identity, x, s, 0), "num_evaluations=0"),
        (lambda x, s: dpm_solver(identity, x, s, 10, 3, True), "num_evaluations=10.*multiple"),
        (lambda x, s: dpm_solver(identity, x, s, 3, nodes=(1.0, 0.1)), "nodes has 2 times.*3"),
        (lambda x, s: dpm_solver(identity, x, s, 1, nodes=(0.1, 0.5)), "nodes=.*fall strictly"),
        (lambda x, s: dpm_solver(identity, x, s, 1, nodes=(0.5, 0.0)), "nodes=.*above 0"),
        (lambda x, s: dpm_solver_pp(identity, x, s, order=0), "order=0"),
        (lambda x, s: dpm_solver_pp(identity, x, s, third_order="x"), "third_order='x'.*released"),
        (lambda x, s: ddim(identity, x, s, eta=2.0), "eta=2.0"),
        (lambda x, s: ddim(identity, x, s, 0), "num_steps=0"),
        (lambda x, s: ddim(identity, x, s, spacing="karras"), "spacing='karras'"),
        (lambda x, s: ddpm(identity, x, linear_schedule(3), variance="x"), "variance='x'"),
        (lambda x, s: run_plan(ddim_plan(s, 3, 1.0), identity, x), "noise=None"),
    ],
)
def test_bad_arguments_are_named(start_state, call, named):
    with pytest.raises(ValueError, match=named):
        call(start_state, VPSchedule())
