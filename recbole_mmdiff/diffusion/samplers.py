"""Samplers: from a noisy state back to data.

Each sees the network only as ``denoise(x, t)``: ``x`` a state of any shape, ``t`` a Python float,
the schedule's continuous time, and the result the **predicted noise** of the state's shape. What
the network predicts and what it takes as its time are the wrapper's business (``noise_from_x0``,
``guided_noise``). Only ``ddpm`` also takes predicted data as they are.

The state may be a torch tensor or a numpy array; gradients flow through tensors. Where nodes are
not given they are evenly spaced in half log-SNR from ``schedule.t_start`` to ``schedule.t_end``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from recbole_mmdiff.diffusion.discrete import DiscreteSchedule
from recbole_mmdiff.diffusion.noise import fold_in, keyed_normal
from recbole_mmdiff.diffusion.plans import ddim_plan, ddpm_plan, dpm_solver_plan, run_plan
from recbole_mmdiff.diffusion.plans_pp import dpm_solver_pp_plan
from recbole_mmdiff.diffusion.schedule import NoiseSchedule

Denoise = Callable[[Any, float], Any]
"""``denoise(x, t) -> predicted noise``."""
Noise = Callable[[int, Any], Any]
"""``noise(step, x) -> standard normal like x``; ``step`` counts the steps done, from 0."""
Callback = Callable[[int, Any], None]
"""``callback(steps_done, x)``, called after each step."""


def noise_from_x0(network: Denoise, schedule: NoiseSchedule) -> Denoise:
    """The ``denoise`` of a network that predicts data: ``(x - alpha(t) x_0) / sigma(t)``.

    ``network(x, t)`` returns the predicted ``x_0``, of ``x``'s shape (Salimans and Ho 2022, section
    4). A sampler undoes this division, which costs digits where a step is long (beta near 1); for
    ``ddpm`` its ``parametrisation="x0"`` spares them.
    """

    def denoise(x: Any, t: float) -> Any:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (1.0 / sigma) * x + (-alpha / sigma) * network(x, t)

    return denoise


def torch_noise(generator: torch.Generator | None = None) -> Noise:
    """Noise drawn in order from ``generator`` (by default torch's global one), for tensors."""

    def noise(step: int, x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    return noise


def keyed_noise(keys: torch.Tensor, seed: int) -> Noise:
    """Noise that depends on (seed, key, step) alone: ``keys`` is a LongTensor ``(n,)``, one a row of the
    states ``(n, d)``. Step -1 is free for the start of a chain."""

    def noise(step: int, x: torch.Tensor) -> torch.Tensor:
        return keyed_normal(keys, x.shape[1], fold_in(seed, step), x.dtype)

    return noise


def ddpm(
    denoise: Denoise,
    x: Any,
    schedule: DiscreteSchedule,
    noise: Noise | None = None,
    variance: str = "posterior",
    parametrisation: str = "eps",
    callback: Callback | None = None,
) -> Any:
    """Ancestral sampling over all steps ``T .. 1`` (Ho et al. 2020, Algorithm 2).

    ``x``: the state at step ``T``; step ``n`` calls ``denoise`` at ``t = n / T``, for the predicted
    noise (``parametrisation="eps"``) or data (``"x0"``): the mean is the true posterior mean (Eq. 7)
    either way, and with ``"x0"`` the last state is the last prediction itself. ``noise``: defaults
    to ``torch_noise()``; the last step adds none. ``variance``: ``"posterior"`` (Eq. 7) or
    ``"beta"``. Returns the state at step 0. Raises ``ValueError`` for another variance or
    parametrisation.
    """
    plan = ddpm_plan(schedule, variance, parametrisation)
    return run_plan(plan, denoise, x, noise or torch_noise(), callback)


def ddim(
    denoise: Denoise,
    x: Any,
    schedule: NoiseSchedule,
    num_steps: int = 50,
    eta: float = 0.0,
    spacing: str = "logsnr",
    nodes: Sequence[float] | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Any:
    """DDIM (Song et al. 2021, Eqs. 12 and 16): deterministic for ``eta=0``, as DDPM for 1.

    ``x``: the state at ``schedule.t_start`` or ``nodes[0]``. ``spacing``: ``"logsnr"`` or
    ``"time"``; ``nodes``: ``num_steps + 1`` falling times instead. ``noise``: used for ``eta > 0``,
    defaults to ``torch_noise()``. Returns the state at the last node. Raises ``ValueError`` for
    ``eta`` outside ``[0, 1]``, ``num_steps < 1``, an unknown spacing, or nodes of another number or
    not falling.
    """
    plan = ddim_plan(schedule, num_steps, eta, spacing, nodes)
    return run_plan(plan, denoise, x, noise or torch_noise(), callback)


def dpm_solver(
    denoise: Denoise,
    x: Any,
    schedule: NoiseSchedule,
    num_evaluations: int = 30,
    order: int = 3,
    fixed_order: bool = False,
    nodes: Sequence[float] | None = None,
    callback: Callback | None = None,
) -> Any:
    """Single-step DPM-Solver on noise predictions (Lu et al. 2022, Algorithms 1 and 2).

    ``x``: the state at ``schedule.t_start`` or ``nodes[0]``. ``num_evaluations``: network
    evaluations, divided into steps by ``step_orders``: for ``order=3`` as DPM-Solver-fast, 30 being
    nine steps of order 3, one of 2, one of 1; with ``fixed_order`` only steps of ``order``. Inner
    nodes lie at 1/2 (order 2), 1/3 and 2/3 (order 3) of a step in half log-SNR. ``nodes``: falling
    times, one more than there are steps. Returns the state at the last node. Raises ``ValueError``
    for an order outside 1, 2, 3, ``num_evaluations < 1``, a count that ``fixed_order`` cannot
    divide, or bad nodes.
    """
    plan = dpm_solver_plan(schedule, num_evaluations, order, fixed_order, nodes)
    return run_plan(plan, denoise, x, callback=callback)


def dpm_solver_pp(
    denoise: Denoise,
    x: Any,
    schedule: NoiseSchedule,
    num_steps: int = 30,
    order: int = 2,
    lower_order_final: bool = True,
    third_order: str = "exact",
    nodes: Sequence[float] | None = None,
    callback: Callback | None = None,
) -> Any:
    """Multistep DPM-Solver++ on data predictions (Lu et al. 2022b, Algorithm 2).

    ``x``: the state at ``schedule.t_start`` or ``nodes[0]``. One network evaluation a step; the
    first steps are of order 1, 2, ... until ``order`` predictions are known. ``lower_order_final``
    lets the order fall again to 1 at the end, steadier when there are few steps. ``nodes``:
    ``num_steps + 1`` falling times. Returns the state at the last node.

    ``third_order``: the widely released code of order 3 gives the second divided difference half
    the weight that the integral asks for, and so converges at order 2 only. ``"exact"`` uses the
    full weight and converges at order 3; ``"released"`` reproduces that code.

    Raises ``ValueError`` for an order outside 1, 2, 3, ``num_steps < 1``, another ``third_order``,
    or nodes of another number or not falling.
    """
    plan = dpm_solver_pp_plan(schedule, num_steps, order, lower_order_final, third_order, nodes)
    return run_plan(plan, denoise, x, callback=callback)
