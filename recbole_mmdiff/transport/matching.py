"""A plan that matches source and target users, by blocks."""

from collections.abc import Callable

import torch
from torch import Tensor

from recbole_mmdiff.transport.cost import Kernel

Linear = Callable[[Tensor], Tensor]


class Matching:
    """A transport plan pi (n, m) from source to target users, in parts: never stored as a whole if it is
    larger than a block. It takes no gradient.

    Over the users that are not fixed, pi_ij = u_i exp((f_i + g_j - Q_ij) / epsilon) v_j; fixed pairs hold
    all of their mass that the marginals permit.

    Attributes:
        kernel: of the users that are not fixed.
        scaling: u (n',) and v (m',), next to it.
        users: their source rows (n',) and target rows (m').
        links: source rows (l,) and target rows (l,) of users in both domains.
        fixed: (l,) masses of fixed pairs, or None if guidance is not "hard".
        masses: (n,) of the source users, (m,) of the target users.
    """

    def __init__(self, kernel: Kernel, scaling: tuple[Tensor, Tensor], users: tuple[Tensor, Tensor],
                 links: tuple[Tensor, Tensor], fixed: Tensor | None, masses: tuple[Tensor, Tensor]):
        self.kernel, self.scaling, self.users = kernel, scaling, users
        self.links, self.fixed, self.masses = links, fixed, masses

    def transposed(self) -> "Matching":
        """pi^T (m, n): source and target have changed places."""
        return Matching(self.kernel.transposed(), self.scaling[::-1], self.users[::-1], self.links[::-1],
                        self.fixed, self.masses[::-1])

    def of_source(self, rows: Tensor) -> "Matching":
        """The rows (r,) of the plan, distinct, of some source users: (r, m). Its columns sum to less than the
        masses of the target users."""
        place = torch.full_like(self.masses[0], -1, dtype=torch.int64)
        place[rows] = torch.arange(len(rows), device=rows.device)
        kept, linked = ((place[side] >= 0).nonzero().squeeze(1) for side in (self.users[0], self.links[0]))
        (own, others), (at_own, at_other) = self.users, self.links
        return Matching(self.kernel.of_rows(kept), (self.scaling[0][kept], self.scaling[1]),
                        (place[own[kept]], others), (place[at_own[linked]], at_other[linked]),
                        None if self.fixed is None else self.fixed[linked],
                        (self.masses[0][rows], self.masses[1]))

    @property
    def epsilon(self) -> float:
        """In the unit of the costs."""
        return self.kernel.epsilon

    @property
    def omega(self) -> Tensor:
        """Potentials (n,) of the source users, in the unit of the costs; that of the last user who is not
        fixed is zero, as in Eq. 25. Fixed users have zero. Means of several batches differ by a constant:
        who keeps them by user id should subtract their mean first."""
        return self._potentials(0)

    @property
    def kappa(self) -> Tensor:
        """Potentials (m,) of the target users: epsilon log b_j less epsilon log sum_i
        exp((omega_i - Q_ij) / epsilon), Eq. 20 with marginals. Fixed users have zero."""
        return self._potentials(1)

    def dense(self) -> Tensor:
        """The whole plan (n, m), for small problems."""
        plan = self.masses[0].new_zeros(len(self.masses[0]), len(self.masses[1]))
        rows, columns = self.users
        u, v = self.scaling
        for block, kernel in self.kernel.blocks():
            plan[rows[block, None], columns] = kernel * u[block, None] * v
        if self.fixed is not None:
            plan[self.links] += self.fixed
        return plan

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Sums of the rows (n,) and of the columns (m,) of the plan."""
        n, m = (masses.new_ones(len(masses), 1) for masses in self.masses)
        return self.from_target(m).squeeze(1), self.from_source(n).squeeze(1)

    def transport_to_source(self, values: Tensor) -> Tensor:
        """For each source user the mean of ``values`` (m, k) of target users, weighted by its row of the
        plan, (n, k): pi U^T of the paper with rows that sum to 1. The values take a gradient, the plan none.
        Zeros for a user without mass, which only a plan that has not converged may have.

        Raises:
            ValueError: not one row of ``values`` for each target user.
        """
        return self._mean(values, self.from_target, self.from_source, 1)

    def transport_to_target(self, values: Tensor) -> Tensor:
        """For each target user the mean of ``values`` (n, k) of source users, weighted by its column of the
        plan, (m, k), as ``transport_to_source``."""
        return self._mean(values, self.from_source, self.from_target, 0)

    def best(self) -> tuple[Tensor, Tensor]:
        """The target user (n,) with the most mass from each source user, and the source user (m,) of each
        target user; of equal ones the first."""
        most = [torch.zeros_like(masses) for masses in self.masses]
        found = [torch.zeros_like(masses, dtype=torch.int64) for masses in self.masses]
        rows, columns = self.users
        u, v = self.scaling
        for block, kernel in self.kernel.blocks():
            plan = kernel * u[block, None] * v
            most[0][rows[block]], place = plan.max(1)
            found[0][rows[block]] = columns[place]
            mass, place = plan.max(0)
            more = mass > most[1][columns]
            most[1][columns] = torch.where(more, mass, most[1][columns])
            found[1][columns] = torch.where(more, rows[block][place], found[1][columns])
        if self.fixed is not None:
            for side in (0, 1):
                own, other = self.links[side], self.links[1 - side]
                found[side][own] = torch.where(self.fixed >= most[side][own], other, found[side][own])
        return found[0], found[1]

    def cost(self) -> float:
        """<pi, Q>, in the unit of the scaled costs; linked pairs that guide cost nothing."""
        u, v = self.scaling
        total = 0.0
        with torch.autocast(u.device.type, enabled=False):
            for block, kernel in self.kernel.blocks():
                moved = (kernel * self.kernel.costs.rows(block)) @ v
                total += float((moved * u[block]).double().sum())
        return total

    def linked_mass(self) -> Tensor:
        """(l,): what each linked pair holds, as a share of the most that it may: of the smaller of both
        users' masses."""
        most = torch.minimum(self.masses[0][self.links[0]], self.masses[1][self.links[1]])
        if self.fixed is not None:
            return self.fixed / most
        rows, columns = self.links
        f, g = self.kernel.f[rows], self.kernel.g[columns]
        held = ((f + g - self.kernel.costs.at(rows, columns)) / self.epsilon).exp()
        return held * self.scaling[0][rows] * self.scaling[1][columns] / most

    def _potentials(self, side: int) -> Tensor:
        f = self.kernel.f + self.epsilon * self.scaling[0].log()
        last = f[-1] if len(f) else 0
        own = f - last if side == 0 else self.kernel.g + self.epsilon * self.scaling[1].log() + last
        potentials = torch.zeros_like(self.masses[side])
        potentials[self.users[side]] = own
        return potentials

    def from_target(self, values: Tensor) -> Tensor:
        """pi @ values (m, k), (n, k), without a gradient; values in the dtype of the plan."""
        moved = values.new_zeros(len(self.masses[0]), values.shape[1])
        rows, columns = self.users
        values_here = values[columns] * self.scaling[1][:, None]
        with torch.autocast(values.device.type, enabled=False):
            for block, kernel in self.kernel.blocks():
                moved[rows[block]] = kernel @ values_here * self.scaling[0][block, None]
        if self.fixed is not None:
            moved[self.links[0]] += self.fixed[:, None] * values[self.links[1]]
        return moved

    def from_source(self, values: Tensor) -> Tensor:
        """pi^T @ values (n, k), (m, k), without a gradient; values in the dtype of the plan."""
        rows, columns = self.users
        values_here = values[rows] * self.scaling[0][:, None]
        own = values.new_zeros(len(columns), values.shape[1])
        with torch.autocast(values.device.type, enabled=False):
            for block, kernel in self.kernel.blocks():
                own.addmm_(kernel.T, values_here[block])
        moved = values.new_zeros(len(self.masses[1]), values.shape[1])
        moved[columns] = own * self.scaling[1][:, None]
        if self.fixed is not None:
            moved[self.links[1]] += self.fixed[:, None] * values[self.links[0]]
        return moved

    def _mean(self, values: Tensor, there: Linear, back: Linear, side: int) -> Tensor:
        if values.dim() != 2 or len(values) != len(self.masses[side]):
            raise ValueError(f"values has shape {tuple(values.shape)}; accepted: "
                             f"({len(self.masses[side])}, any), a row for each user they come from")
        values = values.to(self.masses[side].dtype)
        # The sums of the same products, so that weights add up to 1 to the last bits.
        moved = _Transported.apply(torch.cat([values, torch.ones_like(values[:, :1])], 1), there, back)
        return moved[:, :-1] / moved[:, -1:].detach().clamp(min=torch.finfo(moved.dtype).tiny)


class _Transported(torch.autograd.Function):
    """A product with a plan that takes no gradient, by blocks that are not kept for the backward pass."""

    @staticmethod
    def forward(ctx, values: Tensor, there: Linear, back: Linear) -> Tensor:
        ctx.back = back
        return there(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None
