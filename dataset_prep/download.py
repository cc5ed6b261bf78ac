"""``recbole-mmdiff prepare images``: fetch the images of items, or check a folder of them.

A run that is killed at any moment goes on when it is started again: an image is there whole or not
at all, and ``failed.jsonl`` beside the images remembers the addresses that failed for good.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dataset_prep.folders import item_path, read_items
from dataset_prep.images import (
    MAX_BYTES,
    MAX_PIXELS,
    ImageError,
    check_max_pixels,
    decode_image,
    image_files,
    image_name,
)
from dataset_prep.skips import Skips
from recbole_mmdiff.errors import ConfigError, DataError
from recbole_mmdiff.files import locked, make_folder, remove_leftovers, write_atomically

if TYPE_CHECKING:
    from dataset_prep.web import Web

FAILED = "failed.jsonl"
_LONGEST_NAME = 220    # bytes; file systems allow 255, and a temporary name is somewhat longer


@dataclass
class Report:
    """What a download did, counted in items.

    ``fetched`` now, ``present`` before, ``known`` to fail for good and not asked again,
    ``without`` an address, and ``failed`` now, by reason.
    """

    fetched: int = 0
    present: int = 0
    known: int = 0
    without: int = 0
    failed: Skips = field(default_factory=Skips)

    def lines(self) -> list[str]:
        """The report for people."""
        text = f"images fetched: {self.fetched:,}, there already: {self.present:,}"
        known = f"not asked again, failed before: {self.known:,} (--retry-failed asks again)"
        without = f"items without an address: {self.without:,}"
        return [text] + [known] * bool(self.known) + [without] * bool(self.without) + self.failed.lines()

    def refuse_total_loss(self, folder: Path) -> None:
        """Raise DataError with the most frequent reason when there is no image, but failures."""
        if not self.failed.total or self.fetched or self.present:
            return
        reasons = self.failed.as_dict()
        worst = max(reasons, key=lambda reason: reasons[reason]["count"])
        raise DataError(f"{folder}: no image could be fetched; of {self.failed.total:,} items, "
                        f"{reasons[worst]['count']:,}: {worst} (first: {reasons[worst]['first']})")


class Failures:
    """The addresses that failed for good, a JSON line each in ``path``."""

    def __init__(self, path: Path, forget: bool = False) -> None:
        self._path = path
        self.known = {} if forget or not path.is_file() else self._read()
        with write_atomically(path) as temporary:    # without the half line of a killed run
            temporary.write_text("".join(map(_line, self.known.items())), encoding="utf-8")

    def _read(self) -> dict[str, str]:
        known = {}
        for line in self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                entry = json.loads(line)
                known[entry["url"]] = entry["reason"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(f"{self._path}: {line[:80]!r} is not a line of this file; remove the "
                                f"file to ask all addresses again") from error
        return known

    def add(self, url: str, reason: str) -> None:
        """Remember one more, now and on disk."""
        self.known[url] = reason
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line((url, reason)))


def _line(entry: tuple[str, str]) -> str:
    return json.dumps({"url": entry[0], "reason": entry[1]}) + "\n"


def addresses(data: str | Path, column: str) -> dict[str, str]:
    """Item token -> address in ``column`` of ``data/NAME.item`` (NAME is the folder's name), '' where
    the cell is empty.

    Raises:
        DataError: no such file or column, an item that stands twice, or no address at all.
    """
    from recbole_mmdiff.data.atomic import read_header

    path = item_path(data)
    names = [known.name for known in read_header(path, "\t", "utf-8")]
    if column not in names:
        raise DataError(f"{path}: there is no column {column!r}, only {', '.join(names)}; name the one "
                        f"that holds addresses with --column")
    frame = read_items(path, {column})
    found = dict(zip(frame["item_id"], frame[column].fillna("").astype(str).str.strip(), strict=True))
    if not any(found.values()):
        raise DataError(f"{path}: the column {column!r} is empty in every line")
    return found


def download(data: str | Path, images: str | Path | None = None, column: str = "image_url",
             workers: int = 8, rate: float = 20.0, retries: int = 4, max_bytes: int = MAX_BYTES,
             max_pixels: int = MAX_PIXELS, retry_failed: bool = False, backoff: float = 1.0,
             **guards) -> Report:
    """Fetch the images of the items of ``data/NAME.item`` into ``images`` (``data/images``).

    Args:
        column: the one with the addresses; equal addresses of several items are fetched once.
        workers: threads; ``rate``: requests a second of all of them together.
        retries: how often an address that may work later is asked again, after about ``backoff``,
            2, 4, ... times as many seconds, or as long as its server says.
        max_bytes, max_pixels: the largest file and image accepted.
        retry_failed: ask also the addresses that failed for good before.
        guards: what else `dataset_prep.web.Web` takes.

    Raises:
        DataError: the items or the folder cannot be used, or no image could be had at all.
        ConfigError: an option out of its range.
    """
    _check_options(workers, rate, retries, max_bytes)
    check_max_pixels(max_pixels)
    wanted = addresses(data, column)
    folder = Path(images) if images else Path(data) / "images"
    with _alone_in(folder):
        failures = Failures(folder / FAILED, forget=retry_failed)
        report, jobs = _plan(wanted, folder, failures)
        _fetch_all(jobs, folder, report, failures, workers, retries, backoff, max_pixels,
                   {"rate": rate, "max_bytes": max_bytes, **guards})
    report.refuse_total_loss(folder)
    return report


def _check_options(workers: int, rate: float, retries: int, max_bytes: int) -> None:
    for name, value, least in (("workers", workers, 1), ("retries", retries, 0), ("max-bytes", max_bytes, 1)):
        if value < least:
            raise ConfigError(f"--{name}: {value} is too small, use {least} or more")
    if not 0 < rate < float("inf"):
        raise ConfigError(f"--rate: {rate:g} is not a number of requests a second; use one above 0")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """The folder, made if need be, locked, and without what a killed run left half written."""
    make_folder(folder)
    with locked(folder / ".lock", DataError(f"{folder}: another run is fetching images into this folder")):
        remove_leftovers(folder)
        yield


def _plan(wanted: Mapping[str, str], folder: Path,
          failures: Failures) -> tuple[Report, dict[str, list[str]]]:
    """What need not be fetched, and address -> item tokens of what must be."""
    report, jobs = Report(), {}
    present = image_files(folder)
    for token, url in wanted.items():
        if token in present:
            report.present += 1
        elif not url:
            report.without += 1
        elif url in failures.known:
            report.known += 1
        elif len(image_name(token, "webp")) > _LONGEST_NAME:
            report.failed.add("its token is too long for the name of a file", where=f"item {token!r}")
        else:
            jobs.setdefault(url, []).append(token)
    return report, jobs


def _fetch_all(jobs: Mapping[str, list[str]], folder: Path, report: Report, failures: Failures,
               workers: int, retries: int, backoff: float, max_pixels: int, options: Mapping) -> None:
    from tqdm import tqdm

    from dataset_prep.web import TryAgain, Web

    stop = threading.Event()

    def fetch(url: str) -> tuple[str, ImageError | None]:
        try:
            content = _get(web, url, retries, backoff, stop)
            suffix = decode_image(content, url, max_pixels)[1]    # The pixels are let go at once.
        except ImageError as error:
            return url, error
        for token in jobs[url]:
            with write_atomically(folder / image_name(token, suffix)) as temporary:
                temporary.write_bytes(content)
        return url, None

    with (closing(Web(stop=stop, **options)) as web, ThreadPoolExecutor(workers) as pool,
          tqdm(total=len(jobs), unit="image") as bar):
        try:
            for done in _bounded(pool, fetch, jobs, 4 * workers):
                url, error = done.result()
                if error is None:
                    report.fetched += len(jobs[url])
                else:
                    report.failed.add(f"its image {error.reason}", len(jobs[url]),
                                      where=f"item {jobs[url][0]!r}, {error}")
                    if not isinstance(error, TryAgain):
                        failures.add(url, error.reason)
                bar.set_postfix(failed=report.failed.total, refresh=False)
                bar.update()
        except OSError as error:
            raise DataError(f"{folder}: an image cannot be written ({error})") from error
        finally:
            stop.set()    # After Ctrl-C or an error the workers end what they wait for,
            pool.shutdown(wait=False, cancel_futures=True)    # and begin nothing new.


def _get(web: Web, url: str, retries: int, backoff: float, stop: threading.Event) -> bytes:
    from dataset_prep.web import TryAgain

    for attempt in itertools.count():
        try:
            return web.get(url)
        except TryAgain as error:
            if attempt >= retries or stop.is_set():
                raise
            # Chance keeps workers that failed together from asking together again.
            stop.wait(max(error.wait, backoff * 2 ** attempt * random.uniform(0.5, 1.5)))


def _bounded(pool: ThreadPoolExecutor, function: Callable, jobs: Iterable,
             limit: int) -> Iterator[Future]:
    """Futures of ``function`` on every job as they end; at most ``limit`` are under way."""
    pending: set[Future] = set()
    for job in jobs:
        pending.add(pool.submit(function, job))
        if len(pending) >= limit:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from done
    yield from as_completed(pending)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``prepare images``."""
    add = parser.add_argument
    add("--data", metavar="DIR/NAME", help="a data set; the addresses are in its NAME.item")
    add("--check", metavar="FOLDER", help="fetch nothing: decode the images of this folder and report")
    add("--images", metavar="FOLDER", help="where the images go, DIR/NAME/images if not given")
    add("--column", default="image_url", metavar="NAME", help="the column with the addresses")
    add("--workers", type=int, default=8, metavar="N", help="images fetched at once")
    add("--rate", type=float, default=20.0, metavar="R", help="requests a second, all together")
    add("--retries", type=int, default=4, metavar="N", help="how often a busy server is asked again")
    add("--max-bytes", type=int, default=MAX_BYTES, metavar="N", help="the largest file accepted")
    add("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="the largest image accepted")
    add("--retry-failed", action="store_true", help="ask also the addresses that failed for good before")


def main(options: argparse.Namespace) -> None:
    """Fetch or check images, and print the report.

    Raises:
        ConfigError: neither --data nor --check; and what `download` and `check` raise.
    """
    if options.check is not None:
        from dataset_prep.check_images import check

        print(*check(options.check, options.data, options.max_bytes, options.max_pixels), sep="\n")
        return
    if options.data is None:
        raise ConfigError("prepare images: give --data=DIR/NAME to fetch, or --check=FOLDER to check")
    report = download(options.data, options.images, options.column, options.workers, options.rate,
                      options.retries, options.max_bytes, options.max_pixels, options.retry_failed)
    print(*report.lines(), sep="\n")
