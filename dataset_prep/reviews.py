"""Raw reviews and ratings to tables: what polars reads without a doubt at once, the rest line by line."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import polars as pl

from dataset_prep.raw import Chunk, RawFile, parse_json, reason
from recbole_mmdiff.errors import DataError

MILLISECONDS = 10**11   # a later time is in milliseconds: as seconds it would lie past the year 5000
ROW = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float64, "timestamp": pl.Float64}
_PLAIN_ID = r"^[A-Za-z0-9_#-]+$"
# Before 2.1, the newest for Python 3.10 among them, polars overflows the stack on deeply nested JSON.
_UNGUARDED = tuple(map(int, pl.__version__.split(".")[:2])) < (2, 1)
_DEEP = 500


class Layout(Protocol):
    """How the lines of a file become rows: many at once, or one, which also finds what is wrong."""

    schema: dict[str, Any]

    def frame(self, text: bytes) -> pl.DataFrame:
        """The columns of ``schema``, a row a line; raises PolarsError."""

    def line(self, line: bytes) -> tuple:
        """The same for one line; raises ValueError with the reason."""


class JsonReviews:
    """Reviews as JSON lines; ``names`` maps user_id, item_id, rating, timestamp (and review) to their keys.

    Where a key stands twice in a line, its first value counts.
    """

    def __init__(self, names: dict[str, str], text: bool = False) -> None:
        self.schema = ROW | ({"review": pl.String} if text else {})
        self._names = {column: names[column] for column in self.schema}
        self._schema = {names[column]: dtype for column, dtype in self.schema.items()}

    def frame(self, text: bytes) -> pl.DataFrame:
        if _UNGUARDED and most_brackets(text) > _DEEP:
            raise pl.exceptions.ComputeError("nested too deep")
        return pl.read_ndjson(text, schema=self._schema).rename(
            {name: column for column, name in self._names.items()})

    def line(self, line: bytes) -> tuple:
        value = parse_json(line)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        user, item, rating, time, *text = (value.get(name) for name in self._names.values())
        return (*checked_row(user, item, rating, time), *map(_plain_text, text))


class CsvRatings:
    """Ratings without texts, separated by commas; ``columns`` are the names of the file's columns."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.schema = ROW
        self._columns = list(columns)
        self._places = [self._columns.index(column) for column in ROW]

    def frame(self, text: bytes) -> pl.DataFrame:
        schema = {column: ROW.get(column, pl.String) for column in self._columns}
        return pl.read_csv(text, has_header=False, schema=schema, quote_char=None).select(*ROW)

    def line(self, line: bytes) -> tuple:
        fields = csv_fields(line.decode("utf-8-sig"))
        if len(fields) != len(self._columns):
            raise ValueError(f"not {len(self._columns)} fields")
        user, item, rating, time = (fields[place] for place in self._places)
        try:
            numbers = float(rating), float(time)
        except ValueError as error:
            raise ValueError("the rating or the time is not a number") from error
        return checked_row(user, item, *numbers)


def csv_fields(line: str) -> list[str]:
    """The fields of one line of CSV, without their quotes; a ValueError if it is none."""
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise ValueError("not CSV") from error


def read_rows(raw: RawFile, layout: Layout, header: bool = False) -> Iterator[pl.DataFrame]:
    """The sound rows of a file, in batches: ``row`` (the line's number), user_id, item_id, rating (float32),
    timestamp (int64 seconds) and what else the layout has. Blank lines are passed over.

    Raises:
        DataError: as `RawFile` does; no line is good; or too many are bad.
    """
    for chunk in raw.chunks():
        if header and chunk.first == 1:
            chunk = Chunk(2, chunk.lines - 1, chunk.text[chunk.text.index(b"\n") + 1:])
        batch = _batch(raw, layout, chunk)
        raw.good += batch.height
        if batch.height:
            yield batch
    raw.check_share()
    if not raw.good:
        raise DataError(f"{raw.path}: none of its {raw.lines:,} lines can be used; download it again")


def _batch(raw: RawFile, layout: Layout, chunk: Chunk) -> pl.DataFrame:
    """What polars read without a doubt, and line by line what it refused or what looks odd."""
    try:
        frame = layout.frame(chunk.text)
    except pl.exceptions.PolarsError:
        frame = None
    if frame is None or frame.height != chunk.lines:
        # Some line is bad or blank, so that rows no longer tell their lines.
        return _typed(_by_line(raw, layout, enumerate(chunk.text.split(b"\n")[:-1], chunk.first)))
    frame = frame.with_row_index("row", offset=chunk.first)
    doubtful = frame.filter(~_sound())["row"].to_list()
    if not doubtful:
        return _typed(frame)
    lines = chunk.text.split(b"\n")
    odd = _by_line(raw, layout, ((number, lines[number - chunk.first]) for number in doubtful))
    return _typed(pl.concat([frame.filter(_sound()), odd]).sort("row"))


def _by_line(raw: RawFile, layout: Layout, lines: Iterable[tuple[int, bytes]]) -> pl.DataFrame:
    rows = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            rows.append((number, *layout.line(line)))
        except (ValueError, RecursionError) as error:
            raw.bad(number, reason(error))
    return pl.DataFrame(rows, schema={"row": pl.UInt32, **layout.schema}, orient="row")


def _sound() -> pl.Expr:
    # Polars turns any JSON value into text for a text column: what is not plainly an id is looked at again.
    ids = pl.col("user_id", "item_id")
    plain = pl.all_horizontal(ids.str.contains(_PLAIN_ID) & ~ids.is_in(["true", "false"]))
    numbers = pl.col("rating").is_between(0, 5) & pl.col("timestamp").is_between(0, 1000 * MILLISECONDS)
    return (plain & numbers).fill_null(False)


def most_brackets(text: bytes) -> int:
    """The most opening brackets and braces in one line, of which a value is at most so deep."""
    characters = np.frombuffer(text, dtype=np.uint8)
    opening = np.flatnonzero((characters == ord("[")) | (characters == ord("{")))
    lines = np.searchsorted(np.flatnonzero(characters == ord("\n")), opening)
    return int(np.bincount(lines).max(initial=0))


def _typed(frame: pl.DataFrame) -> pl.DataFrame:
    time = pl.col("timestamp").cast(pl.Int64)
    return frame.with_columns(
        pl.col("row").cast(pl.UInt32), pl.col("rating").cast(pl.Float32),
        pl.when(time > MILLISECONDS).then(time // 1000).otherwise(time).alias("timestamp"))


def checked_row(user: Any, item: Any, rating: Any, time: Any) -> tuple[str, str, float, float]:
    """The four values if they are a rating, else a ValueError that tells which is wrong."""
    user, item = _checked_id(user, "user"), _checked_id(item, "item")
    for value, name, most in ((rating, "rating", 5), (time, "time", 1000 * MILLISECONDS)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # A whole number may be too large for a float, so that isfinite must not see it.
        if not number or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"the {name} is missing or not a number")
        if not 0 <= value <= most:
            raise ValueError(f"the {name} is out of range")
    return user, item, float(rating), float(time)


def _checked_id(value: Any, name: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"the {name} is missing or no text")
    if re.search(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff\ufeff]", value):
        raise ValueError(f"the {name} holds a space or a control character")
    return value


def _plain_text(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub("[\ud800-\udfff]", "\0", text)   # half a surrogate pair is no text; as polars has it
