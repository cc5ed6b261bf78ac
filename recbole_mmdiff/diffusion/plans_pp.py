"""Plans of the multistep DPM-Solver++ (Lu et al. 2022b), on data predictions."""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

from recbole_mmdiff.diffusion._checks import check_choice, check_order
from recbole_mmdiff.diffusion.plans import (
    Plan,
    Stage,
    checked_nodes,
)
from recbole_mmdiff.diffusion.schedule import NoiseSchedule

Terms = tuple[tuple[int, float], ...]
THIRD_ORDER_FORMS = ("exact", "released")


def dpm_solver_pp_plan(
    schedule: NoiseSchedule,
    num_steps: int = 30,
    order: int = 2,
    lower_order_final: bool = True,
    third_order: str = "exact",
    nodes: Sequence[float] | None = None,
) -> Plan:
    """Plan of ``dpm_solver_pp``; arguments and errors as there. Cached."""
    nodes = None if nodes is None else tuple(nodes)
    return _dpm_solver_pp_plan(schedule, num_steps, order, lower_order_final, third_order, nodes)


@lru_cache(maxsize=128)
def _dpm_solver_pp_plan(
    schedule: NoiseSchedule,
    num_steps: int,
    order: int,
    lower_order_final: bool,
    third_order: str,
    nodes: tuple[float, ...] | None,
) -> Plan:
    check_order(order)
    check_choice("third_order", third_order, THIRD_ORDER_FORMS)
    nodes = checked_nodes(schedule, num_steps, nodes)
    lambdas = [schedule.half_logsnr(node) for node in nodes]
    stages = []
    for index, (start, end) in enumerate(itertools.pairwise(nodes)):
        left = num_steps - index if lower_order_final else order
        step_order = min(order, index + 1, left)
        step = lambdas[index + 1] - lambdas[index]
        # Lengths of the steps before this one, the latest first, in units of this one.
        ratios = [(lambdas[index - k] - lambdas[index - k - 1]) / step for k in range(step_order - 1)]
        stages.append(_data_stage(schedule, start, end, _weights(step, ratios, third_order)))
    return Plan(tuple(stages))


def _data_stage(schedule: NoiseSchedule, start: float, end: float, weights: Terms) -> Stage:
    """From ``start`` to ``end``: ``sigma ratio * x + alpha_end * (weighted data predictions)``."""
    alpha, sigma = schedule.alpha(start), schedule.sigma(start)
    return Stage(
        time=start,
        scale=schedule.sigma(end) / sigma,
        terms=tuple((age, schedule.alpha(end) * weight) for age, weight in weights),
        to_data=(1.0 / alpha, -sigma / alpha),
    )


def _weights(step: float, ratios: list[float], third_order: str) -> Terms:
    """Weights of the latest data predictions, without the common factor ``alpha_end``."""
    constant = -math.expm1(-step)
    if not ratios:
        return ((1, constant),)
    if len(ratios) == 1:
        # Algorithm 2: the slope enters by half the constant's weight, equal to second order.
        slope = 0.5 * constant / ratios[0]
        return ((1, constant + slope), (2, -slope))
    near, far = ratios
    # Integrals over the step of e^(tau - h) (tau / h)^k for k = 1, 2: the weights of the first and
    # second divided difference of the interpolating parabola.
    first = 1.0 - constant / step
    second = 1.0 - 2.0 * first / step
    if third_order == "released":
        second *= 0.5
    newest = (first * (1.0 + near / (near + far)) + second / (near + far)) / near
    older = (first * near / (near + far) + second / (near + far)) / far
    return ((1, constant + newest), (2, -newest - older), (3, older))
