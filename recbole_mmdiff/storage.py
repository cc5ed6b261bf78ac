"""Files that are never half written and never run code when they are opened.

``save_plain`` and ``load_plain`` keep a nested training state (model, optimisers, random states,
configuration) as tensors and plain Python values, so that it can be read back with
``torch.load(weights_only=True)`` on any machine, by any version of the classes involved.
"""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch
from scipy import sparse

from recbole_mmdiff.errors import CheckpointError
from recbole_mmdiff.files import write_atomically

TAG = "__plain__"
"""Key that marks a dictionary standing for a value of another type; its value names the type."""

_SCALARS = (type(None), bool, int, float, complex, str, torch.dtype)


def to_plain(obj: Any, where: str = "state") -> Any:
    """Turn a nested state into tensors and plain Python values only; ``from_plain`` undoes it.

    Numpy arrays and scipy sparse matrices become tagged dictionaries of tensors and come back as
    they were; numpy scalars become Python numbers. One way only: Enum members become their names,
    a RecBole ``Config`` becomes the dictionary of its entries, subclasses of dict, list and tuple
    become what they subclass.

    Args:
        obj: the state.
        where: how error messages name ``obj``.

    Raises:
        CheckpointError: some value has no plain form; the message says where it sits.
    """
    if type(obj) in _SCALARS or isinstance(obj, torch.Tensor):
        return obj
    if isinstance(obj, Enum):
        return obj.name
    if isinstance(obj, np.generic):
        return to_plain(obj.item(), where)
    for kind, encode in _ENCODERS.items():  # Before dict, which scipy's dok_matrix subclasses.
        if isinstance(obj, kind):
            return encode(obj, where)
    if isinstance(obj, dict):
        return _plain_dict(obj, where)
    if isinstance(obj, (list, tuple)):
        items = (to_plain(item, f"{where}[{i}]") for i, item in enumerate(obj))
        return list(items) if isinstance(obj, list) else tuple(items)
    if hasattr(obj, "final_config_dict"):
        return {str(key): _config_entry(value) for key, value in obj.final_config_dict.items()}
    raise CheckpointError(
        f"{where} is a {type(obj).__module__}.{type(obj).__qualname__}, which has no plain form; "
        "store its tensors, numbers and strings (such as its state_dict()) instead"
    )


def from_plain(obj: Any) -> Any:
    """Undo ``to_plain``: tagged dictionaries become numpy, scipy and torch objects again."""
    if isinstance(obj, (list, tuple)):
        return type(obj)(from_plain(item) for item in obj)
    if not isinstance(obj, dict):
        return obj
    if TAG not in obj:
        return _like(obj, [(key, from_plain(value)) for key, value in obj.items()])
    if obj[TAG] not in _DECODERS:
        raise CheckpointError(
            f"unknown kind of value {obj[TAG]!r} in the file; known are {', '.join(_DECODERS)}; "
            "a newer recbole-mmdiff may have written it: upgrade recbole-mmdiff"
        )
    return _DECODERS[obj[TAG]](obj)


def save_plain(state: Any, path: str | os.PathLike) -> None:
    """Write ``to_plain(state)`` to ``path`` with torch, atomically."""
    plain = to_plain(state)
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        torch.save(plain, file)


def load_plain(path: str | os.PathLike, map_location: Any = "cpu") -> Any:
    """Read a file of ``save_plain``, or any torch file that holds tensors and plain values only.

    Args:
        path: the file.
        map_location: where tensors go, as in ``torch.load``; numpy arrays are not concerned.

    Raises:
        CheckpointError: the file is missing, damaged, or holds pickled objects. Those are refused
            and not opened, since opening them can run any code.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: there is no such file; check the path of the checkpoint")
    try:
        _check_bytes(path)
        plain = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # A damaged file makes the reader fail in almost any way.
        raise CheckpointError(_why_unreadable(path, error)) from error
    try:
        return from_plain(plain)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds what this version did not write ({error}); use an earlier "
                              f"checkpoint or train again") from error


def _why_unreadable(path: str | os.PathLike, error: Exception) -> str:
    """Say what is wrong with a file that torch could not read, and what to do about it."""
    refused = re.search("unsupported (global|class)", str(error), re.IGNORECASE)
    with open(path, "rb") as file:
        is_bare_pickle = file.read(1) == pickle.PROTO
    if refused or is_bare_pickle:
        return (
            f"{path}: holds pickled Python objects, which can run code when opened, so it was not "
            "opened; use a checkpoint written by recbole_mmdiff, or, if you wrote the file "
            "yourself, convert it once: recbole_mmdiff.storage.save_plain(torch.load(path, "
            "weights_only=False), path)"
        )
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{path}: cannot be read ({cause}); it is truncated, damaged or not a torch file; "
        "use an earlier checkpoint or train again: a run without its checkpoint starts anew with --resume"
    )


def _check_bytes(path: str | os.PathLike) -> None:
    """Torch does not look at the checksums that it writes, so it would read a weight with a flipped bit; and
    it takes a part that is marked as a folder for read."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            marked = [part.filename for part in file.infolist() if part.external_attr]
            wrong = file.testzip() or next(iter(marked), None)
        if wrong:
            raise ValueError(f"{wrong} is not as it was written")


