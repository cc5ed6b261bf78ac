"""What a comparison set out to run: ``plan.json`` of a results store, read and checked."""

import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_mmdiff.errors import DataError
from recbole_mmdiff.files import is_plain_name, read_json

PLAN, FORMAT = "plan.json", 1
_KINDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Sweep:
    """One value of a swept key: ``key`` of ``model`` is ``value`` (a number, text or None)."""

    model: str
    key: str
    value: Any


@dataclass(frozen=True)
class Cell:
    """One run: ``model`` in ``setting`` with ``seed``, for the metrics of ``table``.

    ``folder`` is relative to the store, ``trials`` the number of tuning trials before the run (None
    if it was not tuned). A cell with a ``sweep`` stands in sensitivity curves, never in a table.
    """

    model: str
    setting: str
    table: str
    seed: int
    folder: str
    sweep: Sweep | None = None
    trials: int | None = None


@dataclass(frozen=True)
class Published:
    """Numbers of a paper: setting -> metric -> one value for each of ``models``, None if not given.

    ``tolerance`` maps a metric to the relative difference up to which it counts as reproduced.
    """

    source: str
    models: tuple[str, ...]
    tolerance: dict[str, float]
    values: dict[str, dict[str, tuple[float | None, ...]]]
    note: str | None = None


