"""Which keys exist, and whether their values have the type of the default.

RecBole reads many keys that no properties file of its lists. Its known keys are therefore taken
from where they are read: its installed source, and the source of the model that runs.
"""

import inspect
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from recbole_mmdiff.errors import ConfigError, suggest

_READ = re.compile(r"""config(?:\.get\(|\[)\s*["'](\w+)["']""")
# Read by RecBole under names that it puts together.
_COMPOSED = {"alias_of_user_id", "alias_of_item_id", "alias_of_entity_id", "alias_of_relation_id"}
# Of the command line, or written by RecBole and by us into a run's own config.yaml.
_RUN = {"model", "dataset", "config_files"}
# RecBole takes several types for these.
_FLEXIBLE = {"gpu_id", "topk", "metrics", "train_neg_sample_args", "load_col"}
# RecBole cannot do without a value of these.
_NEEDED = {"learner", "learning_rate", "epochs", "train_batch_size", "eval_step", "stopping_step", "seed"}
# Of keys whose default is nothing.
_LIST, _DICT = (list, tuple), (dict,)
_UNSET = {
    **dict.fromkeys(("seq_len", "threshold", "unused_col", "val_interval", "preload_weight",
                     "discretization", "clip_grad_norm"), _DICT),
    **dict.fromkeys(("additional_feat_suffix", "alias_of_user_id", "alias_of_item_id", "alias_of_entity_id",
                     "alias_of_relation_id", "benchmark_filename"), _LIST),
    **dict.fromkeys(("user_link_file_path", "split_file", "output"), (str, os.PathLike)),
    **dict.fromkeys(("rm_dup_inter", "domain_view", "negative_sampler", "transform", "encoding"), (str,)),
    **dict.fromkeys(("eval_passes", "modalities", "normalize_field"), (str, *_LIST)),
    "split_seed": (int,), "normalize_all": (bool,)}
# What RecBole's nested keys hold; it passes over any other in silence.
NESTED = {"eval_args": {"split", "order", "group_by", "mode"},
          "train_neg_sample_args": {"distribution", "sample_num", "alpha", "dynamic",
                                    "candidate_num"}}


@cache
def _keys_read_by(path: Path) -> frozenset[str]:
    return frozenset(_READ.findall(path.read_text(encoding="utf-8")))


@cache
def recbole_keys() -> frozenset[str]:
    """Every key that RecBole's own rooms read, models apart."""
    from recbole.utils import argument_list

    root = Path(find_spec("recbole").origin).parent
    files = [p for room in ("config", "data", "evaluator", "sampler", "trainer", "utils")
             for p in sorted((root / room).rglob("*.py"))]
    files += [root / "model" / name for name in ("abstract_recommender.py", "layers.py", "init.py")]
    listed = {name for group in vars(argument_list).values() if isinstance(group, list)
              for name in group}
    return frozenset().union(listed, _COMPOSED, _RUN, *(_keys_read_by(p) for p in files))


def model_keys(model_class: type) -> set[str]:
    """Every key read in the files of a model class and of its bases."""
    keys: set[str] = set()
    for cls in model_class.__mro__:
        if cls.__module__.split(".")[0] in {"builtins", "torch", "abc", "typing"}:
            continue
        source = inspect.getsourcefile(cls)
        if source and Path(source).is_file():
            keys |= _keys_read_by(Path(source))
        else:   # A class typed into a notebook or a shell.
            keys |= set(_READ.findall(_typed_source(cls)))
    return keys


def _typed_source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except OSError:
        return ""


def check_known(given: dict, known: set[str], origin: dict[str, str], model: str) -> None:
    """Refuse keys that nothing reads, in ``NESTED`` mappings too.

    Raises:
        ConfigError: names the key, where it was set, and the nearest known one.
    """
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{origin.get(key, 'config_dict')}: the key {key!r} is unknown to "
                f"{model}{suggest(key, known)}")
        if key in NESTED and isinstance(given[key], dict):
            where = f"{origin.get(key, 'config_dict')}: {key}"
            check_known(given[key], NESTED[key], dict.fromkeys(given[key], where), model)


def check_types(given: dict, defaults: dict, origin: dict[str, str], ours: set[str]) -> None:
    """Refuse a value whose type is not the default's.

    A whole number is strict only in the keys of ours: RecBole writes ``0`` for some defaults that
    are shares or weights. None passes where it may mean "nothing": not for our numbers and words.

    Raises:
        ConfigError: names the key, the value, where it was set, and the type that is expected.
    """
    for key, value in given.items():
        default = defaults.get(key)
        if value is None and (key in ours or key in _NEEDED) and isinstance(default, (bool, int, float, str)):
            raise ConfigError(f"{origin.get(key, 'config_dict')}: {key}: has no value "
                              f"(default: {default!r})")
        if value is None or key in _FLEXIBLE or (default is None and key not in _UNSET):
            continue
        expected = _UNSET[key] if default is None else _expected(default)
        if expected == (int,) and key not in ours:
            expected = (int, float)
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            names = " or ".join(kind.__name__ for kind in expected)
            raise ConfigError(
                f"{origin.get(key, 'config_dict')}: {key}: {value!r} is a "
                f"{type(value).__name__}, expected {names} (default: {default!r})")


def check_columns(given: dict, origin: dict[str, str]) -> None:
    """Raises ConfigError where ``load_col`` or ``unload_col`` is no mapping from files to columns."""
    for key, needed in (("load_col", {"inter"}), ("unload_col", set())):
        value = given.get(key)
        if value is not None and (not isinstance(value, dict) or not needed <= value.keys() or not all(
                names == "*" or (isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names))
                for names in value.values())):
            raise ConfigError(f"{origin.get(key, 'config_dict')}: {key}: {value!r} names no columns; write "
                              f"a list of them for each kind of file, such as {{inter: [user_id, item_id]}}")


def _expected(default) -> tuple[type, ...]:
    if isinstance(default, bool):
        return (bool,)
    if isinstance(default, float):
        return (float, int)
    if isinstance(default, (list, tuple)):
        return (list, tuple)
    return (type(default),)
