"""The feature store: matrices of item (or user) features keyed by token, never by row order.

A feature is three files side by side:

- ``<dataset>.<modality>.npy``     rows x dim, float16 or float32, read memory-mapped, never unpickled
- ``<dataset>.<modality>.tokens``  one token a line in row order, UTF-8
- ``<dataset>.<modality>.json``    the manifest: ``encoder``, ``modality``, ``rows``, ``dim``,
  ``dtype``, ``sha256`` (of the .npy file's bytes) and any other key that says where it came from

The manifest is written last, so files without a matching one are an unfinished write.
Needs numpy only: neither RecBole nor torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recbole_mmdiff.errors import DataError

PAD_TOKEN = "[PAD]"
DTYPES = ("float16", "float32")
POLICIES = ("mean", "zero", "drop_item", "error")
_OWN_KEYS = ("rows", "dim", "dtype", "sha256", "tokens_sha256")
_SHOWN = 5  # tokens named in a message
_BLOCK_BYTES = 1 << 24  # bounds the copies made while scanning or gathering a large matrix


class FeatureError(DataError):
    """A feature file, or a request made of it, is wrong; the message says what to do."""


@dataclass(frozen=True)
class Coverage:
    """How many of a dataset's tokens (``[PAD]`` not counted) have a feature row."""

    found: int
    total: int
    first_missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.found / self.total if self.total else 1.0
        line = f"{self.found:,} of {self.total:,} tokens have features ({share:.1%})"
        if self.first_missing:
            line += f"; first missing: {', '.join(self.first_missing)}"
        return line