def _plain_dict(obj: dict, where: str) -> dict:
    items = [(to_plain(key, where), to_plain(obj[key], f"{where}[{key!r}]")) for key in obj]
    if TAG in obj:  # Someone's own key must not be taken for our mark.
        return {TAG: "dict", "items": items}
    for key, _ in items:
        if isinstance(key, (dict, list, torch.Tensor)):
            raise CheckpointError(f"{where} has the key {key!r}; use numbers, strings or tuples")
    return _like(obj, items)


def _like(obj: dict, items: list[tuple]) -> dict:
    """A dict of ``items``, or an OrderedDict with the version marks that torch hangs on it."""
    if not isinstance(obj, OrderedDict):
        return dict(items)
    ordered = OrderedDict(items)
    vars(ordered).update(vars(obj))
    return ordered


def _config_entry(value: Any) -> Any:
    """A configuration value as plain Python; what has no plain form is kept as its text."""
    if type(value) in (type(None), bool, int, float, str):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {_config_entry(key): _config_entry(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = (_config_entry(entry) for entry in value)
        return list(entries) if isinstance(value, list) else tuple(entries)
    return str(value)


def _encode_array(array: np.ndarray, where: str) -> dict:
    if array.dtype.kind == "U":
        return {TAG: "text array", "value": array.tolist(), "dtype": array.dtype.str, "shape": array.shape}
    # Torch wants this machine's byte order, no negative strides and a writable buffer.
    array = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
    try:
        return {TAG: "array", "value": torch.from_numpy(array)}
    except TypeError:
        raise CheckpointError(
            f"{where} is a numpy array of {array.dtype}; store numbers or strings (astype)"
        ) from None


def _encode_sparse(matrix: Any, where: str) -> dict:
    rows = matrix.tocsr()
    parts = {part: getattr(rows, part) for part in ("data", "indices", "indptr")}
    return {
        TAG: "sparse",
        "format": matrix.format,
        "matrix": sparse.isspmatrix(matrix),
        "shape": tuple(matrix.shape),
        **{part: _encode_array(array, f"{where}.{part}") for part, array in parts.items()},
    }


def _decode_array(obj: dict) -> np.ndarray:
    return obj["value"].cpu().numpy()


def _decode_text(obj: dict) -> np.ndarray:
    array = np.array(obj["value"], dtype=obj["dtype"])
    return array.reshape(obj.get("shape", array.shape))     # Lists tell no shape without entries.


def _decode_sparse(obj: dict) -> Any:
    build = sparse.csr_matrix if obj["matrix"] else sparse.csr_array
    parts = tuple(_decode_array(obj[part]) for part in ("data", "indices", "indptr"))
    return build(parts, shape=obj["shape"]).asformat(obj["format"])


def _encode_items(kind: str) -> Callable[[Any, str], dict]:
    return lambda obj, where: {TAG: kind, "items": [to_plain(item, where) for item in obj]}


_ENCODERS: dict[Any, Callable[[Any, str], dict]] = {
    np.ndarray: _encode_array,
    (sparse.spmatrix, getattr(sparse, "sparray", sparse.spmatrix)): _encode_sparse,
    torch.device: lambda device, where: {TAG: "device", "value": str(device)},
    bytes: lambda data, where: {TAG: "bytes", "value": torch.tensor(bytearray(data))},
    set: _encode_items("set"),
    frozenset: _encode_items("frozenset"),
}

_DECODERS: dict[str, Callable[[dict], Any]] = {
    "array": _decode_array,
    "text array": _decode_text,
    "sparse": _decode_sparse,
    "device": lambda obj: torch.device(obj["value"]),
    "bytes": lambda obj: bytes(obj["value"].tolist()),
    "set": lambda obj: {from_plain(item) for item in obj["items"]},
    "frozenset": lambda obj: frozenset(from_plain(item) for item in obj["items"]),
    "dict": lambda obj: {key: from_plain(value) for key, value in obj["items"]},
}
