"""Schedules against slow loops, their inverses, and float32 near t = 0."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_mmdiff.diffusion import (
    CosineVPSchedule,
    DiscreteSchedule,
    VPSchedule,
    cosine_schedule,
    discrete_schedule,
    exp_schedule,
    linear_schedule,
    sqrt_schedule,
)

CONTINUOUS = [
    VPSchedule(),
    VPSchedule(beta_min=0.0),
    CosineVPSchedule(),
    linear_schedule(1000),
    cosine_schedule(20),
]


def alpha_bars(schedule):
    product, values = 1.0, []
    for beta in schedule.betas:
        product *= 1.0 - beta
        values.append(product)
    return values


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("num_steps", [5, 20, 1000])
def test_linear_betas(num_steps, rescale):
    schedule = linear_schedule(num_steps, 1e-4, 0.02, rescale)
    for n in range(num_steps):
        beta = 1e-4 + (0.02 - 1e-4) * n / (num_steps - 1)
        beta = min(beta * 1000 / num_steps, 0.999) if rescale else beta
        assert schedule.betas[n] == pytest.approx(beta, rel=1e-12)
    for n, value in enumerate(alpha_bars(schedule), start=1):
        assert schedule.alpha_bar(n) == pytest.approx(value, rel=1e-10)


def test_rescaling_makes_the_last_step_noise():
    """The unscaled values are those on record in the project's decisions."""
    for steps, left in {2: 0.98, 5: 0.95, 10: 0.90, 20: 0.82, 50: 0.60}.items():
        unscaled = linear_schedule(steps, rescale=False).alpha_bar(steps)
        assert unscaled == pytest.approx(left, abs=0.006)
    for steps in (20, 50, 200, 1000):
        assert linear_schedule(steps).alpha_bar(steps) < 1e-4


def test_cosine_and_sqrt_alpha_bars():
    for n, value in enumerate(alpha_bars(cosine_schedule(50))[:-1], start=1):
        expected = math.cos((n / 50 + 0.008) / 1.008 * math.pi / 2) ** 2
        expected /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert value == pytest.approx(expected, rel=1e-9)
    for n, value in enumerate(alpha_bars(sqrt_schedule(50))[:-1], start=1):
        expected = (1 - math.sqrt(n / 50 + 1e-4)) / (1 - math.sqrt(1e-4))
        assert value == pytest.approx(expected, rel=1e-9)
    assert cosine_schedule(50).betas[-1] == sqrt_schedule(50).betas[-1] == 0.999


@pytest.mark.parametrize("num_steps", [50, 400])
def test_exp_schedule_is_the_continuous_one_at_its_steps(num_steps):
    discrete, continuous = exp_schedule(num_steps, 0.1, 10.0), VPSchedule(0.1, 10.0)
    for n in range(1, num_steps + 1):
        expected = 1 - math.exp(-0.1 / num_steps - (2 * n - 1) * 9.9 / (2 * num_steps**2))
        assert discrete.betas[n - 1] == pytest.approx(expected, rel=1e-9)
        assert discrete.alpha(n / num_steps) == pytest.approx(continuous.alpha(n / num_steps), rel=1e-9)


def test_continuous_formulas():
    for t in (1e-4, 0.01, 0.3, 0.9946):
        integral = 0.1 * t + 0.5 * (20 - 0.1) * t**2
        assert VPSchedule().alpha(t) == pytest.approx(math.exp(-0.5 * integral), rel=1e-12)
        cosine = math.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
        assert CosineVPSchedule().alpha(t) == pytest.approx(cosine, rel=1e-11)


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=lambda value: type(value).__name__)
@given(share=st.floats(1e-6, 1.0))
def test_inverse_round_trip(schedule, share):
    t = share * schedule.t_start
    assert schedule.inverse_log_alpha(schedule.log_alpha(t)) == pytest.approx(t, rel=1e-9)
    back = schedule.inverse_half_logsnr(schedule.half_logsnr(t))
    assert back == pytest.approx(t, rel=1e-9)
    assert schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=lambda value: type(value).__name__)
def test_float32_tensors_keep_their_digits(schedule):
    times = torch.tensor([1e-4, 1e-3, 0.05, 0.5, 0.97], dtype=torch.float32)
    alpha, sigma = schedule.alpha_sigma(times)
    assert alpha.dtype == sigma.dtype == torch.float32
    for index, t in enumerate(times.tolist()):
        tolerance = 1e-6 if t <= 0.05 else 1e-5  # late times: float32 t itself has 1e-7 of t
        assert alpha[index].item() == pytest.approx(schedule.alpha(t), rel=tolerance)
        assert sigma[index].item() == pytest.approx(schedule.sigma(t), rel=tolerance)


def test_discrete_tables_and_interpolation():
    schedule = linear_schedule(40)
    steps = torch.tensor([0, 1, 7, 40])
    alpha, sigma = schedule.alpha_sigma_at(steps, torch.float64)
    for index, step in enumerate(steps.tolist()):
        assert alpha[index].item() == pytest.approx(math.sqrt(schedule.alpha_bar(step)), rel=1e-12)
        assert sigma[index].item() == pytest.approx(math.sqrt(1 - schedule.alpha_bar(step)))
        assert schedule.alpha(step / 40) == pytest.approx(alpha[index].item(), rel=1e-12)
    middle = schedule.log_alpha(10.5 / 40)
    assert middle == pytest.approx((schedule.log_alphas[10] + schedule.log_alphas[11]) / 2)


def test_schedules_are_values():
    assert linear_schedule(30) == linear_schedule(30) != linear_schedule(31)
    assert hash(linear_schedule(30)) == hash(linear_schedule(30))
    assert {VPSchedule(): 1}[VPSchedule(0.1, 20.0)] == 1
    assert discrete_schedule("cosine", 10, offset=0.01) == cosine_schedule(10, 0.01)
    for steps in (1, 2, 3):
        for name in ("linear", "cosine", "sqrt", "exp"):
            assert discrete_schedule(name, steps).num_steps == steps


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: discrete_schedule("quadratic", 10), "name='quadratic'.*linear, cosine, sqrt, exp"),
        (lambda: linear_schedule(0), "num_steps=0"),
        (lambda: linear_schedule(10, beta_start=0.0), "beta_start=0.0"),
        (lambda: linear_schedule(10, beta_end=1.5), "beta_end=1.5"),
        (lambda: cosine_schedule(10, offset=-1), "offset=-1"),
        (lambda: exp_schedule(10, beta_max=-1.0), "beta_max=-1.0"),
        (lambda: DiscreteSchedule((0.1, 1.0)), r"betas\[1\]=1.0"),
        (lambda: DiscreteSchedule(()), "betas"),
        (lambda: VPSchedule(beta_min=-1), "beta_min=-1"),
        (lambda: VPSchedule(beta_max=0.01), "beta_max=0.01"),
        (lambda: VPSchedule(t_end=2.0), "t_end=2.0"),
        (lambda: CosineVPSchedule(t_start=1.0), "t_start=1.0"),
        (lambda: linear_schedule(10).alpha_bar(11), "step=11"),
        (lambda: linear_schedule(10).posterior_coefficients(0), "step=0"),
    ],
)
def test_bad_arguments_are_named(build, named):
    with pytest.raises(ValueError, match=named):
        build()