@dataclass(frozen=True, eq=False)
class AlignedFeatures:
    """Feature rows in a dataset's id order.

    ``matrix``: float32 (n, dim), row 0 zero. ``missing``: bool (n,), true where the file has no
    row for that id; never true for id 0. ``missing_tokens``: the tokens of those ids, in id order.
    """

    matrix: np.ndarray
    missing: np.ndarray
    missing_tokens: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """One opened feature triple. ``matrix`` is memory-mapped: rows are read when touched."""

    folder: Path
    dataset: str
    modality: str
    tokens: tuple[str, ...]
    matrix: np.ndarray
    manifest: dict[str, Any]

    @property
    def path(self) -> Path:
        """The .npy file."""
        return feature_path(self.folder, self.dataset, self.modality, "npy")

    @classmethod
    def open(cls, folder: str | Path, dataset: str, modality: str) -> FeatureFile:
        """Open a triple after structural checks; no feature row is read (see `verify`).

        Raises FeatureError when a file is absent, unreadable, truncated or pickled, when rows, dim
        or dtype disagree between the three files, or when a token is empty or repeated.
        """
        folder = Path(folder)
        npy, names, meta = (feature_path(folder, dataset, modality, s) for s in _SUFFIXES)
        _require_files(folder, dataset, modality, (npy, names, meta))
        manifest = _read_manifest(meta, modality)
        matrix = _map_matrix(npy)
        tokens = _read_tokens(names)
        _check_rows(matrix, tokens, npy, names)
        _check_manifest(manifest, matrix, tokens, meta)
        return cls(folder, dataset, modality, tokens, matrix, manifest)

    def verify(self) -> None:
        """Read the whole file: check its sha256 and that every value is finite.

        Raises FeatureError naming the file and the first offending token.
        """
        digest = _sha256(self.path)
        if digest != self.manifest["sha256"]:
            raise FeatureError(
                f"{self.path}: sha256 is {digest}, the manifest says {self.manifest['sha256']}: "
                "the file was changed or its writing did not finish; make the feature again"
            )
        _check_finite(self.matrix, self.tokens, self.path)

    def coverage(self, tokens: Sequence[str]) -> Coverage:
        """Count which of ``tokens`` (in id order, index 0 = [PAD]) have a row."""
        missing = _missing(self._rows_of(tokens))
        absent = [str(tokens[i]) for i in np.flatnonzero(missing)[:_SHOWN]]
        total = len(tokens) - 1
        return Coverage(total - int(missing.sum()), total, tuple(absent))

    def align(self, tokens: Sequence[str], policy: str = "mean") -> AlignedFeatures:
        """Gather the rows of ``tokens`` (in id order, index 0 = [PAD]) by token.

        ``policy`` for tokens without a row: ``mean`` fills in the mean of the rows found, ``zero``
        zeros; ``drop_item`` leaves zeros and only reports them, for the caller to drop the items;
        ``error`` raises. Rows of the file that no token asks for are ignored.

        Raises FeatureError for an unknown policy, tokens that do not start with [PAD] or are not
        strings, no token found at all, a NaN or Inf in a row used, and missing rows under
        ``error``.
        """
        if policy not in POLICIES:
            raise FeatureError(
                f"missing-row policy {policy!r} is unknown; choose one of {', '.join(POLICIES)}"
            )
        rows = self._rows_of(tokens)
        missing = _missing(rows)
        absent = tuple(str(tokens[i]) for i in np.flatnonzero(missing))
        self._refuse_missing(absent, len(tokens) - 1, policy)
        matrix, mean = self._gather(rows)
        if policy == "mean":
            matrix[missing] = mean
        return AlignedFeatures(matrix, missing, absent)

    def _rows_of(self, tokens: Sequence[str]) -> np.ndarray:
        """Row of each token in the file, -1 where it has none; int64 (n,)."""
        if len(tokens) == 0 or tokens[0] != PAD_TOKEN:
            first = repr(tokens[0]) if len(tokens) else "nothing"
            raise FeatureError(
                f"{self.path}: the tokens to align must be in id order and start with "
                f"{PAD_TOKEN!r}, not {first}; pass RecBole's field2id_token of the id field"
            )
        _check_strings(tokens, "the tokens to align")
        row_of = {token: row for row, token in enumerate(self.tokens)}
        rows = np.fromiter((row_of.get(t, -1) for t in tokens), dtype=np.int64, count=len(tokens))
        rows[0] = -1
        return rows

    def _refuse_missing(self, absent: Sequence[str], total: int, policy: str) -> None:
        if absent and len(absent) == total:
            raise FeatureError(
                f"{self.path}: none of the {total:,} tokens has a row: the dataset has "
                f"{_list(absent)}, the file has {_list(self.tokens)}; "
                "check that the feature was made for this dataset"
            )
        if absent and policy == "error":
            raise FeatureError(
                f"{self.path}: {len(absent):,} of {total:,} tokens have no row, first "
                f"{_list(absent)}; add their rows or choose another missing-row policy "
                f"({', '.join(p for p in POLICIES if p != 'error')})"
            )

    def _gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows as float32 (n, dim), zero where -1, and their float64 mean over those found."""
        matrix = np.zeros((len(rows), self.matrix.shape[1]), dtype=np.float32)
        total = np.zeros(self.matrix.shape[1], dtype=np.float64)
        ids = np.flatnonzero(rows >= 0)
        for part in _blocks(len(ids), self.matrix.shape[1]):
            wanted = rows[ids[part]]
            values = self.matrix[wanted].astype(np.float32)
            _check_finite(values, [self.tokens[row] for row in wanted], self.path)
            matrix[ids[part]] = values
            total += values.sum(axis=0, dtype=np.float64)
        return matrix, total / max(len(ids), 1)


_SUFFIXES = ("npy", "tokens", "json")


def feature_path(folder: str | Path, dataset: str, modality: str, suffix: str) -> Path:
    """Path of one file of a triple. Raises FeatureError for a name that cannot be a file name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", modality):
        raise FeatureError(
            f"modality {modality!r} is not a usable name; use letters, digits, '_' and '-'"
        )
    if not dataset or dataset != Path(dataset).name:
        raise FeatureError(
            f"dataset {dataset!r} is not a usable name; it must be a plain file name"
        )
    return Path(folder) / f"{dataset}.{modality}.{suffix}"


def find_modalities(folder: str | Path, dataset: str) -> list[str]:
    """Sorted names of the dataset's finished features: a matrix with a manifest beside it."""
    pattern = re.compile(re.escape(dataset) + r"\.([A-Za-z0-9_-]+)\.json")
    found = []
    for path in Path(folder).glob("*.json"):
        match = pattern.fullmatch(path.name)
        if match and path.with_suffix(".npy").is_file():
            found.append(match[1])
    return sorted(found)


