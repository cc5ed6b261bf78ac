"""The filters of the papers: pure functions on tables of ratings, and the order in which they run.

A table has a row a rating and the columns user_id and item_id (categoricals, so that tens of millions of rows
fit), rating and timestamp; ``row`` tells the place in the raw file and ``words`` the length of the review.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from recbole_mmdiff.errors import ConfigError, DataError, one_of

USER, ITEM = "user_id", "item_id"
DUPLICATES = ("last", "first", "error")
REQUIRABLE = {"image": "image_url", "description": "description", "title": "title", "brand": "brand",
              "categories": "categories"}
# One number is compared far faster than two columns.
_PAIR = pl.col(USER).to_physical().cast(pl.UInt64) * 2**32 + pl.col(ITEM).to_physical()
Domains = Sequence[pl.DataFrame]


@dataclass(frozen=True)
class Filters:
    """What is left out, in the order in which it is; 0, None or () leaves nothing out.

    Attributes:
        min_words: reviews of fewer words.
        duplicates: which rating of a user for an item stays: the ``last`` or ``first`` by time, or ``error``.
        first_core: users and items with fewer ratings, until none is left, as in the published k-cores.
        positive: ratings below this.
        binarize: nothing; ratings from this on become 1, others 0.
        require: items that lack one of `REQUIRABLE`.
        min_item_ratings, min_user_ratings: items, then users with fewer ratings, once.
        k_core: as ``first_core``, but after all that is above.
        common_users: users who are not in all domains; with the k-core in turn until both hold.
    """

    min_words: int = 0
    duplicates: str = "last"
    first_core: int = 0
    positive: float | None = None
    binarize: float | None = None
    require: tuple[str, ...] = ()
    min_item_ratings: int = 0
    min_user_ratings: int = 0
    k_core: int = 0
    common_users: bool = False

    def __post_init__(self) -> None:
        one_of("--duplicates", self.duplicates, DUPLICATES)
        for field in self.require:
            one_of("--require", field, REQUIRABLE)
        for name in ("min_words", "first_core", "min_item_ratings", "min_user_ratings", "k_core"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} is negative")
        for name in ("positive", "binarize"):
            if not math.isfinite(getattr(self, name) or 0):
                raise ConfigError(f"--{name}: {getattr(self, name)} is no rating")


@dataclass(frozen=True)
class Step:
    """What a filter left of one domain."""

    name: str
    rows: int
    users: int
    items: int

    @classmethod
    def of(cls, name: str, rows: pl.DataFrame) -> Step:
        return cls(name, rows.height, rows[USER].n_unique(), rows[ITEM].n_unique())


def drop_duplicates(rows: pl.DataFrame, keep: str = "last") -> pl.DataFrame:
    """One rating for each user and item: the last or first by time, and at equal times by place in the file.

    Raises:
        DataError: there are duplicates and ``keep`` is ``error``.
    """
    twice = rows.select(_PAIR.is_duplicated()).to_series()
    if not twice.any():
        return rows
    double = rows.filter(twice).sort("timestamp", "row")
    if keep == "error":
        raise DataError(f"{double.height:,} ratings are of a user and an item that have several, as user "
                        f"{double[USER][0]!r} and item {double[ITEM][0]!r}; choose --duplicates last")
    return pl.concat([rows.filter(~twice), double.unique((USER, ITEM), keep=keep)]).sort("row")


def binarize(rows: pl.DataFrame, threshold: float) -> pl.DataFrame:
    """Ratings of at least ``threshold`` become 1, others 0."""
    return rows.with_columns((pl.col("rating") >= threshold).cast(pl.Float32))


def frequent(rows: pl.DataFrame, column: str, least: int) -> pl.DataFrame:
    """The rows whose value of ``column`` stands in at least ``least`` of them."""
    return rows.filter(pl.len().over(column) >= least)


def k_core(rows: pl.DataFrame, k: int) -> pl.DataFrame:
    """The most rows in which every user and every item has at least ``k`` of them."""
    before = -1
    while rows.height != before:
        before = rows.height
        rows = rows.filter((pl.len().over(USER) >= k) & (pl.len().over(ITEM) >= k))
    return rows


def common_users(domains: Sequence[pl.DataFrame]) -> list[pl.DataFrame]:
    """The rows of users who are in every domain."""
    users = [rows.select(pl.col(USER).unique()) for rows in domains]
    for other in users[1:]:
        users[0] = users[0].join(other, on=USER, how="semi")
    return [rows.join(users[0], on=USER, how="semi", maintain_order="left") for rows in domains]


def common_core(domains: Sequence[pl.DataFrame], k: int) -> list[pl.DataFrame]:
    """The most rows in which all domains have the same users and each is its own k-core."""
    before, domains = -1, list(domains)
    while sum(rows.height for rows in domains) != before:
        before = sum(rows.height for rows in domains)
        domains = common_users([k_core(rows, k) for rows in domains])
    return domains


def with_required(rows: pl.DataFrame, items: pl.DataFrame | None, require: Sequence[str]) -> pl.DataFrame:
    """The rows of items that lack none of ``require``; all of them where the items are not known yet."""
    if items is None:
        return rows
    complete = items.drop_nulls([REQUIRABLE[field] for field in require])
    return rows.join(complete.select(pl.col(ITEM).cast(rows.schema[ITEM])), on=ITEM, how="semi",
                     maintain_order="left")


def apply(domains: Domains, filters: Filters,
          items: Sequence[pl.DataFrame | None]) -> tuple[list[pl.DataFrame], list[list[Step]]]:
    """The domains after all filters in their order, and the steps of each domain.

    Nothing after ``require`` ever keeps more of fewer rows. So the outcome without ``items`` has all items
    whose metadata are worth reading.

    Raises:
        DataError: a domain has no rows left; names the filter.
    """
    steps = [[Step.of("ratings in the raw file", rows)] for rows in domains]
    for name, function in _functions(filters, items):
        domains = function(domains)
        for kept, rows in zip(steps, domains, strict=True):
            kept.append(Step.of(name, rows))
            if not rows.height:
                raise DataError(f"no ratings are left after the filter: {name} (before it: {kept[-2].rows:,} "
                                f"ratings of {kept[-2].users:,} users); choose a weaker one")
    return list(domains), steps


def _functions(filters: Filters, items: Sequence[pl.DataFrame | None]
               ) -> Iterator[tuple[str, Callable[[Domains], list[pl.DataFrame]]]]:
    if filters.min_words:
        yield f"reviews of >= {filters.min_words} words", _each(
            lambda rows: rows.filter(pl.col("words") >= filters.min_words))
    yield f"the {filters.duplicates} rating of a user for an item" if filters.duplicates != "error" else \
        "no duplicates", _each(lambda rows: drop_duplicates(rows, filters.duplicates))
    if filters.first_core:
        yield f"{filters.first_core}-core", _each(lambda rows: k_core(rows, filters.first_core))
    if filters.positive is not None:
        yield f"ratings >= {filters.positive:g}", _each(
            lambda rows: rows.filter(pl.col("rating") >= filters.positive))
    if filters.binarize is not None:
        yield f"1 for ratings >= {filters.binarize:g}, else 0", _each(
            lambda rows: binarize(rows, filters.binarize))
    if filters.require:
        yield f"items with {', '.join(filters.require)}", lambda domains: [
            with_required(rows, known, filters.require) for rows, known in zip(domains, items, strict=True)]
    if filters.min_item_ratings:
        yield f"items of >= {filters.min_item_ratings} ratings", _each(
            lambda rows: frequent(rows, ITEM, filters.min_item_ratings))
    if filters.min_user_ratings:
        yield f"users of >= {filters.min_user_ratings} ratings", _each(
            lambda rows: frequent(rows, USER, filters.min_user_ratings))
    if filters.common_users:
        core = f"{filters.k_core}-core of " if filters.k_core else ""
        yield f"{core}common users", lambda domains: common_core(domains, filters.k_core)
    elif filters.k_core:
        yield f"{filters.k_core}-core", _each(lambda rows: k_core(rows, filters.k_core))


def _each(function: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Domains], list[pl.DataFrame]]:
    return lambda domains: [function(rows) for rows in domains]
