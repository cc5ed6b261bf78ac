"""Who is tested on what: named protocols as pure functions of sorted tokens and a seed.

A choice is made by ordering tokens by a hash of (seed, purpose, token). It is the same on every
machine, Python and library version, does not depend on the order of rows, and a larger share
contains the smaller one.
"""

import hashlib
import io
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from recbole_mmdiff.arrays import read_arrays
from recbole_mmdiff.errors import DataError
from recbole_mmdiff.files import write_atomically

PROTOCOLS = ("cold_start_users", "warm_start", "cold_start_items", "ratio", "benchmark")
#: what becomes of a target interaction
TRAIN, VALID, TEST, FINETUNE, UNUSED = range(5)


def choose(tokens: np.ndarray, count: int, seed: int, purpose: str) -> np.ndarray:
    """A mask over ``tokens`` (n,) with ``count`` of them set, by the order of their hashes."""
    digests = [hashlib.sha256(f"{seed}\0{purpose}\0{token}".encode()).digest() for token in tokens]
    mask = np.zeros(len(tokens), dtype=bool)
    mask[sorted(range(len(tokens)), key=digests.__getitem__)[:count]] = True
    return mask


def choose_share(tokens: np.ndarray, share: float, seed: int, purpose: str,
                 key: str) -> np.ndarray:
    """Like ``choose``, with ``round(share * n)`` tokens.

    Raises:
        DataError: a share outside of (0, 1), or one that leaves nothing on either side.
    """
    if not 0 < share < 1:
        raise DataError(f"{key}: {share} must lie between 0 and 1")
    count = round(share * len(tokens))
    if count == 0 or count == len(tokens):
        raise DataError(f"{key}: {share} of {len(tokens)} is {count}, which leaves an empty split")
    return choose(tokens, count, seed, purpose)


@dataclass(frozen=True)
class Rows:
    """The target interactions that a protocol divides: arrays of length n.

    ``user`` and ``item`` are indices into the sorted ``user_tokens`` and ``item_tokens``;
    ``overlap`` marks the users that are linked to the source domain; ``time`` may be None.
    """

    user: np.ndarray
    item: np.ndarray
    user_tokens: np.ndarray
    item_tokens: np.ndarray
    overlap: np.ndarray
    time: np.ndarray | None = None


