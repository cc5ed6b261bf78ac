"""``recbole-mmdiff prepare mmrec``: the prepared data sets of the MMRec toolbox to our files.

MMRec keeps ``NAME.inter`` (tab-separated: userID, itemID, x_label and, mostly, rating and timestamp)
and ``<modality>_feat.npy``, whose row i belongs to the item with itemID i. Its split stands in
x_label (0 train, 1 valid, 2 test); ``split_protocol: benchmark`` reads it from our file as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dataset_prep.output import alone_with, checked_name, is_made, read_record, start_dataset, write_dataset
from dataset_prep.presets import PRESETS
from dataset_prep.skips import Skips
from recbole_mmdiff.data.features import check_finite, feature_path, map_matrix, write_features
from recbole_mmdiff.errors import DataError, one_of
from recbole_mmdiff.files import sha256

TOKENS = ("ids", "asin")
_COLUMNS = {"userID": "user_id:token", "itemID": "item_id:token", "rating": "rating:float",
            "timestamp": "timestamp:float", "x_label": "x_label:float"}
_REQUIRED = ("userID", "itemID", "x_label")
_SUFFIX = "_feat.npy"
_USER_NAMES, _ITEM_NAMES = "u_id_mapping.csv", "i_id_mapping.csv"


@dataclass(frozen=True)
class Imported:
    """An imported data set: its folder, its record, and whether it was there already."""

    folder: Path
    record: Mapping[str, Any]
    there: bool = False

    def lines(self) -> list[str]:
        """The statistics for people."""
        counts, parts = self.record["counts"], self.record["parts"]
        users, items, ratings = (counts[name] for name in ("users", "items", "ratings"))
        split = ", ".join(f"{name} {rows:,}" for name, rows in parts.items())
        lines = [f"{self.folder}: there already, made of the same files"] * self.there
        lines.append(f"{self.folder}: {users:,} users, {items:,} items, {ratings:,} interactions ({split}), "
                     f"sparsity {1 - ratings / (users * items):.2%}")
        for name, rows in self.record["features"].items():
            lines.append(f"feature {name}: {rows:,} items x {self.record['dims'][name]:,}; "
                         f"{rows - items:,} of them have no interactions")
        if not self.record["features"]:
            lines.append(f"warning: there is no <modality>{_SUFFIX}; multimodal models cannot use this data")
        return lines + [f"left out {entry['count']:,}: {reason} (first: {entry['first']})"
                        for reason, entry in self.record["left_out"].items()]


def import_mmrec(folder: str | Path, name: str, output: str | Path = "dataset", new_name: str | None = None,
                 tokens: str = "ids", overwrite: bool = False) -> Imported:
    """Write ``output/NAME`` out of MMRec's files in ``folder``; NAME is ``new_name`` or ``name``.

    ``tokens``: ``ids`` keeps MMRec's numbers as tokens; ``asin`` takes the original ones from
    i_id_mapping.csv and, if it is there, u_id_mapping.csv. Of lines with the same user and item the
    first is kept. Features are stored as float32 (float16 stays) in MMRec's row order, items
    without interactions included. Nothing is written if the same data set is there already, and
    nothing is touched before all files have been read and checked.

    Raises:
        ConfigError: an option that is not known, or a name that cannot be used.
        DataError: another data set is there and ``overwrite`` is not given; or it names the file
            and the line, row or token of the first fault.
    """
    one_of("--tokens", tokens, TOKENS)
    named = ("--name", name) if new_name is None else ("--as", new_name)
    source, target = Path(folder) / f"{name}.inter", Path(output) / checked_name(named[1], named[0])
    if source.resolve() == (target / f"{target.name}.inter").resolve():
        raise DataError(f"{source}: would be overwritten; choose another --output or name it --as=NAME")
    files = _inputs(source, tokens)
    recipe = {"source": "MMRec", "tokens": tokens, "inputs": {path.name: sha256(path) for path in files}}
    if is_made(target, recipe, overwrite):
        return Imported(target, read_record(target), there=True)
    skips = Skips()
    inter = _first_of_pairs(_read_inter(source), source, skips)
    users = _Names(source.with_name(_USER_NAMES), "userID", files)
    items = _Names(source.with_name(_ITEM_NAMES), "itemID", files)
    features = {path.name.removesuffix(_SUFFIX): _read_feature(path, items, inter["itemID"].max(), source)
                for path in files if path.name.endswith(_SUFFIX)}
    for modality in features:
        feature_path(target, target.name, modality, "npy")    # Refuses what is no name.
    table = inter.with_columns(userID=users.of(inter["userID"]), itemID=items.of(inter["itemID"]))
    with alone_with(target):
        _write(target, table, features, {"recipe": recipe, **_counts(inter), "left_out": skips.as_dict()})
    return Imported(target, read_record(target))


def _inputs(source: Path, tokens: str) -> list[Path]:
    """The files that an import reads."""
    files = [source, *sorted(source.parent.glob(f"*{_SUFFIX}"))]
    if tokens == "asin":
        users = source.with_name(_USER_NAMES)
        files += [source.with_name(_ITEM_NAMES)] + [users] * users.is_file()
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
    return files


def _counts(inter: pl.DataFrame) -> dict[str, Any]:
    parts = np.bincount(inter["x_label"].to_numpy(), minlength=3).tolist()
    return {"counts": {"users": inter["userID"].n_unique(), "items": inter["itemID"].n_unique(),
                       "ratings": inter.height},
            "parts": dict(zip(("train", "valid", "test"), parts, strict=True))}


def _write(target: Path, inter: pl.DataFrame, features: Mapping[str, tuple[list[str], np.ndarray]],
           record: Mapping[str, Any]) -> None:
    record = {**record, "features": {modality: len(rows) for modality, (rows, _) in features.items()},
              "dims": {modality: matrix.shape[1] for modality, (_, matrix) in features.items()}}
    start_dataset(target, record)
    for modality, (rows, matrix) in features.items():
        write_features(target, target.name, modality, rows, matrix, encoder="not stated by MMRec",
                       source=f"{modality}{_SUFFIX}")
    table = inter.rename({name: _COLUMNS[name] for name in inter.columns})
    write_dataset(target, {"inter": table}, record, started=True)


def _read_table(path: Path) -> pl.DataFrame:
    """A tab-separated file with a header, every cell as text."""
    try:
        return pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not a tab-separated table in UTF-8; {_fault(path, error)}") from error


def _fault(path: Path, error: Exception) -> str:
    """The first line that is longer than the header; polars does not tell its number."""
    with path.open("rb") as file:
        counts = (line.count(b"\t") + 1 for line in file)
        width = next(counts, 0)
        for number, fields in enumerate(counts, start=2):
            if fields > width:
                return f"line {number} has {fields} fields, the header has {width}"
    return str(error).partition("\n")[0]


def _read_inter(path: Path) -> pl.DataFrame:
    """The columns of MMRec that we know: ids and x_label as Int64, the others as Float64."""
    text = _read_table(path)
    missing = [column for column in _REQUIRED if column not in text.columns]
    if missing:
        raise DataError(f"{path}, line 1: there is no column {missing[0]!r}, only {text.columns}; MMRec's "
                        f"files are tab-separated with the columns {', '.join(_COLUMNS)}")
    if not text.height:
        raise DataError(f"{path}: holds a header but no rows")
    columns = {}
    for column in _COLUMNS:
        if column not in text.columns:
            continue
        values = text[column].cast(pl.Float64, strict=False)
        good, accepted = values.is_finite(), "a number"
        if column in ("userID", "itemID"):
            values = text[column].cast(pl.Int64, strict=False)
            good, accepted = values >= 0, "a whole number from 0"
        elif column == "x_label":
            good, accepted = values.is_in([0.0, 1.0, 2.0]), "0 (train), 1 (valid) or 2 (test)"
        good = good.fill_null(False)
        if not good.all():
            row = good.arg_min()
            raise DataError(f"{path}, line {row + 2}: {column} is {text[column][row] or ''!r}, but must be "
                            f"{accepted} ({(~good).sum():,} such lines)")
        columns[column] = values.cast(pl.Int64) if column == "x_label" else values
    return pl.DataFrame(columns)


def _first_of_pairs(inter: pl.DataFrame, path: Path, skips: Skips) -> pl.DataFrame:
    first = inter.select(pl.struct("userID", "itemID").is_first_distinct()).to_series()
    if not first.all():
        skips.add("lines of a user and an item that stand together on an earlier line",
                  (~first).sum(), f"{path.name}, line {first.arg_min() + 2}")
    return inter.filter(first)


def _read_feature(path: Path, items: _Names, largest: int, source: Path) -> tuple[list[str], np.ndarray]:
    """The tokens and the finite matrix of a feature with a row for every item up to ``largest``;
    memory-mapped unless it must be converted."""
    matrix = map_matrix(path, ("float16", "float32", "float64"))
    if len(matrix) <= largest:
        raise DataError(f"{path}: has {len(matrix):,} rows, but {source.name} has the itemID {largest}; "
                        f"row i must belong to itemID i")
    if matrix.dtype != np.float16:
        with np.errstate(over="ignore"):    # What does not fit becomes Inf, which is refused by name.
            matrix = matrix.astype(np.float32, copy=False)
    rows = items.of(pl.int_range(len(matrix), eager=True)).to_list()
    check_finite(matrix, rows, path)
    return rows, matrix


class _Names:
    """The tokens of ids, from the mapping file ``path`` if it is one of ``files``, else the ids themselves.

    The file has one column of ids, ``column``, and one of names.
    """

    def __init__(self, path: Path, column: str, files: list[Path]) -> None:
        self._path = path
        self._known = self._read(column) if path in files else None

    def _read(self, column: str) -> dict[int, str]:
        table = _read_table(self._path)
        others = [name for name in table.columns if name != column]
        if len(others) != 1 or column not in table.columns:
            raise DataError(f"{self._path}, line 1: the columns are {table.columns}; {column!r} and one of "
                            f"original names are expected")
        ids, names = table[column].cast(pl.Int64, strict=False), table[others[0]]
        for values, what in ((ids, column), (names, others[0])):
            bad = values.is_null() | ~values.is_first_distinct() | table[what].str.contains("\r")
            if bad.any():
                row = bad.arg_max()
                raise DataError(f"{self._path}, line {row + 2}: {what} is {table[what][row]!r}, which is "
                                f"empty, not whole, breaks its line, or stands on an earlier line")
        return dict(zip(ids, names, strict=True))

    def of(self, ids: pl.Series) -> pl.Series:
        """The token of every id."""
        if self._known is None:
            return ids.cast(pl.String)
        names = ids.replace_strict(self._known, default=None, return_dtype=pl.String)
        if names.null_count():
            raise DataError(f"{self._path}: has no name for {names.null_count():,} ids, first "
                            f"{ids.filter(names.is_null())[0]}; use --tokens=ids")
        return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``prepare mmrec``."""
    add = parser.add_argument
    add("--folder", required=True, metavar="DIR", help="holds NAME.inter and the *_feat.npy of MMRec")
    add("--name", required=True, help="MMRec's name of the data set, baby say")
    add("--output", default="dataset", metavar="DIR", help="data path; the files go to DIR/NAME")
    add("--as", dest="new_name", metavar="NAME", help="our name of the data set, if it is another")
    add("--tokens", default="ids", help="ids (MMRec's numbers) or asin (from i_id_mapping.csv)")
    add("--overwrite", action="store_true", help="replace the data set of other files that is there")


def main(options: argparse.Namespace) -> None:
    """Import, and print the statistics beside the published ones."""
    done = import_mmrec(options.folder, options.name, options.output, options.new_name, options.tokens,
                        options.overwrite)
    print(*done.lines(), sep="\n")
    preset = PRESETS.get(f"ccdrec-{options.name}")
    if preset is not None:
        counts, paper = done.record["counts"], preset.domains[0].published
        same = all(paper[what] == count for what, count in counts.items())
        print(f"{preset.table}: {', '.join(f'{paper[what]:,} {what}' for what in counts)}"
              f"{', the same' if same else ', which differs'}")
    # Without the ratings every interaction counts as positive, as in MMRec.
    print(f"ranking models train on it with --dataset={done.folder.name} --data_path={options.output} "
          f"--split_protocol=benchmark '--load_col={{inter: [user_id, item_id, x_label]}}'")
