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
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} is no array")
    return arrays
