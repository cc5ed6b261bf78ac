"""The data of a run beside its checkpoint, so that the folder alone rebuilds the model."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from recbole_mmdiff.data.atomic import read_header
from recbole_mmdiff.data.features import FeatureFile, write_features
from recbole_mmdiff.data.preparation import Parts
from recbole_mmdiff.errors import DataError, WriteError
from recbole_mmdiff.files import read_json, sha256, write_atomically, write_json

KEPT, DONE, LINKS = "data", "kept.json", "links.tsv"
_WRITTEN_ANEW = ("rows", "dim", "dtype", "sha256", "tokens_sha256", "modality", "text_form")


def keep_data(parts: Parts, folder: Path) -> int:
    """Write into ``folder/data`` what a run has read, once its model is built.

    ``source/NAME/`` and ``target/NAME/`` hold the atomic files with the columns that were loaded, and of
    the features that the model read the rows of the data set's items or users; ``links.tsv`` the links,
    where a file names them. ``kept.json`` is written last: without it the rest is unfinished.

    Returns:
        the number of bytes.

    Raises:
        DataError: a file is gone. WriteError: there is no room.
    """
    observed, root = parts.observed, folder / KEPT
    domains = {"target": observed}
    if hasattr(observed, "source"):
        domains["source"] = observed.source
    try:
        shutil.rmtree(root, ignore_errors=True)
        for role, dataset in domains.items():
            place = root / role / dataset.dataset_name
            place.mkdir(parents=True)
            _keep_domain(dataset, place)
        links = observed.config["user_link_file_path"]
        if len(domains) == 2 and links:
            with write_atomically(root / LINKS) as temporary:
                shutil.copyfile(links, temporary)
        files = {path.relative_to(root).as_posix(): path
                 for path in sorted(root.rglob("*")) if path.is_file()}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        sums = {name: sha256(path) for name, path in files.items() if _is_summed(name)}
        write_json({"bytes": sizes, "sha256": sums}, root / DONE)
    except OSError as error:
        shutil.rmtree(root, ignore_errors=True)     # What is unfinished only takes room.
        if isinstance(error, WriteError):
            raise WriteError(f"{error}, or set keep_data: False") from error
        raise DataError(f"keep_data: {error.filename} cannot be copied into {root} ({error.strerror}); "
                        f"make room, or set keep_data: False") from error
    return sum(sizes.values())


def check_kept(folder: Path) -> None:
    """Raises DataError for a file of a run's kept data that is not as it was written: another size, or, of
    text, another checksum (``prepare features`` checks matrices in full)."""
    root = folder / KEPT
    try:
        saved = read_json(root / DONE)
        sizes, sums = dict(saved["bytes"]), dict(saved.get("sha256", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{root / DONE}: cannot be read ({error}); copy the run again, or remove {root} to "
                        f"read the original data") from error
    for name, size in sizes.items():
        path = root / name
        same = path.is_file() and path.stat().st_size == size
        if not same or (name in sums and sums[name] != sha256(path)):
            raise DataError(f"{path}: is not as the run wrote it; copy the run again, or remove {root} to "
                            f"read the original data")


def _is_summed(name: str) -> bool:
    """Text is read in full anyway, which takes longer; a matrix may be larger than what is read of it."""
    return not name.endswith(".npy")


def kept_keys(folder: Path, saved: dict) -> dict:
    """The configuration keys that read the data kept in a run folder; none if it keeps none.

    Args:
        folder: of the run.
        saved: its ``config.yaml``.
    """
    root = Path(os.path.abspath(folder)) / KEPT
    if not (root / DONE).is_file():
        return {}
    if not saved.get("target_domain"):
        return {"data_path": str(root / "target")}
    keys = {f"{role}_domain": {"data_path": str(root / role)} for role in ("source", "target")}
    if saved.get("user_link_file_path"):
        keys["user_link_file_path"] = str(root / LINKS)
    if saved.get("split_file"):     # Of another run, which may be elsewhere.
        keys["split_file"] = str(root.parent / "split.npz")
    return keys


def _keep_domain(dataset, folder: Path) -> None:
    separator, encoding = dataset.config["field_separator"], dataset.config["encoding"] or "utf-8"
    for path, names in dataset.files_read.items():
        with write_atomically(folder / path.name) as temporary:
            _copy_columns(path, temporary, names, separator, encoding)
    for name, field in dataset.features_read.items():
        file = FeatureFile.open(dataset.dataset_path, dataset.dataset_name, name)
        wanted = set(dataset.field2id_token[field])
        rows = [row for row, token in enumerate(file.tokens) if token in wanted]
        manifest = {key: value for key, value in file.manifest.items() if key not in _WRITTEN_ANEW}
        write_features(folder, dataset.dataset_name, name, [file.tokens[row] for row in rows],
                       file.matrix[rows], **manifest)


def _copy_columns(path: Path, target: Path, names: Iterable[str], separator: str, encoding: str) -> None:
    """An atomic file with some of its columns, as they stand there."""
    columns = [column.name for column in read_header(path, separator, encoding)]
    kept = [place for place, name in enumerate(columns) if name in names]
    if len(kept) == len(columns):
        shutil.copyfile(path, target)
        return
    with open(path, encoding=encoding, newline="\n") as lines, \
            open(target, "w", encoding=encoding, newline="\n") as out:
        for line in lines:
            cells = line.rstrip("\r\n").split(separator)
            if len(cells) == len(columns):      # Else it is blank: all others were refused before.
                out.write(separator.join(cells[place] for place in kept) + "\n")
