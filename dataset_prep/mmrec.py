"""``recbole-mmdiff prepare mmrec``: the prepared data sets of the MMRec toolbox to our files.

MMRec keeps ``NAME.inter`` (tab-separated: userID, itemID, x_label and, mostly, rating and timestamp)
and ``<modality>_feat.npy``, whose row i belongs to the item with itemID i. Its split stands in
x_label (0 train, 1 valid, 2 test); ``split_protocol: benchmark`` reads it from our file as it is.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from dataset_prep.output import record_path, write_dataset
from dataset_prep.skips import Skips
from recbole_mmdiff.data.features import write_features
from recbole_mmdiff.errors import DataError, one_of
from recbole_mmdiff.files import sha256

TOKENS = ("ids", "asin")
#: users, items and interactions in Table 1 of the CCDRec paper
PUBLISHED = {"baby": (19_445, 7_050, 160_792), "sports": (35_598, 18_357, 296_337),
             "clothing": (39_387, 23_033, 237_488)}
_COLUMNS = {"userID": "user_id:token", "itemID": "item_id:token", "rating": "rating:float",
            "timestamp": "timestamp:float", "x_label": "x_label:float"}
_REQUIRED = ("userID", "itemID", "x_label")
_SUFFIX = "_feat.npy"


@dataclass(frozen=True)
class Imported:
    """What an import wrote: the folder; users, items and rows of each part; modality -> (rows, dim);
    and what it left out."""

    folder: Path
    users: int
    items: int
    parts: tuple[int, int, int]
    features: dict[str, tuple[int, int]]
    skips: Skips

    @property
    def interactions(self) -> int:
        """Rows of all parts."""
        return sum(self.parts)

    def lines(self) -> list[str]:
        """The statistics for people."""
        train, valid, test = self.parts
        sparsity = 1 - self.interactions / (self.users * self.items)
        lines = [f"{self.folder}: {self.users:,} users, {self.items:,} items, {self.interactions:,} "
                 f"interactions (train {train:,}, valid {valid:,}, test {test:,}), sparsity {sparsity:.2%}"]
        for name, (rows, dim) in self.features.items():
            lines.append(f"feature {name}: {rows:,} items x {dim:,}; {rows - self.items:,} of them have "
                         f"no interactions")
        if not self.features:
            lines.append(f"warning: there is no <modality>{_SUFFIX}; multimodal models cannot use this data")
        return lines + self.skips.lines()


def import_mmrec(folder: str | Path, name: str, output: str | Path = "dataset",
                 new_name: str | None = None, tokens: str = "ids") -> Imported:
    """Write ``output/NAME`` out of MMRec's files in ``folder``; NAME is ``new_name`` or ``name``.

    ``tokens``: ``ids`` keeps MMRec's numbers as tokens; ``asin`` takes the original ones from
    i_id_mapping.csv and, if it is there, u_id_mapping.csv. Of lines with the same user and item the
    first is kept. Features are stored as float32 (float16 stays) in MMRec's row order, items
    without interactions included.

    Raises:
        DataError: names the file and the line, row or token of the first fault.
    """
    one_of("--tokens", tokens, TOKENS)
    folder, new_name = Path(folder), new_name or name
    if new_name != Path(new_name).name:
        raise DataError(f"{new_name!r} is not a usable name of a data set; it must be a plain file name")
    source, target = folder / f"{name}.inter", Path(output) / new_name
    if source.resolve() == (target / f"{new_name}.inter").resolve():
        raise DataError(f"{source}: would be overwritten; choose another --output or name it --as=NAME")
    skips = Skips()
    inter = _first_of_pairs(_read_inter(source), source, skips)
    features = {path.name.removesuffix(_SUFFIX): _map_feature(path, inter["itemID"].max(), source)
                for path in sorted(folder.glob(f"*{_SUFFIX}"))}
    users, items = _Names(folder / "u_id_mapping.csv"), _Names(folder / "i_id_mapping.csv")
    if tokens == "asin":
        items.read("itemID")
        if users.path.is_file():
            users.read("userID")
    rows = {modality: items.of(pl.int_range(len(matrix), eager=True)).to_list()
            for modality, matrix in features.items()}
    named = inter.with_columns(userID=users.of(inter["userID"]), itemID=items.of(inter["itemID"]))
    parts = np.bincount(inter["x_label"].to_numpy(), minlength=3).tolist()
    done = Imported(target, inter["userID"].n_unique(), inter["itemID"].n_unique(), tuple(parts),
                    {modality: matrix.shape for modality, matrix in features.items()}, skips)
    _write(done, named, features, rows, source, tokens)
    return done


def _write(done: Imported, inter: pl.DataFrame, features: dict[str, np.ndarray],
           rows: dict[str, list[str]], source: Path, tokens: str) -> None:
    record_path(done.folder).unlink(missing_ok=True)    # Without its record the folder is unfinished.
    inputs = {source.name: sha256(source)}
    for modality, matrix in features.items():
        file = f"{modality}{_SUFFIX}"
        inputs[file] = sha256(source.with_name(file))
        with np.errstate(over="ignore"):    # What does not fit becomes Inf, which is refused by name.
            matrix = matrix if matrix.dtype == np.float16 else matrix.astype(np.float32, copy=False)
        write_features(done.folder, done.folder.name, modality, rows[modality], matrix,
                       encoder="not stated by MMRec", source=file)
    table = inter.rename({name: _COLUMNS[name] for name in inter.columns})
    write_dataset(done.folder, {"inter": table}, {
        "source": "MMRec", "inputs": inputs, "tokens": tokens, "users": done.users,
        "items": done.items, "parts": dict(zip(("train", "valid", "test"), done.parts, strict=True)),
        "left_out": done.skips.as_dict()})


def _read_table(path: Path) -> pl.DataFrame:
    """A tab-separated file with a header, every cell as text."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
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


