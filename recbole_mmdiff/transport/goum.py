"""Matching the users of two domains by entropic optimal transport, guided by users known in both."""

import math

import torch
from torch import Tensor

from recbole_mmdiff.transport._log import SolverLog, ended
from recbole_mmdiff.transport.cost import Costs, Kernel, user_costs
from recbole_mmdiff.transport.matching import Matching
from recbole_mmdiff.transport.sweeps import balanced

GUIDANCE = ("mask", "hard", "none")
#: epsilon-scaling halves epsilon from above this on
COARSE = 0.05
#: of a linked user's mass; what is left of less is rounding
LEAST_REST = 1e-6
#: of the larger epsilons' errors to the tolerance
COARSE_TOLERANCE = 10
#: of two sums of masses
SUMS_ALIKE = 1e-5


@torch.no_grad()
def match_users(source: Tensor, target: Tensor, epsilon: float = 0.1, *,
                links: tuple[Tensor, Tensor] | None = None, guidance: str = "mask",
                cost_scale: str = "unit", source_mass: Tensor | None = None,
                target_mass: Tensor | None = None, start: Tensor | None = None, tolerance: float = 1e-4,
                max_sweeps: int = 5000, epsilon_scaling: bool = True,
                block_elements: int = 2**24) -> tuple[Matching, SolverLog]:
    """Match source with target users: minimise <pi, Q> - epsilon H(pi) over plans pi (n, m) with rows that
    sum to ``source_mass`` and columns that sum to ``target_mass``.

    Q_ij is the squared distance of users i and j, scaled. With guidance "mask" it is zero for linked pairs,
    which does not force them together. With "hard" each linked pair holds the smaller of both masses, what
    no finite cost could take from them; what is left of the larger one is matched as all others are. With
    "none" links only tell ``Matching.linked_mass`` where to look.

    Args:
        source: (n, d) vectors; half precision is computed in float32.
        target: (m, d).
        epsilon: in the unit of the scaled costs. Below about 1e-3 of the largest cost, float32 is too coarse
            for the costs themselves.
        links: source rows (l,) and target rows (l,), int64, no user twice.
        guidance: "mask", "hard" or "none".
        cost_scale: "unit", "mean" or "none", see ``user_costs``.
        source_mass: (n,) positive; None is 1 / n.
        target_mass: (m,) positive, with the same sum; None is 1 / m.
        start: (n,) omega of a former matching, from which fewer sweeps are needed.
        tolerance: for the sum of |row sum - mass|, as a share of all mass that is not held by
            fixed pairs. The columns are exact.
        max_sweeps: over all epsilons.
        epsilon_scaling: for an epsilon below .05 and without ``start``, solve for larger ones first, each
            half of the one before.
        block_elements: how many entries of the plan are held at once; a plan that is larger is never stored.

    Returns:
        The matching, and the log with the error that ``tolerance`` bounds.

    Raises:
        ValueError: an argument of a wrong shape, type or value.

    Warns:
        NotConverged: the error exceeds the tolerance after ``max_sweeps``.

    Source: SIEOUG, section 3.3, Eqs. 17-22, and appendix B, Eqs. 25-28 (WAFI). A step of Eq. 27 is a sweep.
    Deviations: all omegas are updated and shifted to omega_n = 0, where the paper holds omega_n: the same
    fixed point, in far fewer sweeps. Marginals of 1 / n and 1 / m, as 1 is infeasible for n != m, so that
    Eq. 22 is multiplied by the mass of the column. And ``cost_scale`` and "hard".
    """
    check_numbers(epsilon=epsilon, tolerance=tolerance)
    check_counts(max_sweeps=max_sweeps, block_elements=block_elements)
    if guidance not in GUIDANCE:
        raise ValueError(f"guidance={guidance!r}; accepted: {', '.join(GUIDANCE)}")
    with torch.autocast(source.device.type, enabled=False):
        costs = user_costs(source, target, cost_scale)
        masses = checked_masses(costs, source_mass, target_mass)
        links = checked_links(links, costs)
        f = _checked_start(start, costs)
        users = tuple(torch.arange(len(mass), device=mass.device) for mass in masses)
        fixed, rest = None, masses
        if guidance == "hard":
            fixed, users, rest = _without_links(links, masses)
            costs = Costs(costs.left[users[0]], costs.right[users[1]], costs.row[users[0]],
                          costs.column[users[1]])
        elif guidance == "mask" and len(links[0]):
            partner = torch.full_like(users[0], -1).index_copy(0, *links)
            costs = costs._replace(partner=partner)
        epsilons = [epsilon]
        while epsilon_scaling and start is None and epsilons[0] < COARSE:
            epsilons.insert(0, 2 * epsilons[0])
        solved = _solve(costs, rest, epsilons, f[users[0]], tolerance, max_sweeps, block_elements)
    kernel, scaling, sweeps, error = solved
    matching = Matching(kernel, scaling, users, links, fixed, masses)
    return matching, ended("match_users", sweeps, error, tolerance)