@dataclass(frozen=True)
class Plan:
    """A comparison: labels in the order of the report, metrics of every table, and the cells."""

    name: str
    models: tuple[str, ...]
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    tables: dict[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    ours: tuple[str, ...] | None = None
    published: Published | None = None


def read_object(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        DataError: the file is missing, is cut off, or holds something else; names the file.
    """
    try:
        data = read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error})") from error
    return typed(data, dict, str(path))


def typed(value: Any, kind: type, where: str) -> Any:
    """``value`` if it is of a JSON ``kind`` (float stands for any finite number), else a DataError."""
    accepted = (int, float) if kind is float else kind
    # In Python, but not in JSON, true is a whole number.
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise DataError(f"{where}: must be {_KINDS[kind]}, not {reprlib.repr(value)}")
    if kind is float:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise DataError(f"{where}: must be a finite number")
    return value


def read_plan(store: Path) -> Plan:
    """Read ``plan.json`` of a results store.

    Raises:
        DataError: it is missing, is cut off, has another format, or a key does not fit; names file
            and key.
    """
    path = store / PLAN
    if not path.is_file():
        raise DataError(f"there is no {PLAN} in {store}, so it is not a results store; "
                        f"`recbole-mmdiff compare` writes one")
    return check_plan(read_object(path), f"{path}: ")


def check_plan(data: dict, where: str) -> Plan:
    """The plan that ``data`` holds; ``where`` begins every message.

    Raises:
        DataError: as ``read_plan``.
    """
    found = _get(data, "format", int, where)
    if found != FORMAT:
        raise DataError(f"{where}format: {found} is not known, this version of recbole-mmdiff reads "
                        f"{FORMAT}; use the version that wrote it")
    models, settings = (_labels(data, key, where) for key in ("models", "settings"))
    seeds = _list(data, "seeds", int, where)
    tables = {name: _metrics(value, f"{where}tables.{name}")
              for name, value in _get(data, "tables", dict, where).items()}
    known = {"model": models, "setting": settings, "table": tables, "seed": seeds}
    cells = tuple(_cell(cell, f"{where}cells[{number}].", known)
                  for number, cell in enumerate(_get(data, "cells", list, where)))
    _refuse_repeats(cells, where)
    ours = None if data.get("ours") is None else _labels(data, "ours", where)
    for label in ours or ():
        _known(label, models, f"{where}ours")
    published = None if data.get("published") is None \
        else _published(_get(data, "published", dict, where), f"{where}published.")
    return Plan(_get(data, "name", str, where), models, settings, seeds, tables, cells, ours,
                published)


def _get(data: dict, key: str, kind: type, where: str) -> Any:
    if key not in data:
        raise DataError(f"{where}{key}: is missing")
    return typed(data[key], kind, f"{where}{key}")


def _list(data: dict, key: str, kind: type, where: str) -> tuple:
    values = tuple(typed(value, kind, f"{where}{key}[{number}]")
                   for number, value in enumerate(_get(data, key, list, where)))
    if not values:
        raise DataError(f"{where}{key}: is empty")
    if len(set(values)) != len(values):
        raise DataError(f"{where}{key}: names something twice")
    return values


def _labels(data: dict, key: str, where: str) -> tuple[str, ...]:
    labels = _list(data, key, str, where)
    if not all(label.strip() for label in labels):
        raise DataError(f"{where}{key}: a label is empty")
    return labels


def _known(value: Any, known, where: str) -> Any:
    if value not in known:
        raise DataError(f"{where}: {reprlib.repr(value)} is not in the plan's lists")
    return value


def _metrics(table: Any, where: str) -> tuple[str, ...]:
    metrics = _labels(typed(table, dict, where), "metrics", f"{where}.")
    for metric in metrics:
        parts = metric.split(".", 3 if metric.startswith("groups.") else 1)
        if not all(parts) or len(parts) != (4 if parts[0] == "groups" else 2):
            raise DataError(f"{where}.metrics: {reprlib.repr(metric)} is neither <pass>.<metric> nor "
                            f"groups.<group>.<pass>.<metric>")
    return metrics


def _cell(cell: Any, where: str, known: dict) -> Cell:
    typed(cell, dict, where.rstrip("."))
    sweep = None
    if cell.get("sweep") is not None:
        inner = _get(cell, "sweep", dict, where)
        value = inner.get("value")
        # A list, such as the sizes of layers, is a point without a place on a scale.
        value = json.dumps(value) if isinstance(value, (dict, list)) else value
        sweep = Sweep(*(_get(inner, key, str, f"{where}sweep.") for key in ("model", "key")), value)
    # A sweep may have a label of its own, which stands in no table.
    model = _get(cell, "model", str, where)
    values = {key: _known(_get(cell, key, kind, where), known[key], f"{where}{key}")
              for key, kind in (("setting", str), ("table", str), ("seed", int))}
    folder = _get(cell, "folder", str, where)
    if not all(is_plain_name(part) for part in folder.split("/")):
        raise DataError(f"{where}folder: {reprlib.repr(folder)} must lie in the store, in folders of plain "
                        f"names")
    trials = None if cell.get("trials") is None else _get(cell, "trials", int, where)
    return Cell(model if sweep else _known(model, known["model"], f"{where}model"),
                **values, folder=folder, sweep=sweep, trials=trials)


def _refuse_repeats(cells: tuple[Cell, ...], where: str) -> None:
    """Which of two cells for the same place would the report show?"""
    seen = {}
    for number, cell in enumerate(cells):
        place = (cell.model, cell.setting, cell.table, cell.seed, cell.sweep)
        if place in seen:
            raise DataError(f"{where}cells[{number}]: is the same run as cells[{seen[place]}]")
        seen[place] = number


def _published(data: dict, where: str) -> Published:
    models = _labels(data, "models", where)
    tolerance = {metric: typed(value, float, f"{where}tolerance.{metric}")
                 for metric, value in _get(data, "tolerance", dict, where).items()}
    values = {}
    for setting, metrics in _get(data, "values", dict, where).items():
        values[setting] = {}
        for metric in typed(metrics, dict, f"{where}values.{setting}"):
            inner = f"{where}values.{setting}."
            row = _get(metrics, metric, list, inner)
            if len(row) != len(models):
                raise DataError(f"{inner}{metric}: has {len(row)} values for {len(models)} models")
            values[setting][metric] = tuple(
                None if value is None else typed(value, float, f"{inner}{metric}") for value in row)
    note = None if data.get("note") is None else _get(data, "note", str, where)
    return Published(_get(data, "source", str, where), models, tolerance, values, note)
