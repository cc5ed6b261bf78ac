"""A comparison file: which models, settings, tables and seeds, and what each cell sets."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from recbole_mmdiff.compare.space import Tuning
from recbole_mmdiff.config import find_config_file
from recbole_mmdiff.config.sources import merge, read_yaml
from recbole_mmdiff.errors import ConfigError, suggest

#: what a comparison file may hold
FIELDS = ("name", "config", "keys", "models", "settings", "tables", "seeds", "sweeps", "tune", "ours",
          "preset", "published", "embeddings")
TABLE_FIELDS = ("metrics", "keys", "models")
SWEEP_FIELDS = ("model", "key", "values")
EMBEDDING_FIELDS = ("models", "evaluations", "users")
PUBLISHED_FIELDS = ("source", "tolerance", "models", "values", "note")


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: the place that it has in it, and the keys and files that it sets.

    ``sweep`` is None or ``{"model", "key", "value"}``: the model whose sensitivity it shows.
    """

    model: str
    setting: str
    table: str
    seed: int
    keys: dict
    files: tuple[str, ...] = ()
    sweep: dict | None = None

    def __str__(self) -> str:
        return f"{self.model}, {self.setting}, {self.table}, seed {self.seed}"


@dataclass
class Comparison:
    """A comparison file that was read and checked.

    Attributes:
        path: the file.
        name: of the comparison.
        files: configuration files beneath the keys of every cell; a model adds its own by a list
            ``config``.
        keys: of every cell.
        models, settings: label -> keys; a model's name is its key ``model``, or its label.
        tables: label -> ``{"metrics": [...], "keys": {...}, "models": [...]}``.
        seeds: of the runs, and of their splits unless ``split_seed`` is set.
        sweeps: ``{"model", "key", "values"}``: one key varied over a model of the comparison.
        tune: how hyper-parameters are chosen, or None.
        ours: labels of the models that are held against the best of the others.
        preset: name or names in the data preparation of the data that the settings need, or None.
        embeddings: of which models transferred vectors are pictured (see ``compare.embeddings``).
        published: a paper's numbers (see ``docs/compare.md``), or None.
    """

    path: Path
    name: str
    files: list[str]
    keys: dict
    models: dict[str, dict]
    settings: dict[str, dict]
    tables: dict[str, dict]
    seeds: list[int]
    sweeps: list[dict] = field(default_factory=list)
    tune: Tuning | None = None
    ours: list[str] | None = None
    preset: str | list | None = None
    published: dict | None = None
    embeddings: dict | None = None

    @classmethod
    def read(cls, name: str | Path) -> "Comparison":
        """Read ``name``, a path or a file of the packaged properties.

        Raises:
            ConfigError: names the file, the key, and what is accepted.
        """
        path = find_config_file(name)
        content = read_yaml(path)
        _refuse_unknown(content, FIELDS, str(path))
        models = _labelled(content, "models", path)
        settings = _labelled(content, "settings", path, {"default": {}})
        tables = _tables(content, models, path)
        _refuse_conflicts(models, settings, path)
        comparison = cls(
            path, str(content.get("name", path.stem)),
            _files(content, str(path)),
            _mapping(content.get("keys"), f"{path}: keys"), models, settings, tables,
            _seeds(content, path), _sweeps(content, models, path),
            Tuning.read(content.get("tune"), models, path), content.get("ours"),
            content.get("preset"), _published(content, settings, path),
            _embeddings(content, models, path))
        for label in comparison.ours or ():
            _known(label, comparison.labels(), f"{path}: ours")
        return comparison

    def labels(self) -> list[str]:
        """All columns: the models, and the values of the sweeps."""
        return list(self.models) + [_sweep_label(sweep["model"], sweep["key"], value)
                                    for sweep in self.sweeps for value in sweep["values"]]

    def check_overrides(self, overrides: dict) -> None:
        """Raises ConfigError for a key that the cells differ in: all would become the same one."""
        varied = {"seed", "model", *(key for keys in self.settings.values() for key in keys),
                  *(sweep["key"] for sweep in self.sweeps),
                  *(key for keys in (self.tune.space.values() if self.tune else ()) for key in keys)}
        for key in overrides:
            if key in varied:
                raise ConfigError(f"--{key}: is what the cells of {self.path} differ in (its models, "
                                  f"settings, seeds, sweeps or search space); change it there")

    def cells(self) -> list[Cell]:
        """All cells, a setting after the other, so that rows of the table fill one by one."""
        order = itertools.product(self.tables, self.settings, self.seeds)
        return [cell for table, setting, seed in order
                for cell in self._cells_of(table, setting, seed)]

    def _cells_of(self, table: str, setting: str, seed: int) -> list[Cell]:
        below = merge(merge(self.keys, self.tables[table]["keys"]), self.settings[setting])
        found = []
        for model in self.tables[table]["models"]:
            keys = merge(below, {"model": model, **self.models[model], "seed": seed})
            files = (*self.files, *_files(keys, f"{self.path}: models: {model}"))
            keys.pop("config", None)
            found.append(Cell(model, setting, table, seed, keys, files))
            for sweep in self.sweeps:
                if sweep["model"] == model:
                    found += [Cell(_sweep_label(model, sweep["key"], value), setting, table, seed,
                                   merge(keys, {sweep["key"]: value}), files,
                                   {"model": model, "key": sweep["key"], "value": value})
                              for value in sweep["values"]]
        return found


