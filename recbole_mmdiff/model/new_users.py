"""What users outside of the training rated in the source domain."""

from typing import NamedTuple

import torch
from torch import Tensor


class SourceRows(NamedTuple):
    """Ratings of source items by users without an id.

    Attributes:
        user: (n,) int64 places of the users, from 0, sorted.
        item: (n,) int64 ids of source items, from 1.
        rating: (n,) float32; None where the source domain has no ratings.
        count: users; each has a row.
    """

    user: Tensor
    item: Tensor
    rating: Tensor | None
    count: int

    def to(self, device: torch.device) -> "SourceRows":
        """The same on another device."""
        rating = None if self.rating is None else self.rating.to(device)
        return SourceRows(self.user.to(device), self.item.to(device), rating, self.count)

    def of_users(self, places: Tensor) -> "SourceRows":
        """The rows of the users at ``places`` (b,), which follow each other; they are 0, 1 ... there."""
        part = self.where((self.user >= places[0]) & (self.user <= places[-1]))
        return part._replace(user=part.user - places[0], count=len(places))

    def where(self, kept: Tensor) -> "SourceRows":
        """The rows of a mask (n,), of as many users."""
        rating = None if self.rating is None else self.rating[kept]
        return SourceRows(self.user[kept], self.item[kept], rating, self.count)

    def positive(self, threshold: float) -> "SourceRows":
        """The rows rated from ``threshold`` up; all where there are no ratings."""
        return self if self.rating is None else self.where(self.rating >= threshold)
