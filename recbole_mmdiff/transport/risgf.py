"""Robust item similarity graph fusion (RISGF): what the graphs of several modalities have in common."""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from recbole_mmdiff.graph.edges import Edges
from recbole_mmdiff.transport._log import SolverLog, ended

#: about so many entries are sorted at once, as a cache holds: time then grows as they do
BLOCK = 2**16


def fuse_graphs(graphs: Sequence[Edges], size: int, mu: float, tolerance: float = 1e-6,
                max_iterations: int = 10_000, present: Tensor | None = None) -> tuple[Edges, SolverLog]:
    """The graph A that minimises, with a Delta_m for each of the M modalities,

        1/M sum_m (1/2 |A + Delta_m - S_m|^2 + mu |Delta_m|_1)    subject to 0 <= A <= 1.

    S_m is 1 at the entries of its graph and 0 elsewhere. Delta (Eq. 4) and A (Eq. 5) take turns, from
    the mean of the S_m, until A stays as it is. Where no graph has an entry, A is 0, and nothing is
    stored. An entry in c of the M graphs goes to

        min(c mu / (M - c), c / M)            for c < M/2, and
        1 - min((M - c) mu / c, (M - c) / M)  for c > M/2,

    which the result misses by less than ``tolerance``. At c = M/2 all of [mu, 1 - mu] is optimal if
    mu < 1/2, and the mean, 1/2, stays. One graph alone stays as it is, and two give their mean, whatever
    mu is. First A moves by mu |M - 2c| / M an iteration, for (M - 1) / (2 mu) of them at most; then the
    distance shrinks to min(c, M - c) / M of itself, less than a half. They cost next to nothing: entries
    that stand in as many graphs share one solution.

    Args:
        graphs: the top z of each modality, with itself, such as ``nearest_neighbours`` gives them; no
            pair twice in a graph. Their values are not used but for their dtype, which is the result's
            (float32 at least). The cosine orders neighbours as Eq. 1, its exponential, does.
        size: N items, 1 or more; rows and columns are below it.
        mu: weight of the modalities' own parts, above 0; in units of an entry.
        tolerance: A stays as it is if no entry moves by more; above 0 and below mu / M, as a move far
            from the end may be no larger than that.
        max_iterations: after these a ``NotConverged`` warns.
        present: (N, M) bool, which item has which modality; None means all. For an entry (i, j) only
            the modalities count that both i and j have: these make its M above.

    Returns:
        The entries of A on the union of the graphs, sorted by row and column; and the log, with the
        largest move of an entry as its error, and for each A the objective with the Delta of Eq. 4.

    Raises:
        ValueError: no graph, a pair outside of the items or twice in a graph, a number out of range, or
            a ``present`` of a wrong shape or without a modality in which an item has an entry.

    Source: SIEOUG, section 3.1, Eqs. 1-5. Ours: the start, which decides where modalities disagree, and
    ``present``, as the paper's items have all modalities. The bounds of Eq. 5 are never reached from
    outside, as all terms of its mean are in [0, 1].
    """
    _check_graphs(graphs, size)
    _check_numbers(size, mu, tolerance, max_iterations, len(graphs))
    if present is not None:
        _check_present(present, graphs, size)
    rows, columns, kind = _entries(graphs, size, present)
    counts = torch.bincount(kind)
    kinds = counts.nonzero().squeeze(1)
    share = (kinds % (len(graphs) + 1)).double() / (kinds // (len(graphs) + 1))
    solution, moves, objectives = _alternate(share, counts[kinds], mu, tolerance, max_iterations)
    dtype = torch.promote_types(graphs[0].values.dtype, torch.float32)
    of_kind = torch.zeros(len(counts), dtype=dtype, device=rows.device)
    of_kind[kinds] = solution.to(dtype)
    log = ended("fuse_graphs", len(moves), moves[-1], tolerance, tuple(objectives))
    return Edges(rows, columns, of_kind[kind]), log


def _entries(graphs: Sequence[Edges], size: int, present: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and kinds of the entries that stand in any graph, sorted by row and column.

    The kind is p (M + 1) + c for an entry in c graphs, in p of which it could stand: entries of one kind
    have the same solution.
    """
    graphs = [_by_row(graph) for graph in graphs]
    total = sum(len(graph.rows) for graph in graphs)
    rows_a_block = max(1, size * BLOCK // max(1, total))
    bounds = torch.arange(0, size + rows_a_block, rows_a_block, device=graphs[0].rows.device)
    starts = [torch.searchsorted(graph.rows, bounds).tolist() for graph in graphs]
    blocks = [_entries_of([Edges(*(part[start[block]:start[block + 1]] for part in graph))
                           for graph, start in zip(graphs, starts, strict=True)], size, present)
              for block in range(len(bounds) - 1)]
    rows, columns, kind = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return rows, columns, kind


def _by_row(graph: Edges) -> Edges:
    """The graph with its rows in order, as ``nearest_neighbours`` has them."""
    rows = graph.rows.contiguous()
    if (rows.diff() >= 0).all():
        return graph._replace(rows=rows)
    order = rows.argsort()
    return Edges(*(part[order] for part in graph))


def _entries_of(graphs: Sequence[Edges], size: int, present: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a block of rows."""
    count = len(graphs)
    keys = torch.cat([(graph.rows * size + graph.columns) * count + number
                      for number, graph in enumerate(graphs)]).sort().values
    twice = keys[1:][keys[1:] == keys[:-1]]
    if len(twice):
        pair, number = divmod(int(twice[0]), count)
        raise ValueError(f"graphs[{number}] has the pair {divmod(pair, size)} twice; accepted: once")
    pairs, held = torch.unique_consecutive(keys // count, return_counts=True)
    rows, columns = pairs // size, pairs % size
    if present is None:
        return rows, columns, held + count * (count + 1)
    compared = sum(has[rows] & has[columns] for has in present.unbind(1))
    return rows, columns, held + compared * (count + 1)


def _alternate(share: Tensor, counts: Tensor, mu: float, tolerance: float, max_iterations: int
               ) -> tuple[Tensor, list[float], list[float]]:
    """Solve for kinds of entries, in float64.

    Args:
        share: (k,) of the modalities that compare an entry, those whose graph holds it.
        counts: (k,) how many entries are of the kind.

    Returns:
        (k,) of A, the largest move of each iteration, and the objective before the first and after each.
    """
    # Modalities whose graph holds the entry, and the others: those of one group have the same Delta.
    target = share.new_tensor([[1.0], [0.0]])
    weight = torch.stack([share, 1 - share])
    fused, moves = share, []
    delta = softshrink(target - fused, mu)
    objectives = [_objective(fused, delta, target, weight, counts, mu)]
    while len(moves) < max_iterations and (not moves or moves[-1] > tolerance):
        before, fused = fused, (weight * (target - delta)).sum(0).clamp(0, 1)
        delta = softshrink(target - fused, mu)
        moves.append(max((fused - before).abs().tolist(), default=0.0))
        objectives.append(_objective(fused, delta, target, weight, counts, mu))
    return fused, moves, objectives


def _objective(fused: Tensor, delta: Tensor, target: Tensor, weight: Tensor, counts: Tensor, mu: float
               ) -> float:
    """Eq. 3 over all entries of all kinds."""
    terms = (fused + delta - target).square() / 2 + mu * delta.abs()
    return float((counts * (weight * terms).sum(0)).sum())


def _check_graphs(graphs: Sequence[Edges], size: int) -> None:
    if not graphs:
        raise ValueError("graphs=[] has no graph; accepted: one at least")
    for number, (rows, columns, _) in enumerate(graphs):
        outside = (rows < 0) | (rows >= size) | (columns < 0) | (columns >= size)
        if outside.any():
            pair = int(rows[outside][0]), int(columns[outside][0])
            raise ValueError(f"graphs[{number}] has the pair {pair}; accepted: items from 0 to {size - 1}")


def _check_numbers(size: int, mu: float, tolerance: float, max_iterations: int, num_graphs: int) -> None:
    if size < 1:
        raise ValueError(f"size={size!r} is too small; accepted: 1 or more")
    if not 0 < mu < inf:
        raise ValueError(f"mu={mu!r} is out of range; accepted: a finite number above 0")
    if not 0 < tolerance < mu / num_graphs:
        raise ValueError(f"tolerance={tolerance!r} is out of range; accepted: above 0 and below "
                         f"mu / {num_graphs} = {mu / num_graphs:g}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations!r} is too small; accepted: 1 or more")


def _check_present(present: Tensor, graphs: Sequence[Edges], size: int) -> None:
    if present.shape != (size, len(graphs)) or present.dtype != torch.bool:
        raise ValueError(f"present is {present.dtype} of shape {tuple(present.shape)}; accepted: torch.bool "
                         f"of shape {(size, len(graphs))}, a row an item and a column a graph")
    for number, (has, graph) in enumerate(zip(present.unbind(1), graphs, strict=True)):
        absent = ~(has[graph.rows] & has[graph.columns])
        if absent.any():
            pair = int(graph.rows[absent][0]), int(graph.columns[absent][0])
            raise ValueError(f"present lacks modality {number} for one of the items {pair}, which its graph "
                             f"joins; accepted: True for all items in graphs[{number}]")
