"""Costs of pairs of users by factors, and kernels of transport plans by blocks of rows."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold_

COST_SCALES = ("unit", "mean", "none")
#: of the exponent range of a dtype; products of what is left with scalings of 1e-5 to 1e5 are no subnormal
#: numbers, which processors multiply many times slower
KEPT_RANGE = 0.72


class Costs(NamedTuple):
    """Q_ij = row_i + column_j - <left_i, right_j>, but zero where j is the partner of i.

    Attributes:
        left: (n, d).
        right: (m, d).
        row: (n,).
        column: (m,).
        partner: (n,) int64 columns, -1 for none; None if nobody has one.
    """

    left: Tensor
    right: Tensor
    row: Tensor
    column: Tensor
    partner: Tensor | None = None

    def of_rows(self, rows: Tensor) -> "Costs":
        """Those of some rows (r,)."""
        return Costs(self.left[rows], self.right, self.row[rows], self.column,
                     None if self.partner is None else self.partner[rows])

    def transposed(self) -> "Costs":
        """(m, n)."""
        partner = None
        if self.partner is not None:
            rows = (self.partner >= 0).nonzero().squeeze(1)
            partner = self.partner.new_full((len(self.column),), -1).index_copy(0, self.partner[rows], rows)
        return Costs(self.right, self.left, self.column, self.row, partner)

    def rows(self, block: slice) -> Tensor:
        """Q of a block of rows, (b, m)."""
        with torch.autocast(self.row.device.type, enabled=False):
            costs = self.row[block, None] + self.column - self.left[block] @ self.right.T
        return self._where_partner(costs, block, torch.zeros_like(self.row[block]))

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Q of single pairs, (l,)."""
        costs = self.row[rows] + self.column[columns] - (self.left[rows] * self.right[columns]).sum(1)
        return costs if self.partner is None else costs.masked_fill(self.partner[rows] == columns, 0)

    def exponents(self, block: slice, f: Tensor, g: Tensor, epsilon: float,
                  out: Tensor | None = None) -> Tensor:
        """(f_i + g_j - Q_ij) / epsilon of a block of rows, (b, m), by one matrix product."""
        row = ((f - self.row)[block] / epsilon)[:, None]
        left = torch.cat([self.left[block] / epsilon, row, torch.ones_like(row)], 1)
        column = ((g - self.column) / epsilon)[:, None]
        right = torch.cat([self.right, torch.ones_like(column), column], 1)
        with torch.autocast(self.row.device.type, enabled=False):
            made = torch.mm(left, right.T, out=out)
        if self.partner is None:
            return made
        return self._where_partner(made, block, (f[block] + g[self.partner[block]]) / epsilon)

    def _where_partner(self, matrix: Tensor, block: slice, values: Tensor) -> Tensor:
        """``matrix`` (b, m), which is changed, with ``values`` (b,) where a row has its partner."""
        if self.partner is None:
            return matrix
        partner = self.partner[block, None]
        place = partner.clamp(min=0)
        values = torch.where(partner < 0, matrix.gather(1, place), values[:, None])
        return matrix.scatter_(1, place, values)


def user_costs(source: Tensor, target: Tensor, cost_scale: str, partner: Tensor | None = None) -> Costs:
    """Squared distances of all source users from all target users, scaled.

    Args:
        source: (n, d).
        target: (m, d).
        cost_scale: "unit" takes vectors at length 1 (a vector of zeros stays), "mean" divides the distances
            by their mean over all pairs (unless that is zero), "none" leaves them.
        partner: as in ``Costs``.

    Returns:
        The costs, in the dtype of the vectors, at least float32, without a gradient.

    Raises:
        ValueError: vectors of different lengths, none, of whole numbers, or not finite; an unknown scale.

    Source: SIEOUG, section 3.3, Eq. 17. Deviation: the scales; at the start of a training distances are
    far below the epsilon of the paper, and every plan would be uniform.
    """
    _check_vectors(source, target)
    if cost_scale not in COST_SCALES:
        raise ValueError(f"cost_scale={cost_scale!r}; accepted: {', '.join(COST_SCALES)}")
    dtype = torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)
    source, target = source.detach().to(dtype), target.detach().to(dtype)
    if cost_scale == "unit":
        source, target = unit(source), unit(target)
    # Distances do not change, but the terms that cancel out in them become small.
    middle = (source.mean(0) + target.mean(0)) / 2
    source, target = source - middle, target - middle
    row, column = source.square().sum(1), target.square().sum(1)
    scale = torch.ones((), dtype=dtype, device=source.device)
    if cost_scale == "mean":
        mean = row.mean() + column.mean() - 2 * source.mean(0) @ target.mean(0)
        scale = torch.where(mean > 0, mean, scale)
    return Costs(2 * source / scale, target, row / scale, column / scale, partner)


