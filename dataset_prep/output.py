"""Writing a prepared data set: atomic files, review texts, and the record of where they came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from dataset_prep.folders import HIDDEN
from recbole_mmdiff import __version__
from recbole_mmdiff.data.features import feature_path
from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.files import locked, make_folder, read_json, sha256, write_atomically, write_json

_ATOMIC = ("inter", "item", "user")
_BREAKS = r"[\t\r\n]"    # what would end a cell or its line
_UNFINISHED = "unfinished"    # a key of the record of a data set that is being written
TYPES = ("token", "float", "token_seq", "float_seq")


def clean(column: str | pl.Expr) -> pl.Expr:
    """Text for one cell: runs of whitespace and control characters become one space; empty is null."""
    text = pl.col(column) if isinstance(column, str) else column
    text = text.str.replace_all(r"[\s\p{Cc}\x{2028}\x{2029}]+", " ").str.strip_chars()
    return pl.when(text != "").then(text)


def checked_name(name: str, option: str) -> str:
    """The name if a data set may have it, else a ConfigError that names the option."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
        raise ConfigError(f"{option}: {name!r} is no name of a data set; use letters, digits, '_', '.', '+' "
                          f"and '-', and begin with none of the last three")
    return name


def record_path(folder: Path) -> Path:
    """Where the record of a data set stands."""
    return folder / f"{folder.name}.prep.json"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a data set that was written to its end, else None."""
    record = _read_any_record(folder)
    return None if record is None or _UNFINISHED in record else record


def _read_any_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = read_json(record_path(folder))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if _is_record(record) else None


def _is_record(value: Any) -> bool:
    """Whether files and features stand there as `write_dataset` names them."""
    named = {"files": r"[^/\\\0]{1,250}", "features": r"[A-Za-z0-9_-]{1,250}"}
    return isinstance(value, dict) and all(
        isinstance(value.get(key, {}), dict) and all(re.fullmatch(name, one) for one in value.get(key, {}))
        for key, name in named.items())


def is_made(folder: Path, recipe: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the data set is there, finished, with all its files, and made by this very recipe.

    Raises:
        DataError: another one is there, and ``overwrite`` is not given.
    """
    if overwrite:
        return False
    record = _read_any_record(folder)
    if record is None:
        foreign = (folder / f"{folder.name}.inter").exists()
    else:
        foreign = _UNFINISHED not in record and record.get("recipe") != json.loads(json.dumps(recipe))
    if foreign:
        raise DataError(f"{folder}: another data set is there, made of other files or with other options; "
                        f"choose another --output, or --overwrite to replace it")
    return record is not None and _UNFINISHED not in record and all(
        path.is_file() for path in _files_of(folder, record))


@contextmanager
def alone_with(folder: Path) -> Iterator[None]:
    """Keep other processes from writing the data set in ``folder``, which need not be there yet.

    The file of the lock stays, in the hidden folder beside it: another process may be waiting with it.

    Raises:
        DataError: another process writes it.
    """
    hidden = folder.parent / HIDDEN
    make_folder(hidden)
    with locked(hidden / f"{folder.name}.lock",
                DataError(f"{folder}: another process prepares this data set; wait for it")):
        yield


def start_dataset(folder: Path, record: Mapping[str, Any]) -> None:
    """Remove the earlier data set and mark the folder as unfinished until `write_dataset` ends.

    Removed are all files that `write_dataset` can make, the features that the earlier record
    lists, and what a killed writer left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = re.escape(folder.name)
    pattern = re.compile(rf"{name}\.({'|'.join(_ATOMIC)}|[^.]+\.parquet)|"
                         rf"\.{name}(\.[^.]+)?\.[0-9a-f]+\.tmp\.({'|'.join(_ATOMIC)}|parquet)|"
                         rf"\.{name}\.prep\.[0-9a-f]+\.tmp\.json")
    old = _files_of(folder, _read_any_record(folder) or {})
    write_json({**record, _UNFINISHED: True}, record_path(folder))
    for path in [*old, *(path for path in folder.iterdir() if pattern.fullmatch(path.name))]:
        path.unlink(missing_ok=True)


def _files_of(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """The files that a record lists, those of its features included."""
    names = [Path(name).name for name in record.get("files", {})]
    return [folder / name for name in names] + [
        feature_path(folder, folder.name, modality, suffix)
        for modality in record.get("features", {}) for suffix in ("json", "npy", "tokens")]


def write_dataset(folder: str | Path, tables: Mapping[str, pl.DataFrame],
                  record: Mapping[str, Any], started: bool = False) -> Path:
    """Write ``folder/NAME.<suffix>`` for every table, NAME being the folder's name.

    ``tables``: ``inter``, ``item`` and ``user`` become RecBole's atomic files, their columns named
    ``name:type``; any other table becomes ``NAME.<suffix>.parquet``. Each file appears whole or
    not at all. ``NAME.prep.json`` holds ``record`` (its ``recipe`` is what `is_made` compares), the
    versions, and rows and sha256 of every file. It says that the data set is unfinished until all
    are there; ``.inter`` comes last, so that nothing unfinished can be trained on. ``started``: the
    caller called `start_dataset` and wrote features since.

    Raises:
        DataError: a column without a type, or a cell that would break its line.
    """
    folder = Path(folder)
    for suffix in _ATOMIC:
        if suffix in tables:
            _check_cells(folder / f"{folder.name}.{suffix}", tables[suffix])
    if not started:
        start_dataset(folder, record)
    files = {}
    for suffix, table in sorted(tables.items(), key=lambda entry: entry[0] == "inter"):
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
