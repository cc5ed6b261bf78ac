"""The folder of a run: who may work in it, and what is left of it."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from recbole_mmdiff.errors import ConfigError, FolderInUse, WriteError
from recbole_mmdiff.files import NO_ROOM, locked, remove_leftovers, write_error

CONFIG, CHECKPOINT, METRICS, LOG = "config.yaml", "checkpoint.pth", "metrics.json", "train.log"
SPLIT, LOCK = "split.npz", ".lock"


@contextmanager
def open_run_folder(config, output: str | Path | None, resume: str | Path | None) -> Iterator[Path]:
    """The folder of a run, made if need be, and this process's own until the block ends.

    A run that fails before its configuration is saved leaves nothing behind.

    Args:
        config: names a folder below ``runs`` where neither of the others does.
        output: a new or empty folder.
        resume: the folder of a run.

    Raises:
        ConfigError: ``output`` is not empty; FolderInUse where another run works in the folder.
        WriteError: it cannot be made or written; or the disk became full, and how the run goes on.
    """
    folder, made = _made(config, output, resume)
    try:
        with locked(folder / LOCK, FolderInUse(f"{folder}: another run works in this folder; wait for it, or "
                                               f"choose another --output")):
            if resume is None:
                _refuse_a_full_one(folder)
            remove_leftovers(folder)
            try:
                yield folder
            except OSError as error:
                told = _with_way_on(error, folder)
                if told is error:
                    raise
                raise told from error
            finally:
                begun = resume is not None or (folder / CONFIG).is_file()
                for name in (LOCK,) if begun else (LOCK, SPLIT, LOG):
                    with suppress(OSError):     # Windows keeps an open file; or the disk has failed.
                        (folder / name).unlink(missing_ok=True)
    finally:
        for place in made:
            with suppress(OSError):     # It is not empty: there is a run in it.
                place.rmdir()


def _made(config, output: str | Path | None, resume: str | Path | None) -> tuple[Path, list[Path]]:
    """The folder, and which ones were made for it, the innermost first."""
    if resume is not None or output:
        folder = Path(resume or output)
        if resume is None and not (folder / LOCK).is_file():    # Else it may be that of a run under way.
            _refuse_a_full_one(folder)
        return folder, _make(folder, may_exist=True)
    name = f"{config['model']}-{config['dataset']}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):   # Two runs may be started in one second.
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            return folder, _make(folder, may_exist=False)


def _make(folder: Path, may_exist: bool) -> list[Path]:
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=may_exist)
    except OSError as error:
        if isinstance(error, FileExistsError) and not may_exist:
            raise
        raise write_error(folder, error) from error
    return missing


def _refuse_a_full_one(folder: Path) -> None:
    """Raises ConfigError for a file, or a folder that holds more than a run leaves that was killed before its
    configuration was saved, and so cannot be resumed."""
    if folder.exists() and (not folder.is_dir() or _names(folder) not in (set(), {LOG}, {LOG, SPLIT})):
        way_on = f", or --resume={folder}" if (folder / CONFIG).is_file() else ""
        raise ConfigError(f"--output: {folder} exists and is not empty; choose another folder{way_on}")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def _with_way_on(error: OSError, folder: Path) -> OSError:
    """The error of a full disk with how the run goes on; any other as it is."""
    if not isinstance(error, WriteError):
        if error.errno not in NO_ROOM:
            return error
        error = write_error(folder, error)
    if (folder / CHECKPOINT).is_file():
        return WriteError(f"{error}; then --resume={folder} goes on from its last checkpoint, which is whole")
    if (folder / CONFIG).is_file():
        return WriteError(f"{error}; then --resume={folder} starts it again")
    return error
