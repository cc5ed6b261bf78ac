"""Which users of two domains are matched with whom (SIEOUG, section 3.3, and its ablations)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.errors import ConfigError, at_least, one_of
from recbole_mmdiff.model.base import take
from recbole_mmdiff.transport import COST_SCALES, GUIDANCE, Matching, fused_gromov, match_users

#: how users are matched: the paper's, and its ablations O, M and G
MATCHINGS = ("transport", "none", "links", "gromov")
#: who is matched at once
SCOPES = ("batch", "epoch")


class Halves(NamedTuple):
    """The users of a batch: ids and vectors of each domain, and the linked users that stand in both.

    Attributes:
        users: source ids (n,), target ids (m,), each distinct and sorted.
        vectors: (n, d) and (m, d), at length 1.
        links: places (l,) among the source ids, and (l,) among the target ids, of the same users.
    """

    users: tuple[Tensor, Tensor]
    vectors: tuple[Tensor, Tensor]
    links: tuple[Tensor, Tensor]


class Partners(NamedTuple):
    """Whom the users (n,) of one half are matched with.

    Attributes:
        vectors: (n, d) the mean of the partners' vectors, weighted by the plan.
        nearest: (n,) place of the most probable partner among the m users of the other half; m if there is
            none.
        exist: (n,) bool, False for a user without a partner.
    """

    vectors: Tensor
    nearest: Tensor
    exist: Tensor


class UserMatching(nn.Module):
    """The partners of a batch's users.

    ``matching``: ``transport``, GOUM (Eqs. 17 to 22) with the key ``guidance``; ``links``, a linked user's
    partner alone (SIEOUG-M); ``gromov``, fused Gromov-Wasserstein without guidance (SIEOUG-G); ``none``
    (SIEOUG-O). ``scope``: ``batch`` matches the users of each batch with one another; ``epoch`` matches all
    users with training rows once, before each epoch, and partners are of the whole other domain.

    Args:
        num_users: ids of source users are below it.
        matching, scope: see above.
        guidance, epsilon, cost_scale, tolerance: as in ``match_users``.

    Raises:
        ConfigError: a value that is not accepted.
    """

    def __init__(self, num_users: int, *, matching: str, scope: str, guidance: str, epsilon: float,
                 cost_scale: str, tolerance: float):
        super().__init__()
        self.matching = one_of("matching", matching, MATCHINGS)
        self.scope = one_of("matching_scope", scope, SCOPES)
        if scope == "epoch" and matching in ("links", "gromov"):
            raise ConfigError(f"matching_scope: epoch is for matching: transport, but matching is "
                              f"{matching!r}; leave matching_scope at batch")
        self.guidance = one_of("guidance", guidance, GUIDANCE)
        self.cost_scale = one_of("cost_scale", cost_scale, COST_SCALES)
        for key, value in (("epsilon", epsilon), ("matching_tolerance", tolerance)):
            at_least(key, value, 1e-6)
        self.epsilon, self.tolerance = epsilon, tolerance
        # Where the next matching of a user starts; saved, so that a resumed run goes on alike.
        self.register_buffer("omega", torch.zeros(num_users))
        self.register_buffer("matched_before", torch.zeros(num_users, dtype=torch.bool))
        self._whole: tuple[_Whole, _Whole] | None = None

    def forward(self, halves: Halves, tables: tuple[Tensor, Tensor]) -> tuple[Partners, Partners]:
        """The partners of the source half, and of the target half; ``tables`` are the vectors (n_users, d)
        of all users of each domain."""
        if self.scope == "batch":
            plan = self.plan(halves)
            return _partners(plan, halves.vectors[1]), _partners(plan.T, halves.vectors[0])
        return tuple(self._whole[side].partners(halves.users[side], halves.users[1 - side], tables[1 - side])
                     for side in (0, 1))

    def match_all(self, users: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor],
                  num_linked: int) -> None:
        """Match all source ``users`` (n,) with all target users (m,), sorted ids; ids up to ``num_linked``
        are of both domains."""
        vectors = tuple(functional.normalize(table[ids], dim=-1)
                        for table, ids in zip(tables, users, strict=True))
        matching = self._transported(Halves(users, vectors, shared_places(*users, num_linked)))
        best = matching.best()
        self._whole = (_Whole(matching, *users, best[0]),
                       _Whole(matching.transposed(), *users[::-1], best[1]))

    def plan(self, halves: Halves) -> Tensor:
        """pi (n, m), without a gradient; its rows and columns need not sum to anything."""
        if self.matching == "links":
            plan = halves.vectors[0].new_zeros(len(halves.users[0]), len(halves.users[1]))
            plan[halves.links] = 1
            return plan
        if self.matching == "gromov":
            return fused_gromov(*halves.vectors, self.epsilon, tolerance=self.tolerance)[0].dense()
        return self._transported(halves).dense()

    def _transported(self, halves: Halves) -> Matching:
        users = halves.users[0]
        # A start that some have no part in is worse than none, which begins with larger epsilons.
        start = self.omega[users] if self.matched_before[users].all() else None
        matching, _ = match_users(*halves.vectors, self.epsilon, links=halves.links, guidance=self.guidance,
                                  cost_scale=self.cost_scale, start=start, tolerance=self.tolerance)
        free, omega = matching.users[0], torch.zeros_like(matching.omega)
        # Those of several batches differ by a constant.
        omega[free] = matching.omega[free] - matching.omega[free].mean()
        self.omega[users], self.matched_before[users] = omega.to(self.omega.dtype), True
        return matching


class _Whole(NamedTuple):
    """The plan of all users, from one side.

    Attributes:
        matching: (n, m).
        own, others: (n,) and (m,) sorted ids.
        best: (n,) row of the most probable partner among the others.
    """

    matching: Matching
    own: Tensor
    others: Tensor
    best: Tensor

    def partners(self, users: Tensor, half: Tensor, table: Tensor) -> Partners:
        """Of ``users`` (k,), in a batch with ``half`` (m,) of the other domain, whose vectors ``table``
        (n_users, d) holds."""
        rows = torch.searchsorted(self.own, users)
        values = functional.normalize(take(table, self.others), dim=-1)
        nearest = self.others[self.best[rows]]
        place = torch.searchsorted(half, nearest).clamp(max=len(half) - 1)
        return Partners(self.matching.of_source(rows).transport_to_source(values),
                        torch.where(half[place] == nearest, place, len(half)), torch.ones_like(rows).bool())


def shared_places(source: Tensor, target: Tensor, num_linked: int) -> tuple[Tensor, Tensor]:
    """Places of the linked users, ids up to ``num_linked``, that stand in both of two sorted lists."""
    linked = source[(source <= num_linked) & torch.isin(source, target)]
    return torch.searchsorted(source, linked), torch.searchsorted(target, linked)


def _partners(plan: Tensor, others: Tensor) -> Partners:
    """By a plan (n, m) with the users of the other half, whose vectors are ``others`` (m, d)."""
    mass = plan.sum(1, keepdim=True)
    # Half precision has no numbers as small as those of a plan.
    with torch.autocast(plan.device.type, enabled=False):
        dtype = torch.promote_types(plan.dtype, others.dtype)
        matched = plan.to(dtype) @ others.to(dtype) / mass.where(mass > 0, 1)
    exist = mass[:, 0] > 0
    return Partners(matched, torch.where(exist, plan.argmax(1), plan.shape[1]), exist)
