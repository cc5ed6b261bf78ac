"""Means over seeds, and paired tests between models over users and over seeds."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from recbole_mmdiff.report.results import Results, smaller_is_better

TESTS = ("t", "wilcoxon")
UNITS = ("users", "seeds")


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (NaN below two values) of ``n`` values."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class PairedTest:
    """One test of ``model`` against ``other`` in one row of a table.

    Attributes:
        over: what the pairs are, ``users`` or ``seeds``.
        test: ``t`` (paired t-test) or ``wilcoxon`` (signed ranks), two-sided.
        n: the number of pairs.
        difference: the mean of ``model`` minus ``other`` over the pairs.
        statistic, p: NaN where the test cannot be made.
        holm_p: p after Holm's correction over the tests of the same kind in the same row.
    """

    table: str
    setting: str
    metric: str
    model: str
    other: str
    over: str
    test: str
    n: int
    difference: float
    statistic: float
    p: float
    holm_p: float = math.nan


def summarize(values: Iterable[float]) -> Summary:
    """Mean and sample standard deviation of the values that are not NaN."""
    found = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if not len(found):
        return Summary(math.nan, math.nan, 0)
    sd = float(found.std(ddof=1)) if len(found) > 1 else math.nan
    return Summary(float(found.mean()), sd, len(found))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction of a family of p values (Holm 1979); keeps the order.

    The i-th smallest of m is multiplied by m - i + 1, never falls below a smaller one's, never
    exceeds 1. NaN stays NaN and does not count in m.
    """
    p = np.asarray(p, dtype=np.float64)
    corrected = np.full(len(p), math.nan)
    order = np.argsort(p, kind="stable")[:np.isfinite(p).sum()]  # NaN comes last.
    stepped = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected


def paired_test(test: str, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Statistic and two-sided p of a paired test; (NaN, NaN) where it cannot be made.

    All pairs equal: p is 1. Fewer than two pairs: no test. Differences that do not vary: no t-test,
    whose p would be zero however few the pairs (two models that draw no random numbers differ by
    the same amount in every seed).

    Args:
        test: ``t`` (scipy's ``ttest_rel``) or ``wilcoxon`` (scipy's, zero differences left out).
        first, second: (n,) paired finite values.
    """
    if len(first) < 2:
        return math.nan, math.nan
    difference, scale = first - second, max(np.abs(first).max(), np.abs(second).max())
    if scale:
        # 2/3 - 1/3 and 1/3 - 0 are a tie, which rounding errors must not break.
        difference = np.round(difference / scale, 12)
    if not difference.any():
        return 0.0, 1.0
    if test == "t" and np.ptp(difference) <= 1e-11:
        return math.nan, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Small samples and ties: scipy picks its method itself.
        found = stats.ttest_rel(difference, np.zeros_like(difference)) if test == "t" \
            else stats.wilcoxon(difference)
    return float(found.statistic), float(found.pvalue)


def user_pairs(results: Results, model: str, other: str, setting: str, table: str,
               metric: str) -> pd.DataFrame:
    """Values by user of two models: rows by sorted user token, columns ``first`` and ``second``.

    Each is the user's mean over the seeds in which both models have a value for the user. Users are
    matched by token.
    """
    by_seed = {cell.seed: cell for cell in results.cells(other, setting, table)}
    shared = []
    for cell in results.cells(model, setting, table):
        if cell.seed in by_seed:
            first = results.per_user(cell, metric)
            second = results.per_user(by_seed[cell.seed], metric)
            if first is not None and second is not None:
                both = pd.concat({"first": first, "second": second}, axis=1, join="inner")
                shared.append(both)
    if not shared:
        return pd.DataFrame({"first": [], "second": []}, dtype=np.float64)
    return pd.concat(shared).groupby(level=0, sort=True).mean()


def seed_pairs(results: Results, model: str, other: str, setting: str, table: str,
               metric: str) -> pd.DataFrame:
    """The same by seed: the metric's values of the seeds in which both models have one."""
    values = {name: results.values(label, setting, table, metric)
              for name, label in (("first", model), ("second", other))}
    return pd.DataFrame(values, columns=["first", "second"], dtype=np.float64).dropna()


def row_means(results: Results, table: str, setting: str, metric: str) -> dict[str, Summary]:
    """Model -> its values over the seeds, for the models of a table."""
    return {model: summarize(results.values(model, setting, table, metric).values())
            for model in results.models(table)}


def best_model(means: dict[str, Summary], metric: str, among: Iterable[str]) -> str | None:
    """The model with the best mean, the first of equal ones; None if none has a value."""
    sign = 1 if smaller_is_better(metric) else -1
    there = [model for model in among if model in means and means[model].n]
    return min(there, key=lambda model: sign * means[model].mean, default=None)


def sides(means: dict[str, Summary], metric: str,
          ours: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The models of a row that have a value: ours (None: the best of all), and the others."""
    there = [model for model in means if means[model].n]
    mine = [best_model(means, metric, there)] if ours is None else list(ours)
    return [model for model in there if model in mine], [model for model in there if model not in mine]


def row_tests(results: Results, table: str, setting: str, metric: str,
              ours: Sequence[str] | None = None) -> list[PairedTest]:
    """Every test of a row: each of ours against each other model, over users and over seeds.

    Holm's correction is made over the pairs, apart for each kind of test.
    """
    mine, others = sides(row_means(results, table, setting, metric), metric, ours)
    found = {(over, test): [] for over in UNITS for test in TESTS}
    for model in mine:
        for other in others:
            place = (results, model, other, setting, table, metric)
            for over, pairs in (("users", user_pairs(*place)), ("seeds", seed_pairs(*place))):
                first, second = pairs["first"].to_numpy(), pairs["second"].to_numpy()
                difference = float((first - second).mean()) if len(first) else math.nan
                for test in TESTS:
                    found[over, test].append(PairedTest(
                        table, setting, metric, model, other, over, test, len(first), difference,
                        *paired_test(test, first, second)))
    return [replace(entry, holm_p=float(p)) for family in found.values()
            for entry, p in zip(family, holm([entry.p for entry in family]), strict=True)]


def all_tests(results: Results, ours: Sequence[str] | None = None) -> list[PairedTest]:
    """The tests of every row of every table, in the order of the plan."""
    return [entry for table, metrics in results.plan.tables.items()
            for setting in results.settings(table) for metric in metrics
            for entry in row_tests(results, table, setting, metric, ours)]


def improvement(means: dict[str, Summary], metric: str, ours: Sequence[str] | None) -> float:
    """By how many percent the best of ours beats the best other model; negative if it is worse.

    NaN if either side has no value, or the other's is zero.
    """
    mine, others = sides(means, metric, ours)
    model, other = best_model(means, metric, mine), best_model(means, metric, others)
    if model is None or other is None or means[other].mean == 0:
        return math.nan
    sign = -1 if smaller_is_better(metric) else 1
    return sign * 100 * (means[model].mean - means[other].mean) / abs(means[other].mean)
