"""From raw Amazon files to data sets: read, filter, join the metadata, write, and record how."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
from filelock import FileLock, Timeout

from dataset_prep.editions import EDITIONS, ratings_columns
from dataset_prep.filters import ITEM, USER, Filters, Step, apply
from dataset_prep.metadata import FIELDS, read_items
from dataset_prep.output import clean, read_record, record_path, write_dataset
from dataset_prep.raw import MAX_BAD, RawFile, first_line
from dataset_prep.reviews import CsvRatings, JsonReviews, read_rows
from recbole_mmdiff.errors import DataError

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
        """What tells these files from others without reading them."""
        files = {"reviews": self.reviews, "meta": self.meta}
        return {"name": self.name, "edition": self.edition} | {
            key: path and {"name": path.name, "bytes": path.stat().st_size} for key, path in files.items()}


def recipe(sources: Sequence[Source], filters: Filters, texts: bool) -> dict[str, Any]:
    """All that decides what `prepare` writes, as plain values."""
    chosen = asdict(filters) | {"require": list(filters.require)}
    return {"filters": chosen, "texts": texts, "domains": [source.identity() for source in sources]}


def is_made(sources: Sequence[Source], filters: Filters, output: Path, texts: bool, overwrite: bool) -> bool:
    """Whether all data sets of this recipe are there already.

    Raises:
        DataError: one is there by another recipe, and ``overwrite`` is not given.
    """
    if overwrite:
        return False
    wanted, made = recipe(sources, filters, texts), 0
    for source in sources:
        folder = output / source.name
        record = read_record(folder)
        if record and record.get("recipe") == wanted:
            made += 1
        elif (folder / f"{source.name}.inter").exists():
            raise DataError(f"{folder}: a data set is there that other files or filters made, or whose "
                            "writing was cut short; choose another --output, or --overwrite to replace it")
    return made == len(sources)


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
    with _workspace(output, sources[0].name) as work:
        read = [_read_ratings(source, filters, work if texts else None, max_bad) for source in sources]
        rows = [frame for _, frame in read]
        kept, steps = apply(rows, filters, [None] * len(rows))
        described = [_read_metadata(source, frame, max_bad)
                     for source, frame in zip(sources, kept, strict=True)]
        if filters.require:
            kept, steps = apply(rows, filters, [items for _, items, _ in described])
        made, records = recipe(sources, filters, texts), []
        for source, (raw, _), (meta, items, mended), frame, taken in zip(
                sources, read, described, kept, steps, strict=True):
            tables = {"inter": _inter(frame)}
            if items is not None:
                tables["item"] = _item(frame, items)
            if texts:
                tables["reviews"] = _reviews(frame, work, source.name)
            record = {"recipe": made, "raw": [file.record() for file in (raw, meta) if file],
                      "mended": mended, **_counts(taken, tables.get("item")),
                      "python": platform.python_version()}
            _remove_old(output / source.name)
            write_dataset(output / source.name, tables, record)
            records.append(record)
        return records


@contextmanager
def _workspace(output: Path, name: str) -> Iterator[Path]:
    """An empty hidden folder, removed at the end; what a killed run left in it is removed at the start."""
    output.mkdir(parents=True, exist_ok=True)
    work, lock = output / f".prepare-{name}", FileLock(output / f".prepare-{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(f"{output / name}: another process prepares this data set; wait for it") from error
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):     # Windows does not remove a file that is open.
            Path(lock.lock_file).unlink()
        lock.release()


def _read_ratings(source: Source, filters: Filters, work: Path | None,
                  max_bad: float) -> tuple[RawFile, pl.DataFrame]:
    """The ratings of a source, with the words of each review if asked for; the texts go to ``work``."""
    edition, raw = EDITIONS[source.edition], RawFile(source.reviews, max_bad)
    texts, header = work is not None or filters.min_words > 0, False
    if source.csv:
        if texts:
            raise DataError(f"{source.reviews}: has no review texts; give the file of reviews")
        columns, header = ratings_columns(edition, source.reviews, first_line(source.reviews))
        layout = CsvRatings(columns)
    else:
        layout = JsonReviews(edition.reviews, text=texts)
    batches = []
    for batch in read_rows(raw, layout, header):
        if source.csv and not batches:
            _check_order(source, batch)
        worth = batch
        if filters.min_words:
            batch = batch.with_columns(words=pl.col("review").fill_null("").str.count_matches(r"\S+"))
            worth = batch.filter(pl.col("words") >= filters.min_words)
        if work:
            worth.select("row", "review").write_parquet(work / f"{source.name}.{len(batches)}.parquet",
                                                        compression="lz4")
        batches.append(batch.drop("review", strict=False).with_columns(pl.col(USER, ITEM).cast(_IDS)))
    return raw, pl.concat(batches)


def _check_order(source: Source, batch: pl.DataFrame) -> None:
    """Refuse a file with users and items in the other order: items have ten characters, users more."""
    users, items = batch.select((pl.col(USER, ITEM).str.len_chars() == 10).mean()).row(0)
    if users > 0.9 and items < 0.5:
        raise DataError(f"{source.reviews}: users and items look swapped for the edition {source.edition} "
                        f"(first user {batch[USER][0]!r}, first item {batch[ITEM][0]!r}); name the right "
                        "--edition")


def _read_metadata(source: Source, rows: pl.DataFrame,
                   max_bad: float) -> tuple[RawFile | None, pl.DataFrame | None, dict[str, int]]:
    """The metadata file of the rated items, the items, and what was mended."""
    if source.meta is None:
        return None, None, {}
    raw = RawFile(source.meta, max_bad)
    needed = set(rows[ITEM].unique().cast(pl.String))
    return raw, *read_items(raw, EDITIONS[source.edition], needed)


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


def _reviews(rows: pl.DataFrame, work: Path, name: str) -> pl.DataFrame:
    """The texts of the ratings that are left."""
    texts = pl.scan_parquet(work / f"{name}.*.parquet", glob=True)
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


def _remove_old(folder: Path) -> None:
    """Remove what an earlier recipe wrote, since this one may not write all of its files."""
    record = read_record(folder)
    if record:
        record_path(folder).unlink()
        for name in record.get("files", {}):
            (folder / Path(name).name).unlink(missing_ok=True)