def write_features(
    folder: str | Path,
    dataset: str,
    modality: str,
    tokens: Sequence[str],
    matrix: np.ndarray,
    **manifest: Any,
) -> FeatureFile:
    """Write a feature triple and open it.

    ``matrix``: (rows, dim) float16 or float32, row r belonging to ``tokens[r]``. Further keywords
    go into the manifest; state at least ``encoder``. Each file appears whole or not at all.

    Raises FeatureError for anything `FeatureFile.open` or `verify` would refuse later.
    """
    npy, names, meta = (feature_path(folder, dataset, modality, s) for s in _SUFFIXES)
    matrix = _checked_matrix(matrix, npy)
    tokens = _checked_tokens(tokens, names)
    _check_rows(matrix, tokens, npy, names)
    _check_finite(matrix, tokens, npy)
    text = _token_bytes(tokens)
    described = _described(manifest, modality, matrix, text, meta)
    meta.parent.mkdir(parents=True, exist_ok=True)
    # From here until the last line the feature counts as unfinished, also when it is overwritten.
    meta.unlink(missing_ok=True)
    described["sha256"] = _replace(npy, lambda file: np.save(file, matrix, allow_pickle=False))
    _replace(names, lambda file: file.write(text))
    _replace(meta, lambda file: file.write(json.dumps(described, indent=1).encode("ascii")))
    return FeatureFile.open(folder, dataset, modality)


def _described(
    manifest: dict[str, Any], modality: str, matrix: np.ndarray, text: bytes, path: Path
) -> dict[str, Any]:
    """The manifest without the matrix checksum, checked to be writable before anything is."""
    clash = sorted(set(manifest) & set(_OWN_KEYS))
    if clash:
        raise FeatureError(f"{path}: the manifest key {clash[0]!r} is computed; do not pass it")
    described = {"encoder": "unstated", **manifest, "modality": modality}
    described |= {"rows": matrix.shape[0], "dim": matrix.shape[1], "dtype": matrix.dtype.name}
    described["tokens_sha256"] = hashlib.sha256(text).hexdigest()
    try:
        json.dumps(described)
    except (TypeError, ValueError) as error:
        raise FeatureError(f"{path}: the manifest must hold plain JSON values: {error}") from error
    return described


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> str:
    """Write through a temporary file beside ``path``, then rename; returns the sha256."""
    # Not storage.write_atomically: that module needs torch.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        digest = _sha256(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _require_files(folder: Path, dataset: str, modality: str, paths: Sequence[Path]) -> None:
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        known = find_modalities(folder, dataset)
        raise FeatureError(
            f"{folder}: feature {modality!r} of {dataset!r} lacks {', '.join(absent)} "
            f"(finished here: {', '.join(known) or 'none'}); "
            "make it with recbole_mmdiff.data.features.write_features"
        )


def _read_manifest(path: Path, modality: str) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FeatureError(f"{path}: not a JSON file in UTF-8 ({error}); write it again") from error
    if not isinstance(manifest, dict):
        raise FeatureError(f"{path}: must hold a JSON object, not {type(manifest).__name__}")
    absent = [key for key in ("rows", "dim", "dtype", "sha256") if key not in manifest]
    if absent:
        raise FeatureError(f"{path}: lacks the key(s) {', '.join(absent)}; write it again")
    if manifest.get("modality", modality) != modality:
        raise FeatureError(
            f"{path}: describes the modality {manifest['modality']!r}, not {modality!r}; "
            "the file was renamed: write it again under the new name"
        )
    return manifest


def _map_matrix(path: Path) -> np.ndarray:
    # Not np.load: it would also open zip archives and, on request, pickles.
    try:
        matrix = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, OverflowError) as error:
        raise FeatureError(
            f"{path}: not a complete .npy matrix ({error}); pickled, compressed or truncated "
            "files are never read: save a plain float16 or float32 array with write_features"
        ) from error
    _check_form(matrix, path)
    expected = matrix.offset + matrix.nbytes
    if path.stat().st_size != expected:
        raise FeatureError(
            f"{path}: {path.stat().st_size:,} bytes where its header says {expected:,}; "
            "make the feature again"
        )
    return matrix


