"""Samplers with any numbers of steps, for data that are one known point: then every solver is exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_mmdiff.diffusion import (
    CosineVPSchedule,
    VPSchedule,
    ddim,
    ddpm,
    dpm_solver,
    dpm_solver_pp,
    keyed_normal,
    linear_schedule,
    noise_from_x0,
)
from recbole_mmdiff.diffusion.samplers import keyed_noise

SCHEDULES = st.sampled_from([VPSchedule, CosineVPSchedule])
POINTS = st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=4).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64))
SAMPLERS = {"ddim": lambda *chain, steps, order: ddim(*chain, steps),
            "single": lambda *chain, steps, order: dpm_solver(*chain, steps, order),
            "multi": lambda *chain, steps, order: dpm_solver_pp(*chain, steps, order)}


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=30)
@given(kind=SCHEDULES, t_end=st.floats(0.01, 0.5), points=POINTS, steps=st.integers(1, 12),
       order=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_known_point_is_reached_along_a_straight_line(name, kind, t_end, points, steps, order, seed):
    """x_t = alpha x_0 + sigma e with one e all the way; rows neither see each other nor their order."""
    schedule, sampler = kind(t_end=t_end), SAMPLERS[name]
    start = keyed_normal(torch.arange(len(points)), 3, seed, torch.float64)
    noise = (start - schedule.alpha(schedule.t_start) * points) / schedule.sigma(schedule.t_start)
    expected = schedule.alpha(t_end) * points + schedule.sigma(t_end) * noise
    found = sampler(noise_from_x0(lambda x, t: points, schedule), start, schedule, steps=steps, order=order)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    row = len(points) - 1
    alone = sampler(noise_from_x0(lambda x, t: points[row:], schedule), start[row:], schedule, steps=steps,
                    order=order)
    torch.testing.assert_close(alone, found[row:], rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(POINTS, st.integers(1, 20), st.integers(0, 2**40), st.integers(1, 3))
def test_an_ancestral_chain_ends_at_the_point_in_whatever_chunks(points, steps, seed, size):
    schedule, keys = linear_schedule(steps), torch.arange(len(points))
    start = keyed_normal(keys, 3, seed, torch.float64)

    def chain(rows):
        return ddpm(lambda x, t: points[rows], start[rows], schedule, keyed_noise(keys[rows], seed),
                    parametrisation="x0")

    whole = chain(keys)
    np.testing.assert_allclose(whole, points, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([chain(rows) for rows in keys.split(size)]), whole, rtol=0, atol=0)
