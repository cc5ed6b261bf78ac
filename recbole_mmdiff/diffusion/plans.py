"""Samplers as tables of coefficients.

Every sampler of this room does the same two things: it asks the network for a prediction, and it
takes a linear combination of the state at the start of the step and of recent predictions. Hence a
``Plan``, the list of those combinations, computed once for a schedule and its nodes (float64,
cached), and one loop, ``run_plan``, which needs nothing of the state but ``*`` and ``+`` with
floats.

Throughout, ``h = lambda_end - lambda_start`` is a step's length in half log-SNR, and every
coefficient is written with ``expm1`` so that short steps do not cancel.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from recbole_mmdiff.diffusion._checks import check_choice, check_count, check_interval, check_order
from recbole_mmdiff.diffusion.discrete import DiscreteSchedule
from recbole_mmdiff.diffusion.process import PARAMETRISATIONS
from recbole_mmdiff.diffusion.schedule import NoiseSchedule


class Stage(NamedTuple):
    """One network evaluation and the linear combination after it.

    With ``p_1`` the prediction just made, ``p_2`` the one before it, and so on, the next state is
    ``scale * (state at the start of the step) + sum_k coefficient_k p_k + noise_scale * noise``.
    """

    time: float
    scale: float
    terms: tuple[tuple[int, float], ...]
    """``(k, coefficient_k)`` pairs; ``k`` is 1, 2 or 3."""
    ends_step: bool = True
    to_data: tuple[float, float] | None = None
    """``(a, b)``: the prediction kept is ``a * x + b * eps``, the data, rather than ``eps``."""
    noise_scale: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A sampler bound to a schedule and nodes; build it by one of the ``*_plan`` functions."""

    stages: tuple[Stage, ...]

    @property
    def times(self) -> tuple[float, ...]:
        """The time of every network evaluation, in order."""
        return tuple(stage.time for stage in self.stages)

    @property
    def is_stochastic(self) -> bool:
        """Whether noise is added on the way."""
        return any(stage.noise_scale for stage in self.stages)


def run_plan(
    plan: Plan,
    denoise: Callable[[Any, float], Any],
    x: Any,
    noise: Callable[[int, Any], Any] | None = None,
    callback: Callable[[int, Any], None] | None = None,
) -> Any:
    """Carry ``x`` from the plan's first node to its last.

    ``x``: the state at the first node, a tensor or array of any shape; ``denoise(x, t)``: the
    predicted noise (data, for a plan of ``parametrisation="x0"``), of the same shape.
    ``noise(step, x)`` returns standard normal noise like ``x`` for the step with that index (from
    0); a stochastic plan needs it. ``callback(steps_done, x)`` is called after every step. Returns
    the last state. Raises ``ValueError`` for a stochastic plan without ``noise``.
    """
    if noise is None and plan.is_stochastic:
        raise ValueError("noise=None is not accepted by a stochastic sampler; pass noise(step, x)")
    start, recent, steps_done = x, [], 0
    for time, scale, terms, ends_step, to_data, noise_scale in plan.stages:
        prediction = denoise(x, time)
        if to_data is not None:
            prediction = to_data[0] * x + to_data[1] * prediction
        recent = [prediction, *recent[:2]]
        x = scale * start
        for age, coefficient in terms:
            x = x + coefficient * recent[age - 1]
        if noise_scale:
            x = x + noise_scale * noise(steps_done, x)
        if ends_step:
            start, steps_done = x, steps_done + 1
            if callback is not None:
                callback(steps_done, x)
    return x


def time_nodes(schedule: NoiseSchedule, num_steps: int, spacing: str = "logsnr") -> tuple[float, ...]:
    """``num_steps + 1`` times from ``t_start`` down to ``t_end``.

    ``spacing``: even in half log-SNR (``"logsnr"``, Lu et al. 2022, section 3.3) or in ``"time"``.
    Raises ``ValueError`` for another spacing or ``num_steps < 1``.
    """
    check_count("num_steps", num_steps)
    check_choice("spacing", spacing, ("logsnr", "time"))
    first, last = schedule.t_start, schedule.t_end
    if spacing == "time":
        inner = (first + (last - first) * i / num_steps for i in range(1, num_steps))
    else:
        low, high = schedule.half_logsnr(first), schedule.half_logsnr(last)
        inner = (
            schedule.inverse_half_logsnr(low + (high - low) * i / num_steps) for i in range(1, num_steps)
        )
    return (first, *inner, last)


