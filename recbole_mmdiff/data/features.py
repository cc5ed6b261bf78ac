"""The feature store: matrices of item (or user) features keyed by token, never by row order.

A feature is three files side by side:

- ``<dataset>.<modality>.npy``     rows x dim, float16 or float32, read memory-mapped, never unpickled
- ``<dataset>.<modality>.tokens``  one token a line in row order, UTF-8
- ``<dataset>.<modality>.json``    the manifest: ``encoder``, ``modality``, ``rows``, ``dim``,
  ``dtype``, ``sha256`` (of the .npy file's bytes), ``entity`` (``item``, the default, or ``user``:
  whose tokens they are) and any other key that says where it came from

The manifest is written last, so files without a matching one are an unfinished write.
Needs numpy only: neither RecBole nor torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from recbole_mmdiff.data.feature_files import (
    FeatureError,
    blocks,
    check_finite,
    check_manifest,
    check_rows,
    check_strings,
    checked_matrix,
    checked_tokens,
    map_matrix,
    read_manifest,
    read_tokens,
    token_bytes,
)
from recbole_mmdiff.data.feature_lookup import (
    SUFFIXES,
    feature_path,
    find_modalities,
    require_files,
    text_path,
    unfinished_modalities,
)
from recbole_mmdiff.data.text_form import (
    describe_text_form,
    entity_of,
    is_converted,
    read_text_form,
)
from recbole_mmdiff.files import remove_leftovers, sha256, write_atomically

__all__ = ["PAD_TOKEN", "POLICIES", "AlignedFeatures", "Coverage", "FeatureError", "FeatureFile",
           "check_finite", "feature_path", "find_modalities", "map_matrix", "read_manifest",
           "unfinished_modalities", "write_features"]

PAD_TOKEN = "[PAD]"
POLICIES = ("mean", "zero", "drop_item", "error")
_OWN_KEYS = ("rows", "dim", "dtype", "sha256", "tokens_sha256")
_SHOWN = 5  # tokens named in a message


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
    row for that id; never true for id 0. ``missing_tokens``: the tokens of those ids, in id order,
    '' apart.
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

    @property
    def entity(self) -> str | None:
        """``item`` or ``user``, whose tokens the rows have; None where the manifest does not say."""
        return self.manifest.get("entity")

    @classmethod
    def open(cls, folder: str | Path, dataset: str, modality: str) -> FeatureFile:
        """Open a triple after structural checks; no feature row is read (see `verify`).

        A file in RecBole's text form, ``<dataset>.<modality>``, is converted into a triple first,
        and again when it has changed; a triple that was made otherwise goes before it.

        Raises FeatureError when a file is absent, unreadable, truncated or pickled, when rows, dim
        or dtype disagree between the three files, or when a token is empty or repeated.
        """
        folder = Path(folder)
        _convert_text_form(folder, dataset, modality)
        npy, names, meta = (feature_path(folder, dataset, modality, s) for s in SUFFIXES)
        require_files(folder, dataset, modality, (npy, names, meta))
        manifest = read_manifest(meta, modality)
        matrix = map_matrix(npy)
        tokens = read_tokens(names)
        check_rows(matrix, tokens, npy, names)
        check_manifest(manifest, matrix, tokens, meta)
        return cls(folder, dataset, modality, tokens, matrix, manifest)

    def verify(self) -> None:
        """Read the whole file: check its sha256 and that every value is finite.

        Raises FeatureError naming the file and the first offending token.
        """
        digest = sha256(self.path)
        if digest != self.manifest["sha256"]:
            raise FeatureError(
                f"{self.path}: sha256 is {digest}, the manifest says {self.manifest['sha256']}: "
                "the file was changed or its writing did not finish; make the feature again"
            )
        check_finite(self.matrix, self.tokens, self.path)

    def coverage(self, tokens: Sequence[str]) -> Coverage:
        """Count which of ``tokens`` (in id order, index 0 = [PAD]) have a row; '' is no token."""
        absent = _absent(tokens, self._rows_of(tokens))
        total = _count(tokens)
        return Coverage(total - len(absent), total, tuple(str(tokens[i]) for i in absent[:_SHOWN]))

    def align(self, tokens: Sequence[str], policy: str = "mean") -> AlignedFeatures:
        """Gather the rows of ``tokens`` (in id order, index 0 = [PAD]) by token.

        ``policy`` for tokens without a row: ``mean`` fills in the mean of the rows found, ``zero``
        zeros; ``drop_item`` leaves zeros and only reports them, for the caller to drop the items;
        ``error`` raises. Rows of the file that no token asks for are ignored. An empty token, ''
        for an id that is not of this domain, is missing and zero under every policy.

        Raises FeatureError for an unknown policy, tokens that do not start with [PAD] or are not
        strings, no token found at all, a NaN or Inf in a row used, and missing rows under
        ``error``.
        """
        if policy not in POLICIES:
            raise FeatureError(
                f"missing-row policy {policy!r} is unknown; choose one of {', '.join(POLICIES)}"
            )
        rows = self._rows_of(tokens)
        lacking = _absent(tokens, rows)
        absent = tuple(str(tokens[i]) for i in lacking)
        self._refuse_missing(absent, _count(tokens), policy)
        matrix, mean = self._gather(rows)
        if policy == "mean":
            matrix[lacking] = mean
        missing = rows < 0
        missing[0] = False      # Padding misses nothing.
        return AlignedFeatures(matrix, missing, absent)

    def _rows_of(self, tokens: Sequence[str]) -> np.ndarray:
        """Row of each token in the file, -1 where it has none; int64 (n,)."""
        if len(tokens) == 0 or tokens[0] != PAD_TOKEN:
            first = repr(tokens[0]) if len(tokens) else "nothing"
            raise FeatureError(
                f"{self.path}: the tokens to align must be in id order and start with "
                f"{PAD_TOKEN!r}, not {first}; pass RecBole's field2id_token of the id field"
            )
        check_strings(tokens, "the tokens to align")
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
        for part in blocks(len(ids), self.matrix.shape[1]):
            wanted = rows[ids[part]]
            values = self.matrix[wanted].astype(np.float32)
            check_finite(values, [self.tokens[row] for row in wanted], self.path)
            matrix[ids[part]] = values
            total += values.sum(axis=0, dtype=np.float64)
        return matrix, total / max(len(ids), 1)


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
    npy, names, meta = (feature_path(folder, dataset, modality, s) for s in SUFFIXES)
    matrix = checked_matrix(matrix, npy)
    tokens = checked_tokens(tokens, names)
    check_rows(matrix, tokens, npy, names)
    check_finite(matrix, tokens, npy)
    text = token_bytes(tokens)
    described = _described(manifest, modality, matrix, text, meta)
    meta.parent.mkdir(parents=True, exist_ok=True)
    # From here until the last line the feature counts as unfinished, also when it is overwritten.
    meta.unlink(missing_ok=True)
    remove_leftovers(meta.parent, {npy.name, names.name, meta.name})
    with write_atomically(npy) as temporary, open(temporary, "wb") as file:
        np.save(file, matrix, allow_pickle=False)
    described["sha256"] = sha256(npy)
    for path, content in ((names, text), (meta, json.dumps(described, indent=1).encode("ascii"))):
        with write_atomically(path) as temporary:
            temporary.write_bytes(content)
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


def _convert_text_form(folder: Path, dataset: str, modality: str) -> None:
    """Bring the triple up to date with a file in RecBole's text form, if there is one."""
    text = text_path(folder, dataset, modality)
    meta = feature_path(folder, dataset, modality, "json")
    if text is None or is_converted(text, meta, modality):
        return
    try:
        with FileLock(folder / f".{text.name}.lock"):
            if not is_converted(text, meta, modality):
                logging.getLogger(__name__).info("%s: converted into a matrix, once", text)
                tokens, matrix = read_text_form(text)
                entity = {"entity": entity} if (entity := entity_of(text)) else {}
                write_features(folder, dataset, modality, tokens, matrix,
                               encoder="unstated (RecBole's text form)",
                               text_form=describe_text_form(text), **entity)
    except OSError as error:
        raise FeatureError(f"{text}: cannot be converted beside itself ({error}); convert a copy of "
                           f"the folder that can be written") from error


def _absent(tokens: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Ids of the tokens that have no row, [PAD] and '' apart."""
    return np.array([i for i in np.flatnonzero(rows < 0) if i and tokens[i] != ""], dtype=np.int64)


def _count(tokens: Sequence[str]) -> int:
    """How many there are, [PAD] and '' apart."""
    return sum(token != "" for token in tokens) - 1


def _list(tokens: Sequence[str]) -> str:
    return ", ".join(tokens[:_SHOWN]) + (", ..." if len(tokens) > _SHOWN else "")
