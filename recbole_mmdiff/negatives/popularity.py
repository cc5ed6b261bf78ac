"""Negatives drawn by popularity, exactly and without rejection."""

import math

import torch
from torch import Tensor

from recbole_mmdiff.negatives._checks import check_rows, check_shape, nth_of
from recbole_mmdiff.negatives.known import KnownItems

#: all masses of all users together stay below it, in int64
_MASS_LIMIT = 2**62


class PopularityNegatives:
    """Items in proportion to a power of their counts, among those that a user does not know.

    The counts of word2vec's noise distribution (Mikolov et al. 2013, section 2.2) have the exponent
    0.75; with 0 the law is uniform over the items with a count above 0.

    A user's masses, without those of known items, lie side by side on a line; a uniform number is a
    point of it. So nothing is rejected and drawn again. The masses are whole numbers, with sums up to
    2^52 (less above 1,024 users, so that users x sum stays below 2^62): sums are exact and no rounding
    lets a known item in.

    Args:
        known: the pairs to draw outside of.
        counts: (num_items,) int or float, at least 0; ``counts[0]``, the padding, is ignored.
        exponent: of the counts.

    Raises:
        ValueError: ``counts`` has another shape, negative or non-finite values, or ``exponent`` is not
            finite.
    """

    def __init__(self, known: KnownItems, counts: Tensor, exponent: float):
        check_shape("counts", counts, (known.num_items,))
        if not (torch.isfinite(counts) & (counts >= 0)).all():
            raise ValueError(f"counts has values from {counts.min().item()} to {counts.max().item()}; "
                             f"accepted: finite ones of at least 0")
        if not math.isfinite(exponent):
            raise ValueError(f"exponent={exponent!r} must be finite")
        self.known = known
        masses = _whole_masses(counts, exponent, min(2**52, _MASS_LIMIT // max(1, len(known.counts))))
        self._cumulative = masses.cumsum(0)
        # Of all users' known items one after the other, so that a difference is the mass between.
        of_known = masses[known.items]
        self._known_before = torch.cat([of_known.new_zeros(1), of_known.cumsum(0)])
        start = known.starts
        self._free = self._cumulative[-1] - (self._known_before[start + known.counts]
                                             - self._known_before[start])
        within = self._known_before[:-1] - self._known_before[start[known.users]]
        # Unknown mass in front of each known item, made one sorted key with its user.
        self._stride = int(self._cumulative[-1]) + 1
        self._gaps = known.users * self._stride + self._cumulative[known.items] - of_known - within

    def to(self, device: torch.device) -> "PopularityNegatives":
        """The same on another device, with its known pairs."""
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, KnownItems)):
                setattr(self, name, value.to(device))
        return self

    def draw(self, users: Tensor, uniforms: Tensor) -> Tensor:
        """One unknown item for each uniform number.

        A user who knows every item with a count above 0 gets uniform unknown items.

        Args:
            users: (b,) int64.
            uniforms: (b, k) in [0, 1).

        Returns:
            (b, k) int64 item ids.

        Raises:
            ValueError: a user knows every item, or ``uniforms`` has another shape.
        """
        check_rows("uniforms", uniforms, len(users), "user")
        free = self._free[users]
        point = nth_of(uniforms, free[:, None])
        place = torch.searchsorted(self._gaps, users[:, None] * self._stride + point, right=True)
        skipped = self._known_before[place] - self._known_before[self.known.starts[users]][:, None]
        drawn = torch.searchsorted(self._cumulative, point + skipped, right=True)
        massless = free == 0
        if massless.any():
            drawn[massless] = self.known.sample_unknown(users[massless], uniforms[massless])
        return drawn


def _whole_masses(counts: Tensor, exponent: float, limit: int) -> Tensor:
    """Masses in proportion to ``counts ** exponent`` (num_items,) int64 with a sum of about ``limit``;
    0 where the count is 0, at least 1 elsewhere."""
    positive = counts > 0
    positive[0] = False
    logs = exponent * counts.double().clamp(min=torch.finfo(torch.float64).tiny).log()
    shares = torch.softmax(logs.masked_fill(~positive, -math.inf), 0).nan_to_num(0.0)
    return (shares * limit).round().long().clamp(min=1).masked_fill(~positive, 0)
