"""``recbole-mmdiff prepare features``: stored features checked in full, text forms converted."""

from __future__ import annotations

import argparse
from pathlib import Path

from recbole_mmdiff.data.features import FeatureFile, find_modalities
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
        DataError: there is none, or one is damaged, does not match its checksum, or holds NaN or
            Inf; it names the file and the token.
    """
    folder = options.data
    names = options.modality or find_modalities(folder, folder.name)
    if not names:
        raise DataError(f"{folder}: holds no features of {folder.name!r}; prepare encode makes them")
    for name in names:
        file = FeatureFile.open(folder, folder.name, name)
        file.verify()
        rows, dim = file.matrix.shape
        print(f"{file.path.name}: {rows:,} {file.entity or 'item'}s x {dim:,} {file.matrix.dtype.name}, "
              f"checksum and values are right; encoder: {file.manifest['encoder']}")