def _check_form(matrix: np.ndarray, path: Path) -> None:
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise FeatureError(f"{path}: shape {matrix.shape}; a non-empty (rows, dim) is accepted")
    if matrix.dtype.name not in DTYPES:
        raise FeatureError(
            f"{path}: dtype {matrix.dtype}; {' or '.join(DTYPES)} is accepted: "
            "convert it with matrix.astype('float32')"
        )


def _checked_matrix(matrix: np.ndarray, path: Path) -> np.ndarray:
    """The matrix row-major and little-endian, so that equal values give equal files."""
    matrix = np.asarray(matrix)
    _check_form(matrix, path)
    return np.ascontiguousarray(matrix, dtype=matrix.dtype.newbyteorder("<"))


def _read_tokens(path: Path) -> tuple[str, ...]:
    # Not str.splitlines: it also cuts at characters that tokens may hold, such as U+2028.
    # utf-8-sig and universal newlines: an editor's mark or CRLF must not become part of a token.
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FeatureError(f"{path}: not UTF-8 ({error}); write it again in UTF-8") from error
    return _checked_tokens(text.removesuffix("\n").split("\n"), path)


def _token_bytes(tokens: Sequence[str]) -> bytes:
    return "".join(f"{token}\n" for token in tokens).encode("utf-8")


def _check_strings(tokens: Sequence[Any], where: str | Path) -> None:
    for index, token in enumerate(tokens):
        if not isinstance(token, str):
            raise FeatureError(
                f"{where}: token {index} is {token!r} ({type(token).__name__}); tokens are strings"
            )


def _checked_tokens(tokens: Sequence[str], path: Path) -> tuple[str, ...]:
    _check_strings(tokens, path)
    tokens = tuple(str(token) for token in tokens)
    seen: set[str] = set()
    for row, token in enumerate(tokens):
        if not token or "\n" in token or "\r" in token:
            raise FeatureError(f"{path}: token {token!r} of row {row} is empty or breaks the line")
        if token in seen:
            raise FeatureError(
                f"{path}: token {token!r} appears twice (again in row {row}, counted from 0); "
                "keep one row for each token"
            )
        seen.add(token)
    return tokens


def _check_rows(matrix: np.ndarray, tokens: Sequence[str], npy: Path, names: Path) -> None:
    if matrix.shape[0] != len(tokens):
        raise FeatureError(
            f"{npy}: {matrix.shape[0]:,} rows, but {names.name} has {len(tokens):,} tokens; "
            "they must be one to one: make both again together"
        )


def _check_manifest(
    manifest: dict[str, Any], matrix: np.ndarray, tokens: Sequence[str], path: Path
) -> None:
    actual = {"rows": matrix.shape[0], "dim": matrix.shape[1], "dtype": matrix.dtype.name}
    if "tokens_sha256" in manifest:
        actual["tokens_sha256"] = hashlib.sha256(_token_bytes(tokens)).hexdigest()
    for key, value in actual.items():
        if manifest[key] != value:
            raise FeatureError(
                f"{path}: {key} is {manifest[key]!r}, but the files have {value!r}; a file was "
                "changed or its writing did not finish: make the feature again"
            )


def _check_finite(matrix: np.ndarray, tokens: Sequence[str], path: Path) -> None:
    for part in _blocks(*matrix.shape):
        bad = ~np.isfinite(matrix[part]).all(axis=1)
        if bad.any():
            row = part.start + int(np.argmax(bad))
            raise FeatureError(
                f"{path}: the row of token {tokens[row]!r} holds NaN or Inf; "
                "leave the row out to mark the feature as missing"
            )


def _blocks(rows: int, dim: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (4 * dim))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _missing(rows: np.ndarray) -> np.ndarray:
    """True where an id has no row; id 0 is padding and misses nothing."""
    missing = rows < 0
    missing[0] = False
    return missing


def _list(tokens: Sequence[str]) -> str:
    return ", ".join(tokens[:_SHOWN]) + (", ..." if len(tokens) > _SHOWN else "")
