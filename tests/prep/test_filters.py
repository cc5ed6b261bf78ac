"""The filters against slow loops over lists, and what they refuse."""

from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_prep.filters import (
    Filters,
    apply,
    common_core,
    common_users,
    drop_duplicates,
    frequent,
    k_core,
)
from recbole_mmdiff.errors import ConfigError, DataError

UNHURRIED = settings(deadline=None)      # the machine may be busy
IDS = pl.Categorical(pl.Categories("tests.ids"))
SCHEMA = {"row": pl.UInt32, "user_id": IDS, "item_id": IDS, "rating": pl.Float32, "timestamp": pl.Int64}


def table(rows):
    """Rows are (user, item[, rating[, time]])."""
    full = [(place, *row, *(5.0, 0)[len(row) - 2:]) for place, row in enumerate(rows)]
    return pl.DataFrame(full, schema=SCHEMA, orient="row")


def pairs(rows):
    return sorted(rows.select(pl.col("user_id", "item_id").cast(pl.String)).rows())


def slow_core(rows, k):
    """Remove one user or item with too few rows after another."""
    rows = list(rows)
    while True:
        for place in (0, 1):
            counts = Counter(row[place] for row in rows)
            poor = [name for name, count in counts.items() if count < k]
            if poor:
                rows = [row for row in rows if row[place] != poor[0]]
                break
        else:
            return sorted(rows)


def pair_lists(size=60):
    names = st.tuples(st.integers(0, 7).map("u{}".format), st.integers(0, 6).map("i{}".format))
    return st.lists(names, max_size=size, unique=True)


@UNHURRIED
@given(pair_lists(), st.integers(1, 5))
def test_k_core_equals_a_slow_loop(rows, k):
    assert pairs(k_core(table(rows), k)) == slow_core(rows, k)


@UNHURRIED
@given(pair_lists(), pair_lists(), st.integers(0, 4))
def test_common_core_is_the_largest_fix_point(left, right, k):
    found = [pairs(rows) for rows in common_core([table(left), table(right)], k)]
    lists = [sorted(left), sorted(right)]
    while True:     # in another order than ours: one domain after the other
        before = list(lists)
        for place in (0, 1):
            users = {user for user, _ in lists[1 - place]}
            lists[place] = slow_core([row for row in lists[place] if row[0] in users], k)
        if lists == before:
            break
    assert found == lists


@UNHURRIED
@given(pair_lists(), pair_lists())
def test_common_users(left, right):
    users = {user for user, _ in left} & {user for user, _ in right}
    found = common_users([table(left), table(right)])
    assert [pairs(rows) for rows in found] == [sorted(row for row in rows if row[0] in users)
                                               for rows in (left, right)]


@UNHURRIED
@given(pair_lists(), st.integers(1, 5), st.sampled_from([0, 1]))
def test_frequent_counts_once(rows, least, place):
    counts = Counter(row[place] for row in rows)
    expected = sorted(row for row in rows if counts[row[place]] >= least)
    assert pairs(frequent(table(rows), ("user_id", "item_id")[place], least)) == expected


rated = st.lists(st.tuples(st.sampled_from("uvw"), st.sampled_from("ij"), st.integers(1, 5).map(float),
                           st.integers(0, 3)), max_size=20)


@UNHURRIED
@given(rated, st.sampled_from(["first", "last"]))
def test_duplicates_by_time_then_by_place(rows, keep):
    chosen = {}
    for place, (user, item, rating, time) in enumerate(rows):
        key, when = (user, item), (time, place)
        if key not in chosen or (when > chosen[key][0]) == (keep == "last"):
            chosen[key] = (when, rating)
    found = drop_duplicates(table(rows), keep)
    assert found["row"].to_list() == sorted(when[1] for when, _ in chosen.values())
    assert found["rating"].to_list() == [rows[place][2] for place in found["row"]]


def test_duplicates_can_be_an_error():
    once, twice = table([("u", "i"), ("u", "j")]), table([("u", "i"), ("v", "i"), ("v", "j"), ("v", "i")])
    assert drop_duplicates(once, "error").equals(once)
    with pytest.raises(DataError, match="2 ratings are of a user and an item that have several, as user 'v' "
                                        "and item 'i'"):
        drop_duplicates(twice, "error")


