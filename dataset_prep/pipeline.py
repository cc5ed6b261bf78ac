"""From raw Amazon files to data sets: read, filter, join the metadata, write, and record how."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from dataset_prep.editions import EDITIONS, ratings_columns
from dataset_prep.filters import ITEM, USER, Filters, Step, apply
from dataset_prep.folders import HIDDEN
from dataset_prep.metadata import FIELDS, read_items
from dataset_prep.output import alone_with, clean, write_dataset
from dataset_prep.raw import MAX_BAD, RawFile, first_line
from dataset_prep.reviews import CsvRatings, JsonReviews, read_rows
from recbole_mmdiff.errors import DataError
from recbole_mmdiff.files import telling_of_disk

_IDS = pl.Categorical(pl.Categories("recbole_mmdiff.ids"))    # one code for a user of two domains
_ITEM_TYPES = {"title": "token_seq", "brand": "token_seq", "categories": "token_seq",
               "description": "token_seq", "price": "float", "image_url": "token"}


@dataclass(frozen=True)
class Source:
    """The raw files of one data set; ``csv`` tells a ratings file from reviews, ``meta`` may be missing."""

    name: str
    edition: str
    reviews: Path
    csv: bool = False
    meta: Path | None = None

    def identity(self) -> dict[str, Any]:
        """Name, edition, and of each file, which is not read for it, name, bytes and time of change (ns)."""
        return {"name": self.name, "edition": self.edition, "reviews": _identity(self.reviews),
                "meta": self.meta and _identity(self.meta)}


def _identity(path: Path) -> dict[str, Any]:
    state = path.stat()
    return {"name": path.name, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}


def recipe(sources: Sequence[Source], filters: Filters, texts: bool = False,
           max_bad: float = MAX_BAD) -> dict[str, Any]:
    """All that decides what `prepare` writes, as plain values."""
    chosen = asdict(filters) | {"require": list(filters.require)}
    return {"filters": chosen, "texts": texts, "max_bad": max_bad,
            "domains": [source.identity() for source in sources]}


def prepare(sources: Sequence[Source], filters: Filters, output: Path, texts: bool = False,
            max_bad: float = MAX_BAD) -> list[dict[str, Any]]:
    """Write ``output/NAME`` for every source, replacing what is there; domains that must have their users
    in common are given together.

    ``texts`` keeps the reviews, as NAME.reviews.parquet. Of the ratings, codes and numbers are held in memory
    (24 bytes each, several times over while they are filtered); texts wait on the disk, in a hidden folder
    of ``output``, until the filters have chosen, and those that are left must fit into memory.

    Returns:
        the records.

    Raises:
        DataError: as the readers and the filters do; another process prepares the same data set.
    """
    decided = recipe(sources, filters, texts, max_bad)      # before a file can change while it is read
    with _workspace(output, [source.name for source in sources]) as work:
        read = [_read_ratings(source, filters, work if texts else None, max_bad) for source in sources]
        ratings = [ratings for ratings, *_ in read]
        kept, steps = apply(ratings, filters, [None] * len(sources))
        described = [_read_metadata(source, rows, max_bad)
                     for source, rows in zip(sources, kept, strict=True)]
        if filters.require:
            kept, steps = apply(ratings, filters, [items for items, *_ in described])
        records = []
        for source, (_, raw, files), (items, meta, mended), rows, left in zip(
                sources, read, described, kept, steps, strict=True):
            tables = _tables(rows, items, files)
            records.append({"recipe": decided, "raw": [file.record() for file in (raw, meta) if file],
                            "mended": mended, **_counts(left, tables.get("item")),
                            "python": platform.python_version()})
            write_dataset(output / source.name, tables, records[-1])
        return records


def clean_up(output: Path, names: Sequence[str]) -> None:
    """Remove what a `prepare` left that was killed once its data sets were there; not what others hold."""
    if (output / HIDDEN / names[0]).is_dir():
        with suppress(DataError), _workspace(output, names):
            pass    # It removes the folder.


@contextmanager
def _workspace(output: Path, names: Sequence[str]) -> Iterator[Path]:
    """An empty hidden folder, removed at the end; what a killed run left in it is removed at the start.

    All names are locked meanwhile.
    """
    with ExitStack() as locks:
        for name in names:
            locks.enter_context(alone_with(output / name))
        work = output / HIDDEN / names[0]
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _read_ratings(source: Source, filters: Filters, work: Path | None,
                  max_bad: float) -> tuple[pl.DataFrame, RawFile, list[Path]]:
    """The ratings of a source, with the words of each review if they count, and the files in ``work`` that
    hold the texts."""
    raw, batches, files = RawFile(source.reviews, max_bad), [], []
    layout, header = _layout(source, texts=work is not None or filters.min_words > 0)
    for batch in read_rows(raw, layout, header):
        if source.csv and not batches:
            _check_order(source, batch)
        long_enough = batch
        if filters.min_words:
            batch = batch.with_columns(words=pl.col("review").fill_null("").str.count_matches(r"\S+"))
            long_enough = batch.filter(pl.col("words") >= filters.min_words)
        if work:
            files.append(work / f"{source.name}.{len(files)}.parquet")
            with telling_of_disk(files[-1]):
                long_enough.select("row", "review").write_parquet(files[-1], compression="lz4")
        batches.append(batch.drop("review", strict=False).with_columns(pl.col(USER, ITEM).cast(_IDS)))
    ratings = pl.concat(batches)
    if source.csv:
        _check_end(raw, ratings)
    return ratings, raw, files


def _layout(source: Source, texts: bool) -> tuple[CsvRatings | JsonReviews, bool]:
    """How the lines of a source's reviews are read, and whether the first is a header."""
    edition = EDITIONS[source.edition]
    if not source.csv:
        return JsonReviews(edition.reviews, text=texts), False
    if texts:
        raise DataError(f"{source.reviews}: has no review texts; give the file of reviews")
    columns, header = ratings_columns(edition, source.reviews, first_line(source.reviews))
    return CsvRatings(columns), header


