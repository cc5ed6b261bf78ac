"""Matching the users of two domains by fused Gromov-Wasserstein transport, which knows no linked users."""

import torch
from torch import Tensor

from recbole_mmdiff.transport._log import SolverLog, ended
from recbole_mmdiff.transport.cost import Costs, user_costs
from recbole_mmdiff.transport.goum import check_counts, check_numbers, checked_links, checked_masses
from recbole_mmdiff.transport.matching import Matching
from recbole_mmdiff.transport.sweeps import balanced

#: of the error of each inner problem's marginals to the tolerance
INNER_TOLERANCE = 0.1


@torch.no_grad()
def fused_gromov(source: Tensor, target: Tensor, epsilon: float = 0.1, *, alpha: float = 0.5,
                 links: tuple[Tensor, Tensor] | None = None, source_mass: Tensor | None = None,
                 target_mass: Tensor | None = None, tolerance: float = 1e-4, max_steps: int = 100,
                 max_sweeps: int = 1000, block_elements: int = 2**24) -> tuple[Matching, SolverLog]:
    """Minimise (1 - alpha) <pi, M> + alpha sum_ijkl (C_ik - D_jl)^2 pi_ij pi_kl - epsilon H(pi) over plans pi
    (n, m) with the given marginals, where M, C and D are squared distances between source and target users,
    among source users and among target users, all at length 1, and H(pi) = -sum pi log pi.

    Each step replaces the second term, which is concave on such plans, by its tangent, and solves what is
    left by sweeps: the objective never rises. The start is the plan of independent users, and the minimum
    that is found is a local one. Distances have factors of d + 2 columns, so that a step costs n m d, and
    no matrix of distances is stored.

    Args:
        source: (n, d) vectors; half precision is computed in float32.
        target: (m, d).
        epsilon: in the unit of squared distances, which go up to 4; the tangent goes up to 32 alpha.
        alpha: in [0, 1]; 0 is ``match_users`` without guidance.
        links: source rows (l,) and target rows (l,), int64: where ``Matching.linked_mass`` looks. They guide
            nothing.
        source_mass: (n,) positive; None is 1 / n.
        target_mass: (m,) positive, with the same sum; None is 1 / m.
        tolerance: for the error: the sum of all changes of the plan in the last step, or that of its
            |row sum - mass| if this is larger, as a share of all mass.
        max_steps: of tangents.
        max_sweeps: a step.
        block_elements: as in ``match_users``.

    Returns:
        The matching, whose costs are those of the last tangent; and the log, with the objective of the start
        and after each step.

    Raises:
        ValueError: an argument of a wrong shape, type or value.

    Warns:
        NotConverged: the error exceeds the tolerance after ``max_steps``.

    Source: SIEOUG, section 4.4 (SIEOUG-G, which is only named there); Peyre et al., Gromov-Wasserstein
    Averaging of Kernel and Distance Matrices, ICML 2016, section 2.3; Vayer et al., ICML 2019, for "fused".
    """
    check_numbers(epsilon=epsilon, tolerance=tolerance)
    check_counts(max_steps=max_steps, max_sweeps=max_sweeps, block_elements=block_elements)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r}; accepted: 0 to 1")
    with torch.autocast(source.device.type, enabled=False):
        features = user_costs(source, target, "unit")
        masses = checked_masses(features, source_mass, target_mass)
        links = checked_links(links, features)
        users = tuple(torch.arange(len(mass), device=mass.device) for mass in masses)
        problem = _Problem(features, masses, alpha, epsilon)
        moved, f = masses[0][:, None] * (masses[1] @ problem.target), torch.zeros_like(masses[0])
        log_plan = (masses[0] * masses[0].log()).sum() * masses[1].sum()
        log_plan += (masses[1] * masses[1].log()).sum() * masses[0].sum()
        objectives, matching, error = [problem.objective(moved, log_plan)], None, torch.inf
        while error > tolerance and len(objectives) <= max_steps:
            costs, before = problem.tangent(moved), matching
            kernel, scaling, _, short = balanced(costs, masses, epsilon, f, INNER_TOLERANCE * tolerance,
                                                 max_sweeps, block_elements)
            matching = Matching(kernel, scaling, users, links, None, masses)
            f, moved = kernel.f + epsilon * scaling[0].log(), matching.from_target(problem.target)
            objectives.append(problem.objective(moved, problem.log_plan(matching, moved)))
            error = max(short, _change(before, matching))
    return matching, ended("fused_gromov", len(objectives) - 1, error, tolerance, tuple(objectives))


class _Problem:
    """Distances by factors: C = source G source^T and D = target G target^T, of columns (x, |x|^2, 1).

    A plan pi comes in as its product pi @ target (n, d + 2).
    """

    def __init__(self, features: Costs, masses: tuple[Tensor, Tensor], alpha: float, epsilon: float):
        self.features, self.masses, self.alpha, self.epsilon = features, masses, alpha, epsilon
        parts = (features.left / 2, features.row), (features.right, features.column)
        self.source, self.target = (torch.cat([x, square[:, None], torch.ones_like(square)[:, None]], 1)
                                    for x, square in parts)
        d = self.source.shape[1] - 2
        self.form = -2 * torch.eye(d + 2, dtype=features.row.dtype, device=features.row.device)
        self.form[d:, d:] = self.form.new_tensor([[0, 1], [1, 0]])
        # sum_k C_ik^2 mass_k of every i, without C.
        self.squares = [((rows @ (self.form @ (rows.T * mass @ rows) @ self.form)) * rows).sum(1)
                        for rows, mass in zip((self.source, self.target), masses, strict=True)]

    def tangent(self, moved: Tensor) -> Costs:
        """The gradient of the objective without its entropy, as costs."""
        alpha = self.alpha
        middle = self.form @ (self.source.T @ moved) @ self.form
        left = 4 * alpha * self.source @ middle
        left[:, :-2] += (1 - alpha) * self.features.left
        row = (1 - alpha) * self.features.row + 2 * alpha * self.squares[0]
        column = (1 - alpha) * self.features.column + 2 * alpha * self.squares[1]
        return Costs(left, self.target, row, column)

    def objective(self, moved: Tensor, log_plan: Tensor) -> float:
        """Of a plan with its sum pi log pi."""
        inner = self.source.T @ moved
        middle = self.form @ inner @ self.form
        between = self.masses[0] @ self.features.row + self.masses[1] @ self.features.column \
            - 2 * inner.diagonal()[:-2].sum()
        within = sum(mass @ squares for mass, squares in zip(self.masses, self.squares, strict=True)) \
            - 2 * (middle * inner).sum()
        return float((1 - self.alpha) * between + self.alpha * within + self.epsilon * log_plan)

    def log_plan(self, matching: Matching, moved: Tensor) -> Tensor:
        """sum pi log pi, by the potentials."""
        costs = matching.kernel.costs
        potentials = self.masses[0] @ (matching.omega - costs.row) \
            + self.masses[1] @ (matching.kappa - costs.column)
        return (potentials + (costs.left * moved).sum()) / self.epsilon


def _change(before: Matching | None, after: Matching) -> float:
    """The sum of |changes| of the plan, as a share of all mass; infinite for the first plan."""
    if before is None:
        return torch.inf
    total = 0.0
    for (block, new), (_, old) in zip(after.kernel.blocks(), before.kernel.blocks(), strict=True):
        new = new * after.scaling[0][block, None] * after.scaling[1]
        total += float((new - old * before.scaling[0][block, None] * before.scaling[1]).abs().sum())
    return total / float(after.masses[0].sum())
