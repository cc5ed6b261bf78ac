"""Files that are never half written, and their checksums; needs nothing but Python."""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp(\.[^.]+)?")


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is that of a file or folder on every system: it leads to no other folder or
    drive, and holds no NUL."""
    return name not in ("", "..") and "\0" not in name \
        and PurePosixPath(name).name == PureWindowsPath(name).name == name


@contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the place of ``path`` on success only.

    Readers see the old file or the complete new one, even if the process is killed midway. The
    temporary keeps the suffix of ``path`` (numpy appends one otherwise) and is removed on failure; that of
    a killed process stays, see `remove_leftovers`.

    Raises:
        FileNotFoundError: the folder does not exist, or the block did not write the temporary.
    """
    # A symbolic link keeps pointing at the file that it pointed at.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}.tmp{target.suffix}")
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # The renaming is safe from a power cut once the folder is flushed.
        _flush_to_disk(target.parent)


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