def _solve(costs: Costs, masses: tuple[Tensor, Tensor], epsilons: list[float], f: Tensor, tolerance: float,
           max_sweeps: int, block_elements: int) -> tuple[Kernel, tuple[Tensor, Tensor], int, float]:
    """``balanced`` for one epsilon after another, the last to the tolerance."""
    if not len(f):
        return Kernel(costs, epsilons[-1], f, costs.column, block_elements), masses, 0, 0.0
    made = 0
    for epsilon in epsilons:
        allowed = tolerance if epsilon == epsilons[-1] else COARSE_TOLERANCE * tolerance
        kernel, scaling, sweeps, error = balanced(costs, masses, epsilon, f, allowed, max_sweeps - made,
                                                  block_elements)
        made += sweeps
        f = kernel.f + epsilon * scaling[0].log()
    return kernel, scaling, made, error


def _without_links(links: tuple[Tensor, Tensor], masses: tuple[Tensor, Tensor]
                   ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What each linked pair holds (l,); the rows of the users with mass left; and what is left."""
    pairs = [mass[side] for mass, side in zip(masses, links, strict=True)]
    fixed = torch.minimum(*pairs)
    left = []
    for mass, side, own in zip(masses, links, pairs, strict=True):
        rest = torch.where(own - fixed > LEAST_REST * own, own - fixed, 0)
        left.append(mass.index_copy(0, side, rest))
    users = [rest.nonzero().squeeze(1) for rest in left]
    if not all(len(side) for side in users):
        users = [side[:0] for side in users]
    rest = [rest[side] for rest, side in zip(left, users, strict=True)]
    # What was rounded away on one side may not be missing on the other.
    return fixed, tuple(users), (rest[0], rest[1] * (rest[0].sum() / rest[1].sum()))


def checked_masses(costs: Costs, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both marginals, in the dtype of the costs, with exactly the sum of the first."""
    masses = []
    likes = costs.row, costs.column
    for name, mass, like in zip(("source_mass", "target_mass"), given, likes, strict=True):
        if mass is None:
            mass = torch.full_like(like, 1 / len(like))
        if mass.shape != like.shape:
            raise ValueError(f"{name} has shape {tuple(mass.shape)}; accepted: {tuple(like.shape)}")
        if not (mass.isfinite() & (mass > 0)).all():
            raise ValueError(f"{name} goes from {float(mass.min())} to {float(mass.max())}; accepted: finite "
                             f"numbers above 0")
        masses.append(mass.detach().to(like.device, torch.float64))
    sums = [float(mass.sum()) for mass in masses]
    if abs(sums[0] - sums[1]) > SUMS_ALIKE * sums[0]:
        raise ValueError(f"target_mass sums to {sums[1]}; accepted: {sums[0]}, the sum of source_mass")
    return masses[0].to(costs.row.dtype), (masses[1] * (sums[0] / sums[1])).to(costs.row.dtype)


def checked_links(links: tuple[Tensor, Tensor] | None, costs: Costs) -> tuple[Tensor, Tensor]:
    """Source rows and target rows (l,), none for None; ValueError for what is no matching of users."""
    if links is None:
        none = torch.empty(0, dtype=torch.int64, device=costs.row.device)
        return none, none
    if len(links) != 2 or links[0].shape != links[1].shape:
        raise ValueError(f"links has shapes {[tuple(side.shape) for side in links]}; accepted: source rows "
                         f"and target rows, both (l,)")
    for name, side, users in zip(("source", "target"), links, (costs.row, costs.column), strict=True):
        if side.dim() != 1 or side.dtype != torch.int64:
            raise ValueError(f"links has {name} rows of {side.dtype} and shape {tuple(side.shape)}; "
                             f"accepted: torch.int64 (l,)")
        if len(side) and (side.min() < 0 or side.max() >= len(users)):
            raise ValueError(f"links has {name} rows from {int(side.min())} to {int(side.max())}; accepted: "
                             f"0 to {len(users) - 1}")
        if len(side.unique()) != len(side):
            raise ValueError(f"links names {len(side) - len(side.unique())} {name} rows again; accepted: no "
                             f"user twice")
    return tuple(side.to(costs.row.device) for side in links)


def _checked_start(start: Tensor | None, costs: Costs) -> Tensor:
    if start is None:
        return torch.zeros_like(costs.row)
    if start.shape != costs.row.shape or not start.isfinite().all():
        raise ValueError(f"start is of shape {tuple(start.shape)}; accepted: finite numbers of shape "
                         f"{tuple(costs.row.shape)}, one a source user")
    return start.detach().to(costs.row)


def check_numbers(**numbers: float) -> None:
    """Raise ``ValueError`` for a number that is not above zero, or infinite."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}; accepted: finite numbers above 0")


def check_counts(**counts: int) -> None:
    """Raise ``ValueError`` for a count below one."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value!r}; accepted: 1 or more")
