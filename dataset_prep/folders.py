"""The folder of a data set: its name and the items that it lists."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from recbole_mmdiff.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


#: beside the data sets: the locks and the unfinished files of a preparation
HIDDEN = ".prepare"


def data_folder(path: str | Path) -> Path:
    """The folder of a data set, whose name is the data set's. Where it is a symbolic link, the data
    set has the link's name, as RecBole has it."""
    return Path(os.path.abspath(path))


def item_path(data: str | Path) -> Path:
    """``NAME.item`` of the data set in the folder ``data``."""
    folder = data_folder(data)
    return folder / f"{folder.name}.item"


def read_items(path: Path, columns: set[str]) -> pd.DataFrame:
    """``item_id`` and ``columns`` of a ``NAME.item``, a row an item; see `read_atomic`.

    Raises:
        DataError: as `read_atomic`; an item stands twice.
    """
    from recbole_mmdiff.data.atomic import read_atomic  # It imports RecBole.

    frame = read_atomic(path, {"item_id", *columns}, {"item_id"})
    twice = frame["item_id"][frame["item_id"].duplicated()]
    if len(twice):
        raise DataError(f"{path}: the item {twice.iloc[0]!r} stands twice ({len(twice):,} such lines); "
                        f"keep one line for each item")
    return frame