def held_out_users(rows: Rows, seed: int, test_ratio: float,
                   valid_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks over ``user_tokens`` of the test and the validation users, disjoint, all linked."""
    linked = np.flatnonzero(rows.overlap)
    test = linked[choose_share(rows.user_tokens[linked], test_ratio, seed, "test users",
                               "test_user_ratio")]
    rest = np.setdiff1d(linked, test)
    valid = rest[choose_share(rows.user_tokens[rest], valid_ratio, seed, "valid users",
                              "valid_user_ratio")]
    masks = np.zeros((2, len(rows.user_tokens)), dtype=bool)
    masks[0, test] = masks[1, valid] = True
    return masks[0], masks[1]


def cold_start_users(rows: Rows, seed: int, test_ratio: float, valid_ratio: float) -> np.ndarray:
    """All target rows of the test users are test, of the validation users validation: (n,)."""
    test, valid = held_out_users(rows, seed, test_ratio, valid_ratio)
    return np.where(test[rows.user], TEST, np.where(valid[rows.user], VALID, TRAIN))


def warm_start(rows: Rows, seed: int, test_ratio: float, valid_ratio: float) -> np.ndarray:
    """As ``cold_start_users``, but the earlier half of each held-out user's rows (by time, ties
    by item token; the smaller half of an odd number) is set aside for fine-tuning: (n,)."""
    if rows.time is None:
        raise DataError("split_protocol warm_start needs the time field in the target domain")
    part = cold_start_users(rows, seed, test_ratio, valid_ratio)
    order = np.lexsort((rows.item, rows.time, rows.user))
    counts = np.bincount(rows.user, minlength=len(rows.user_tokens))
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(order)) - starts[rows.user[order]]
    earlier = np.empty(len(order), dtype=bool)
    earlier[order] = rank < counts[rows.user[order]] // 2
    part[earlier & (part != TRAIN)] = FINETUNE
    return part


def cold_start_items(rows: Rows, seed: int, test_ratio: float, valid_ratio: float,
                     test_item_ratio: float, valid_item_ratio: float) -> np.ndarray:
    """Cold users meet cold items: test rows are those of test users on held-out items; the
    validation has items of its own; no training row holds an item of either: (n,)."""
    test, valid = held_out_users(rows, seed, test_ratio, valid_ratio)
    test_item = choose_share(rows.item_tokens, test_item_ratio, seed, "test items",
                             "test_item_ratio")
    rest = np.flatnonzero(~test_item)
    valid_item = np.zeros_like(test_item)
    valid_item[rest[choose_share(rows.item_tokens[rest], valid_item_ratio, seed, "valid items",
                                 "valid_item_ratio")]] = True
    part = np.full(len(rows.user), UNUSED)
    warm = ~(test | valid)[rows.user] & ~(test_item | valid_item)[rows.item]
    part[warm] = TRAIN
    part[valid[rows.user] & valid_item[rows.item]] = VALID
    part[test[rows.user] & test_item[rows.item]] = TEST
    return part


def check_parts(part: np.ndarray, protocol: str) -> None:
    """Raises DataError if training, validation or test is empty."""
    for code, name in ((TRAIN, "training"), (VALID, "validation"), (TEST, "test")):
        if not (part == code).any():
            raise DataError(f"split_protocol {protocol}: the {name} split is empty; use other "
                            f"ratios, or more overlapping users")


def _nothing() -> np.ndarray:
    return np.array([], dtype=str)


@dataclass(frozen=True)
class SavedSplit:
    """A split as a file holds it, by tokens.

    Attributes:
        protocol: its name.
        linked: target tokens of the linked users.
        user, item, part: of every target row that is not training.
        source_user, source_item, source_part: the same of the source domain, under ``ratio``.
        source_gone, target_gone: users whose rows left a domain (``overlap_mode: split``).
    """

    protocol: str
    linked: np.ndarray
    user: np.ndarray
    item: np.ndarray
    part: np.ndarray
    source_user: np.ndarray = field(default_factory=_nothing)
    source_item: np.ndarray = field(default_factory=_nothing)
    source_part: np.ndarray = field(default_factory=_nothing)
    source_gone: np.ndarray = field(default_factory=_nothing)
    target_gone: np.ndarray = field(default_factory=_nothing)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` without pickles, whole or not at all."""
        buffer = io.BytesIO()
        values = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        for name in ("part", "source_part"):
            values[name] = values[name].astype(np.int8)
        np.savez_compressed(buffer, **values)
        with write_atomically(path) as temporary:
            Path(temporary).write_bytes(buffer.getvalue())

    def equals(self, other: "SavedSplit") -> bool:
        """Whether both say the same, array by array."""
        return all(np.array_equal(getattr(self, name), getattr(other, name))
                   for name in (f.name for f in fields(self)))

    def digest(self) -> str:
        """A sha256 of what it says: equal for equal splits, however their rows were ordered or saved."""
        columns = ([self.linked], [self.source_gone], [self.target_gone],
                   [self.user, self.item, self.part],
                   [self.source_user, self.source_item, self.source_part])
        rows = [sorted(zip(*(column.astype(str).tolist() for column in group), strict=True))
                for group in columns]
        return hashlib.sha256(json.dumps([self.protocol, *rows]).encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> "SavedSplit":
        """Raises DataError if the file is missing or is no saved split."""
        try:
            arrays = read_arrays(path)
            values = {f.name: arrays[f.name] for f in fields(cls)}
            split = cls(**{**values, "protocol": str(values["protocol"])})
            split._check_form()
        except FileNotFoundError as error:
            raise DataError(f"split_file: there is no file {path}") from error
        except (ValueError, KeyError) as error:
            raise DataError(f"split_file: {path} is not a saved split ({error})") from error
        return split

    def _check_form(self) -> None:
        """Raises ValueError for arrays that ``save`` did not write."""
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {self.protocol!r:.80}, not one of {PROTOCOLS}")
        for name in (f.name for f in fields(self) if f.name != "protocol"):
            array, kinds = getattr(self, name), "i" if name.endswith("part") else "U"
            if array.ndim != 1 or array.dtype.kind not in kinds:
                raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
        for user, item, part in ((self.user, self.item, self.part),
                                 (self.source_user, self.source_item, self.source_part)):
            if not len(user) == len(item) == len(part) or not np.isin(part, range(TRAIN, UNUSED + 1)).all():
                raise ValueError("users, items and parts do not belong together")

    def parts(self, user: np.ndarray, item: np.ndarray, path: Path) -> np.ndarray:
        """The part of each target row given by its tokens (n,).

        Raises:
            DataError: the file names an interaction that is not in the data.
        """
        return _saved_parts((self.user, self.item, self.part), (user, item), path, "target")

    def source_parts(self, user: np.ndarray, item: np.ndarray, path: Path) -> np.ndarray:
        """The same of the source rows."""
        saved = (self.source_user, self.source_item, self.source_part)
        return _saved_parts(saved, (user, item), path, "source")


def _saved_parts(saved, rows, path: Path, domain: str) -> np.ndarray:
    keys, known = (np.char.add(np.char.add(user, "\t"), item) for user, item in (rows, saved[:2]))
    order = np.argsort(keys, kind="stable")
    place = np.searchsorted(keys, known, sorter=order).clip(max=len(keys) - 1)
    unknown = keys[order[place]] != known
    if unknown.any():
        pair = known[unknown][0].replace("\t", "', '")
        raise DataError(f"split_file: {path} holds ('{pair}'), which is not among the {domain} "
                        f"interactions; was it saved from other data?")
    part = np.full(len(keys), TRAIN)
    part[order[place]] = saved[2]
    return part
