"""Users outside of the training: the file of what they rated, and how they are scored."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from recbole_mmdiff.data.atomic import read_atomic
from recbole_mmdiff.errors import DataError
from recbole_mmdiff.model.new_users import SourceRows

_SHOWN = 5


def read_new_users(path: Path, source, skip_unknown: bool) -> tuple[np.ndarray, SourceRows]:
    """The users of a file, sorted by token, and what they rated.

    Args:
        path: an atomic file (``user_id:token``, ``item_id:token``, ``rating:float``, tab-separated), or a
            ``.csv`` with the same names in its first line, without types.
        source: the data set of the source domain, whose column names and items hold; the rating must be
            there if the domain has ratings, on the same scale.
        skip_unknown: leave out users who rated no item of the source domain.

    Returns:
        tokens (count,), and their rows. Rows with items that the domain does not have are left out; the log
        tells how many, and the first lines.

    Raises:
        DataError: file, line and column of the first fault; or a user who rated no known item.
    """
    names = [source.uid_field, source.iid_field]
    if source.ratings is not None:
        names.append(source.config["RATING_FIELD"])
    frame = _read_csv(path, names) if path.suffix == ".csv" else \
        read_atomic(path, set(names), set(names), source.config["field_separator"],
                    source.config["encoding"] or "utf-8")
    user, item = (frame[name].astype(str) for name in names[:2])
    twice = frame.duplicated(names[:2]).to_numpy()
    if twice.any():
        row = int(twice.argmax())
        raise DataError(f"{path}, line {frame.index[row] + 2}: user {user.iloc[row]!r} and item "
                        f"{item.iloc[row]!r} stand together a second time; keep one of the lines")
    ids = item.map(source.field2token_id[source.iid_field]).fillna(0).to_numpy(dtype=np.int64)
    _tell_unknown(path, item[ids == 0])
    tokens, place = np.unique(user.to_numpy(dtype=str)[ids > 0], return_inverse=True)
    _check_unknown_users(path, np.setdiff1d(user.to_numpy(dtype=str), tokens), len(tokens), skip_unknown)
    order = np.argsort(place, kind="stable")
    rating = None
    if len(names) == 3:
        _check_scale(path, frame[names[2]], source.ratings)
        rating = torch.from_numpy(frame[names[2]].to_numpy(dtype=np.float32)[ids > 0][order])
    return tokens, SourceRows(torch.from_numpy(place[order]), torch.from_numpy(ids[ids > 0][order]), rating,
                              len(tokens))


def _read_csv(path: Path, names: list[str]) -> pd.DataFrame:
    """The columns ``names`` of a CSV file; the third, if there is one, as numbers."""
    try:
        with warnings.catch_warnings():
            # Of lines longer than the first pandas would make an index, which shifts all columns, or drop
            # what is too much.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8",
                                skip_blank_lines=False, index_col=False)
    except (OSError, ValueError, pd.errors.ParserWarning) as error:     # Wrong UTF-8 is a ValueError.
        raise DataError(f"{path}: cannot be read as CSV in UTF-8 ({error})") from error
    absent = [name for name in names if name not in frame]
    if absent:
        raise DataError(f"{path}, line 1: there is no column {absent[0]!r}, only {list(frame.columns)}; the "
                        f"first line must be {','.join(names)}")
    frame = frame[names]
    for name in names:
        numbers = pd.to_numeric(frame[name], errors="coerce") if name in names[2:] else None
        wrong = frame[name] == "" if numbers is None else ~np.isfinite(numbers)
        if wrong.any():
            row = int(wrong.to_numpy().argmax())
            raise DataError(f"{path}, line {row + 2}: {name} is {frame[name].iloc[row]!r}; fill in a "
                            f"{'token' if numbers is None else 'finite number'} or delete the line")
        if numbers is not None:
            frame = frame.assign(**{name: numbers})
    if frame.empty:
        raise DataError(f"{path}: holds a header but no rows")
    return frame


def _check_scale(path: Path, ratings: pd.Series, trained: torch.Tensor) -> None:
    """Ratings are on the scale of those that the model was trained with."""
    least, most = float(trained.min()), float(trained.max())
    outside = ~ratings.between(least, most).to_numpy()
    if outside.any():
        row = int(outside.argmax())
        raise DataError(f"{path}, line {ratings.index[row] + 2}: {ratings.name} is {ratings.iloc[row]:g}, "
                        f"but those of the source domain are from {least:g} to {most:g}; bring them to that "
                        f"scale, or delete the line")


def _tell_unknown(path: Path, items: pd.Series) -> None:
    """Warn of rows whose items (by row number) the source domain does not have."""
    if len(items):
        lines = ", ".join(f"line {row + 2} ({item!r})" for row, item in items.head(_SHOWN).items())
        logging.getLogger().warning(
            "%s: %d rows name %d items that are not in the source domain, and are left out: %s%s", path,
            len(items), items.nunique(), lines, ", ..." * (len(items) > _SHOWN))


def _check_unknown_users(path: Path, unknown: np.ndarray, known: int, skip: bool) -> None:
    if len(unknown) and not skip:
        raise DataError(f"{path}: {unknown[:_SHOWN].tolist()} rated no item of the source domain "
                        f"({len(unknown)} of {len(unknown) + known} users); leave them out "
                        f"(--skip-unknown), or give ratings of items that it has")
    if not known:
        raise DataError(f"{path}: nobody rated an item of the source domain, so nobody is left")
