"""Writing a prepared data set: atomic files, review texts, and the record of where they came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from recbole_mmdiff import __version__
from recbole_mmdiff.errors import DataError
from recbole_mmdiff.files import sha256, write_atomically, write_json

_ATOMIC = ("inter", "item", "user")
_BREAKS = r"[\t\r\n]"    # what would end a cell or its line
TYPES = ("token", "float", "token_seq", "float_seq")


def clean(column: str | pl.Expr) -> pl.Expr:
    """Text for one cell: runs of whitespace and control characters become one space; empty is null."""
    text = pl.col(column) if isinstance(column, str) else column
    text = text.str.replace_all(r"[\s\p{Cc}\x{2028}\x{2029}]+", " ").str.strip_chars()
    return pl.when(text != "").then(text)


def record_path(folder: Path) -> Path:
    """Where the record of a data set stands."""
    return folder / f"{folder.name}.prep.json"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a data set that was written to its end, else None."""
    try:
        record = json.loads(record_path(folder).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_dataset(folder: str | Path, tables: Mapping[str, pl.DataFrame],
                  record: Mapping[str, Any]) -> Path:
    """Write ``folder/NAME.<suffix>`` for every table, NAME being the folder's name.

    ``tables``: ``inter``, ``item`` and ``user`` become RecBole's atomic files, their columns named
    ``name:type``; any other table becomes ``NAME.<suffix>.parquet``. Each file appears whole or
    not at all. ``NAME.prep.json`` holds ``record``, the version, and rows and sha256 of every
    file; it is removed first and written last, so files without it are an unfinished write.

    Raises:
        DataError: a column without a type, or a cell that would break its line.
    """
    folder = Path(folder)
    for suffix in _ATOMIC:
        if suffix in tables:
            _check_cells(folder / f"{folder.name}.{suffix}", tables[suffix])
    folder.mkdir(parents=True, exist_ok=True)
    record_path(folder).unlink(missing_ok=True)
    files = {}
    for suffix, table in tables.items():
        atomic = suffix in _ATOMIC
        path = folder / f"{folder.name}.{suffix}{'' if atomic else '.parquet'}"
        with write_atomically(path) as temporary:
            if atomic:
                table.write_csv(temporary, separator="\t", quote_style="never", null_value="")
            else:
                table.write_parquet(temporary)
        files[path.name] = {"rows": table.height, "sha256": sha256(path)}
    write_json({"recbole_mmdiff": __version__, "polars": pl.__version__, **record, "files": files},
               record_path(folder))
    return folder


def _check_cells(path: Path, table: pl.DataFrame) -> None:
    for name, dtype in table.schema.items():
        if name.partition(":")[2] not in TYPES:
            raise DataError(f"{path}: the column {name!r} has no type; name it 'name:type' with one of "
                            f"{', '.join(TYPES)}")
        if dtype != pl.String:
            continue
        broken = table.filter(pl.col(name).str.contains(_BREAKS))
        if broken.height:
            raise DataError(f"{path}: {broken.height:,} cells of {name} hold a tab or a line break, "
                            f"first {broken[name][0][:60]!r}; they would break their lines")
