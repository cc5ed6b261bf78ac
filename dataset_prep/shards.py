"""A long encoding in shards: killed at any moment, it goes on; several processes share it.

The work lies in ``.<dataset>.<modality>.shards`` beside the feature to be made: ``plan.json`` says
what is encoded and how, ``00000.npz`` ... are the finished shards. Each file appears whole or not
at all. When all are there they become the feature, and the folder goes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.batches import Encoded
from recbole_mmdiff.arrays import read_arrays
from recbole_mmdiff.data.features import FeatureFile, feature_path, read_manifest, write_features
from recbole_mmdiff.errors import DataError
from recbole_mmdiff.files import locked, read_json, write_atomically, write_json

if TYPE_CHECKING:
    from dataset_prep.processes import Processes

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
        """What the feature depends on, as JSON gives it back: equal for equal inputs, settings and
        stored numbers, however they are cut into shards."""
        return json.loads(json.dumps({**self.settings, "store": self.dtype, "inputs": len(self.tokens)}))


class Work:
    """The unfinished feature ``modality`` of the data set in ``folder``."""

    def __init__(self, folder: Path, modality: str, plan: Plan) -> None:
        self.plan, self.modality, self._target = plan, modality, folder
        self.dataset = folder.name
        npy = feature_path(folder, folder.name, modality, "npy")
        self.folder = npy.with_name(f".{npy.stem}.shards")
        self._plan_file = self.folder / "plan.json"
        self._wanted = {**plan.record(), "shard_size": plan.shard_size}

    def _begun(self) -> tuple[dict[str, Any] | None, bool]:
        """The plan of the work that was begun, if any, and whether a restart began it.

        Raises:
            DataError: the file of the plan is damaged.
        """
        if not self._plan_file.is_file():
            return None, False
        try:
            plan = read_json(self._plan_file)
            return plan, dict.pop(plan, "restart", False)
        except (ValueError, TypeError) as error:
            raise DataError(f"{self._plan_file}: is damaged ({error}); delete the folder and start "
                            f"again") from error

    def is_finished(self) -> bool:
        """Whether the feature is there, made by this very plan, and no restart of it was cut short.

        Raises:
            DataError: there is a feature of that name that was made otherwise, or is damaged.
        """
        path = feature_path(self._target, self.dataset, self.modality, "json")
        begun, restarted = self._begun()
        if not path.is_file() or (restarted and begun == self._wanted):
            return False
        manifest = read_manifest(path, self.modality)
        if changes := _changes(manifest.get("plan", manifest), self.plan.record()):
            raise DataError(f"{path}: the feature {self.modality!r} exists, made of other inputs or with "
                            f"other settings: {changes}; --restart replaces it, another --modality keeps it")
        self.feature()
        return True

    def feature(self) -> FeatureFile:
        """The finished feature."""
        return FeatureFile.open(self._target, self.dataset, self.modality)

    @contextmanager
    def lock(self, processes: Processes) -> Iterator[None]:
        """Hold this process's part of the work. A failure before a shard is done leaves no trace.

        Raises:
            DataError: another run holds it.
        """
        self.folder.mkdir(exist_ok=True)
        with locked(self.folder / f"process{processes.rank}.lock",
                    DataError(f"{self.folder}: another run encodes this feature now; wait for it or choose "
                              f"another --modality")):
            try:
                yield
            except BaseException:
                # Not under the feet of others, who may be about to finish a shard.
                if processes.size == 1 and not self.finished():
                    self.discard()
                raise

    def prepare(self, restart: bool) -> None:
        """Continue the work that was begun, or begin it. A restart that was cut short is continued.

        Raises:
            DataError: shards were finished with other inputs or settings, and ``restart`` does not
                say that they may be thrown away.
        """
        begun, restarted = self._begun()
        if begun == self._wanted and (restarted or not restart):
            return
        if begun and not restart and (done := self.finished()):
            raise DataError(f"{self.folder}: was begun otherwise: {_changes(begun, self._wanted)}; "
                            f"--restart throws the {len(done)} finished shards away")
        # The plan goes first and comes last: without it no shard counts.
        for file in (self._plan_file, *self.folder.glob("*.npz")):
            file.unlink(missing_ok=True)
        write_json({**self._wanted, "restart": restart}, self._plan_file)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npz"

    def finished(self) -> list[int]:
        """The shards that are done, of whatever plan the work was begun with."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz"))

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
            part = read_arrays(self._path(shard))
            _check_form(part, *self.plan.bounds(shard), self.plan.dtype)
            return part
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{self._path(shard)}: is damaged ({error}); delete it and start "
                            f"again") from error

    def merge(self, facts: Mapping[str, Any]) -> FeatureFile:
        """Make the feature of the finished shards, one in memory at a time, and drop the work.

        The manifest holds the plan's settings, overlaid by ``facts`` on how they were carried out,
        what was left out and why, and under ``plan`` what another run is compared with.

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
            self.discard()
            raise DataError(f"{self._target}: none of the {len(self.plan.tokens):,} inputs has a "
                            f"vector: {_told(left_out)}")
        manifest = {**self.plan.settings, **facts, "inputs": len(self.plan.tokens), "left_out": left_out,
                    "cut_to_max_length": cut, "plan": self.plan.record()}
        feature = write_features(self._target, self.dataset, self.modality, tokens,
                                 self._matrix(len(tokens), dim), **manifest)
        self.discard()
        return feature

    def _matrix(self, rows: int, dim: int) -> np.ndarray:
        matrix = np.lib.format.open_memmap(self.folder / "matrix.npy", "w+", self.plan.dtype, (rows, dim))
        start = 0
        for shard in range(self.plan.shards):
            part = self.load(shard)["matrix"]
            if len(part):    # A shard without vectors knows no dimension either.
                if part.shape[1] != dim:
                    raise DataError(f"{self._path(shard)}: has {part.shape[1]} dimensions, others {dim}; "
                                    f"delete it and start again")
                matrix[start:start + len(part)] = part
            start += len(part)
        return matrix

    def clean_up(self, processes: Processes) -> None:
        """Remove what is left of work that was killed once its feature was made; not what others hold."""
        if self.folder.is_dir():
            with suppress(DataError), self.lock(processes):
                self.discard()

    def discard(self) -> None:
        """Remove the folder."""
        self._plan_file.unlink(missing_ok=True)    # First: what a kill leaves then is begun anew.
        # Where an open file cannot be removed (Windows), the lock stays behind and does no harm.
        shutil.rmtree(self.folder, ignore_errors=True)


def _check_form(part: Mapping[str, np.ndarray], start: int, stop: int, dtype: str) -> None:
    """Raises ValueError or KeyError for arrays that `Work.save` did not write for inputs from ``start`` to
    ``stop``."""
    for name, ndim, kinds in (("rows", 1, "i"), ("matrix", 2, "f"), ("cut", 0, "i"), ("left_out", 1, "i"),
                              ("reasons", 1, "U")):
        if part[name].ndim != ndim or part[name].dtype.kind not in kinds:
            raise ValueError(f"{name} is {part[name].dtype} of shape {part[name].shape}")
    rows, left_out = part["rows"], part["left_out"]
    inside = all(((start <= places) & (places < stop)).all() for places in (rows, left_out))
    if not inside or (np.diff(rows) <= 0).any() or part["matrix"].dtype != dtype \
            or len(rows) != len(part["matrix"]) or len(left_out) != len(part["reasons"]):
        raise ValueError("its arrays do not belong together")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, "" if nothing does. Encoders have settings of their own: if they differ, only that."""
    changed = [key for key in dict.fromkeys([*now, *before]) if before.get(key) != now.get(key)]
    if "encoder" in changed:
        changed = ["encoder"]
    return ", ".join(f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}"
                     for key in changed)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _told(left_out: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{entry['count']:,} {reason}" for reason, entry in left_out.items())
