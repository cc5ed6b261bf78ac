"""RecBole's text form of features: a header ``item_id:token<tab>emb:float_seq``, a row for each token."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from recbole_mmdiff.data.feature_files import FeatureError, read_manifest
from recbole_mmdiff.files import sha256

_TYPES = ["float_seq", "token"]
_ENTITIES = {"item_id": "item", "iid": "item", "user_id": "user", "uid": "user"}
_LINES = 4096   # parsed at once


def read_text_form(path: Path) -> tuple[list[str], np.ndarray]:
    """Tokens and float32 matrix (rows, dim) of a file in the text form, in the order of its lines.

    The two columns may stand in either order; numbers are separated by spaces.

    Raises:
        FeatureError: not UTF-8, another header, a line without two cells, rows of different
            lengths, a cell that is not finite numbers, or a token twice; it names the line.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            token_first = _check_header(path, file.readline())
            return _read_rows(path, file, token_first)
    except UnicodeDecodeError as error:
        raise FeatureError(f"{path}: not UTF-8 ({error}); write it again in UTF-8") from error


def entity_of(path: Path) -> str | None:
    """``item`` or ``user``, where the token column is called as RecBole calls their ids, else None."""
    with open(path, encoding="utf-8-sig") as file:
        words = file.readline().rstrip("\n").split("\t")
    column = next(word.removesuffix(":token") for word in words if word.endswith(":token"))
    return _ENTITIES.get(column)


def describe_text_form(path: Path) -> dict[str, Any]:
    """What a manifest says of the text file that a feature was converted from."""
    status = path.stat()
    return {"file": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns,
            "sha256": sha256(path)}


def is_converted(path: Path, meta: Path, modality: str) -> bool:
    """Whether the triple of the manifest ``meta`` comes from the text file as it is now, or from
    elsewhere."""
    if not meta.is_file():
        return False
    described = read_manifest(meta, modality).get("text_form")
    return described is None or _is_unchanged(path, described)


def _is_unchanged(path: Path, described: dict[str, Any]) -> bool:
    """The bytes are read only if the size is the same and the time is not (a copied folder)."""
    status = path.stat()
    if status.st_size != described.get("bytes"):
        return False
    return status.st_mtime_ns == described.get("mtime_ns") or sha256(path) == described.get("sha256")


def is_text_form(path: Path) -> bool:
    """Whether the first line of a file is a header of the text form."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return sorted(_types(file.readline(_LINES))) == _TYPES


def _types(header: str) -> list[str]:
    return [word.partition(":")[2] for word in header.rstrip("\n").split("\t")]


def _check_header(path: Path, line: str) -> bool:
    """Whether the token column is the first one."""
    types = _types(line)
    if sorted(types) != _TYPES:
        raise FeatureError(
            f"{path}, line 1: the header is {line[:80]!r}; RecBole's text form has two columns, "
            f"such as 'item_id:token<tab>emb:float_seq'"
        )
    return types[0] == "token"


def _read_rows(path: Path, file, token_first: bool) -> tuple[list[str], np.ndarray]:
    line_of: dict[str, int] = {}
    parts: list[np.ndarray] = []
    lines = ((number, line) for number, line in enumerate(file, start=2) if line.strip())
    while block := list(islice(lines, _LINES)):
        cells = [_cells(path, number, line, token_first) for number, line in block]
        dim = parts[0].shape[1] if parts else len(cells[0][1].split())
        parts.append(_numbers(path, [number for number, _ in block], [row for _, row in cells], dim))
        for (number, _), (token, _) in zip(block, cells, strict=True):
            if line_of.setdefault(token, number) != number:
                raise FeatureError(f"{path}, line {number}: the token {token!r} stands on line "
                                   f"{line_of[token]} already; keep one row for each token")
    if not parts:
        raise FeatureError(f"{path}: holds a header but no rows")
    return list(line_of), np.concatenate(parts)


def _cells(path: Path, number: int, line: str, token_first: bool) -> tuple[str, str]:
    cells = line.rstrip("\n").split("\t")
    if len(cells) != 2 or not all(cell.strip() for cell in cells):
        raise FeatureError(f"{path}, line {number}: {line[:60]!r} is not a token and its numbers, "
                           f"separated by one tab")
    return (cells[0], cells[1]) if token_first else (cells[1], cells[0])


def _numbers(path: Path, numbers: list[int], rows: list[str], dim: int) -> np.ndarray:
    """The rows that stand on the lines ``numbers``, float32 (rows, dim)."""
    for number, row in zip(numbers, rows, strict=True):
        if len(row.split()) != dim:
            raise FeatureError(f"{path}, line {number}: holds {len(row.split())} numbers, the lines "
                               f"before it {dim}")
    try:
        values = np.loadtxt(rows, dtype=np.float32, comments=None, ndmin=2)
    except ValueError as error:
        number = next(number for number, row in zip(numbers, rows, strict=True) if not _is_numeric(row))
        raise FeatureError(f"{path}, line {number}: {error}") from error
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise FeatureError(f"{path}, line {numbers[int(finite.argmin())]}: holds NaN, Inf or a number too "
                           f"large for float32; leave the line out to mark the feature as missing")
    return values


def _is_numeric(row: str) -> bool:
    try:
        np.loadtxt([row], dtype=np.float32, comments=None)
    except ValueError:
        return False
    return True
