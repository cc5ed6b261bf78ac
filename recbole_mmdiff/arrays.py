"""Arrays out of ``.npz`` files; needs numpy alone."""

import tokenize
import zipfile
import zlib
from os import PathLike

import numpy as np

#: what numpy raises for files that are cut off, are no .npz, or hold pickled objects
UNREADABLE = (OSError, ValueError, LookupError, EOFError, RuntimeError, MemoryError, OverflowError, TypeError,
              AttributeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: str | PathLike, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` whose names begin with ``prefix``, never unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off, is no ``.npz``, or holds anything else than plain arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name.startswith(prefix)}
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(str(error) or type(error).__name__) from error
    for name, array in arrays.items():      # A member that is no .npy comes as bytes.
        if not isinstance(array, np.ndarray) or not _is_text_or_none(array):
            raise ValueError(f"{name} is no array of numbers or text")
    return arrays


def _is_text_or_none(array: np.ndarray) -> bool:
    """Whether numpy, which checks no letters, can make strings of a text array; True for all others."""
    if array.dtype.kind != "U" or not array.dtype.itemsize:
        return True
    letters = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(-1).view(np.uint32)
    return not ((letters > 0x10FFFF) | ((letters >= 0xD800) & (letters <= 0xDFFF))).any()
