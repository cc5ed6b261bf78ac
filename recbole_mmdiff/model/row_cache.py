"""Vectors that are computed once for each id, however often and in whatever chunks they are asked for."""

from collections.abc import Callable

import torch
from torch import Tensor


class RowCache:
    """Rows of a table (count, k), computed when they are first asked for.

    Args:
        compute: ids (b,), sorted and distinct, to rows (b, k); called without gradient.
        count: ids are below it.
        chunk: ids that are computed at once: bounds the memory of ``compute``.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], count: int, chunk: int):
        self.compute, self.count, self.chunk = compute, count, chunk
        self.clear()

    def clear(self) -> None:
        """Forget all rows: what they were computed from has changed."""
        self.known: Tensor | None = None
        self.table: Tensor | None = None

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Rows (b, k) of ids (b,)."""
        if self.known is None:
            self.known = torch.zeros(self.count, dtype=torch.bool, device=ids.device)
        missing = torch.unique(ids[~self.known[ids]])
        # The split of nothing is one empty part, which tells how wide the table is.
        if len(missing) or self.table is None:
            for part in missing.split(self.chunk):
                self._fill(part)
        return self.table[ids]

    def _fill(self, ids: Tensor) -> None:
        with torch.autocast(ids.device.type, enabled=False):     # Whoever asks first: one type.
            rows = self.compute(ids)
        if self.table is None:
            self.table = rows.new_zeros(self.count, rows.shape[1])
        self.table[ids] = rows
        self.known[ids] = True
