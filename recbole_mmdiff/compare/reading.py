"""Reading a comparison file: every part of it checked, every mistake told with file and key."""

import itertools
from pathlib import Path

from recbole_mmdiff.config import find_config_file
from recbole_mmdiff.config.sources import merge
from recbole_mmdiff.errors import ConfigError, suggest

#: what a comparison file may hold, and its parts
FIELDS = ("name", "config", "keys", "models", "settings", "tables", "seeds", "sweeps", "tune", "ours",
          "preset", "published", "embeddings")
TABLE_FIELDS = ("metrics", "keys", "models")
SWEEP_FIELDS = ("model", "key", "values")
EMBEDDING_FIELDS = ("models", "evaluations", "users")
PUBLISHED_FIELDS = ("source", "tolerance", "models", "values", "note")
#: keys that say on what data and how models are held against each other: no model may have its own
PROTOCOL = {
    "seed", "dataset", "data_path", "source_domain", "target_domain", "user_link_file_path", "load_col",
    "overlap_ratio", "overlap_mode", "split_protocol", "split_seed", "split_file", "benchmark_filename",
    "test_user_ratio", "valid_user_ratio", "test_item_ratio", "valid_item_ratio", "positive_rating",
    "eval_args", "eval_passes", "rating_metrics", "metrics", "topk", "clip_ratings", "labeled_gain",
    "mask_valid_items", "val_interval", "user_inter_num_interval", "item_inter_num_interval",
    "rm_dup_inter", "filter_inter_by_user_or_item"}


