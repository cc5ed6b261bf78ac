"""Files that are never half written, their checksums, and folders with one owner."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from recbole_mmdiff.errors import WriteError

#: what the system says where a file cannot grow
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if os.name == "posix" else (errno.ENOSPC,)
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp(\.[^.]+)?")
#: bytes of a plain name; systems take 255
LONGEST_NAME = 200


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is that of a file or folder on every system: it leads to no other folder or
    drive, holds no NUL and no half of a character, and leaves room for a suffix."""
    return name not in ("", "..") and "\0" not in name \
        and len(name.encode("utf-8", "replace")) <= LONGEST_NAME and not re.search("[\ud800-\udfff]", name) \
        and PurePosixPath(name).name == PureWindowsPath(name).name == name


@contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the place of ``path`` on success only.

    Readers see the old file or the complete new one, even if the process is killed midway. The
    temporary keeps the suffix of ``path`` (numpy appends one otherwise) and is removed on failure; that of
    a killed process stays, see `remove_leftovers`.

    Raises:
        WriteError: a full disk, a folder that is not there or cannot be written, or a block that did not
            write the temporary.
    """
    # A symbolic link keeps pointing at the file that it pointed at.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}.tmp{target.suffix}")
    with telling_of_disk(path, temporary):
        try:
            yield temporary
            _flush_to_disk(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        if os.name == "posix":  # The renaming is safe from a power cut once the folder is flushed.
            _flush_to_disk(target.parent)


@contextmanager
def telling_of_disk(path: str | os.PathLike, temporary: Path | None = None) -> Iterator[None]:
    """A refusal of the operating system to write ``path`` (what is in it, of a folder), or its ``temporary``,
    as a WriteError; one that names another file is left as it is."""
    try:
        yield
    except Exception as error:
        found = _disk_error(error)
        if found is None:
            raise
        named = Path(path if found.filename is None or found.errno in NO_ROOM else found.filename)
        if named != temporary and Path(path) not in (named, *named.parents):
            raise       # What could not be read, say.
        raise write_error(path, found) from error


def write_error(path: str | os.PathLike, error: OSError) -> WriteError:
    """What is told of a file or folder that cannot be written, and why not."""
    why, todo = error.strerror or str(error), "check that its folder is there and can be written"
    if error.errno in NO_ROOM:
        todo = "make room on this disk, or use another one"
        folder = next((place for place in Path(os.path.abspath(path)).parents if place.is_dir()), None)
        if folder is not None:
            why += f", {shutil.disk_usage(folder).free / 1e6:.1f} MB are free"
    return WriteError(f"{path}: cannot be written ({why}); {todo}")


def _disk_error(error: Exception) -> OSError | None:
    """The operating system's refusal behind an error, if there is one: torch's writer raises another in its
    place, and libraries in Rust (polars) put its number into a text."""
    if isinstance(error, WriteError):
        return None
    if isinstance(error, OSError) and error.errno:
        return error
    behind = error.__context__
    if isinstance(error, RuntimeError) and isinstance(behind, OSError) and behind.errno in NO_ROOM:
        return behind
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there; raises WriteError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


@contextmanager
def locked(path: Path, in_use: Exception) -> Iterator[None]:
    """Hold the lock file ``path``, which the system gives free when this process ends, however it ends.

    Raises:
        WriteError: it cannot be made; ``in_use`` where another process holds it.
    """
    from filelock import FileLock, Timeout

    try:
        lock = FileLock(path).acquire(timeout=0)
    except Timeout as error:
        raise in_use from error
    except OSError as error:
        raise write_error(path, error) from error
    with lock:
        yield


def remove_leftovers(folder: str | os.PathLike, names: Collection[str] | None = None) -> None:
    """Remove the temporaries that killed processes left in ``folder``: all, or those of the files ``names``.

    Only for who knows that no other process writes these files now: it would lose its temporary.
    """
    for path in Path(folder).iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found and (names is None or f"{found[1]}{found[2] or ''}" in names):
            path.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    """Wait until the contents of a file, or the entries of a folder, are on the disk."""
    writable = os.O_RDONLY if path.is_dir() else os.O_RDWR  # Windows flushes writable handles only.
    handle = os.open(path, writable)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The checksum of a file's bytes, read block by block."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file in UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or nested without end.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from error


def write_json(value, path: str | os.PathLike) -> None:
    """Write plain values as JSON, atomically; numbers that are not finite become null."""
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False)
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _finite(value):
    """JSON has no NaN: a value that does not exist is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
