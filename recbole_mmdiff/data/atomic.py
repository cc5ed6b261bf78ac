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
            line = file.readline().rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not {encoding} text ({error.reason}); "
                        f"set the key 'encoding'") from error
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
    _check_width(path, content, len(columns), separator, encoding)
    chosen = [column for column in columns if wanted is None or column.name in wanted]
    dtypes = {c.name: np.float64 if c.ftype == FeatureType.FLOAT else
              "category" if c.name in categories else str for c in chosen}
    options = {"sep": separator, "header": 0, "names": [c.name for c in columns],
               "usecols": [c.name for c in chosen], "encoding": encoding,
               "quoting": csv.QUOTE_NONE, "keep_default_na": False, "na_values": [""]}
    try:
        frame = pd.read_csv(io.BytesIO(content), dtype=dtypes, **options)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not {encoding} text ({error.reason}); "
                        f"set the key 'encoding'") from error
    except ValueError as error:
        frame = pd.read_csv(io.BytesIO(content), dtype=str, **options)
        _blame_number(path, frame, [c.name for c in chosen if c.ftype == FeatureType.FLOAT])
        raise DataError(f"{path}: {error}") from error
    _check_cells(path, frame, required)
    return frame


def _check_width(path: Path, content: bytes, width: int, separator: str, encoding: str) -> None:
    """Every line has as many fields as the header: counted at once, searched only if not so."""
    lines = content.count(b"\n") + (not content.endswith(b"\n"))
    mark = separator.encode(encoding)
    if content.count(mark) == lines * (width - 1) and (width > 1 or b"\n\n" not in content):
        return
    for number, line in enumerate(content.decode(encoding).splitlines(), start=1):
        fields = line.count(separator) + 1
        if line.strip() and fields != width:
            raise DataError(f"{path}, line {number}: has {fields} fields, the header has {width}; "
                            f"the line is {line[:80]!r}")


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
            raise DataError(f"{path}, line {row + 2}: {name} is {frame[name][row]}; fill the cell "
                            f"or delete the line")
