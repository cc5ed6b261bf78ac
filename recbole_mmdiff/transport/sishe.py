"""SISHE: balanced soft clusters of items out of the graph of those that are alike."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recbole_mmdiff.diffusion.noise import fold_in, keyed_normal, keyed_uniform
from recbole_mmdiff.graph.edges import Edges, to_matrix
from recbole_mmdiff.graph.normalise import mix
from recbole_mmdiff.transport._log import SolverLog, ended
from recbole_mmdiff.transport.balanced import check_count, check_positive, solve

#: the marginals of the result are as exact
MARGINS = 1e-6
#: of the inner problems: larger errors of the marginals would hide which way is down
INNER = {"tolerance": 1e-10, "max_iterations": 200}
#: eta of a start out of distances to centres, in units of their mean
START_ETA = 0.1
#: each eta of an annealing is this share of the last, and gets so many iterations
COOLING, COOLING_ITERATIONS = 0.5, 10
KMEANS_ITERATIONS = 25
#: products with the graph, and vectors beyond the number of clusters, of the spectral embedding
POWERS, EXTRA_VECTORS = 20, 5


class _Descent(NamedTuple):
    """Iterations from one start.

    Attributes:
        gamma: (N, K) float64.
        objectives: before the first iteration and after each.
        error: the share of an item that the last solution of Eq. 7 moved, on the mean.
        margins: the largest error of an inner problem.
    """

    gamma: Tensor
    objectives: list[float]
    error: float
    margins: float


def cluster_items(adjacency: Tensor, num_clusters: int, eta: float = 0.1, features: Tensor | None = None,
                  start: Tensor | None = None, num_starts: int = 4, anneal_from: float | None = None,
                  seed: int = 0, tolerance: float = 1e-5, max_iterations: int = 200
                  ) -> tuple[Tensor, SolverLog]:
    """Soft clusters of equal size that keep together what the graph joins.

    Descends on -1/2 <A gamma, gamma> + eta/2 |gamma|^2 over gamma >= 0 whose rows sum to 1 and whose
    columns sum to N/K, where A is the mean of ``adjacency`` and its transpose. Each iteration solves Eq. 7
    with the cost -A gamma and moves to its solution, or, where a shorter way is lower, as far as is lowest.
    The problem is not convex: the result is a stationary point, the lowest of those from several starts.
    A graph with self-loops of 1 makes it concave along an item where eta < 1, and gamma hard but for few
    items.

    Source: SIEOUG (Liu et al., WWW 2025), section 3.1, Eqs. 6-10, and Algorithm 1. Deviations:
    the objective has half the weight on the graph, which is that whose stationary points the paper's
    iteration finds (Eq. 6's own may rise); the graph is made symmetric, without which -A gamma is no
    gradient; the paper's step, always the whole way, may raise the objective if A is indefinite, and the
    shorter one costs no further product; and the paper's start 1/K is a stationary point, at which nothing
    moves. Starts are k-means clusters of ``features``, or, without them, of a spectral embedding of
    the graph (the leading eigenvectors of D^-1/2 A D^-1/2, rows of unit length), balanced by Eq. 7 with
    the squared distances to the centres as cost.

    Args:
        adjacency: (N, N) sparse CSR, finite and not negative, such as that of RISGF.
        num_clusters: K, from 1 to N.
        eta: weight of the squares, above 0, in units of the adjacency.
        features: (N, d) of any floating type, for the starts; k-means looks at Euclidean distances.
        start: the only start, instead: (N,) int64 clusters, or (N, K) floating; the nearest gamma that
            meets the constraints is taken.
        num_starts: of k-means, each with draws of its own.
        anneal_from: before ``eta``, iterate for this larger one, and for its halves above ``eta``.
        seed: of the starts.
        tolerance: of the error, the mean share of an item, from 0 to 1, that the last solution of Eq. 7
            moved to other clusters. No single item is asked to stay: at a saddle point that one or two
            of 100,000 are about to leave, what rounding leaves of a margin would start them again.
        max_iterations: of each start at ``eta``; each makes one product with the graph and solves Eq. 7.

    Returns:
        gamma (N, K) in the type of ``adjacency``, float32 at least, marginals exact to 1e-6 (of N/K for
        columns), and the log of its start. The objectives of the log are those above, at ``eta``: they do
        not rise but for rounding. For a given ``start``, items in another order give the same gamma in
        that order (ties of the graph aside); the draws of k-means depend on the order.

    Raises:
        ValueError: shapes that do not fit together, entries that are not finite or are negative, or a
            number out of range.
    """
    _check(adjacency, num_clusters, features, start)
    check_positive("eta", eta)
    check_positive("tolerance", tolerance)
    check_count("num_starts", num_starts)
    check_count("max_iterations", max_iterations)
    if anneal_from is not None:
        check_positive("anneal_from", anneal_from)
    best = None
    with torch.no_grad(), torch.autocast(adjacency.device.type, enabled=False):
        graph = _symmetric(adjacency)
        for gamma in _starts(graph, num_clusters, features, start, num_starts, seed):
            for larger in _cooling(anneal_from, eta):
                gamma = _descend(graph, gamma, larger, tolerance, COOLING_ITERATIONS).gamma
            found = _descend(graph, gamma, eta, tolerance, max_iterations)
            if best is None or found.objectives[-1] < best.objectives[-1]:
                best = found
    ended("cluster_items, marginals", len(best.objectives) - 1, best.margins, MARGINS)
    log = ended("cluster_items", len(best.objectives) - 1, best.error, tolerance, tuple(best.objectives))
    return best.gamma.to(torch.promote_types(adjacency.dtype, torch.float32)), log


def _check(adjacency: Tensor, num_clusters: int, features: Tensor | None, start: Tensor | None) -> None:
    n = adjacency.shape[0]
    if adjacency.layout != torch.sparse_csr or tuple(adjacency.shape) != (n, n):
        raise ValueError(f"adjacency is {adjacency.layout} of shape {tuple(adjacency.shape)}; accepted: "
                         f"torch.sparse_csr of shape (N, N)")
    values = adjacency.values()
    if not (values.isfinite() & (values >= 0)).all():
        raise ValueError(f"adjacency has values from {float(values.min())} to {float(values.max())}; "
                         f"accepted: finite values that are not negative")
    check_count("num_clusters", num_clusters)
    if num_clusters > n:
        raise ValueError(f"num_clusters={num_clusters!r} is too large; accepted: up to {n}, the items")
    if features is not None and (features.dim() != 2 or len(features) != n or not features.isfinite().all()):
        raise ValueError(f"features has shape {tuple(features.shape)} and "
                         f"{int((~features.isfinite()).sum())} entries that are not finite; accepted: finite "
                         f"numbers of shape ({n}, any)")
    if start is None:
        return
    clusters = start.dtype == torch.int64 and start.shape == (n,) \
        and ((start >= 0) & (start < num_clusters)).all()
    weights = start.is_floating_point() and start.shape == (n, num_clusters) and start.isfinite().all()
    if not clusters and not weights:
        raise ValueError(f"start is {start.dtype} of shape {tuple(start.shape)}; accepted: torch.int64 of "
                         f"shape ({n},), from 0 to {num_clusters - 1}, or finite floats of shape "
                         f"({n}, {num_clusters})")


def _symmetric(adjacency: Tensor) -> Tensor:
    """The mean of the matrix and its transpose, CSR float64."""
    n, counts = len(adjacency), adjacency.crow_indices().diff()
    rows = torch.arange(n, device=counts.device).repeat_interleave(counts)
    columns, values = adjacency.col_indices().long(), adjacency.values().double()
    both = mix([Edges(rows, columns, values), Edges(columns, rows, values)], [0.5, 0.5], n)
    return to_matrix(both, (n, n))


def _cooling(anneal_from: float | None, eta: float) -> list[float]:
    """Etas above ``eta``, falling."""
    if anneal_from is None or anneal_from <= eta:
        return []
    steps = math.ceil(math.log(eta / anneal_from, COOLING) - 1e-9)
    return [anneal_from * COOLING**step for step in range(steps)]


def _descend(graph: Tensor, gamma: Tensor, eta: float, tolerance: float, max_iterations: int) -> _Descent:
    """Iterations of Eq. 7 from a gamma that meets the constraints."""
    prices, error, margins = None, math.inf, 0.0
    product = graph @ gamma
    objectives = [_objective(product, gamma, eta)]
    while error > tolerance and len(objectives) <= max_iterations:
        found = solve(-product, eta, prices, **INNER)
        prices, margins = found.prices, max(margins, found.error)
        step = found.plan - gamma
        change = graph @ step
        # The objective along the step is a parabola.
        slope = float((step * (eta * gamma - product)).sum())
        curvature = float((step * (eta * step - change)).sum())
        length = 1.0 if curvature <= 0 else min(1.0, max(0.0, -slope / curvature))
        gamma, product = gamma + length * step, product + length * change
        objectives.append(_objective(product, gamma, eta))
        error = float(step.abs().sum()) / (2 * len(step))
    return _Descent(gamma, objectives, error, margins)


def _objective(product: Tensor, gamma: Tensor, eta: float) -> float:
    return float((gamma * (eta * gamma - product)).sum()) / 2


def _starts(graph: Tensor, num_clusters: int, features: Tensor | None, start: Tensor | None,
            num_starts: int, seed: int) -> Iterator[Tensor]:
    """Gammas (N, K) float64 that meet the constraints, one after the other."""
    if start is not None:
        if start.dtype == torch.int64:
            start = torch.nn.functional.one_hot(start, num_clusters)
        # Eq. 7 with eta = 1 is the projection of the negative cost.
        yield solve(-start.double(), 1.0, None, **INNER).plan
        return
    points = _spectral_embedding(graph, num_clusters, seed) if features is None else features.detach()
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    points = points - points.mean(0)
    for number in range(num_starts):
        distances = _distances_to_centres(points, num_clusters, fold_in(seed, number)).double()
        scale = distances.mean()
        yield solve(distances / scale.where(scale > 0, 1), START_ETA, None, **INNER).plan


def _spectral_embedding(graph: Tensor, num_clusters: int, seed: int) -> Tensor:
    """(N, K) leading eigenvectors of D^-1/2 A D^-1/2 by a block power method, rows of length 1 or 0.

    Source: Ng, Jordan and Weiss, On Spectral Clustering, NIPS 2001; Halko, Martinsson and Tropp, Finding
    Structure with Randomness, SIAM Review 2011.
    """
    n = len(graph)
    items = torch.arange(n, device=graph.device)
    degrees = graph @ torch.ones(n, 1, dtype=graph.dtype, device=graph.device)
    scale = degrees.where(degrees > 0, 1).rsqrt()
    vectors = keyed_normal(items, min(n, num_clusters + EXTRA_VECTORS), seed, torch.float64)
    for _ in range(POWERS):
        # The identity makes all eigenvalues positive, or those near -1 would lead as well.
        vectors = torch.linalg.qr(vectors + scale * (graph @ (scale * vectors))).Q
    small = vectors.T @ (scale * (graph @ (scale * vectors)))
    leading = vectors @ torch.linalg.eigh((small + small.T) / 2).eigenvectors[:, -num_clusters:]
    lengths = torch.linalg.vector_norm(leading, dim=1, keepdim=True)
    return leading / lengths.where(lengths > 0, 1)


def _distances_to_centres(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """(N, K) squared distances to the centres of k-means.

    Source: Arthur and Vassilvitskii, k-means++, SODA 2007: the next centre is drawn in proportion to the
    squared distance to those before; then Lloyd's iterations. A cluster that loses all its points keeps
    its centre.
    """
    items = torch.arange(len(points), device=points.device)
    lengths = points.square().sum(1, keepdim=True)
    nearest, chosen = torch.ones_like(lengths[:, 0]), []
    for number in range(num_clusters):
        # The first of exponential clocks rings in proportion to the rates.
        clocks = -(1 - keyed_uniform(items, 1, fold_in(seed, number), torch.float64)[:, 0]).log()
        chosen.append((clocks / nearest).nan_to_num(nan=math.inf).argmin())
        to_new = _squared_distances(points, lengths, points[chosen[-1]][None])[:, 0]
        nearest = to_new if number == 0 else torch.minimum(nearest, to_new)
    centres, before = points[torch.stack(chosen)], None
    for _ in range(KMEANS_ITERATIONS):
        clusters = _squared_distances(points, lengths, centres).argmin(1)
        if before is not None and torch.equal(clusters, before):
            break
        before = clusters
        members = torch.nn.functional.one_hot(clusters, num_clusters).to(points.dtype)
        sizes = members.sum(0)[:, None]
        centres = (members.T @ points / sizes.clamp(min=1)).where(sizes > 0, centres)
    return _squared_distances(points, lengths, centres)


def _squared_distances(points: Tensor, lengths: Tensor, centres: Tensor) -> Tensor:
    """(N, k); ``lengths`` (N, 1) are the squares of those of the points."""
    return (lengths + centres.square().sum(1) - 2 * points @ centres.T).clamp_(min=0)
