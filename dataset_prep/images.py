"""Images of items on disk: found by the name of their file, and opened without trusting them.

An image is named by its item's token: ``<token, percent-encoded>.<jpg|jpeg|png|webp|gif>``.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from dataset_prep.skips import Skips
from recbole_mmdiff.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 32 << 20
MAX_PIXELS = 50_000_000
MOST_PIXELS = 89_478_485    # Pillow itself warns of larger images
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
#: Bytes of the blocks that Pillow takes. Those of its own size, 16 MiB, malloc keeps for the thread that
#: freed them, so that every thread would hold its largest image for good; it gives back larger ones.
_BLOCK = 64 << 20
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


def check_max_pixels(max_pixels: int) -> None:
    """Raise ConfigError for a limit of pixels that cannot be used."""
    if not 1 <= max_pixels <= MOST_PIXELS:
        raise ConfigError(f"--max-pixels: {max_pixels} is not a number from 1 to {MOST_PIXELS}")


def image_name(token: str, suffix: str) -> str:
    """The file name of an item's image; ``suffix`` without its dot."""
    # A leading dot would hide the file.
    name = quote(token, safe="")
    return f"{'%2E' + name[1:] if name.startswith('.') else name}.{suffix}"


def image_files(folder: str | Path, skips: Skips | None = None) -> dict[str, Path]:
    """The images in ``folder`` (not below it) by item token, sorted by token; none is opened.

    Ignored, and counted in ``skips`` when it is given, are files with other suffixes, and what is
    named as an image but is no file, such as a link to what is gone. Whatever is hidden is ignored.

    Raises:
        DataError: no such folder, two files for one token, or a name that is not percent-encoded
            UTF-8.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder of images")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        named, is_file = path.suffix.lower() in SUFFIXES, path.is_file()
        if not (named and is_file):
            if skips is not None and (named or is_file):
                skips.add("named as images, but folders or links to what is gone" if named else
                          f"files that are not {', '.join(SUFFIXES)}", where=path.name)
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
    8. The size is checked before anything is decoded. Threads that decode at the same time wait for
    each other so that their images have no more than `MAX_PIXELS` together (about 20 bytes each at
    worst); a larger one is decoded alone.

    Raises:
        ImageError: empty, of another format, broken anywhere, or of more than ``max_pixels``.
    """
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise ImageError(where, "is empty", "")
    Image.core.set_block_size(_BLOCK)
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP", "GIF"))
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise ImageError(where, "has too many pixels",
                             f"{image.width} x {image.height}, {max_pixels:,} are accepted")
        with _ROOM.taken(pixels):
            image.load()
            _turn_upright(image)
            return _rgb(image), _FORMATS[image.format]
    except ImageError:
        raise
    except bombs as error:
        raise ImageError(where, "has too many pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError(where, "is not a jpeg, png, webp or gif image",
                         f"it starts with {content[:16]!r}") from error
    except Exception as error:    # Decoders raise whatever their format's damage leads to.
        raise ImageError(where, "is truncated or corrupt", str(error)) from error


class _Room:
    """Room for so many pixels, of all threads together."""

    def __init__(self, size: int) -> None:
        self._size, self._free, self._changed = size, size, threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait until there is room, and take it; all of it if more is asked for."""
        pixels = min(pixels, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_ROOM = _Room(MAX_PIXELS)


def _turn_upright(image: Image.Image) -> None:
    from PIL import ImageOps

    # Damaged notes beside the picture are no reason to lose the picture.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):    # convert() would clip 16 bits to the lowest 8.
        image = image.point(lambda value: value / 256, "L")
        image.info.pop("transparency", None)    # one of the 65,536 greys, which no longer exists
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white
