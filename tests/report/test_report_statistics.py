"""Means and paired tests, against slow loops and scipy on the stored values."""

import itertools
import json
import math
import warnings

import numpy as np
import pytest
import stores
from scipy import stats

from recbole_mmdiff.report import Results
from recbole_mmdiff.report.statistics import all_tests, holm, improvement, paired_test, row_means, row_tests


def slow_user_values(store, model, setting, table, metric):
    """(seed, token) -> value, straight out of the files."""
    plan = json.loads((store / "plan.json").read_text())
    name, key = metric.split(".")
    values = {}
    for cell in plan["cells"]:
        if (cell["model"], cell["setting"], cell["table"]) == (model, setting, table):
            with np.load(store / cell["folder"] / "per_user.npz") as file:
                for token, value in zip(file[f"{name}.user"], file[f"{name}.{key}"], strict=True):
                    values[cell["seed"], str(token)] = float(value)
    return values


def slow_pairs(store, model, other, setting, table, metric):
    first, second = (slow_user_values(store, label, setting, table, metric) for label in (model, other))
    by_user = {}
    for place in first:
        if place in second:
            by_user.setdefault(place[1], []).append((first[place], second[place]))
    return [[sum(pair[side] for pair in pairs) / len(pairs) for pairs in by_user.values()]
            for side in (0, 1)]


def keyed(tests):
    return {(test.setting, test.metric, test.model, test.other, test.over, test.test): test
            for test in tests}


@pytest.mark.parametrize("ours", [None, ["EMCDR"], ["CMF", "MF"]])
def test_tests_over_users_equal_scipys(full, results, ours):
    found = keyed(all_tests(results, ours))
    mine = ours or ["DiffCDR"]
    others = [model for model in stores.MODELS if model not in mine]
    for (table, content), setting in itertools.product(stores.TABLES.items(), stores.SETTINGS):
        for metric, model, other in itertools.product(content["metrics"], mine, others):
            pairs = slow_pairs(full, model, other, setting, table, metric)
            for test, expected in (("t", stats.ttest_rel(*pairs)), ("wilcoxon", stats.wilcoxon(*pairs))):
                entry = found[setting, metric, model, other, "users", test]
                assert entry.n == len(pairs[0]) == 40
                np.testing.assert_allclose([entry.statistic, entry.p], expected[:2], rtol=1e-7)
                assert entry.difference == pytest.approx(np.mean(pairs[0]) - np.mean(pairs[1]))


def test_tests_over_seeds_equal_scipys(results):
    for entry in all_tests(results, ["MF"]):
        if entry.over == "seeds":
            pairs = [list(results.values(label, entry.setting, entry.table, entry.metric).values())
                     for label in (entry.model, entry.other)]
            expected = stats.ttest_rel(*pairs) if entry.test == "t" else stats.wilcoxon(*pairs)
            assert entry.n == 3
            np.testing.assert_allclose([entry.statistic, entry.p], expected[:2], rtol=1e-7)


def test_the_holm_family_is_one_row(results):
    found = all_tests(results, ["DiffCDR", "EMCDR"])
    families = {}
    for entry in found:
        place = (entry.table, entry.setting, entry.metric, entry.over, entry.test)
        families.setdefault(place, []).append(entry)
    assert {len(family) for family in families.values()} == {4}
    for family in families.values():
        np.testing.assert_array_equal([entry.holm_p for entry in family], holm([e.p for e in family]))


def test_the_order_of_users_does_not_matter(tmp_path):
    cells = stores.full_store(tmp_path, settings=["s"])
    before = all_tests(Results.load(tmp_path))
    for cell in cells:
        if cell["model"] == "EMCDR":
            path = tmp_path / cell["folder"] / "per_user.npz"
            with np.load(path) as file:
                arrays = dict(file)
            order = np.random.default_rng(cell["seed"]).permutation(len(next(iter(arrays.values()))))
            np.savez_compressed(path, **{name: values[order] for name, values in arrays.items()})
    assert all_tests(Results.load(tmp_path)) == before


