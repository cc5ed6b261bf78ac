"""The items that users are known to like, held sparsely, and exact draws outside of them."""

import torch
from torch import Tensor


class KnownItems:
    """Known (user, item) pairs as sorted rows: O(pairs) memory, never users x items.

    Args:
        users: (n,) int64 user ids.
        items: (n,) int64 item ids, from 1; pairs may repeat.
        num_users: user ids are below it.
        num_items: item ids are below it; 0 is padding.
    """

    def __init__(self, users: Tensor, items: Tensor, num_users: int, num_items: int):
        self.num_items = num_items
        keys = torch.unique(users * num_items + items)
        self.users = keys // num_items
        self.items = keys % num_items
        self.counts = torch.bincount(self.users, minlength=num_users)
        self.starts = torch.cumsum(self.counts, 0) - self.counts
        rank = torch.arange(len(keys), device=keys.device) - self.starts[self.users]
        # Unknown items in front of each known one, made one sorted key with its user.
        self._gaps = self.users * num_items + (self.items - 1 - rank)

    def to(self, device: torch.device) -> "KnownItems":
        """The same on another device."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def rows(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """All known items of ``users`` (b,): their positions in ``users`` (m,), items (m,)."""
        counts = self.counts[users]
        row = torch.repeat_interleave(torch.arange(len(users), device=users.device), counts)
        first = torch.cumsum(counts, 0) - counts
        offset = torch.arange(len(row), device=users.device) - first[row]
        return row, self.items[self.starts[users][row] + offset]

    def among(self, users: Tensor, candidates: Tensor) -> Tensor:
        """(b, c) bool: which of the ``candidates`` (c,), distinct and sorted, each of ``users`` (b,) knows.
        It looks at what they know, where ``contains`` looks at every pair."""
        row, items = self.rows(users)
        place = torch.searchsorted(candidates, items).clamp(max=len(candidates) - 1)
        found = candidates[place] == items
        mask = torch.zeros(len(users), len(candidates), dtype=torch.bool, device=users.device)
        mask[row[found], place[found]] = True
        return mask

    def contains(self, users: Tensor, items: Tensor) -> Tensor:
        """Whether each pair is known; ``users`` and ``items`` broadcast against each other."""
        keys = users * self.num_items + items
        known = self.users * self.num_items + self.items
        if not len(known):
            return torch.zeros_like(keys, dtype=torch.bool)
        place = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
        return known[place] == keys

    def sample_unknown(self, users: Tensor, uniforms: Tensor) -> Tensor:
        """One item for each uniform number, uniformly among those the user does not know.

        The j-th unknown item is found by counting the known ones before it, so nothing is
        rejected and drawn again.

        Args:
            users: (b,) int64.
            uniforms: (b, k) in [0, 1).

        Returns:
            (b, k) int64 item ids.

        Raises:
            ValueError: a user knows every item.
        """
        free = self.num_items - 1 - self.counts[users]
        if (free <= 0).any():
            user = int(users[free <= 0][0])
            raise ValueError(f"user {user} knows all {self.num_items - 1} items, so there is no "
                             f"negative one")
        nth = (uniforms * free[:, None]).long().clamp(max=free[:, None] - 1)
        before = torch.searchsorted(self._gaps, users[:, None] * self.num_items + nth, right=True)
        return nth + 1 + before - self.starts[users][:, None]
