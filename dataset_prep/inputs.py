"""What is encoded: the texts and images of items, or the reviews of users, one entry a row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dataset_prep.encoders.base import Sample
from dataset_prep.folders import item_path, read_items
from dataset_prep.images import image_files
from dataset_prep.prompt import Prompt
from recbole_mmdiff.data.atomic import read_header
from recbole_mmdiff.errors import ConfigError, DataError, suggest
from recbole_mmdiff.files import sha256

if TYPE_CHECKING:
    import polars as pl

#: protocols under which nothing that a tested user wrote in the target domain may be seen
COLD = ("cold_start_users", "cold_start_items")
_READERS = 8     # threads that read images
_BLOCK = 4096    # users whose reviews are read at once when all texts are gone through


class Inputs(Protocol):
    """An ordered collection of samples, read in parts so that not all need to be in memory."""

    tokens: Sequence[str]

    def part(self, start: int, stop: int) -> list[Sample]:
        """The samples of these positions."""

    def describe(self) -> dict[str, Any]:
        """Which fields, files and options the samples are made of, in plain values."""

    def digest(self) -> str:
        """A checksum that differs when any sample does."""


def texts_of(inputs: Inputs) -> Iterator[str]:
    """The texts of all samples that say something, in order."""
    for start in range(0, len(inputs.tokens), _BLOCK):
        for sample in inputs.part(start, start + _BLOCK):
            if not sample.blank:
                yield sample.text


class Items:
    """The items of ``NAME.item`` in the order of the file: their text, and where their images lie.

    The text is ``fields`` (by default every ``token_seq`` column) joined by ``separator``, empty
    ones left out; or ``prompt`` with the item's columns filled in, and with ``{text}`` standing for
    the joined fields, also where a column is called text. ``max_characters`` cuts every cell.
    Columns stay unused where neither fields nor prompt name them. An item says nothing
    (``Sample.blank``) if all cells used are empty.

    Raises:
        ConfigError: a field is named twice.
        DataError: no such file or no item in it, a column that it lacks, or an item that it has twice.
    """

    def __init__(self, folder: Path, fields: Sequence[str] | None = None, separator: str = ". ",
                 prompt: Prompt | None = None, max_characters: int | None = None,
                 images: Path | None = None) -> None:
        path = item_path(folder)
        columns = read_header(path, "\t", "utf-8")
        names = [column.name for column in columns if column.name != "item_id"]
        if fields is None:
            fields = [c.name for c in columns if c.ftype.value == "token_seq"]
        for field in fields:
            if field not in names:
                raise DataError(f"--fields: {path} has no column {field!r}, only {', '.join(names)}"
                                f"{suggest(field, names)}")
            if fields.count(field) > 1:
                raise ConfigError(f"--fields: {field!r} stands twice; name each column once")
        if prompt:
            prompt.check(list(dict.fromkeys(["text", *names])))
        places = [name for name in prompt.names if name != "text"] if prompt else []
        used = dict.fromkeys([*fields, *places])
        frame = read_items(path, set(used))
        self.tokens: list[str] = frame["item_id"].tolist()
        self._cells = {name: _as_text(frame[name], max_characters) for name in used}
        self._fields, self._separator, self._prompt = list(fields), separator, prompt
        self._max_characters = max_characters
        self._images = image_files(images) if images else {}

    def part(self, start: int, stop: int) -> list[Sample]:
        return [self._sample(row) for row in range(start, min(stop, len(self.tokens)))]

    def _sample(self, row: int) -> Sample:
        cells = {name: values[row] for name, values in self._cells.items()}
        text = self._separator.join(filter(None, (cells[field] for field in self._fields)))
        used = cells
        if self._prompt:
            values = {**cells, "text": text}
            used = {name: values[name] for name in self._prompt.names}
            text = self._prompt.fill(values)
        token = self.tokens[row]
        return Sample(token, text, not any(map(str.strip, used.values())), self._images.get(token))

    def describe(self) -> dict[str, Any]:
        described = {"fields": self._fields, "separator": self._separator,
                     "max_characters": self._max_characters} if self._cells else {}
        return {**described, **(self._prompt.describe() if self._prompt else {})}

    def digest(self) -> str:
        digest = hashlib.sha256()
        with ThreadPoolExecutor(_READERS) as readers:
            for start in range(0, len(self.tokens), _BLOCK):
                samples = self.part(start, start + _BLOCK)
                images = readers.map(_checksum, [sample.image for sample in samples])
                for sample, image in zip(samples, images, strict=True):
                    digest.update(repr((sample.token, sample.text, image)).encode())
        return digest.hexdigest()


def _checksum(image: Path | None) -> str:
    """Of the contents, so that a copied data set is the same."""
    try:
        return sha256(image) if image else ""
    except OSError as error:    # It will be left out, and be told.
        return f"cannot be read: {error.strerror}"


def _as_text(cells: Any, max_characters: int | None) -> list[str]:
    """A column as strings, "" where a cell is empty; numbers as short as they can be told."""
    if cells.dtype == np.float64:
        texts = ["" if np.isnan(value) else f"{value:.15g}" for value in cells]
    else:
        texts = cells.fillna("").tolist()
    return [text[:max_characters] for text in texts]


class Users:
    """The users of ``NAME.reviews.parquet``: each one's latest reviews, the newest of them first.

    The file holds ``user_id``, ``item_id``, ``timestamp`` and ``review``, a user's rows together,
    sorted by timestamp and item. ``reviews_per_user`` reviews a user, each cut to ``max_characters``, are
    joined by line breaks, or fill ``{reviews}`` of ``prompt``. What an encoder's maximum length cuts
    off are the oldest.

    ``split``: the ``split.npz`` of a run. Reviews of the interactions that it holds out of this
    ``domain`` are left out, as if they had never been written. Under the protocols of cold starts
    these are, in the target domain, all reviews of the validation and test users, also those of
    rows that the run filtered out.

    Raises:
        DataError: a file or column is missing, there is no review, one has no user or item, users are
            scattered, or the split is of other data.
    """

    def __init__(self, folder: Path, prompt: Prompt | None = None, reviews_per_user: int = 20,
                 max_characters: int | None = 1000, split: Path | None = None,
                 domain: str | None = None) -> None:
        import polars as pl

        self._path = folder / f"{folder.name}.reviews.parquet"
        if not self._path.is_file():
            raise DataError(f"{self._path}: there is no such file; write review texts when the data "
                            f"set is prepared")
        self._reviews = pl.scan_parquet(self._path)
        self._check_columns()
        self._check_ids()
        if prompt:
            prompt.check(["reviews"])
        if (split is None) != (domain is None):
            raise ConfigError("--split and --domain go together: the file holds out rows of both domains")
        self._prompt, self._latest, self._max_characters = prompt, reviews_per_user, max_characters
        self._split, self._domain = split, domain
        self._find_users()
        self._held_out: dict[str, pl.DataFrame] = {}    # by the columns that they are told by
        self._split_record = self._read_split() if split else {}

    def _check_columns(self) -> None:
        import polars as pl

        try:
            schema = self._reviews.collect_schema()
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{self._path}: is not a parquet file ({error})") from error
        for name in ("user_id", "item_id", "timestamp", "review"):
            if name not in schema:
                raise DataError(f"{self._path}: has no column {name!r}, only {', '.join(schema)}")
            if name != "timestamp" and schema[name] != pl.String:
                raise DataError(f"{self._path}: the column {name} holds {schema[name]}, not text")

    def _check_ids(self) -> None:
        import polars as pl

        names = ("user_id", "item_id")
        empty = pl.any_horizontal(pl.col(names).fill_null("") == "")
        found = self._reviews.select(names).with_row_index("row").filter(empty).head(1) \
            .collect(engine="streaming")
        for row, *ids in found.iter_rows():
            name = next(name for name, token in zip(names, ids, strict=True) if not token)
            raise DataError(f"{self._path}: row {row:,} (from 0) has no {name}; remove such rows")
        if not self._reviews.select(pl.len()).collect().item():
            raise DataError(f"{self._path}: has no reviews; prepare the data set again")

    def _find_users(self) -> None:
        """The users in the order of the file, and where the rows of each begin."""
        import polars as pl

        rows = self._reviews.select("user_id", "timestamp").collect()
        runs = rows["user_id"].rle().struct.unnest()
        self.tokens: list[str] = runs["value"].to_list()
        backwards = rows.select(((pl.col("user_id") == pl.col("user_id").shift())
                                 & (pl.col("timestamp") < pl.col("timestamp").shift())).any()).item()
        if backwards or len(set(self.tokens)) < len(self.tokens):
            raise DataError(f"{self._path}: the rows of a user do not stand together in the order of "
                            f"time; sort it by user_id, timestamp and item_id")
        self._starts = np.concatenate([[0], np.cumsum(runs["len"].to_numpy(), dtype=np.int64)])

    def _read_split(self) -> dict[str, Any]:
        """Find what is held out; the split's part of `describe`."""
        import polars as pl

        from recbole_mmdiff.data.splits import TEST, VALID, SavedSplit

        saved = SavedSplit.load(self._split)
        target = self._domain == "target"
        user, item = (saved.user, saved.item) if target else (saved.source_user, saved.source_item)
        pairs = pl.DataFrame({"user_id": user.astype(str), "item_id": item.astype(str)}).unique()
        self._held_out["user_id", "item_id"] = pairs
        if target and saved.protocol in COLD:
            cold = user[np.isin(saved.part, (VALID, TEST))].astype(str)
            self._held_out["user_id",] = pl.DataFrame({"user_id": cold}).unique()
        keys = self._reviews.select("user_id", "item_id")
        found = keys.join(pairs.lazy(), on=["user_id", "item_id"], how="semi").unique()
        matched, kept = (frame.select(pl.len()).collect(engine="streaming").item()
                         for frame in (found, self._without_held_out(keys)))
        if pairs.height and not matched:
            raise DataError(f"--split: none of the {pairs.height:,} {self._domain} interactions that "
                            f"{self._split} holds out is in {self._path.name}; is it the split of "
                            f"other data, or of the other --domain?")
        return {"split_protocol": saved.protocol, "split_digest": saved.digest(), "domain": self._domain,
                "held_out_pairs": pairs.height, "held_out_pairs_found": matched,
                "reviews_held_out": int(self._starts[-1]) - kept}

    def _without_held_out(self, rows: pl.LazyFrame) -> pl.LazyFrame:
        for columns, held_out in self._held_out.items():
            rows = rows.join(held_out.lazy(), on=list(columns), how="anti", maintain_order="left")
        return rows

    def part(self, start: int, stop: int) -> list[Sample]:
        import polars as pl

        tokens = self.tokens[start:stop]
        first, last = self._starts[start], self._starts[start + len(tokens)]
        rows = self._reviews.slice(first, last - first).select("user_id", "item_id", "review")
        text = pl.col("review").str.strip_chars()
        rows = self._without_held_out(rows).with_columns(text if self._max_characters is None else
                                 text.str.slice(0, self._max_characters)) \
            .filter(pl.col("review").fill_null("") != "")
        joined = rows.group_by("user_id", maintain_order=True).tail(self._latest) \
            .group_by("user_id", maintain_order=True).agg(pl.col("review").reverse().str.join("\n")).collect()
        texts = dict(joined.iter_rows())
        return [self._sample(token, texts.get(token, "")) for token in tokens]

    def _sample(self, token: str, reviews: str) -> Sample:
        text = self._prompt.fill({"reviews": reviews}) if self._prompt else reviews
        return Sample(token, text, blank=not reviews)

    def describe(self) -> dict[str, Any]:
        described = {"fields": ["review"], "reviews_per_user": self._latest,
                     "max_characters": self._max_characters}
        return {**described, **self._split_record, **(self._prompt.describe() if self._prompt else {})}

    def digest(self) -> str:
        # All else that the texts depend on is in `describe`.
        return sha256(self._path)
