"""The table of recommendations, and its files."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.files import write_atomically

FORMATS = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Recommendations:
    """A row for each recommended item, user after user, best first.

    Attributes:
        user, item: (n,) tokens.
        score: (n,) float32, as the model gives them: ratings, or numbers that only order items.
        rank: (n,) int64, from 1 for each user.
    """

    user: np.ndarray
    item: np.ndarray
    score: np.ndarray
    rank: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def of(self, user: str) -> list[str]:
        """The items of one user, best first."""
        return self.item[self.user == user].tolist()

    def frame(self) -> pd.DataFrame:
        """The columns user, item, score and rank."""
        return pd.DataFrame(vars(self))

    def save(self, path: str | Path) -> None:
        """Write a ``.csv``, a ``.jsonl`` (one JSON object a row) or a ``.parquet`` file, whole or not at all.

        Raises:
            ConfigError: as ``check_output``.
        """
        suffix, frame = check_output(path), self.frame()
        with write_atomically(path) as temporary:
            if suffix == ".csv":
                frame.to_csv(temporary, index=False)
            elif suffix == ".jsonl":
                frame.to_json(temporary, orient="records", lines=True, force_ascii=False)
            else:
                frame.to_parquet(temporary, index=False)


def check_output(path: str | Path) -> str:
    """The suffix of a file that can be written.

    Raises:
        ConfigError: another suffix, a folder that is not there, or parquet without pyarrow.
    """
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise ConfigError(f"--output: {path} ends in {suffix!r}; use one of {list(FORMATS)}")
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"--output: there is no folder {Path(path).resolve().parent} for {Path(path).name}")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"--output: {path} needs pyarrow (pip install pyarrow); or write .csv or .jsonl")
    return suffix
