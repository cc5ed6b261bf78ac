"""Quadratically regularised transport onto few columns of equal size: a Newton method on its dual."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recbole_mmdiff.transport._log import SolverLog, ended

#: a cold start solves first for larger etas, each smaller than the last by this factor
COOLING = 10.0
#: how exactly it solves for those
COARSE = 0.1
#: a Newton step is damped by this times |gradient| / range of the costs, which vanishes at the solution
DAMPING = 20.0
#: a step is long enough when the slope along it fell to this share of what it was
SLOPE = 0.9
#: costs that are looked at together: as many as a cache holds, or on a GPU as keep it busy
CACHED, LAUNCHED = 2**16, 2**24
#: in units of the range of the costs; float64 has sixteen digits
SMALLEST_ETA = 1e-12
#: trials of a length of a step
TRIALS = 30


class Solution(NamedTuple):
    """What the dual says.

    Attributes:
        plan: (N, K) float64.
        prices: (K,) float64, the multipliers g of the columns.
        iterations: Newton steps.
        error: the larger of |row sum - 1| and |column sum - N/K| K/N.
        values: of the dual, before the first step for ``eta`` and after each.
    """

    plan: Tensor
    prices: Tensor
    iterations: int
    error: float
    values: tuple[float, ...]


def balanced_assignment(cost: Tensor, eta: float, tolerance: float = 1e-6,
                        max_iterations: int = 200) -> tuple[Tensor, SolverLog]:
    """The cheapest soft assignment of rows to columns of equal size.

    Minimises <cost, gamma> + eta/2 |gamma|^2 over gamma >= 0 whose rows sum to 1 and whose columns sum
    to N/K. The problem is strictly convex: there is one solution, and most of its entries are zero where
    eta is small against the differences of costs. N need not be a multiple of K.

    Source: SIEOUG, section 3.1, Eqs. 7-9. Deviations: the sums of Eqs. 9 and 10 run to kappa and to n, as
    their conditions ask; printed are K and N. The paper solves for f (Eq. 9) and g (Eq. 10) in turn, which
    often misses 1e-6 in 200 sweeps. Here f is eliminated by Eq. 9, and g maximises the concave dual that is
    left by damped semi-smooth Newton steps. A step takes O(N K (K + log K)), in blocks of rows.

    Args:
        cost: (N, K) of any floating type, N and K at least 1, finite; computed in float64.
        eta: weight of the squares, above 0, in units of the cost.
        tolerance: of the error, the larger of |row sum - 1| and |column sum - N/K| K/N.
        max_iterations: Newton steps (of each of the problems of larger eta, too, that are solved first).

    Returns:
        gamma (N, K) in the type of ``cost``, float32 at least, and the log. The objectives of the log are
        those of the dual: they rise, to the minimum.

    Raises:
        ValueError: ``cost`` is not a finite matrix, or a number is out of range; ``eta`` may not be below
            1e-12 of the largest difference of costs in a row.
    """
    if cost.dim() != 2 or not cost.numel() or not cost.is_floating_point():
        raise ValueError(f"cost is {cost.dtype} of shape {tuple(cost.shape)}; accepted: a floating type of "
                         f"shape (N, K), both at least 1")
    if not cost.isfinite().all():
        raise ValueError(f"cost has {int((~cost.isfinite()).sum())} entries that are not finite; accepted: "
                         f"finite numbers")
    check_positive("eta", eta)
    check_positive("tolerance", tolerance)
    check_count("max_iterations", max_iterations)
    found = solve(cost, eta, None, tolerance, max_iterations)
    log = ended("balanced_assignment", found.iterations, found.error, tolerance, found.values)
    return found.plan.to(torch.promote_types(cost.dtype, torch.float32)), log


def check_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``0 < value < infinity`` (NaN is refused)."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} is out of range; accepted: a number above 0")


def check_count(name: str, value: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an ``int`` of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is no count; accepted: a whole number from 1")


@torch.no_grad()
def solve(cost: Tensor, eta: float, prices: Tensor | None, tolerance: float,
          max_iterations: int) -> Solution:
    """``balanced_assignment`` without checks of its arguments or a warning, from the ``prices`` (K,) of a
    similar problem."""
    cost = cost.detach().double()
    lowest = cost.amin(1, keepdim=True)      # A constant of a row is f's; without it less is rounded away.
    cost = cost - lowest
    spread, iterations = float(cost.max()), 0
    if not eta >= SMALLEST_ETA * spread:
        raise ValueError(f"eta={eta!r} is lost in rounding beside costs that differ by {spread:.3g}; "
                         f"accepted: {SMALLEST_ETA:.0e} of that, or more")
    with torch.autocast(cost.device.type, enabled=False):
        if prices is None:
            prices = cost.new_zeros(cost.shape[1])
            larger = spread / COOLING
            while larger > eta:
                point, values = _ascend(cost, larger, prices, COARSE, max_iterations, spread)
                prices, iterations = point.prices, iterations + len(values) - 1
                larger /= COOLING
        point, values = _ascend(cost, eta, prices, tolerance, max_iterations, spread)
    plan = (point.levels + point.prices - cost).clamp_(min=0).div_(eta)      # Eq. 8
    share = len(cost) / cost.shape[1]
    error = max(float((plan.sum(1) - 1).abs().max()), float((plan.sum(0) / share - 1).abs().max()))
    base = float(lowest.sum())
    return Solution(plan, point.prices, iterations + len(values) - 1, error,
                    tuple(base + value for value in values))


class _Point(NamedTuple):
    """A point of the dual whose rows are right.

    Attributes:
        prices: (K,) g.
        levels: (N, 1) f.
        lack: (K,) what the columns lack, the gradient.
        value: of the dual.
    """

    prices: Tensor
    levels: Tensor
    lack: Tensor
    value: float


def _levels(values: Tensor, amount: float) -> Tensor:
    """f (n, 1) with sum_j max(f_i - values_ij, 0) = ``amount`` in each row (Eq. 9)."""
    ordered = values.sort(dim=1).values
    counts = torch.arange(1, values.shape[1] + 1, device=values.device)
    levels = (ordered.cumsum(1) + amount) / counts
    # The k lowest lie below the level of k entries for k = 1 .. kappa, and for no other k.
    return levels.gather(1, (ordered < levels).sum(1, keepdim=True) - 1)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of a few rows each of tensors (N, any), the first of which is the widest."""
    rows = max(1, (CACHED if tensors[0].device.type == "cpu" else LAUNCHED) // tensors[0].shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _evaluate(cost: Tensor, eta: float, prices: Tensor) -> _Point:
    """The dual at ``prices``."""
    share, given, squares, levels = len(cost) / cost.shape[1], 0, 0, []
    for (block,) in _blocks(cost):
        reduced = block - prices
        levels.append(_levels(reduced, eta))
        plan = (levels[-1] - reduced).clamp_(min=0).div_(eta)
        given, squares = given + plan.sum(0), squares + plan.flatten() @ plan.flatten()
    levels = torch.cat(levels)
    value = levels.sum() + share * prices.sum() - eta / 2 * squares
    return _Point(prices, levels, share - given, float(value))


def _ascend(cost: Tensor, eta: float, prices: Tensor, tolerance: float, max_iterations: int,
            spread: float) -> tuple[_Point, list[float]]:
    """Newton steps until the columns are right: where they end, and the dual before them and after each."""
    point = _evaluate(cost, eta, prices)
    values, share = [point.value], len(cost) / cost.shape[1]
    while len(values) <= max_iterations and float(point.lack.abs().max()) > tolerance * share:
        point = _search(cost, eta, point, _newton_step(cost, eta, point, spread), spread)
        values.append(point.value)
    return point, values


def _newton_step(cost: Tensor, eta: float, point: _Point, spread: float) -> Tensor:
    """(K,) the gradient over the negative Hessian, which is a Laplacian of the columns that share rows."""
    columns, shared = 0, 0
    for block, levels in _blocks(cost, point.levels):
        support = (block - point.prices < levels).to(cost.dtype)
        columns = columns + support.sum(0)
        shared = shared + support.T @ (support / support.sum(1, keepdim=True))
    # Columns that share no row would give a singular matrix.
    damping = DAMPING * torch.linalg.vector_norm(point.lack) / (spread + eta)
    return torch.linalg.solve(((columns / eta + damping).diag() - shared / eta), point.lack)


def _search(cost: Tensor, eta: float, start: _Point, step: Tensor, spread: float) -> _Point:
    """The point at a length of ``step`` where the dual is no lower and has become flatter."""
    slope = float(start.lack @ step)
    rounding = 1e-13 * len(cost) * (spread + eta)
    low, high, length = (0.0, slope), None, 1.0
    for _ in range(TRIALS):
        point = _evaluate(cost, eta, start.prices + length * step)
        now = float(point.lack @ step)
        if now > SLOPE * slope:
            low = length, now
        elif now < -SLOPE * slope or (now < 0 and point.value < start.value - rounding):
            high = length, now
        else:
            break
        if high is None:
            length *= 4
        else:
            # Where the slope would be zero if it fell linearly, but not next to an end.
            share = min(0.9, max(0.1, low[1] / (low[1] - high[1])))
            length = low[0] + share * (high[0] - low[0])
    return point
