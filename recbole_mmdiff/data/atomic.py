"""Reading RecBole's atomic files: fast, and strict about what they hold."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from recbole.utils import FeatureType

from recbole_mmdiff.errors import DataError


@dataclass(frozen=True)
class Column:
    """One column of an atomic file: ``name:type`` in the header."""

    name: str
    ftype: FeatureType


def read_header(path: Path, separator: str, encoding: str) -> list[Column]:
    """The columns of an atomic file.

    Raises:
        DataError: no such file, an empty one, or a header that is not ``name:type ...``.
    """
    try:
        with open(path, encoding=encoding) as file:
            line = file.readline().rstrip("\r\n").removeprefix("\ufeff")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, LookupError) as error:
        raise _not_text(path, encoding, error) from error
    known = [ftype.value for ftype in FeatureType]
    columns = []
    for word in line.split(separator):
        name, colon, ftype = word.partition(":")
        if not colon or not name or ftype not in known:
            raise DataError(f"{path}, line 1: the header field {word!r} is not 'name:type' with "
                            f"a type of {known}")
        columns.append(Column(name, FeatureType(ftype)))
    names = [column.name for column in columns]
    if len(set(names)) < len(names):
        raise DataError(f"{path}, line 1: a column name stands twice in {names}")
    return columns


def read_atomic(path: Path, wanted: set[str] | None, required: set[str], separator: str = "\t",
                encoding: str = "utf-8", categories: tuple[str, ...] = ()) -> pd.DataFrame:
    """The wanted columns of an atomic file, a row each, in the order of the file.

    Token columns are strings (pandas categories for those in ``categories``), floats are float64,
    sequences are unsplit strings. A cell that is empty in a column of ``required`` is an error;
    elsewhere it is missing (NaN).

    Raises:
        DataError: names the file, the line and the column of the first fault.
    """
    columns = read_header(path, separator, encoding)
    missing = required - {column.name for column in columns}
    if missing:
        raise DataError(f"{path}, line 1: there is no column {sorted(missing)[0]!r}, only "
                        f"{[column.name for column in columns]}")
    content = Path(path).read_bytes()
    lines = _check_width(path, content, len(columns), separator, encoding)
    chosen = [column for column in columns if wanted is None or column.name in wanted]
    dtypes = {c.name: np.float64 if c.ftype == FeatureType.FLOAT else str for c in chosen}
    options = {"sep": separator, "header": 0, "names": [c.name for c in columns],
               "usecols": [c.name for c in chosen], "encoding": encoding,
               "quoting": csv.QUOTE_NONE, "keep_default_na": False, "na_values": [""]}
    if len(separator.encode("utf-8")) == 1:     # pandas' other parser is exact anyway
        options["float_precision"] = "round_trip"
    try:
        frame = pd.read_csv(io.BytesIO(content), dtype=dtypes, **options)
    except UnicodeDecodeError as error:
        raise _not_text(path, encoding, error) from error
    except ValueError as error:
        text = pd.read_csv(io.BytesIO(content), dtype=str, encoding_errors="replace", **options)
        _check_lines(path, text, lines)
        text.index = lines
        _blame_number(path, text, [c.name for c in chosen if c.ftype == FeatureType.FLOAT])
        raise DataError(f"{path}: {error}") from error
    _check_lines(path, frame, lines)
    # Where blank lines were skipped the index still tells the line.
    if len(lines) and lines[-1] != len(lines) - 1:
        frame.index = lines
    _check_cells(path, frame, required)
    # Not by read_csv, where 007 becomes 7 if all tokens of the column are numbers.
    return frame.astype({name: "category" for name in categories if name in frame})


def _not_text(path: Path, encoding: str, error: Exception) -> DataError:
    return DataError(f"{path}: is not {encoding} text ({error}); set the key 'encoding'")


def _check_width(path: Path, content: bytes, width: int, separator: str,
                 encoding: str) -> np.ndarray:
    """Check that every line has as many fields as the header, blank ones apart.

    Returns:
        the numbers of the lines that are not blank, the first one after the header being 0.
    """
    marks = f"{separator}\n"
    if len(separator) > 1 or marks.encode(encoding) != marks.encode("ascii", "replace"):
        # A longer separator or wider characters: made bytes that can be counted.
        try:
            content = content.decode(encoding).replace(separator, "\0").encode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_text(path, encoding, error) from error
        separator, encoding = "\0", "utf-8"
    characters = np.frombuffer(content, dtype=np.uint8)
    ends = np.append(np.flatnonzero(characters == ord("\n")), len(content))
    marks = np.flatnonzero(characters == ord(separator))
    fields = np.diff(np.searchsorted(marks, ends), prepend=0) + 1
    lengths = np.diff(ends, prepend=-1) - 1
    blank = lengths == 0
    blank |= (lengths == 1) & (characters[np.maximum(ends - 1, 0)] == ord("\r"))
    wrong = (fields != width) & ~blank
    if wrong.any():
        number = int(wrong.argmax())
        line = content[ends[number] - lengths[number]:ends[number]].decode(encoding, "replace")
        line = line.rstrip("\r")
        raise DataError(f"{path}, line {number + 1}: has {fields[number]} fields, the header has "
                        f"{width}; the line is {line[:80]!r}")
    return np.flatnonzero(~blank)[1:] - 1


def _check_lines(path: Path, frame: pd.DataFrame, lines: np.ndarray) -> None:
    if len(frame) != len(lines):
        raise DataError(f"{path}: a cell holds a carriage return (\\r), which breaks its line in "
                        f"two; remove it")


def _blame_number(path: Path, frame: pd.DataFrame, floats: list[str]) -> None:
    for name in floats:
        bad = frame.index[pd.to_numeric(frame[name], errors="coerce").isna() & frame[name].notna()]
        if len(bad):
            raise DataError(f"{path}, line {bad[0] + 2}: {name} is {frame[name][bad[0]]!r}, "
                            f"which is not a number")


def _check_cells(path: Path, frame: pd.DataFrame, required: set[str]) -> None:
    if not len(frame):
        raise DataError(f"{path}: holds a header but no rows")
    for name in sorted(required & set(frame)):
        bad = frame[name].isna().to_numpy()
        if frame[name].dtype == np.float64:
            bad = bad | ~np.isfinite(frame[name].to_numpy())
        if bad.any():
            row = int(bad.argmax())
            value = frame[name].iloc[row]
            value = "empty" if pd.isna(value) else value
            raise DataError(f"{path}, line {frame.index[row] + 2}: {name} is {value}; fill the cell "
                            f"or delete the line")