def step_orders(num_evaluations: int, order: int = 3, fixed_order: bool = False) -> tuple[int, ...]:
    """Orders of the single steps that together make ``num_evaluations`` network evaluations.

    For ``order=3`` those of DPM-Solver-fast (Lu et al. 2022, section 3.4): as many third-order
    steps as leave a remainder, which a second- or first-order step takes, e.g. 30 gives nine 3s, 2,
    1. For ``order=2`` second-order steps and a first-order one for an odd count. ``fixed_order``
    uses only steps of ``order`` and asks for a multiple of it. Raises ``ValueError`` otherwise.
    """
    check_count("num_evaluations", num_evaluations)
    check_order(order)
    if fixed_order:
        if num_evaluations % order:
            raise ValueError(
                f"num_evaluations={num_evaluations} must be a multiple of order={order} with fixed_order"
            )
        return (order,) * (num_evaluations // order)
    whole, rest = divmod(num_evaluations, order)
    if order == 3 and rest == 0:
        return (3,) * (whole - 1) + (2, 1)
    return (order,) * whole + ((rest,) if rest else ())


def dpm_solver_plan(
    schedule: NoiseSchedule,
    num_evaluations: int = 30,
    order: int = 3,
    fixed_order: bool = False,
    nodes: Sequence[float] | None = None,
) -> Plan:
    """Plan of ``dpm_solver``; arguments and errors as there. Cached."""
    return _dpm_solver_plan(
        schedule, num_evaluations, order, fixed_order, None if nodes is None else tuple(nodes)
    )


@lru_cache(maxsize=128)
def _dpm_solver_plan(
    schedule: NoiseSchedule,
    num_evaluations: int,
    order: int,
    fixed_order: bool,
    nodes: tuple[float, ...] | None,
) -> Plan:
    orders = step_orders(num_evaluations, order, fixed_order)
    nodes = checked_nodes(schedule, len(orders), nodes)
    builders = {1: _first_order, 2: _second_order, 3: _third_order}
    stages: list[Stage] = []
    for step_order, start, end in zip(orders, nodes[:-1], nodes[1:], strict=True):
        stages += builders[step_order](schedule, start, end)
    return Plan(tuple(stages))


def _first_order(schedule: NoiseSchedule, start: float, end: float) -> list[Stage]:
    return [_noise_stage(schedule, start, start, end, (1, 1.0))]


def _second_order(schedule: NoiseSchedule, start: float, end: float) -> list[Stage]:
    # Lu et al. 2022, Algorithm 1, with its r_1 = 1/2: the two differences add up to the midpoint's.
    middle = _between(schedule, start, end, 0.5)
    return [
        _noise_stage(schedule, start, start, middle, (1, 1.0), ends_step=False),
        _noise_stage(schedule, middle, start, end, (1, 1.0)),
    ]


def _third_order(schedule: NoiseSchedule, start: float, end: float) -> list[Stage]:
    # Lu et al. 2022, Algorithm 2, with r_1 = 1/3 and r_2 = 2/3.
    first, second = (_between(schedule, start, end, ratio) for ratio in (1 / 3, 2 / 3))
    step = schedule.half_logsnr(end) - schedule.half_logsnr(start)
    # The weight of a difference of predictions relative to that of the prediction itself.
    inner = 2.0 * _slope_weight(step * 2 / 3)
    outer = 1.5 * _slope_weight(step)
    return [
        _noise_stage(schedule, start, start, first, (1, 1.0), ends_step=False),
        _noise_stage(schedule, first, start, second, (2, 1.0 - inner), (1, inner), ends_step=False),
        _noise_stage(schedule, second, start, end, (3, 1.0 - outer), (1, outer)),
    ]


def _slope_weight(step: float) -> float:
    """``((e^h - 1)/h - 1) / (e^h - 1)``, by its series where it would cancel."""
    if abs(step) < 1e-3:
        return 0.5 - step / 12.0 + step**3 / 720.0
    return 1.0 / step - 1.0 / math.expm1(step)


def _noise_stage(
    schedule: NoiseSchedule,
    time: float,
    start: float,
    end: float,
    *weights: tuple[int, float],
    ends_step: bool = True,
) -> Stage:
    """From ``start`` to ``end``: ``alpha ratio * x - sigma_end (e^h - 1) (weighted noises)``."""
    scale = math.exp(schedule.log_alpha(end) - schedule.log_alpha(start))
    step = schedule.half_logsnr(end) - schedule.half_logsnr(start)
    factor = -schedule.sigma(end) * math.expm1(step)
    terms = tuple((age, factor * weight) for age, weight in weights)
    return Stage(time, scale, terms, ends_step)


def _between(schedule: NoiseSchedule, start: float, end: float, ratio: float) -> float:
    low, high = schedule.half_logsnr(start), schedule.half_logsnr(end)
    return schedule.inverse_half_logsnr(low + ratio * (high - low))


def ddim_plan(
    schedule: NoiseSchedule,
    num_steps: int = 50,
    eta: float = 0.0,
    spacing: str = "logsnr",
    nodes: Sequence[float] | None = None,
) -> Plan:
    """Plan of ``ddim``; arguments and errors as there. Cached."""
    return _ddim_plan(schedule, num_steps, eta, spacing, None if nodes is None else tuple(nodes))


@lru_cache(maxsize=128)
def _ddim_plan(
    schedule: NoiseSchedule,
    num_steps: int,
    eta: float,
    spacing: str,
    nodes: tuple[float, ...] | None,
) -> Plan:
    check_interval("eta", eta, 0.0, 1.0)
    nodes = checked_nodes(schedule, num_steps, nodes, spacing)
    stages = []
    for start, end in itertools.pairwise(nodes):
        stage = _first_order(schedule, start, end)[0]
        sigma = schedule.sigma(end)
        # Song et al. 2021 (DDIM), Eq. 16; the deterministic part keeps the rest of sigma_end.
        log_ratio = schedule.log_alpha(start) - schedule.log_alpha(end)
        spread = math.sqrt(-math.expm1(2.0 * log_ratio)) * sigma / schedule.sigma(start)
        noise_scale = eta * spread
        direction = stage.terms[0][1] + math.sqrt(sigma**2 - noise_scale**2) - sigma
        stages.append(stage._replace(terms=((1, direction),), noise_scale=noise_scale))
    return Plan(tuple(stages))


@lru_cache(maxsize=128)
def ddpm_plan(
    schedule: DiscreteSchedule, variance: str = "posterior", parametrisation: str = "eps"
) -> Plan:
    """Plan of ``ddpm``; arguments and errors as there. Cached."""
    check_choice("variance", variance, ("posterior", "beta"))
    check_choice("parametrisation", parametrisation, PARAMETRISATIONS)
    stages = []
    for step in range(schedule.num_steps, 0, -1):
        weight, scale, spread = schedule.posterior_coefficients(step)
        beta, time = schedule.betas[step - 1], step / schedule.num_steps
        if parametrisation == "eps":
            scale = 1.0 / math.sqrt(1.0 - beta)
            weight = -scale * beta / schedule.sigma(time)
        spread = beta if variance == "beta" else spread
        noise_scale = math.sqrt(spread) if step > 1 else 0.0
        stages.append(Stage(time, scale, ((1, weight),), noise_scale=noise_scale))
    return Plan(tuple(stages))


def checked_nodes(
    schedule: NoiseSchedule,
    num_steps: int,
    nodes: tuple[float, ...] | None,
    spacing: str = "logsnr",
) -> tuple[float, ...]:
    """Evenly spaced nodes, or the given ones; ``ValueError`` for a wrong number or order."""
    if nodes is None:
        return time_nodes(schedule, num_steps, spacing)
    if len(nodes) != num_steps + 1:
        raise ValueError(f"nodes has {len(nodes)} times; accepted: {num_steps + 1}, one a boundary")
    falling = all(start > end for start, end in itertools.pairwise(nodes))
    if not falling or nodes[-1] <= 0.0 or nodes[0] > schedule.t_start:
        raise ValueError(
            f"nodes={nodes!r} must fall strictly, from at most t_start={schedule.t_start!r} to above 0"
        )
    return tuple(float(node) for node in nodes)