def _check_order(source: Source, batch: pl.DataFrame) -> None:
    """Refuse a file with users and items in the other order: items have ten characters, users more."""
    users, items = batch.select((pl.col(USER, ITEM).str.len_chars() == 10).mean()).row(0)
    if users > 0.9 and items < 0.5:
        raise DataError(f"{source.reviews}: users and items look swapped for the edition {source.edition} "
                        f"(first user {batch[USER][0]!r}, first item {batch[ITEM][0]!r}); name the right "
                        "--edition")


def _check_end(raw: RawFile, ratings: pl.DataFrame) -> None:
    """Refuse a last line without a line break whose time has fewer digits than all others: it was cut there.

    A file may well lack its last line break, but a time that lost digits still is a number, of a wrong day.
    """
    last, least = ratings["timestamp"][-1], ratings["timestamp"][:-1].min()
    if ratings["row"][-1] == raw.unended and least is not None and len(str(last)) < len(str(least)):
        raise DataError(f"{raw.path}, line {raw.unended}: ends without a line break after the time {last}, "
                        "which is shorter than all others; the file was cut off: download it again")


def _read_metadata(source: Source, rows: pl.DataFrame,
                   max_bad: float) -> tuple[pl.DataFrame | None, RawFile | None, dict[str, int]]:
    """The rated items, the file of their metadata, and what was mended."""
    if source.meta is None:
        return None, None, {}
    raw = RawFile(source.meta, max_bad)
    needed = set(rows[ITEM].unique().cast(pl.String))
    items, mended = read_items(raw, EDITIONS[source.edition], needed)
    return items, raw, mended


def _tables(rows: pl.DataFrame, items: pl.DataFrame | None, files: Sequence[Path]) -> dict[str, pl.DataFrame]:
    """What is written of a domain; ``files`` hold the texts of its reviews, if any are wanted."""
    tables = {"inter": _inter(rows)}
    if items is not None:
        tables["item"] = _item(rows, items)
    if files:
        tables["reviews"] = _reviews(rows, files)
    return tables


def _inter(rows: pl.DataFrame) -> pl.DataFrame:
    """The ratings as an atomic file, by user, time and item: the order of the raw file does not matter."""
    ordered = rows.select(pl.col(USER, ITEM).cast(pl.String), "rating", "timestamp").sort(
        USER, "timestamp", ITEM)
    return ordered.rename({USER: "user_id:token", ITEM: "item_id:token", "rating": "rating:float",
                           "timestamp": "timestamp:float"})


def _item(rows: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """All rated items in the order of their tokens; empty fields for what their metadata lack."""
    rated = rows.select(pl.col(ITEM).unique().cast(pl.String))
    return rated.join(items, on=ITEM, how="left").sort(ITEM).select(
        pl.col(ITEM).alias("item_id:token"),
        *(pl.col(name).alias(f"{name}:{_ITEM_TYPES[name]}") for name in FIELDS))


def _reviews(rows: pl.DataFrame, files: Sequence[Path]) -> pl.DataFrame:
    """The texts of the ratings that are left."""
    texts = pl.scan_parquet(list(files), glob=False)
    kept = rows.lazy().select("row", pl.col(USER, ITEM).cast(pl.String), "rating", "timestamp")
    return kept.join(texts, on="row").select(
        USER, ITEM, "rating", "timestamp", clean("review").fill_null("").alias("review"),
    ).sort(USER, "timestamp", ITEM).collect()


def _counts(steps: Sequence[Step], items: pl.DataFrame | None) -> dict[str, Any]:
    last = steps[-1]
    empty = items.null_count().row(0, named=True) if items is not None else {}
    return {"steps": [asdict(step) for step in steps],
            "counts": {"users": last.users, "items": last.items, "ratings": last.rows},
            "items_without": {name.partition(":")[0]: count for name, count in empty.items() if count}}
