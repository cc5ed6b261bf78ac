"""The three files of a feature: how each is read, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mmdiff.arrays import UNREADABLE
from recbole_mmdiff.errors import DataError
from recbole_mmdiff.files import read_json

DTYPES = ("float16", "float32")
BLOCK_BYTES = 1 << 24  # bounds the copies made while scanning or gathering a large matrix


class FeatureError(DataError):
    """A feature file, or a request made of it, is wrong; the message says what to do."""


def read_manifest(path: Path, modality: str) -> dict[str, Any]:
    try:
        manifest = read_json(path)
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


def map_matrix(path: Path, dtypes: Sequence[str] = DTYPES) -> np.ndarray:
    """A complete .npy matrix of one of ``dtypes``, memory-mapped; nothing is ever unpickled."""
    # Not np.load: it would also open zip archives and, on request, pickles.
    try:
        matrix = np.lib.format.open_memmap(path, mode="r")
    except UNREADABLE as error:
        raise FeatureError(
            f"{path}: not a complete .npy matrix ({error}); pickled, compressed or truncated "
            "files are never read: save a plain float16 or float32 array with write_features"
        ) from error
    check_form(matrix, path, dtypes)
    expected = matrix.offset + matrix.nbytes
    if path.stat().st_size != expected:
        raise FeatureError(
            f"{path}: {path.stat().st_size:,} bytes where its header says {expected:,}; "
            "make the feature again"
        )
    return matrix


def check_form(matrix: np.ndarray, path: Path, dtypes: Sequence[str] = DTYPES) -> None:
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise FeatureError(f"{path}: shape {matrix.shape}; a non-empty (rows, dim) is accepted")
    if matrix.dtype.name not in dtypes:
        raise FeatureError(
            f"{path}: dtype {matrix.dtype}; {' or '.join(dtypes)} is accepted: "
            f"convert it with matrix.astype('float32')"
        )


def checked_matrix(matrix: np.ndarray, path: Path) -> np.ndarray:
    """The matrix row-major and little-endian, so that equal values give equal files."""
    matrix = np.asarray(matrix)
    check_form(matrix, path)
    return np.ascontiguousarray(matrix, dtype=matrix.dtype.newbyteorder("<"))


def read_tokens(path: Path) -> tuple[str, ...]:
    # Not str.splitlines: it also cuts at characters that tokens may hold, such as U+2028.
    # utf-8-sig and universal newlines: an editor's mark or CRLF must not become part of a token.
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FeatureError(f"{path}: not UTF-8 ({error}); write it again in UTF-8") from error
    return checked_tokens(text.removesuffix("\n").split("\n"), path)


def token_bytes(tokens: Sequence[str]) -> bytes:
    return "".join(f"{token}\n" for token in tokens).encode("utf-8")


def check_strings(tokens: Sequence[Any], where: str | Path) -> None:
    for index, token in enumerate(tokens):
        if not isinstance(token, str):
            raise FeatureError(
                f"{where}: token {index} is {token!r} ({type(token).__name__}); tokens are strings"
            )


def checked_tokens(tokens: Sequence[str], path: Path) -> tuple[str, ...]:
    check_strings(tokens, path)
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


def check_rows(matrix: np.ndarray, tokens: Sequence[str], npy: Path, names: Path) -> None:
    if matrix.shape[0] != len(tokens):
        raise FeatureError(
            f"{npy}: {matrix.shape[0]:,} rows, but {names.name} has {len(tokens):,} tokens; "
            "they must be one to one: make both again together"
        )


def check_manifest(
    manifest: dict[str, Any], matrix: np.ndarray, tokens: Sequence[str], path: Path
) -> None:
    actual = {"rows": matrix.shape[0], "dim": matrix.shape[1], "dtype": matrix.dtype.name}
    if "tokens_sha256" in manifest:
        actual["tokens_sha256"] = hashlib.sha256(token_bytes(tokens)).hexdigest()
    for key, value in actual.items():
        if manifest[key] != value:
            raise FeatureError(
                f"{path}: {key} is {manifest[key]!r}, but the files have {value!r}; a file was "
                "changed or its writing did not finish: make the feature again"
            )


def check_finite(matrix: np.ndarray, tokens: Sequence[str], path: Path) -> None:
    for part in blocks(*matrix.shape):
        bad = ~np.isfinite(matrix[part]).all(axis=1)
        if bad.any():
            row = part.start + int(np.argmax(bad))
            raise FeatureError(
                f"{path}: the row of token {tokens[row]!r} holds NaN or Inf; "
                "leave the row out to mark the feature as missing"
            )


def blocks(rows: int, dim: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (4 * dim))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
