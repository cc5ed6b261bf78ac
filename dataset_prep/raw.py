"""Raw files of lines, plain or gzip: streamed in bounded memory, every line that is left out counted."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from dataset_prep.skips import Skips
from recbole_mmdiff.errors import DataError

CHUNK = 1 << 24         # bytes of text that are parsed at once
LINE_LIMIT = 1 << 26    # a longer line is cut here, so that it cannot fill the memory, and then refused
MAX_BAD = 0.01
_BLOCK = 1 << 18
_EARLY = 100_000        # bad lines, and none that is good, after which a file is not read to its end
_UTF16 = re.compile(rb"\xff\xfe|\xfe\xff|.?\0", re.DOTALL)
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|\?xml)", re.IGNORECASE)


class Chunk(NamedTuple):
    """Whole lines of a file: the number of the first, counted from 1, how many, and their bytes."""

    first: int
    lines: int
    text: bytes


class RawFile:
    """A plain or gzip file of lines, read once from its start to its end.

    Attributes:
        lines: how many lines were read so far.
        good: how many of them were parsed without a fault; whoever parses them counts them here.
        not_needed: how many were not parsed, since nobody needs what they hold; counted likewise.
        unended: the number of a last line that no line break ends, else 0.
        skips: what was left out, by reason.
    """

    def __init__(self, path: str | Path, max_bad: float = MAX_BAD) -> None:
        self.path = Path(path)
        self.max_bad = max_bad
        self.lines = self.good = self.not_needed = 0
        self.skips = Skips()
        self._digest = hashlib.sha256()
        self.unended = 0

    def chunks(self) -> Iterator[Chunk]:
        """The file in chunks of about `CHUNK` bytes; a last line without a line break gets one.

        A thread reads the next chunk while the last one is worked on, so ``lines`` may be one chunk ahead.

        Raises:
            DataError: the file cannot be read, is empty, a web page or in UTF-16, or is a broken or cut off
                gzip file; or none of a great many lines is good.
        """
        chunks = self._chunks()
        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(next, chunks, None)
            while (chunk := following.result()) is not None:
                following = reader.submit(next, chunks, None)
                yield chunk
                if not self.good and self.skips.total >= _EARLY:
                    raise self._unusable(f"none of the first {self.skips.total:,} lines can be used")

    def _chunks(self) -> Iterator[Chunk]:
        parts: list[bytes] = []
        size = 0
        for block in self._blocks(parts):
            cut = block.rfind(b"\n") + 1
            parts.append(block[:cut])
            size += cut
            if cut and size >= CHUNK:
                yield self._count(b"".join(parts))
                parts[:], size = [], 0
            # A zero byte for what is dropped of an endless line: no reader takes such a line for a good one.
            parts.append(block[cut:] if size < LINE_LIMIT else b"\0")
            size += len(parts[-1])
        last = b"".join(parts)
        if last and not last.endswith(b"\n"):
            self.unended = self.lines + last.count(b"\n") + 1
            last += b"\n"
        if last:
            yield self._count(last)
        if not self.lines:
            raise DataError(f"{self.path}: is empty; download it again")

    def bad(self, number: int, reason: str) -> None:
        """Count line ``number`` as left out; a DataError if the file ends within it."""
        if number == self.unended:
            raise DataError(f"{self.path}, line {number}: {reason}, and the file ends within the line; it "
                            "was cut off: download it again")
        self.skips.add(reason, where=f"{self.path.name}, line {number}")

    def check_share(self) -> None:
        """Raise a DataError if more than the accepted share of the lines that were parsed is bad."""
        parsed = self.good + self.skips.total
        if self.skips.total > self.max_bad * parsed:
            raise self._unusable(f"{self.skips.total:,} of {parsed:,} lines that were parsed cannot be used, "
                                 f"more than {self.max_bad:.2%}")

    def _unusable(self, what: str) -> DataError:
        return DataError(
            f"{self.path}: {what} ({'; '.join(self.skips.lines())}); the file is damaged or of another "
            "layout: download it again, name its --edition, or accept more with --max-bad")

    def record(self) -> dict[str, Any]:
        """Name, bytes, sha256 of the file as it is on disk, its lines, those that were not needed and not
        parsed, and what was left out."""
        return {"name": self.path.name, "bytes": self.path.stat().st_size,
                "sha256": self._digest.hexdigest(), "lines": self.lines, "not_needed": self.not_needed,
                "left_out": self.skips.as_dict()}

    def _count(self, text: bytes) -> Chunk:
        chunk = Chunk(self.lines + 1, text.count(b"\n"), text)
        self.lines += chunk.lines
        return chunk

    def _blocks(self, pending: list[bytes]) -> Iterator[bytes]:
        try:
            with _opened(self.path, self._digest) as stream:
                block = stream.read(_BLOCK)
                _check_start(self.path, block)
                while block:
                    yield block
                    block = stream.read(_BLOCK)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            lines = self.lines + sum(part.count(b"\n") for part in pending)
            raise DataError(f"{self.path}: not a complete gzip file ({error}); {lines:,} complete lines were "
                            "read, and nothing was written: download it again") from error
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})") from error


class _Watched:
    """A file that shows its progress and feeds a digest while it is read."""

    def __init__(self, file: BinaryIO, digest: Any, bar: tqdm) -> None:
        self._file, self._digest, self._bar = file, digest, bar

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._digest.update(block)
        self._bar.update(len(block))
        return block


@contextmanager
def _opened(path: Path, digest: Any) -> Iterator[Any]:
    """The text of a plain or gzip file, told apart by their first bytes."""
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=None)
    with open(path, "rb") as file, bar:
        watched = _Watched(file, digest, bar)
        yield gzip.GzipFile(fileobj=watched) if _zipped(file) else watched


def _zipped(file: BinaryIO) -> bool:
    start = file.read(2)
    file.seek(0)
    return start == b"\x1f\x8b"


def _check_start(path: Path, start: bytes) -> None:
    """Tell what no raw file of lines starts with."""
    if _UTF16.match(start):
        raise DataError(f"{path}: is probably UTF-16 and not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    if _PAGE.match(start):
        raise DataError(f"{path}: looks like a web page (HTML or XML), not like data; download the file")


def first_line(path: Path) -> str:
    """The first line of a plain or gzip file, or '' where there is none that can be read.

    Raises:
        DataError: it is the start of a web page or in UTF-16.
    """
    try:
        with open(path, "rb") as file:
            stream = gzip.GzipFile(fileobj=file) if _zipped(file) else file
            line = stream.readline(1 << 16)
    except (EOFError, zlib.error, OSError):
        return ""   # what is wrong is told when the file is read
    _check_start(path, line)
    return line.decode("utf-8-sig", "replace").strip()


def reason(error: Exception) -> str:
    """Why a line is left out, in words that are the same for all lines of a kind."""
    if isinstance(error, (RecursionError, MemoryError)):
        return "nested too deep"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def parse_json(line: bytes) -> Any:
    """One JSON value; of a key that stands twice the first counts, as polars has it.

    Raises:
        ValueError: it is none, with the reason.
    """
    try:
        return json.loads(line, object_pairs_hook=_first_of_each, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError("not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON") from error


def _first_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(reversed(pairs))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
