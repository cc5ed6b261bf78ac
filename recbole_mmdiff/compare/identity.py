"""What makes two runs the same: every key that may change a number, and the data's contents."""

import hashlib
import json
from functools import cache
from pathlib import Path

from recbole_mmdiff.config import DOMAINS
from recbole_mmdiff.errors import DataError
from recbole_mmdiff.files import sha256
from recbole_mmdiff.quick_start import MAY_CHANGE, ensure_default_data

#: keys that say where, how long at once and how loudly a run goes, and change none of its numbers;
#: what ``paper`` changes are other keys
WHERE = MAY_CHANGE - {"epochs", "stopping_step"} | {"output", "checkpoint_dir", "paper"}
#: of the files of a data set that a run may read; a matrix of features has its digest in the .json
SUFFIXES = (".inter", ".item", ".user", ".kg", ".link", ".net", ".json")
#: files whose contents are keys, too
FILES = ("split_file", "user_link_file_path")


def run_identity(config, leave_out: tuple[str, ...] = ()) -> dict:
    """All that the numbers of a run follow from, as plain values.

    Args:
        config: of the run.
        leave_out: keys that do not count.

    Raises:
        DataError: a file of the data is missing.
    """
    # A split that follows the seed is told apart by its own seed.
    keys = without({**config.plain_run_dict(), "split_seed": config["split_seed"]},
                   WHERE | set(leave_out))
    for name in FILES:
        if keys.get(name):
            keys[name] = _digest_of_file(Path(keys[name]))
    return {"keys": keys, "data": data_digests(config)}


def digest(value) -> str:
    """A short name for plain values: equal values, equal names."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def data_digests(config) -> dict[str, str]:
    """The digest of every file that a run may read, feature matrices by their manifests."""
    ensure_default_data(config)
    folders = [config.for_domain(domain)["data_path"] for domain in DOMAINS] \
        if config.cross_domain else [config["data_path"]]
    found = {}
    for folder in map(Path, folders):
        files = [path for path in sorted(folder.glob("*")) if path.suffix in SUFFIXES
                 and path.name.startswith(f"{folder.name}.")]
        if not any(path.suffix == ".inter" for path in files):
            raise DataError(f"{folder}: there is no data set here; set data_path to the folder that "
                            f"holds {folder.name}")
        found |= {f"{folder.name}/{path.name}": _digest_of_file(path) for path in files}
    return found


def without(values: dict, keys: set[str]) -> dict:
    """A mapping without some keys, also inside of it."""
    return {key: without(value, keys) if isinstance(value, dict) else value
            for key, value in values.items() if key not in keys}


def _digest_of_file(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return _digest_of_version(path, status.st_mtime_ns, status.st_size)


@cache
def _digest_of_version(path: Path, modified: int, size: int) -> str:
    return sha256(path)
