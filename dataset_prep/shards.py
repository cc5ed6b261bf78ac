"""A long encoding in shards: killed at any moment, it goes on; several processes share it.

The work lies in ``.<dataset>.<modality>.shards`` beside the feature to be made: ``plan.json`` says
what is encoded and how, ``00000.npz`` ... are the finished shards. Each file appears whole or not
at all. When all are there they become the feature, and the folder goes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset_prep.batches import Encoded
from recbole_mmdiff.data.features import FeatureFile, feature_path, read_manifest, write_features
from recbole_mmdiff.errors import DataError
from recbole_mmdiff.files import write_atomically, write_json

_SHOWN = 5    # tokens named in a manifest


@dataclass(frozen=True)
class Plan:
    """What is encoded and how.

    ``settings``: all that the vectors depend on, in plain values. ``tokens``: one an input, in
    order. ``shard_size``: inputs a shard. ``dtype``: of the stored numbers.
    """

    settings: Mapping[str, Any]
    tokens: Sequence[str]
    shard_size: int
    dtype: str

    @property
    def fingerprint(self) -> str:
        """Equal for equal inputs, settings and stored numbers, however they are cut into shards."""
        content = {"settings": self.settings, "dtype": self.dtype}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> int:
        return -(-len(self.tokens) // self.shard_size)

    def bounds(self, shard: int) -> tuple[int, int]:
        """The first input of a shard, and the one after its last."""
        start = shard * self.shard_size
        return start, min(start + self.shard_size, len(self.tokens))

    def inputs(self, shards: Sequence[int]) -> int:
        """How many inputs some shards hold."""
        return sum(stop - start for start, stop in map(self.bounds, shards))

    def record(self) -> dict[str, Any]:
        """Plain values, for comparing with those of another run."""
        return {**self.settings, "store": self.dtype, "inputs": len(self.tokens),
                "shard_size": self.shard_size}


class Work:
    """The unfinished feature ``modality`` of the data set in ``folder``."""

    def __init__(self, folder: Path, modality: str, plan: Plan) -> None:
        self.plan, self.modality, self._target = plan, modality, folder
        self.dataset = folder.name
        npy = feature_path(folder, folder.name, modality, "npy")
        self.folder = npy.with_name(f".{npy.stem}.shards")

    def is_finished(self) -> bool:
        """Whether the feature is there, made by this very plan.

        Raises:
            DataError: there is a feature of that name that was made otherwise, or is damaged.
        """
        path = feature_path(self._target, self.dataset, self.modality, "json")
        if not path.is_file():
            return False
        if read_manifest(path, self.modality).get("fingerprint") == self.plan.fingerprint:
            self.feature()
            return True
        raise DataError(f"{path}: the feature {self.modality!r} exists, made of other inputs or with "
                        f"other settings; --restart replaces it, another --modality keeps it")

    def feature(self) -> FeatureFile:
        """The finished feature."""
        return FeatureFile.open(self._target, self.dataset, self.modality)

    @contextmanager
    def lock(self, rank: int) -> Iterator[None]:
        """Hold this process's part of the work; DataError when another run holds it."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(exist_ok=True)
        try:
            with FileLock(self.folder / f"process{rank}.lock", timeout=0):
                yield
        except Timeout as error:
            raise DataError(f"{self.folder}: another run encodes this feature now; wait for it or "
                            f"choose another --modality") from error

    def prepare(self, restart: bool) -> None:
        """Continue the work that was begun, or begin it.

        Raises:
            DataError: it was begun with other inputs or settings and ``restart`` does not say that
                it may be thrown away.
        """
        path = self.folder / "plan.json"
        if restart:
            for file in (path, *self.folder.glob("*.npz")):
                file.unlink(missing_ok=True)
        wanted = json.loads(json.dumps(self.plan.record()))
        if not path.is_file():
            write_json(wanted, path)
        elif changes := _changes(json.loads(path.read_text(encoding="utf-8")), wanted):
            raise DataError(f"{self.folder}: was begun otherwise: {changes}; --restart throws the "
                            f"{len(self.finished())} finished shards away")

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npz"

    def finished(self) -> list[int]:
        """The shards that are done."""
        return [shard for shard in range(self.plan.shards) if self._path(shard).is_file()]

    def save(self, shard: int, encoded: Encoded) -> None:
        """Store what became of a shard's inputs.

        Raises:
            DataError: a number is too large for the dtype that it is stored in.
        """
        with np.errstate(over="ignore"):
            matrix = encoded.matrix.astype(self.plan.dtype)
        start, _ = self.plan.bounds(shard)
        broken = ~np.isfinite(matrix).all(axis=1)
        if broken.any():
            token = self.plan.tokens[start + encoded.rows[int(broken.argmax())]]
            raise DataError(f"the vector of {token!r} holds a number that {self.plan.dtype} cannot; "
                            f"--store float32")
        with write_atomically(self._path(shard)) as temporary:
            np.savez(temporary, rows=start + encoded.rows, matrix=matrix, cut=encoded.cut,
                     left_out=start + np.array(list(encoded.left_out), dtype=np.int64),
                     reasons=np.array(list(encoded.left_out.values()), dtype=str))

    def load(self, shard: int) -> dict[str, np.ndarray]:
        """A finished shard's arrays. Raises DataError if the file is damaged."""
        try:
            with np.load(self._path(shard), allow_pickle=False) as file:
                return {name: file[name] for name in ("rows", "matrix", "cut", "left_out", "reasons")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{self._path(shard)}: is damaged ({error}); delete it and start "
                            f"again") from error

    def merge(self) -> FeatureFile:
        """Make the feature of the finished shards, one in memory at a time, and drop the work.

        The manifest holds the plan's settings, and what was left out and why.

        Raises:
            DataError: no input has a vector.
        """
        left_out: dict[str, dict[str, Any]] = {}
        rows, cut, dim = [], 0, 0
        for shard in range(self.plan.shards):
            part = self.load(shard)
            rows.append(part["rows"])
            cut += int(part["cut"])
            dim = max(dim, part["matrix"].shape[1])
            for place, reason in zip(part["left_out"], part["reasons"], strict=True):
                entry = left_out.setdefault(str(reason), {"count": 0, "first": []})
                entry["count"] += 1
                if len(entry["first"]) < _SHOWN:
                    entry["first"].append(self.plan.tokens[place])
        tokens = [self.plan.tokens[row] for row in np.concatenate(rows)]
        if not tokens:
            raise DataError(f"{self._target}: none of the {len(self.plan.tokens):,} inputs has a "
                            f"vector: {_told(left_out)}")
        feature = write_features(
            self._target, self.dataset, self.modality, tokens, self._matrix(len(tokens), dim),
            **self.plan.settings, inputs=len(self.plan.tokens), left_out=left_out, cut_to_max_length=cut,
            fingerprint=self.plan.fingerprint)
        self.discard()
        return feature

    def _matrix(self, rows: int, dim: int) -> np.ndarray:
        matrix = np.lib.format.open_memmap(self.folder / "matrix.npy", "w+", self.plan.dtype, (rows, dim))
        start = 0
        for shard in range(self.plan.shards):
            part = self.load(shard)["matrix"]
            if len(part):    # A shard without vectors knows no dimension either.
                matrix[start:start + len(part)] = part
            start += len(part)
        return matrix

    def discard(self) -> None:
        """Remove the folder."""
        # Where an open file cannot be removed (Windows), the lock stays behind and does no harm.
        shutil.rmtree(self.folder, ignore_errors=True)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [key for key in dict.fromkeys([*now, *before]) if before.get(key) != now.get(key)]
    return ", ".join(f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}"
                     for key in changed)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _told(left_out: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{entry['count']:,} {reason}" for reason, entry in left_out.items())
