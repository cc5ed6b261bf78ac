"""Images of items on disk: found by the name of their file, and opened without trusting them.

An image is named by its item's token: ``<token, percent-encoded>.<jpg|jpeg|png|webp|gif>``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from dataset_prep.skips import Skips
from recbole_mmdiff.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 32 << 20
MAX_PIXELS = 50_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
_SHOWN = 5    # tokens named in a report
#: Pillow's formats and the suffixes that they are stored with. MPO is what Pillow calls a jpeg with
#: further pictures behind the first one, as cameras write them.
_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}


class ImageError(DataError):
    """An image that cannot be used.

    ``ImageError(where, reason, detail)``: the file or address, the kind of fault in words that are
    the same for every image (to be counted by), and what is particular to this one.
    """

    def __str__(self) -> str:
        where, reason, detail = self.args
        return f"{where}: {reason}" + (f" ({detail})" if detail else "")

    @property
    def reason(self) -> str:
        """The kind of fault."""
        return self.args[1]


def image_name(token: str, suffix: str) -> str:
    """The file name of an item's image; ``suffix`` without its dot."""
    # A leading dot would hide the file.
    name = quote(token, safe="")
    return f"{'%2E' + name[1:] if name.startswith('.') else name}.{suffix}"


def image_files(folder: str | Path, skips: Skips | None = None) -> dict[str, Path]:
    """The images in ``folder`` (not below it) by item token, sorted by token; none is opened.

    Files with other suffixes are ignored, and counted in ``skips`` when it is given; hidden files
    and folders are ignored.

    Raises:
        DataError: no such folder, two files for one token, or a name that is not percent-encoded
            UTF-8.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder of images")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix.lower() not in SUFFIXES:
            if skips is not None:
                skips.add(f"files that are not {', '.join(SUFFIXES)}", where=path.name)
            continue
        token = _token_of(path)
        if token in found:
            raise DataError(f"{folder}: {found[token].name!r} and {path.name!r} are both images of "
                            f"the item {token!r}; keep one of them")
        found[token] = path
    return dict(sorted(found.items()))


def _token_of(path: Path) -> str:
    try:
        return unquote(path.stem, errors="strict")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the name is not percent-encoded UTF-8 ({error}); name the file by "
                        f"urllib.parse.quote(token, safe='')") from error


def open_image(path: str | Path, max_bytes: int = MAX_BYTES,
               max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file, fully decoded, as RGB; see `decode_image`.

    Raises:
        ImageError: also when the file is missing, empty, not a plain file, or larger than
            ``max_bytes``.
    """
    path = Path(path)
    if not path.is_file():    # A pipe or a device would be waited for.
        raise ImageError(path, "is missing or not a plain file", "")
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ImageError(path, "cannot be read", error.strerror) from error
    if len(content) > max_bytes:
        raise ImageError(path, "has too many bytes",
                         f"{path.stat().st_size:,}, {max_bytes:,} are accepted")
    return decode_image(content, path, max_pixels)[0]


def decode_image(content: bytes, where: str | Path,
                 max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """The first frame of a jpeg, png, webp or gif as RGB, and the suffix of its format.

    The orientation that a camera noted is applied; transparency is laid on white; 16 bits become
    8. The size is checked before anything is decoded.

    Raises:
        ImageError: empty, of another format, broken anywhere, or of more than ``max_pixels``.
    """
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise ImageError(where, "is empty", "")
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP", "GIF"))
        if image.width * image.height > max_pixels:
            raise ImageError(where, "has too many pixels",
                             f"{image.width} x {image.height}, {max_pixels:,} are accepted")
        image.load()
        return _rgb(_upright(image)), _FORMATS[image.format]
    except ImageError:
        raise
    except bombs as error:
        raise ImageError(where, "has too many pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError(where, "is not a jpeg, png, webp or gif image",
                         f"it starts with {content[:16]!r}") from error
    except Exception as error:    # Decoders raise whatever their format's damage leads to.
        raise ImageError(where, "is truncated or corrupt", str(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:    # Damaged notes beside the picture are no reason to lose the picture.
        return image


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):    # convert() would clip 16 bits to the lowest 8.
        image = image.point(lambda value: value / 256, "L")
        image.info.pop("transparency", None)    # one of the 65,536 greys, which no longer exists
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def check_images(files: Mapping[str, Path]) -> Skips:
    """Decode every image; the broken ones are counted by reason. Shows its progress."""
    from tqdm import tqdm

    def fault(path: Path) -> ImageError | None:
        try:
            open_image(path)
        except ImageError as error:
            return error
        return None

    broken = Skips()
    with ThreadPoolExecutor() as pool:    # Decoders release the interpreter's lock.
        for error in tqdm(pool.map(fault, files.values()), total=len(files), unit="image"):
            if error is not None:
                broken.add(f"an image {error.reason}", where=str(error))
    return broken


def item_path(data: str | Path) -> Path:
    """``NAME.item`` of the data set whose folder is ``data``; NAME is the folder's name."""
    folder = Path(data).resolve()
    return folder / f"{folder.name}.item"


def check(folder: str | Path, data: str | Path | None = None) -> list[str]:
    """Decode every image of a folder; with ``data``, compare them with the items of ``NAME.item``.

    Returns:
        the lines of a report.

    Raises:
        DataError: the folder or the items cannot be used.
    """
    skips = Skips()
    files = image_files(folder, skips)
    broken = check_images(files)
    lines = [f"{folder}: {len(files):,} images, {len(files) - broken.total:,} decode"]
    lines += [f"broken: {line.removeprefix('left out ')}" for line in broken.lines()]
    lines += [f"ignored: {line.removeprefix('left out ')}" for line in skips.lines()]
    if data is not None:
        from recbole_mmdiff.data.atomic import read_atomic

        items = dict.fromkeys(read_atomic(item_path(data), {"item_id"}, {"item_id"})["item_id"])
        without = [token for token in items if token not in files]
        strangers = [token for token in files if token not in items]
        lines.append(f"items with an image: {len(items) - len(without):,} of {len(items):,}"
                     f"{_first(without, 'first without')}")
        lines.append(f"images without an item: {len(strangers):,}{_first(strangers, 'first')}")
    return lines


def _first(tokens: list[str], what: str) -> str:
    return f"; {what}: {', '.join(tokens[:_SHOWN])}" if tokens else ""
