"""``recbole-mmdiff prepare images --check``: every image of a folder decoded, and compared with the items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from dataset_prep.folders import item_path
from dataset_prep.images import (
    MAX_BYTES,
    MAX_PIXELS,
    ImageError,
    check_max_pixels,
    image_files,
    open_image,
)
from dataset_prep.skips import Skips
from recbole_mmdiff.data.atomic import read_atomic

_READERS = 8    # each holds the bytes of one file; their pixels are bounded together
_SHOWN = 5    # tokens named in a report


def check(folder: str | Path, data: str | Path | None = None, max_bytes: int = MAX_BYTES,
          max_pixels: int = MAX_PIXELS) -> list[str]:
    """Decode every image of a folder; with ``data``, compare them with the items of ``NAME.item``.

    Returns:
        the lines of a report.

    Raises:
        ConfigError: ``max_pixels`` is out of its range.
        DataError: the folder or the items cannot be used.
    """
    check_max_pixels(max_pixels)
    ignored, broken = Skips(), Skips()
    files = image_files(folder, ignored)
    faults = _faults(files, max_bytes, max_pixels)
    for error in faults.values():
        broken.add(f"an image {error.reason}", where=str(error))
    lines = [f"{folder}: {len(files):,} images, {len(files) - len(faults):,} decode"]
    lines += [*broken.lines("broken:"), *ignored.lines("ignored:")]
    if data is not None:
        items = dict.fromkeys(read_atomic(item_path(data), {"item_id"}, {"item_id"})["item_id"])
        without = [token for token in items if token not in files or token in faults]
        strangers = [token for token in files if token not in items]
        lines.append(f"items with an image that decodes: {len(items) - len(without):,} of {len(items):,}"
                     f"{_first(without, 'first without')}")
        lines.append(f"images without an item: {len(strangers):,}{_first(strangers, 'first')}")
    return lines


def _faults(files: Mapping[str, Path], max_bytes: int, max_pixels: int) -> dict[str, ImageError]:
    """What is wrong with those images that do not decode, by token. Shows its progress."""
    def fault(path: Path) -> ImageError | None:
        try:
            open_image(path, max_bytes, max_pixels)
        except ImageError as error:
            return error
        return None

    with ThreadPoolExecutor(_READERS) as pool:    # Decoders release the interpreter's lock.
        found = tqdm(pool.map(fault, files.values()), total=len(files), unit="image")
        return {token: error for token, error in zip(files, found, strict=True) if error is not None}


def _first(tokens: Sequence[str], what: str) -> str:
    return f"; {what}: {', '.join(tokens[:_SHOWN])}" if tokens else ""
