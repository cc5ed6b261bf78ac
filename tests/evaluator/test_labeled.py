"""NDCG over a user's own rows, against slow loops."""

import itertools
import math

import numpy as np
import pytest

from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.evaluator.labeled import labeled_ndcg

GAINS = {"exponential": lambda rating: 2.0**rating - 1, "linear": float}
TOPK = [1, 2, 5, 50]


def discounted(gains, k):
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains[:k]))


def slow_ndcg(rows, k, gain):
    """NDCG@k of one user's (score, rating) rows; Python's sort is stable, as ties should be."""
    ranked = [gain(rating) for _, rating in sorted(rows, key=lambda row: -row[0])]
    best = discounted(sorted(ranked, reverse=True), k)
    return discounted(ranked, k) / best if best else math.nan


def by_user(users, scores, ratings):
    rows = {}
    for user, score, rating in zip(users, scores, ratings, strict=True):
        rows.setdefault(int(user), []).append((float(score), float(rating)))
    return rows


@pytest.fixture
def table():
    """Shuffled users with 1 to 12 rows each, many equal scores, some users without gain."""
    generator = np.random.default_rng(5)
    users = np.repeat(generator.permutation(40) + 3, generator.integers(1, 13, 40))
    users = generator.permutation(users)
    ratings = generator.integers(0, 6, len(users)).astype(np.float32)
    ratings[users % 10 == 0] = 0
    scores = generator.integers(0, 4, len(users)).astype(np.float32)
    return users, scores, ratings


@pytest.mark.parametrize("gain", GAINS)
def test_equals_a_slow_loop(table, gain):
    found = labeled_ndcg(*table, TOPK, gain)
    rows = by_user(*table)
    assert found["user"].tolist() == sorted(rows)
    for k in TOPK:
        slow = [slow_ndcg(rows[user], k, GAINS[gain]) for user in sorted(rows)]
        np.testing.assert_allclose(found[f"ndcg@{k}"], slow, rtol=1e-12, equal_nan=True)
    nobody = found["user"] % 10 == 0
    assert nobody.any()
    for name, values in found.items():
        if name != "user":
            assert np.isnan(values[nobody]).all() and np.isfinite(values[~nobody]).all()


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("k", [1, 3, 20])
def test_random_value_is_the_mean_over_all_orders(gain, k):
    ratings = [5.0, 1.0, 3.0, 3.0, 4.0]
    mean = np.mean([
        slow_ndcg(list(zip(order, ratings, strict=True)), k, GAINS[gain])
        for order in itertools.permutations(range(5))])
    found = labeled_ndcg(np.full(5, 7), np.arange(5.0), np.array(ratings), [k], gain)
    np.testing.assert_allclose(found[f"random_ndcg@{k}"], [mean], rtol=1e-12)


def test_perfect_and_single_row():
    user, rating = np.array([1, 1, 1, 2]), np.array([2.0, 5.0, 3.0, 1.0])
    found = labeled_ndcg(user, rating, rating, [2, 10])
    np.testing.assert_allclose(found["ndcg@2"], [1, 1])
    np.testing.assert_allclose(found["random_ndcg@10"][1], 1)


def test_unknown_gain_is_refused():
    with pytest.raises(ConfigError, match=r"labeled_gain.*exponential.*linear"):
        labeled_ndcg(np.ones(1, int), np.ones(1), np.ones(1), [1], "quadratic")