def unit(vectors: Tensor) -> Tensor:
    """Vectors (n, d) at length 1; zeros stay."""
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.masked_fill(lengths == 0, torch.inf)


def _check_vectors(source: Tensor, target: Tensor) -> None:
    for name, vectors in (("source", source), ("target", target)):
        if vectors.dim() != 2 or not vectors.numel() or not vectors.is_floating_point():
            raise ValueError(f"{name} is {vectors.dtype} of shape {tuple(vectors.shape)}; accepted: "
                             f"floating-point (users, d), neither of them zero")
        lengths = torch.linalg.vector_norm(vectors.detach().double(), dim=1)
        if not lengths.isfinite().all():
            bad = int((~lengths.isfinite()).nonzero()[0])
            raise ValueError(f"{name} has a row {bad} of length {float(lengths[bad])}; accepted: rows of "
                             f"finite length")
    if source.shape[1] != target.shape[1]:
        raise ValueError(f"target has vectors of length {target.shape[1]}; accepted: {source.shape[1]}, "
                         f"that of source")


class Kernel:
    """K_ij = exp((f_i + g_j - Q_ij) / epsilon) by blocks of rows. A single block is kept, of more each is
    made anew, to the same bits, whenever it is needed. Entries below 5e-28 (float32) count as zero.

    Attributes:
        costs: (n, m).
        epsilon: in the unit of the costs.
        f: (n,) potentials of the rows, in that unit.
        g: (m,) potentials of the columns.
        block_elements: how many entries are held at once (at least one row).
    """

    def __init__(self, costs: Costs, epsilon: float, f: Tensor, g: Tensor, block_elements: int):
        self.costs, self.epsilon, self.f, self.g = costs, epsilon, f, g
        self.block_elements = block_elements
        self._kept: Tensor | None = None

    def moved(self, f: Tensor, g: Tensor) -> "Kernel":
        """The same with other potentials."""
        return Kernel(self.costs, self.epsilon, f, g, self.block_elements)

    def of_rows(self, rows: Tensor) -> "Kernel":
        """That of some rows (r,)."""
        return Kernel(self.costs.of_rows(rows), self.epsilon, self.f[rows], self.g, self.block_elements)

    def transposed(self) -> "Kernel":
        """K^T (m, n)."""
        return Kernel(self.costs.transposed(), self.epsilon, self.g, self.f, self.block_elements)

    def exponents(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of log K (b, m); each is overwritten by the next, and may be changed."""
        n, m = len(self.f), len(self.g)
        step = max(1, self.block_elements // max(1, m))
        buffer = self.f.new_empty(min(n, step), m)
        for start in range(0, n, step):
            block = slice(start, min(n, start + step))
            yield block, self.costs.exponents(block, self.f, self.g, self.epsilon,
                                              buffer[:block.stop - start])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of K (b, m), not to be changed; each is overwritten by the next."""
        if self._kept is not None:
            yield slice(0, len(self.f)), self._kept
            return
        least = KEPT_RANGE * math.log(torch.finfo(self.f.dtype).tiny)
        for block, exponents in self.exponents():
            made = threshold_(exponents, least, -torch.inf).exp_()
            if len(made) == len(self.f):
                self._kept = made
            yield block, made

    def row_logsums(self) -> Tensor:
        """log sum_j K_ij, (n,)."""
        sums = torch.empty_like(self.f)
        for block, exponents in self.exponents():
            sums[block] = exponents.logsumexp(1)
        return sums

    def column_maxima(self) -> Tensor:
        """max_i log K_ij, (m,)."""
        largest = torch.full_like(self.g, -torch.inf)
        for _, exponents in self.exponents():
            largest = torch.maximum(largest, exponents.amax(0))
        return largest

    def column_logsums(self) -> Tensor:
        """log sum_i K_ij, (m,)."""
        sums = torch.full_like(self.g, -torch.inf)
        for _, exponents in self.exponents():
            sums = torch.logaddexp(sums, exponents.logsumexp(0))
        return sums
