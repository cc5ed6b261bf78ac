"""``recbole-mmdiff prepare features``: stored features checked in full, text forms converted."""

from __future__ import annotations

import argparse
from pathlib import Path

from dataset_prep.folders import data_folder
from recbole_mmdiff.data.features import FeatureFile, find_modalities, unfinished_modalities
from recbole_mmdiff.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--data", required=True, type=Path, metavar="DIR/NAME",
                        help="folder of a data set; its features are NAME.<modality>.*")
    parser.add_argument("--modality", action="append", metavar="M",
                        help="one feature (may be given several times); all of them by default")


def main(options: argparse.Namespace) -> None:
    """Open every feature, convert it if it is in RecBole's text form, and read it to the end.

    Raises:
        DataError: there is none; or, after all have been read, one is unfinished or damaged, does
            not match its checksum, or holds NaN or Inf; each names the file and the token.
    """
    folder = data_folder(options.data)
    unfinished = unfinished_modalities(folder, folder.name)
    names = options.modality or [*find_modalities(folder, folder.name), *unfinished]
    if not names:
        raise DataError(f"{folder}: holds no features of {folder.name!r}; prepare encode makes them")
    faults = []
    for name in names:
        try:
            print(_checked(folder, name))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError(f"{len(faults)} of {len(names)} features cannot be used:\n" + "\n".join(faults))


def _checked(folder: Path, modality: str) -> str:
    file = FeatureFile.open(folder, folder.name, modality)
    file.verify()
    rows, dim = file.matrix.shape
    return (f"{file.path.name}: {rows:,} {file.entity or 'item'}s x {dim:,} {file.matrix.dtype.name}, "
            f"checksum and values are right; encoder: {file.manifest.get('encoder', 'unstated')}")
