"""Overlapped user guidance: users are drawn to those whom they are matched with (SIEOUG, section 3.3)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_mmdiff.errors import at_least, one_of, share
from recbole_mmdiff.model.base import take
from recbole_mmdiff.model.user_matching import Halves, Partners, UserMatching, shared_places

#: whose loss it is
GUIDED = ("all", "linked")


class UserGuidance(nn.Module):
    """The contrastive loss between users and those that they are matched with in the other domain.

    Args:
        matcher: says who is matched with whom.
        num_linked: the ids of linked users are 1 .. num_linked in both domains.
        temperature: of the cosines.
        linked_share: see ``halves``.
        guided: ``all`` users are drawn to whom they are matched with, or the ``linked`` ones alone.

    Attributes:
        linked_counts: linked users that stood in both halves, of each batch since it was emptied.

    Raises:
        ConfigError: a value that is not accepted.
    """

    def __init__(self, matcher: UserMatching, num_linked: int, temperature: float, linked_share: float,
                 guided: str):
        super().__init__()
        at_least("guidance_temperature", temperature, 1e-6)
        share("linked_share", linked_share)
        self.guided = one_of("guided_users", guided, GUIDED)
        self.matcher, self.num_linked = matcher, num_linked
        self.temperature, self.linked_share = temperature, linked_share
        self.linked_counts: list[int] = []

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

    def forward(self, users: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor]) -> Tensor:
        """L_C (Eq. 23), a scalar: the mean over the guided users of the source, and over those of the target.

        Args:
            users: source ids (n,) and target ids (m,), distinct and sorted.
            tables: vectors (n_users, d) of all users of the source, and of the target.
        """
        vectors = tuple(functional.normalize(take(table, ids), dim=-1)
                        for table, ids in zip(tables, users, strict=True))
        halves = Halves(users, vectors, shared_places(*users, self.num_linked))
        self.linked_counts.append(len(halves.links[0]))
        source, target = self.matcher(halves, tables)
        similarity = vectors[0] @ vectors[1].T / self.temperature
        return self._one_way(source, similarity, vectors[0], halves.links) \
            + self._one_way(target, similarity.T, vectors[1], halves.links[::-1])

    def _one_way(self, partners: Partners, similarity: Tensor, own: Tensor,
                 links: tuple[Tensor, Tensor]) -> Tensor:
        """Users (n,) against their partners. Negatives are the other half's users (m,) but for the linked one
        and the most probable one."""
        positive = functional.cosine_similarity(own, partners.vectors, dim=-1) / self.temperature
        n, m = similarity.shape
        left_out = torch.zeros(n, m + 1, dtype=torch.bool, device=similarity.device)
        left_out[links] = True
        left_out = left_out.scatter_(1, partners.nearest[:, None], True)[:, :m]
        negatives = similarity.masked_fill(left_out, torch.finfo(similarity.dtype).min).logsumexp(1)
        # A user without a partner, or without negatives, has nothing to say.
        counts = partners.exist & ~left_out.all(1)
        if self.guided == "linked":
            counts &= torch.zeros_like(counts).index_fill_(0, links[0], True)
        losses = torch.where(counts, negatives - positive, 0)
        return losses.sum() / counts.sum().clamp(min=1)