def _sweep_label(model: str, key: str, value) -> str:
    return f"{model} {key}={value}"


# ---- reading and checking -------------------------------------------------------------------------


def _refuse_unknown(content: dict, known, where: str) -> None:
    for key in content:
        if key not in known:
            raise ConfigError(f"{where}: the key {key!r} is unknown, use one of "
                              f"{list(known)}{suggest(key, known)}")


def _known(label, labels, where: str) -> None:
    if label not in labels:
        raise ConfigError(f"{where}: {label!r} is none of {list(labels)}{suggest(str(label), labels)}")


def _mapping(value, where: str) -> dict:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where}: needs 'key: value' lines, not {value!r}")
    return value


def _labelled(content: dict, field_name: str, path: Path, default: dict | None = None) -> dict:
    """label -> keys, of ``models`` or ``settings``."""
    value = content.get(field_name, default)
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{path}: {field_name}: needs one line 'label: {{key: value}}' or more, "
                          f"not {value!r}")
    found = {str(label): _mapping(keys, f"{path}: {field_name}: {label}")
             for label, keys in value.items()}
    for label, keys in found.items():
        if "seed" in keys:
            raise ConfigError(f"{path}: {field_name}: {label}: sets seed; list it under seeds")
    return found


def _refuse_conflicts(models: dict, settings: dict, path: Path) -> None:
    """A model that sets what a setting sets would stand in a row that is not its own."""
    for (model, own), (setting, row) in itertools.product(models.items(), settings.items()):
        for key in own.keys() & row.keys():
            raise ConfigError(f"{path}: {key} is set by models: {model} and by settings: {setting}; "
                              f"leave it to one of them")


def _tables(content: dict, models: dict, path: Path) -> dict:
    tables = _labelled(content, "tables", path)
    for label, table in tables.items():
        where = f"{path}: tables: {label}"
        _refuse_unknown(table, TABLE_FIELDS, where)
        metrics = table.get("metrics")
        if not isinstance(metrics, list) or not metrics \
                or not all(isinstance(name, str) and "." in name for name in metrics):
            raise ConfigError(f"{where}: metrics: needs a list such as [rating.mae], not {metrics!r}")
        chosen = table.get("models", list(models))
        for model in chosen:
            _known(model, models, f"{where}: models")
        tables[label] = {"metrics": metrics, "models": chosen,
                         "keys": _mapping(table.get("keys"), f"{where}: keys")}
    return tables


def _files(content: dict, where: str) -> list[str]:
    """The paths of the files that a list ``config`` names."""
    names = content.get("config") or []
    if not isinstance(names, list):
        raise ConfigError(f"{where}: config: needs a list of files, not {names!r}")
    return [str(find_config_file(name)) for name in names]


def _seeds(content: dict, path: Path) -> list[int]:
    seeds = content.get("seeds", [2020])
    if not isinstance(seeds, list) or not seeds or len(set(seeds)) < len(seeds) \
            or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(f"{path}: seeds: needs different whole numbers from 0, not {seeds!r}")
    return seeds


def _sweeps(content: dict, models: dict, path: Path) -> list[dict]:
    sweeps = content.get("sweeps") or []
    if not isinstance(sweeps, list):
        raise ConfigError(f"{path}: sweeps: needs a list of {{model, key, values}}")
    for sweep in sweeps:
        where = f"{path}: sweeps"
        sweep = _mapping(sweep, where)
        _refuse_unknown(sweep, SWEEP_FIELDS, where)
        missing = [name for name in SWEEP_FIELDS if name not in sweep]
        if missing or not isinstance(sweep["values"], list) or not sweep["values"]:
            raise ConfigError(f"{where}: {sweep} needs model, key and a list of values")
        _known(sweep["model"], models, where)
    return sweeps


def _published(content: dict, settings: dict, path: Path) -> dict | None:
    published = content.get("published")
    if published is None:
        return None
    where = f"{path}: published"
    published = _mapping(published, where)
    _refuse_unknown(published, PUBLISHED_FIELDS, where)
    for name in ("source", "models", "values"):
        if name not in published:
            raise ConfigError(f"{where}: {name} is missing")
    for setting, rows in published["values"].items():
        _known(setting, settings, f"{where}: values")
        for metric, row in _mapping(rows, f"{where}: values: {setting}").items():
            if not isinstance(row, list) or len(row) != len(published["models"]):
                raise ConfigError(f"{where}: values: {setting}: {metric}: needs one number for each "
                                  f"of {published['models']}, not {row!r}")
    return {"tolerance": {}, "note": None, **published}


def _embeddings(content: dict, models: dict, path: Path) -> dict | None:
    embeddings = content.get("embeddings")
    if embeddings is None:
        return None
    where = f"{path}: embeddings"
    embeddings = {"evaluations": {}, "users": 1000, **_mapping(embeddings, where)}
    _refuse_unknown(embeddings, EMBEDDING_FIELDS, where)
    if not embeddings.get("models"):
        raise ConfigError(f"{where}: models is missing")
    for model in [*embeddings["models"], *embeddings["evaluations"]]:
        _known(model, models, where)
    return embeddings
