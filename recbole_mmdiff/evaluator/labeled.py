"""Ranking of each user's own test items with graded gains (MuSiC's Table 2)."""

import numpy as np

from recbole_mmdiff.errors import one_of

GAINS = {"exponential": lambda rating: np.exp2(rating) - 1, "linear": lambda rating: rating}


def labeled_ndcg(user: np.ndarray, score: np.ndarray, rating: np.ndarray, topk: list[int],
                 gain: str = "exponential") -> dict[str, np.ndarray]:
    """NDCG@k of every user over the user's own rows, and what a random order would get.

    Ties in score are broken by the order of the rows.

    Args:
        user: (n,) ids.
        score: (n,) predictions.
        rating: (n,) labels, not negative.
        topk: the cut-offs k.
        gain: ``exponential`` (2^r - 1) or ``linear`` (r).

    Returns:
        ``user``: (m,) the users in ascending order; ``ndcg@k`` and ``random_ndcg@k``: (m,) in
        [0, 1], NaN for a user without gain. The random value is the exact expectation over all
        orders: mean gain times the sum of discounts, over the ideal.
    """
    gains = GAINS[one_of("labeled_gain", gain, GAINS)](rating.astype(np.float64))
    users, start, count = np.unique(np.sort(user, kind="stable"), return_index=True,
                                    return_counts=True)
    rank = np.arange(len(user)) - np.repeat(start, count)
    by_score = gains[np.lexsort((-score, user))]
    ideal = gains[np.lexsort((-gains, user))]
    discount = 1 / np.log2(rank + 2)
    mean_gain = np.repeat(np.add.reduceat(ideal, start) / count, count)
    result = {"user": users}
    for k in topk:
        weight = np.where(rank < k, discount, 0)
        best, ours, chance = (np.add.reduceat(values * weight, start)
                              for values in (ideal, by_score, mean_gain))
        with np.errstate(invalid="ignore", divide="ignore"):
            result[f"ndcg@{k}"], result[f"random_ndcg@{k}"] = ours / best, chance / best
    return result