def typed(value, kind: type | tuple, where: str):
    """``value`` if it is of a kind (a bool is no number), else a ConfigError that says where."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join({str: "text", int: "a whole number", float: "a number", list: "a list",
                             dict: "'key: value' lines"}[one] for one in kinds)
        raise ConfigError(f"{where}: needs {names}, not {value!r}")
    return value


def refuse_unknown(content: dict, known, where: str) -> None:
    """Raises ConfigError for a key that is not known."""
    for key in content:
        if key not in known:
            raise ConfigError(f"{where}: the key {key!r} is unknown, use one of "
                              f"{list(known)}{suggest(str(key), known)}")


def known_labels(value, labels, where: str) -> list[str]:
    """A list of different labels, each one of ``labels``."""
    found = [str(label) for label in typed(value, list, where)]
    for label in found:
        if label not in labels:
            raise ConfigError(f"{where}: {label!r} is none of {list(labels)}{suggest(label, labels)}")
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"{where}: needs one or more different labels, not {value!r}")
    return found


def mapping(value, where: str) -> dict:
    """A mapping from text; None is an empty one."""
    value = typed({} if value is None else value, dict, where)
    for key in value:
        typed(key, str, where)
    return value


def labelled_keys(content: dict, field: str, path: Path, default: dict | None = None) -> dict[str, dict]:
    """label -> keys, of ``models``, ``settings`` or ``tables``."""
    value = typed(content.get(field, default), dict, f"{path}: {field}")
    if not value or any(not str(label).strip() for label in value):
        raise ConfigError(f"{path}: {field}: needs one line 'label: {{key: value}}' or more, not {value!r}")
    return {str(label): mapping(keys, f"{path}: {field}: {label}") for label, keys in value.items()}


def config_files(content: dict, where: str) -> list[str]:
    """The absolute paths of the files that a list ``config`` names."""
    names = typed(content.get("config") or [], list, f"{where}: config")
    return [str(find_config_file(typed(name, str, f"{where}: config")).resolve()) for name in names]


def check_keys(models: dict, settings: dict, path: Path) -> None:
    """Rows of a table stand on one split and one evaluation, and are told apart by one part only.

    Raises:
        ConfigError: a model sets what belongs to a setting or to all cells; names key and label.
    """
    for label, keys in models.items():
        typed(keys.get("model", label), str, f"{path}: models: {label}: model")
        for key in keys.keys() & PROTOCOL:
            raise ConfigError(f"{path}: models: {label}: {key} is of the protocol, which all models of a "
                              f"table share; set it under keys, settings or tables")
    for label, keys in settings.items():
        for key in keys.keys() & {"seed", "model"}:
            raise ConfigError(f"{path}: settings: {label}: sets {key}; list it under {key}s")
    for (model, own), (setting, row) in itertools.product(models.items(), settings.items()):
        for key in own.keys() & row.keys():
            raise ConfigError(f"{path}: {key} is set by models: {model} and by settings: {setting}; "
                              f"leave it to one of them")


def read_tables(content: dict, models: dict, path: Path) -> dict[str, dict]:
    """label -> ``{"metrics", "keys", "models"}``."""
    tables = {}
    for label, table in labelled_keys(content, "tables", path).items():
        where = f"{path}: tables: {label}"
        refuse_unknown(table, TABLE_FIELDS, where)
        metrics = typed(table.get("metrics"), list, f"{where}: metrics")
        if not metrics or len(set(map(str, metrics))) < len(metrics) \
                or not all(isinstance(name, str) and "." in name for name in metrics):
            raise ConfigError(f"{where}: metrics: needs a list such as [rating.mae], not {metrics!r}")
        tables[label] = {"metrics": metrics,
                         "models": known_labels(table.get("models", list(models)), models,
                                                f"{where}: models"),
                         "keys": mapping(table.get("keys"), f"{where}: keys")}
    return tables


def read_seeds(content: dict, path: Path) -> list[int]:
    """Different whole numbers that every generator takes."""
    seeds = typed(content.get("seeds", [2020]), list, f"{path}: seeds")
    for seed in seeds:
        if not 0 <= typed(seed, int, f"{path}: seeds") < 2**32:
            raise ConfigError(f"{path}: seeds: {seed} is not from 0 up to 2^32 - 1")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{path}: seeds: needs one or more different numbers, not {seeds!r}")
    return seeds


def read_sweeps(content: dict, models: dict, path: Path) -> list[dict]:
    """``{"model", "key", "values"}``, each key of each model once."""
    sweeps, where = typed(content.get("sweeps") or [], list, f"{path}: sweeps"), f"{path}: sweeps"
    for sweep in sweeps:
        refuse_unknown(mapping(sweep, where), SWEEP_FIELDS, where)
        for name in SWEEP_FIELDS:
            if name not in sweep:
                raise ConfigError(f"{where}: {sweep} needs model, key and a list of values")
        known_labels([sweep["model"]], models, f"{where}: model")
        if typed(sweep["key"], str, f"{where}: key") in ("seed", "model"):
            raise ConfigError(f"{where}: {sweep['key']} is what cells are told apart by; list it under "
                              f"{sweep['key']}s")
        values = typed(sweep["values"], list, f"{where}: {sweep['key']}: values")
        if not values or len(set(map(repr, values))) < len(values):
            raise ConfigError(f"{where}: {sweep['key']}: needs different values, not {values!r}")
    if len({(sweep["model"], sweep["key"]) for sweep in sweeps}) < len(sweeps):
        raise ConfigError(f"{where}: a key of a model is swept twice; join their values")
    return sweeps


def read_published(content: dict, settings: dict, tables: dict, labels: list[str],
                   path: Path) -> dict | None:
    """A paper's numbers, each in a place that this comparison has."""
    if content.get("published") is None:
        return None
    where = f"{path}: published"
    published = merge({"tolerance": {}, "note": None}, mapping(content["published"], where))
    refuse_unknown(published, PUBLISHED_FIELDS, where)
    for name in ("source", "models", "values"):
        if name not in published:
            raise ConfigError(f"{where}: {name} is missing")
    typed(published["source"], str, f"{where}: source")
    published["models"] = known_labels(published["models"], labels, f"{where}: models")
    metrics = [name for table in tables.values() for name in table["metrics"]]
    for metric, tolerance in mapping(published["tolerance"], f"{where}: tolerance").items():
        known_labels([metric], metrics, f"{where}: tolerance")
        typed(tolerance, (int, float), f"{where}: tolerance: {metric}")
    for setting, rows in mapping(published["values"], f"{where}: values").items():
        known_labels([setting], settings, f"{where}: values")
        for metric, row in mapping(rows, f"{where}: values: {setting}").items():
            place = f"{where}: values: {setting}: {metric}"
            known_labels([metric], metrics, f"{where}: values: {setting}")
            if len(typed(row, list, place)) != len(published["models"]):
                raise ConfigError(f"{place}: needs one number for each of {published['models']}, not "
                                  f"{row!r}")
            for value in row:
                if value is not None:
                    typed(value, (int, float), place)
    return published


def read_embeddings(content: dict, models: dict, path: Path) -> dict | None:
    """``{"models", "evaluations", "users"}``; no number of users leaves it to what is shown."""
    if content.get("embeddings") is None:
        return None
    where = f"{path}: embeddings"
    found = {"evaluations": {}, "users": None, **mapping(content["embeddings"], where)}
    refuse_unknown(found, EMBEDDING_FIELDS, where)
    found["models"] = known_labels(found.get("models"), models, f"{where}: models")
    if found["users"] is not None and typed(found["users"], int, f"{where}: users") < 2:
        raise ConfigError(f"{where}: users: {found['users']} is too few, use 2 or more")
    for label, counts in mapping(found["evaluations"], f"{where}: evaluations").items():
        known_labels([label], found["models"], f"{where}: evaluations")
        for count in typed(counts, list, f"{where}: evaluations: {label}"):
            if typed(count, int, f"{where}: evaluations: {label}") < 1:
                raise ConfigError(f"{where}: evaluations: {label}: {count} is too few, use 1 or more")
    return found
