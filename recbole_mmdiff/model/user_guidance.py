"""Overlapped user guidance: the users of two domains matched, and drawn together (SIEOUG, section 3.3)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.errors import at_least, one_of, share
from recbole_mmdiff.transport import COST_SCALES, GUIDANCE, fused_gromov, match_users

#: how users are matched: the paper's, and its ablations O, M and G
MATCHINGS = ("transport", "none", "links", "gromov")


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


class UserGuidance(nn.Module):
    """The contrastive loss between users and those that they are matched with in the other domain.

    ``matching``: ``transport``, GOUM (Eqs. 17 to 22) with the key ``guidance``; ``links``, a linked user's
    partner alone (SIEOUG-M); ``gromov``, fused Gromov-Wasserstein without guidance (SIEOUG-G); ``none``
    (SIEOUG-O).

    Args:
        num_linked: the ids of linked users are 1 .. num_linked in both domains.
        num_users: ids of source users are below it.
        matching: see above.
        guidance, epsilon, cost_scale: as in ``match_users``.
        temperature: of the cosines.
        linked_share: see ``halves``.

    Raises:
        ConfigError: a value that is not accepted.
    """

    def __init__(self, num_linked: int, num_users: int, *, matching: str, guidance: str, epsilon: float,
                 cost_scale: str, temperature: float, linked_share: float):
        super().__init__()
        self.matching = one_of("matching", matching, MATCHINGS)
        self.guidance = one_of("guidance", guidance, GUIDANCE)
        self.cost_scale = one_of("cost_scale", cost_scale, COST_SCALES)
        for key, value in (("epsilon", epsilon), ("temperature", temperature)):
            at_least(key, value, 1e-6)
        share("linked_share", linked_share)
        self.epsilon, self.temperature, self.linked_share = epsilon, temperature, linked_share
        self.num_linked = num_linked
        # Where the next matching of a user starts; saved, so that a resumed run goes on alike.
        self.register_buffer("omega", torch.zeros(num_users))
        self.register_buffer("matched_before", torch.zeros(num_users, dtype=torch.bool))

    def halves(self, source: Tensor, target: Tensor, uniforms: Tensor,
               has_rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The ids of a batch's users in either domain, each distinct: its own, and a share of the linked
        users of the other half, or chance would bring hardly any linked user into both.

        Args:
            source, target: (b,) and (c,) ids of a batch's rows.
            uniforms: (num_linked + 1,) in [0, 1): a linked user with less than ``linked_share`` is in both.
            has_rows: by id, who has training rows in the source, and in the target. Nobody else joins:
                the vectors of the others are not learned there.
        """
        def joining(users: Tensor, known: Tensor) -> Tensor:
            linked = users[users <= self.num_linked]
            return linked[(uniforms[linked] < self.linked_share) & known[linked]]

        return (torch.unique(torch.cat([source, joining(target, has_rows[0])])),
                torch.unique(torch.cat([target, joining(source, has_rows[1])])))

    def links(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the linked users that stand in both of two sorted lists of ids."""
        linked = source[(source <= self.num_linked) & torch.isin(source, target)]
        return torch.searchsorted(source, linked), torch.searchsorted(target, linked)

    def forward(self, users: tuple[Tensor, Tensor], vectors: tuple[Tensor, Tensor]) -> Tensor:
        """L_C (Eq. 23), a scalar: the mean over the users of the source, and over those of the target.

        Args:
            users: source ids (n,) and target ids (m,), distinct and sorted.
            vectors: (n, d) and (m, d).
        """
        halves = Halves(users, tuple(functional.normalize(part, dim=-1) for part in vectors),
                        self.links(*users))
        plan = self.plan(halves)
        similarity = halves.vectors[0] @ halves.vectors[1].T / self.temperature
        return self._one_way(plan, similarity, halves.vectors, halves.links) \
            + self._one_way(plan.T.contiguous(), similarity.T, halves.vectors[::-1], halves.links[::-1])

    def plan(self, halves: Halves) -> Tensor:
        """pi (n, m), without a gradient; its rows and columns need not sum to anything."""
        if self.matching == "links":
            plan = torch.zeros(len(halves.users[0]), len(halves.users[1]), device=halves.users[0].device)
            plan[halves.links] = 1
            return plan
        vectors = tuple(part.detach() for part in halves.vectors)
        if self.matching == "gromov":
            return fused_gromov(*vectors, self.epsilon)[0].dense()
        users = halves.users[0]
        # A start that some have no part in is worse than none, which begins with larger epsilons.
        start = self.omega[users] if self.matched_before[users].all() else None
        matching, _ = match_users(*vectors, self.epsilon, links=halves.links, guidance=self.guidance,
                                  cost_scale=self.cost_scale, start=start)
        free, omega = matching.users[0], torch.zeros_like(matching.omega)
        # Those of several batches differ by a constant.
        omega[free] = matching.omega[free] - matching.omega[free].mean()
        self.omega[users], self.matched_before[users] = omega.to(self.omega.dtype), True
        return matching.dense()

    def _one_way(self, plan: Tensor, similarity: Tensor, vectors: tuple[Tensor, Tensor],
                 links: tuple[Tensor, Tensor]) -> Tensor:
        """Users (n,) against what they are matched with: the mean of their partners' vectors, weighted by
        the plan. Negatives are the others' users but for the linked one and the most probable one."""
        own, others = vectors
        mass = plan.sum(1, keepdim=True)
        # Half precision has no numbers as small as those of a plan.
        with torch.autocast(plan.device.type, enabled=False):
            dtype = torch.promote_types(plan.dtype, others.dtype)
            matched = (plan / mass.where(mass > 0, 1)).to(dtype) @ others.to(dtype)
        positive = functional.cosine_similarity(own, matched, dim=-1) / self.temperature
        left_out = torch.zeros_like(plan, dtype=torch.bool)
        left_out[links] = True
        left_out.scatter_(1, plan.argmax(1, keepdim=True), True)
        negatives = similarity.masked_fill(left_out, torch.finfo(similarity.dtype).min).logsumexp(1)
        # A user without a partner, or without negatives, has nothing to say.
        counts = (mass[:, 0] > 0) & ~left_out.all(1)
        losses = torch.where(counts, negatives - positive, 0)
        return losses.sum() / counts.sum().clamp(min=1)
