"""What is encoded: the texts and images of items, or the reviews of users, one entry a row."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dataset_prep.encoders.base import Sample
from dataset_prep.images import image_files
from recbole_mmdiff.data.atomic import read_atomic, read_header
from recbole_mmdiff.errors import ConfigError, DataError, suggest
from recbole_mmdiff.files import sha256

if TYPE_CHECKING:
    import polars as pl

PROMPTS = Path(__file__).with_name("prompts")
DOMAINS = ("target", "source")
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


class Prompt:
    """A text with ``{name}`` places to fill in; braces that stand for themselves are doubled.

    Only plain names are accepted: no attributes, indices, conversions or formats.
    """

    def __init__(self, template: str, where: str) -> None:
        self.template, self.where = template, where
        self.names: list[str] = []
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise DataError(f"{where}: not a prompt ({error}); write {{{{ and }}}} for braces that "
                            f"stand for themselves") from error
        for _, name, form, conversion in parts:
            if name is None:
                continue
            if form or conversion or not name.isidentifier():
                raise DataError(f"{where}: {{{name}}} is not accepted with attributes, indices, "
                                f"conversions or formats; write {{column}} with a plain name")
            self.names.append(name)
        if not self.names:
            raise DataError(f"{where}: has no {{place}} to fill in, so every text would be the same")

    @classmethod
    def read(cls, path: str | Path) -> Prompt:
        """The prompt in a UTF-8 file, without white space around it."""
        try:
            return cls(Path(path).read_text(encoding="utf-8").strip(), str(path))
        except OSError as error:
            raise DataError(f"--prompt: {path} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"--prompt: {path} is not UTF-8 text ({error})") from error

    def check(self, known: Sequence[str]) -> None:
        """Raises DataError for a place that none of the ``known`` names fills."""
        for name in self.names:
            if name not in known:
                raise DataError(f"{self.where}: {{{name}}} is unknown, there are "
                                f"{', '.join(known)}{suggest(name, known)}")

    def fill(self, values: Mapping[str, str]) -> str:
        """The prompt with its places filled."""
        return "".join(literal + (values[name] if name is not None else "")
                       for literal, name, _, _ in string.Formatter().parse(self.template))

    def describe(self) -> dict[str, str]:
        return {"prompt": self.template,
                "prompt_sha256": hashlib.sha256(self.template.encode()).hexdigest()}


class Items:
    """The items of ``NAME.item`` in the order of the file: their text, and where their images lie.

    The text is ``fields`` (by default every ``token_seq`` column) joined by ``separator``, empty
    ones left out; or ``prompt`` with the item's columns filled in, and with ``{text}`` standing for
    the joined fields. ``max_characters`` cuts every cell. Columns stay unused where neither fields
    nor prompt name them. An item says nothing (``Sample.blank``) if all cells used are empty.

    Raises:
        DataError: no such file, a column or an item that it lacks or has twice.
    """

    def __init__(self, folder: Path, fields: Sequence[str] | None = None, separator: str = ". ",
                 prompt: Prompt | None = None, max_characters: int | None = None,
                 images: Path | None = None) -> None:
        path = folder / f"{folder.name}.item"
        columns = read_header(path, "\t", "utf-8")
        names = [column.name for column in columns if column.name != "item_id"]
        if fields is None:
            fields = [c.name for c in columns if c.ftype.value == "token_seq"]
        for field in fields:
            if field not in names:
                raise DataError(f"--fields: {path} has no column {field!r}, only {', '.join(names)}"
                                f"{suggest(field, names)}")
        if prompt:
            prompt.check(["text", *names])
        used = [*fields, *(prompt.names if prompt else ())]
        frame = read_atomic(path, {"item_id", *used}, {"item_id"})
        self.tokens: list[str] = frame["item_id"].tolist()
        _check_once(path, self.tokens)
        self._cells = {name: _as_text(frame[name], max_characters) for name in dict.fromkeys(used)
                       if name in names}
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
            values = {"text": text, **cells}
            used = {name: values[name] for name in self._prompt.names}
            text = self._prompt.fill(values)
        token = self.tokens[row]
        return Sample(token, text, not any(map(str.strip, used.values())), self._images.get(token))

    def describe(self) -> dict[str, Any]:
        described = {"fields": self._fields, "separator": self._separator,
                     "max_characters": self._max_characters}
        return {**described, **(self._prompt.describe() if self._prompt else {})}

    def digest(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, len(self.tokens), _BLOCK):
            for sample in self.part(start, start + _BLOCK):
                place = ""
                if sample.image is not None:
                    status = sample.image.stat()
                    place = f"{sample.image.name} {status.st_size} {status.st_mtime_ns}"
                digest.update(repr((sample.token, sample.text, place)).encode())
        return digest.hexdigest()


def _check_once(path: Path, tokens: Sequence[str]) -> None:
    seen = set()
    for token in tokens:
        if token in seen:
            raise DataError(f"{path}: the item {token!r} stands twice; keep one line for each item")
        seen.add(token)


def _as_text(cells: Any, max_characters: int | None) -> list[str]:
    """A column as strings, "" where a cell is empty; numbers as short as they can be told."""
    if cells.dtype == np.float64:
        texts = ["" if np.isnan(value) else f"{value:.15g}" for value in cells]
    else:
        texts = cells.fillna("").tolist()
    return [text[:max_characters] for text in texts]


class Users:
    """The users of ``NAME.reviews.parquet``: each one's latest reviews, the oldest of them first.

    The file holds ``user_id``, ``item_id``, ``timestamp`` and ``review``, a user's rows together,
    sorted by timestamp and item. ``reviews_per_user`` reviews a user, each cut to ``max_characters``, are
    joined by line breaks, or fill ``{reviews}`` of ``prompt``.

    ``split``: the ``split.npz`` of a run. Reviews of the interactions that it holds out of this
    ``domain`` are left out, as if they had never been written.

    Raises:
        DataError: a file or column is missing, users are scattered, or the split is of other data.
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
        if prompt:
            prompt.check(["reviews"])
        if (split is None) != (domain is None):
            raise ConfigError("--split and --domain go together: the file holds out rows of both domains")
        self._prompt, self._latest, self._max_characters = prompt, reviews_per_user, max_characters
        self._split, self._domain = split, domain
        self._find_users()
        self._held_out = self._read_split() if split else None

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

    def _read_split(self) -> pl.DataFrame:
        import polars as pl

        from recbole_mmdiff.data.splits import SavedSplit

        saved = SavedSplit.load(self._split)
        user, item = (saved.user, saved.item) if self._domain == "target" else \
            (saved.source_user, saved.source_item)
        pairs = pl.DataFrame({"user_id": user.astype(str), "item_id": item.astype(str)}).unique()
        keys = self._reviews.select("user_id", "item_id")
        self.held_out = keys.join(pairs.lazy(), on=["user_id", "item_id"], how="semi") \
            .select(pl.len()).collect(engine="streaming").item()
        if pairs.height and not self.held_out:
            raise DataError(f"--split: none of the {pairs.height:,} {self._domain} interactions that "
                            f"{self._split} holds out is in {self._path.name}; is it the split of "
                            f"other data, or of the other --domain?")
        return pairs

    def part(self, start: int, stop: int) -> list[Sample]:
        import polars as pl

        tokens = self.tokens[start:stop]
        first, last = self._starts[start], self._starts[start + len(tokens)]
        rows = self._reviews.slice(first, last - first).select("user_id", "item_id", "review")
        if self._held_out is not None:
            rows = rows.join(self._held_out.lazy(), on=["user_id", "item_id"], how="anti",
                             maintain_order="left")
        text = pl.col("review").str.strip_chars()
        rows = rows.with_columns(text if self._max_characters is None else
                                 text.str.slice(0, self._max_characters)) \
            .filter(pl.col("review").fill_null("") != "")
        joined = rows.group_by("user_id", maintain_order=True).tail(self._latest) \
            .group_by("user_id", maintain_order=True).agg(pl.col("review").str.join("\n")).collect()
        texts = dict(joined.iter_rows())
        return [self._sample(token, texts.get(token, "")) for token in tokens]

    def _sample(self, token: str, reviews: str) -> Sample:
        text = self._prompt.fill({"reviews": reviews}) if self._prompt else reviews
        return Sample(token, text, blank=not reviews)

    def describe(self) -> dict[str, Any]:
        described = {"fields": ["review"], "reviews_per_user": self._latest,
                     "max_characters": self._max_characters}
        if self._split:
            described |= {"split_sha256": sha256(self._split), "domain": self._domain,
                          "reviews_held_out": self.held_out}
        return {**described, **(self._prompt.describe() if self._prompt else {})}

    def digest(self) -> str:
        # All else that the texts depend on is in `describe`.
        return sha256(self._path)