def test_users_are_matched_by_token_within_seeds(one_row):
    users = {("A", 2020): (["x", "y", "only A"], {"mae": [1.0, 2.0, 9.0]}),
             ("B", 2020): (["only B", "y", "x"], {"mae": [7.0, 3.0, 5.0]}),
             ("A", 2021): (["y", "z"], {"mae": [4.0, 6.0]}),
             ("B", 2021): (["z", "y"], {"mae": [5.0, math.nan]}),
             ("A", 2022): (["y"], {"mae": [100.0]})}
    results = one_row({"A": [1, 1, 1], "B": [2, 2, "pending"]}, per_user=users)
    entry = keyed(row_tests(results, "table", "s", "rating.mae"))["s", "rating.mae", "A", "B", "users", "t"]
    # x: 1 against 5; y: 2 against 3 in the first seed only; z: 6 against 5.
    expected = stats.ttest_rel([1, 2, 6], [5, 3, 5])
    assert (entry.n, entry.difference) == (3, pytest.approx(-4 / 3))
    assert (entry.statistic, entry.p) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.6]), [1, 1])
    np.testing.assert_allclose(holm([0.02, math.nan, 0.03]), [0.04, math.nan, 0.04])
    assert holm([]).tolist() == [] and holm([0.3]).tolist() == [0.3]


def test_holm_is_monotone_and_equals_the_definition():
    p = np.random.default_rng(0).random(30)**3
    found = holm(p)
    order = np.argsort(p)
    assert (np.diff(found[order]) >= 0).all() and (found >= p).all() and (found <= 1).all()
    for rank, at in enumerate(order):
        assert found[at] == min(1, max((30 - before) * p[order[before]] for before in range(rank + 1)))


def test_holm_equals_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(1).random(40)**4
    np.testing.assert_allclose(holm(p), multitest.multipletests(p, method="holm")[1])


@pytest.mark.parametrize("test", ["t", "wilcoxon"])
def test_degenerate_pairs(test):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paired_test(test, np.ones(5), np.ones(5)) == (0, 1)
        assert paired_test(test, np.zeros(5), np.zeros(5)) == (0, 1)
        assert paired_test(test, np.full(5, 0.1 + 0.2), np.full(5, 0.3)) == (0, 1)
        for few in (np.ones(0), np.ones(1)):
            assert np.isnan(paired_test(test, few, few + 1)).all()
        _, p = paired_test(test, np.array([1.0, 2.0]), np.array([1.5, 3.0]))
        assert 0 < p <= 1


def test_differences_that_do_not_vary_have_no_t_test():
    first, second = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6])
    assert np.isnan(paired_test("t", first, second)).all()
    assert paired_test("wilcoxon", first, second)[1] == pytest.approx(0.25)


def test_rounding_errors_do_not_break_ties():
    """Hit rates are thirds after three seeds; the exact differences are whole numbers."""
    draw = np.random.default_rng(2)
    first, second = draw.integers(0, 4, (2, 200))
    exact = stats.wilcoxon(first - second)
    found = paired_test("wilcoxon", first / 3, second / 3)
    assert (found[0], found[1]) == (exact.statistic, pytest.approx(exact.pvalue, rel=1e-12))


def test_a_model_without_values_is_in_no_comparison(one_row):
    results = one_row({"A": [1, 2], "B": [None, "failed"], "C": [3, 3.5]})
    tests = row_tests(results, "table", "s", "rating.mae")
    assert {(test.model, test.other) for test in tests} == {("A", "C")}
    assert all(test.n == 0 and math.isnan(test.p) for test in tests if test.over == "users")
    assert row_tests(results, "table", "s", "rating.mae", ["B"]) == []


def test_means_and_improvement_by_hand(one_row):
    results = one_row({"A": [0.8, 0.9, 1.0], "B": [1.0, 1.2, "pending"], "C": [2.0, 2.0, 2.0]})
    means = row_means(results, "table", "s", "rating.mae")
    assert (means["A"].mean, means["A"].sd, means["A"].n) == (pytest.approx(0.9), pytest.approx(0.1), 3)
    assert (means["B"].mean, means["B"].sd, means["B"].n) == (pytest.approx(1.1), pytest.approx(0.02**0.5), 2)
    assert improvement(means, "rating.mae", None) == pytest.approx(100 * 0.2 / 1.1)
    assert improvement(means, "rating.mae", ["C"]) == pytest.approx(-100 * 1.1 / 0.9)
    assert improvement(means, "ranking.hit", ["C"]) == pytest.approx(100 * 0.9 / 1.1)
    assert math.isnan(improvement(means, "rating.mae", ["A", "B", "C"]))