def _map_feature(path: Path, largest: int, source: Path) -> np.ndarray:
    """The matrix of a feature, memory-mapped, with a row for every item up to ``largest``."""
    try:
        matrix = np.lib.format.open_memmap(path, mode="r")    # This one never unpickles.
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a complete .npy matrix ({error}); pickled files are never read: save "
                        f"a plain array of floats with numpy.save") from error
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise DataError(f"{path}: holds {matrix.dtype} of shape {matrix.shape}; floats of shape (items, "
                        f"dim) are accepted")
    if len(matrix) <= largest:
        raise DataError(f"{path}: has {len(matrix):,} rows, but {source.name} has the itemID {largest}; "
                        f"row i must belong to itemID i")
    return matrix


class _Names:
    """The tokens of ids: the ids themselves until a mapping is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[int, str] | None = None

    def read(self, column: str) -> None:
        """Take the names from the mapping: one column of ids, ``column``, and one of names."""
        table = _read_table(self.path)
        others = [name for name in table.columns if name != column]
        if len(others) != 1 or column not in table.columns:
            raise DataError(f"{self.path}, line 1: the columns are {table.columns}; {column!r} and one of "
                            f"original names are expected")
        ids, names = table[column].cast(pl.Int64, strict=False), table[others[0]]
        for values, what in ((ids, column), (names, others[0])):
            bad = values.is_null() | ~values.is_first_distinct()
            if bad.any():
                row = bad.arg_max()
                raise DataError(f"{self.path}, line {row + 2}: {what} is {table[what][row]!r}, which is "
                                f"empty, not whole, or stands on an earlier line")
        self._known = dict(zip(ids, names, strict=True))

    def of(self, ids: pl.Series) -> pl.Series:
        """The token of every id."""
        if self._known is None:
            return ids.cast(pl.String)
        names = ids.replace_strict(self._known, default=None, return_dtype=pl.String)
        if names.null_count():
            raise DataError(f"{self.path}: has no name for {names.null_count():,} ids, first "
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


def main(options: argparse.Namespace) -> None:
    """Import, and print the statistics beside the published ones."""
    done = import_mmrec(options.folder, options.name, options.output, options.new_name, options.tokens)
    print(*done.lines(), sep="\n")
    published = PUBLISHED.get(options.name)
    if published is not None:
        same = published == (done.users, done.items, done.interactions)
        print("Table 1 of CCDRec: {:,} users, {:,} items, {:,} interactions{}".format(
            *published, ", the same" if same else ", which differs"))
    # Without the ratings every interaction counts as positive, as in MMRec.
    print(f"train on it with --dataset={done.folder.name} --data_path={options.output} "
          f"--split_protocol=benchmark '--load_col={{inter: [user_id, item_id, x_label]}}'")