ROWS = [("u", "i", 5.0, 1), ("u", "i", 2.0, 2), ("u", "j", 4.0, 3), ("v", "j", 3.0, 1), ("v", "k", 5.0, 1),
        ("w", "j", 5.0, 9)]


def test_the_order_of_the_filters():
    rows = table(ROWS).with_columns(words=pl.Series([20, 20, 20, 20, 3, 20]))
    items = pl.DataFrame({"item_id": ["i", "j", "k"], "title": ["I", "J", None]})
    filters = Filters(min_words=10, positive=4, binarize=5, require=("title",), min_item_ratings=1,
                      min_user_ratings=1, k_core=1)
    (kept,), (steps,) = apply([rows], filters, [items])
    # (v, k) is short; the last rating of (u, i) and the one of (v, j) are not positive.
    assert kept.select("user_id", "item_id", "rating").rows() == [("u", "j", 0.0), ("w", "j", 1.0)]
    assert [(step.name, step.rows, step.users, step.items) for step in steps] == [
        ("ratings in the raw file", 6, 3, 3), ("reviews of >= 10 words", 5, 3, 2),
        ("the last rating of a user for an item", 4, 3, 2), ("ratings >= 4", 2, 2, 1),
        ("1 for ratings >= 5, else 0", 2, 2, 1), ("items with title", 2, 2, 1),
        ("items of >= 1 ratings", 2, 2, 1), ("users of >= 1 ratings", 2, 2, 1), ("1-core", 2, 2, 1)]


def test_the_first_core_comes_before_the_items_that_lack_something():
    rows = table([(user, item) for user in "uvw" for item in "ij"])
    items = pl.DataFrame({"item_id": ["i"], "title": ["I"]})
    (kept,), _ = apply([rows], Filters(first_core=2, require=("title",)), [items])
    assert pairs(kept) == [("u", "i"), ("v", "i"), ("w", "i")]
    with pytest.raises(DataError, match="after the filter: 2-core"):
        apply([rows], Filters(k_core=2, require=("title",)), [items])


def test_required_fields_must_all_be_there():
    items = pl.DataFrame({"item_id": ["i", "j"], "title": ["I", "J"], "image_url": [None, "x"]})
    (kept,), _ = apply([table(ROWS)], Filters(require=("title", "image")), [items])
    assert set(kept["item_id"].cast(pl.String)) == {"j"}        # i has no image, k no metadata at all


@UNHURRIED
@given(rated, rated, st.integers(0, 2), st.integers(0, 3), st.booleans())
def test_without_items_everything_worth_their_metadata_is_left(left, right, k, least, common):
    """What `prepare` relies on: the outcome without items has all that the outcome with them has."""
    domains = [table([*rows, *(("z", item, 5.0, 0) for item in "xyz")]) for rows in (left, right)]
    filters = Filters(require=("title",), k_core=k, min_user_ratings=least, common_users=common)
    items = pl.DataFrame({"item_id": ["i", "x", "y", "z"], "title": ["I", "X", "Y", "Z"]})
    try:
        wide, _ = apply(domains, filters, [None, None])
        narrow, _ = apply(domains, filters, [items, items])
    except DataError:
        assert k > 1
        return
    for more, fewer in zip(wide, narrow, strict=True):
        assert set(fewer["row"]) <= set(more["row"])
        assert set(fewer["item_id"].cast(pl.String)) <= set(items["item_id"])


def test_an_empty_outcome_names_the_filter():
    with pytest.raises(DataError, match=r"no ratings are left after the filter: 4-core \(before it: 5 "
                                        r"ratings of 3 users\)"):
        apply([table(ROWS)], Filters(k_core=4), [None])


@pytest.mark.parametrize("options, message", [
    ({"duplicates": "lst"}, "--duplicates: 'lst'.*did you mean 'last'"),
    ({"require": ("images",)}, "--require: 'images'.*did you mean 'image'"),
    ({"k_core": -1}, "--k-core: -1 is negative"),
    ({"binarize": float("nan")}, "--binarize: nan is no rating"),
    ({"positive": float("nan")}, "--positive: nan is no rating"),
    ({"positive": float("inf")}, "--positive: inf is no rating"),
])
def test_filters_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Filters(**options)
