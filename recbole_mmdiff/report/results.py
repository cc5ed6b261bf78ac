"""What a comparison found: the values, states and per-user values of every run of a results store."""

import math
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_mmdiff.arrays import read_arrays
from recbole_mmdiff.errors import DataError
from recbole_mmdiff.report.plan import Cell, Plan, read_object, read_plan, typed

METRICS, PER_USER, ERROR, RECORD = "metrics.json", "per_user.npz", "error.json", "cell.json"
DONE, FAILED, PENDING = "done", "failed", "pending"
SMALLER_IS_BETTER = {"mae", "rmse", "mse", "logloss", "averagepopularity", "giniindex"}


def smaller_is_better(metric: str) -> bool:
    """Whether the best value of a metric such as ``rating.mae`` is the smallest."""
    return metric.startswith("seconds.") \
        or metric.rpartition(".")[2].partition("@")[0] in SMALLER_IS_BETTER


def read_table(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` whose names begin with ``prefix``, never unpickled.

    Raises:
        DataError: the file is missing, is cut off, or holds pickled objects; names the file.
    """
    try:
        return read_arrays(path, prefix)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except ValueError as error:
        raise DataError(f"{path} cannot be read as an .npz of plain arrays ({error})") from error


@dataclass
class Results:
    """The results of a store. A value that a run does not have is NaN.

    Attributes:
        store: the folder.
        plan: what was to be run.
        metrics: folder of a cell -> its ``metrics.json``, for the finished cells.
        errors: folder of a cell -> what went wrong, for the failed cells.
        records: folder of a cell -> its ``cell.json`` (tuned keys, versions, threads), if any.
    """

    store: Path
    plan: Plan
    metrics: dict[str, dict]
    errors: dict[str, str]
    records: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def load(cls, store: str | os.PathLike) -> "Results":
        """Read ``plan.json`` and the results of its cells that are there.

        A cell with a ``metrics.json`` is done, whatever an earlier attempt left beside it.

        Raises:
            DataError: a file is missing, is cut off, or does not fit; names file and key.
        """
        store = Path(store)
        plan, metrics, errors, records = read_plan(store), {}, {}, {}
        for cell in plan.cells:
            folder = store / cell.folder
            if (folder / METRICS).is_file():
                metrics[cell.folder] = read_object(folder / METRICS)
                if (folder / RECORD).is_file():
                    records[cell.folder] = read_object(folder / RECORD)
            elif (folder / ERROR).is_file():
                errors[cell.folder] = str(read_object(folder / ERROR).get("error"))
        return cls(store, plan, metrics, errors, records)

    def __post_init__(self):
        # A row of a table reads the same few files again and again.
        self._read_users = lru_cache(maxsize=256)(self._read_users)
        self._by_place: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in self.plan.cells:
            if cell.sweep is None:
                place = (cell.model, cell.setting, cell.table)
                self._by_place.setdefault(place, []).append(cell)

    def state(self, cell: Cell) -> str:
        """``done``, ``failed`` or ``pending``."""
        return DONE if cell.folder in self.metrics else \
            FAILED if cell.folder in self.errors else PENDING

    def cells(self, model: str, setting: str, table: str) -> list[Cell]:
        """The planned cells of a place in a table, in the order of the plan's seeds; no sweeps."""
        found = self._by_place.get((model, setting, table), [])
        return sorted(found, key=lambda cell: self.plan.seeds.index(cell.seed))

    def models(self, table: str) -> list[str]:
        """The models with a cell in a table, in the order of the plan."""
        there = {place[0] for place in self._by_place if place[2] == table}
        return [model for model in self.plan.models if model in there]

    def settings(self, table: str) -> list[str]:
        """The settings with a cell in a table, in the order of the plan."""
        there = {place[1] for place in self._by_place if place[2] == table}
        return [setting for setting in self.plan.settings if setting in there]

    def value(self, cell: Cell, metric: str) -> float:
        """One number of a cell; NaN if the cell is not done, or the model has no such value.

        Args:
            metric: ``<pass>.<metric>`` (of the test part), ``groups.<group>.<pass>.<metric>``,
                ``throughput.<part>`` or ``seconds.<part>``.

        Raises:
            DataError: there is something else than a number or null.
        """
        node = self.metrics.get(cell.folder)
        keys = metric.split(".", 3 if metric.startswith("groups.") else 1)
        if keys[0] not in ("groups", "throughput", "seconds"):
            keys = ["test", *keys]
        where = f"{self.store / cell.folder / METRICS}: "
        for depth, key in enumerate(keys):
            if node is None:
                return math.nan
            node = typed(node, dict, where + ".".join(keys[:depth])).get(key)
        # Python's json reads NaN and Infinity, which mean the same as null here.
        if node is None or (isinstance(node, float) and not math.isfinite(node)):
            return math.nan
        return typed(node, float, where + ".".join(keys))

    def values(self, model: str, setting: str, table: str, metric: str) -> dict[int, float]:
        """Seed -> value of the planned cells of a place, NaN where there is none."""
        return {cell.seed: self.value(cell, metric) for cell in self.cells(model, setting, table)}

    def per_user(self, cell: Cell, metric: str) -> pd.Series | None:
        """The values of a metric by user token; users without a value are left out.

        A user with several requests (sequences) counts with their mean. None if the run has no
        values by user for the metric.

        Raises:
            DataError: ``per_user.npz`` cannot be read, or its arrays do not fit together.
        """
        if self.state(cell) != DONE:
            return None
        name, _, key = metric.partition(".")
        table = self._read_users(cell.folder, name)
        if table is None or key not in table:
            return None
        found = table[key].dropna()
        return found if found.index.is_unique else found.groupby(level=0).mean()

    def _read_users(self, folder: str, name: str) -> pd.DataFrame | None:
        """The values of one pass: rows by user token, one column for each metric."""
        path = self.store / folder / PER_USER
        if not path.is_file():
            return None
        prefix = f"{name}."
        arrays = {key.removeprefix(prefix): value
                  for key, value in read_table(path, prefix).items()}
        if "user" not in arrays:
            return None
        users = arrays.pop("user")
        if users.ndim != 1 or users.dtype.kind != "U":
            raise DataError(f"{path}: {prefix}user: must be a list of tokens")
        for key, values in arrays.items():
            if values.shape != users.shape or values.dtype.kind not in "fiub":
                raise DataError(f"{path}: {prefix}{key}: must have one number for each of the "
                                f"{len(users)} users")
        table = pd.DataFrame(arrays, index=pd.Index(users, dtype=object)).astype(np.float64)
        return table.where(np.isfinite(table))

    def history(self, cell: Cell) -> list[tuple[str, int, float, float]]:
        """(stage, epoch, training loss, validation score) of every epoch; several losses are added.

        Raises:
            DataError: an entry of ``history`` does not fit.
        """
        where = f"{self.store / cell.folder / METRICS}: history"
        entries = self.metrics.get(cell.folder, {}).get("history") or []
        return [_epoch(entry, f"{where}[{number}]")
                for number, entry in enumerate(typed(entries, list, where))]


def _epoch(entry, where: str) -> tuple[str, int, float, float]:
    typed(entry, dict, where)
    loss, score = entry.get("loss"), entry.get("valid_score")
    losses = loss if isinstance(loss, list) else [loss]
    return (typed(entry.get("stage"), str, f"{where}.stage"),
            typed(entry.get("epoch"), int, f"{where}.epoch"),
            sum(_number(value, f"{where}.loss") for value in losses),
            _number(score, f"{where}.valid_score"))


def _number(value, where: str) -> float:
    missing = value is None or (isinstance(value, float) and not math.isfinite(value))
    return math.nan if missing else typed(value, float, where)
