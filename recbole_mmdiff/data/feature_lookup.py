"""Which features a folder holds, and under which names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from glob import escape
from pathlib import Path

from recbole_mmdiff.data.feature_files import FeatureError
from recbole_mmdiff.data.text_form import is_text_form
from recbole_mmdiff.files import is_plain_name

ATOMIC = ("inter", "item", "user", "kg", "link", "net")     # RecBole's own suffixes
SUFFIXES = ("npy", "tokens", "json")


def feature_path(folder: str | Path, dataset: str, modality: str, suffix: str) -> Path:
    """Path of one file of a triple. Raises FeatureError for a name that cannot be a file name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", modality):
        raise FeatureError(
            f"modality {modality!r} is not a usable name; use letters, digits, '_' and '-'"
        )
    if not is_plain_name(dataset):
        raise FeatureError(
            f"dataset {dataset!r} is not a usable name; it must be a plain file name"
        )
    return Path(folder) / f"{dataset}.{modality}.{suffix}"


def text_path(folder: str | Path, dataset: str, modality: str) -> Path | None:
    """The feature in RecBole's text form, ``<dataset>.<modality>``, or None if there is none."""
    path = feature_path(folder, dataset, modality, "npy").with_suffix("")
    return path if modality not in ATOMIC and path.is_file() else None


def find_modalities(folder: str | Path, dataset: str) -> list[str]:
    """Sorted names of the dataset's features: a matrix with a manifest beside it, or a file in
    RecBole's text form."""
    pattern = re.compile(re.escape(dataset) + r"\.([A-Za-z0-9_-]+)(\.json)?")
    found = set()
    for path in Path(folder).glob(f"{escape(dataset)}.*"):
        match = pattern.fullmatch(path.name)
        if not match:
            continue
        if match[2]:
            finished = path.with_suffix(".npy").is_file()
        else:
            finished = match[1] not in ATOMIC and path.is_file() and is_text_form(path)
        if finished:
            found.add(match[1])
    return sorted(found)


def unfinished_modalities(folder: str | Path, dataset: str) -> list[str]:
    """Sorted names of matrices without a manifest: their writing did not end."""
    pattern = re.compile(re.escape(dataset) + r"\.([A-Za-z0-9_-]+)\.npy")
    matches = (pattern.fullmatch(path.name) for path in Path(folder).glob(f"{escape(dataset)}.*.npy"))
    return sorted({match[1] for match in matches if match} - set(find_modalities(folder, dataset)))


def require_files(folder: Path, dataset: str, modality: str, paths: Sequence[Path]) -> None:
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        known = find_modalities(folder, dataset)
        raise FeatureError(
            f"{folder}: feature {modality!r} of {dataset!r} lacks {', '.join(absent)} "
            f"(finished here: {', '.join(known) or 'none'}); "
            "name another modality, or make it with recbole-mmdiff prepare encode, or with "
            "recbole_mmdiff.data.features.write_features"
        )
