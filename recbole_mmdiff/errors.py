"""The kinds of mistakes that users are told about without a traceback."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A configuration key or value that cannot be used; the message names it."""


class FolderInUse(ConfigError):
    """A folder in which another process works; it is safe to ask again later."""


class DataError(ValueError):
    """A file or a data set that cannot be used; the message names file, line and column."""


class CheckpointError(ValueError):
    """A state that cannot be stored, or a file that cannot be read back safely."""


class TrainingError(ValueError):
    """Training that cannot go on: a loss, weights or scores that are no numbers; the message says where."""


class ProcessError(RuntimeError):
    """One of the processes of a run has ended, or cannot be reached."""


class WriteError(OSError):
    """A file or folder that cannot be written: a full disk, no permission. The message names it, and what
    to do."""


#: what a command tells in one line
TOLD = (ConfigError, DataError, CheckpointError, TrainingError, ProcessError, WriteError)


@contextmanager
def in_words_of(keys: str) -> Iterator[None]:
    """A ValueError of a lower room, which knows arguments and no keys, as a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{keys}: {error}") from error


def suggest(name: str, known: Iterable[str]) -> str:
    """A clause ``; did you mean 'x'?`` for the known name nearest to ``name``, or ''."""
    known = list(known)
    by_lower = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def one_of(key: str, value, choices: Iterable[str]):
    """``value`` if it is one of ``choices``, else a ConfigError that lists them."""
    choices = list(choices)
    if value not in choices:
        hint = suggest(str(value), choices)
        raise ConfigError(f"{key}: {value!r} is not known, use one of {choices}{hint}")
    return value


def at_least(key: str, value: float, least: float) -> None:
    """Raises a ConfigError for a value below ``least``."""
    if value < least:
        raise ConfigError(f"{key}: {value!r} is too small, use {least} or more")


def share(key: str, value: float, below_one: bool = False) -> None:
    """Raises a ConfigError for a value outside of 0 .. 1, or ``below_one`` also for 1."""
    if not 0 <= value <= 1 or (below_one and value == 1):
        raise ConfigError(f"{key}: {value} is no share; use a number from 0 "
                          + ("up to, but not including, 1" if below_one else "to 1"))
