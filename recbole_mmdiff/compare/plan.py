"""A comparison: which models, settings, tables and seeds, and what each cell sets."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from recbole_mmdiff.compare import reading
from recbole_mmdiff.compare.space import Tuning
from recbole_mmdiff.config import find_config_file
from recbole_mmdiff.config.sources import merge, read_yaml
from recbole_mmdiff.errors import ConfigError


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
        published: a paper's numbers (see ``docs/compare.md``), or None.
        embeddings: of which models transferred vectors are pictured (see ``compare.embeddings``).
    """

    path: Path
    name: str
    files: list[str]
    keys: dict
    models: dict[str, dict]
    settings: dict[str, dict]
    tables: dict[str, dict]
    seeds: list[int]
    sweeps: list[dict]
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
        reading.refuse_unknown(content, reading.FIELDS, str(path))
        models = reading.labelled_keys(content, "models", path)
        settings = reading.labelled_keys(content, "settings", path, {"default": {}})
        reading.check_keys(models, settings, path)
        tables = reading.read_tables(content, models, path)
        comparison = cls(
            path, reading.typed(content.get("name", path.stem), str, f"{path}: name"),
            reading.config_files(content, str(path)),
            reading.mapping(content.get("keys"), f"{path}: keys"), models, settings, tables,
            reading.read_seeds(content, path), reading.read_sweeps(content, models, path),
            Tuning.read(content.get("tune"), models, path), None, content.get("preset"), None,
            reading.read_embeddings(content, models, path))
        labels = comparison.labels()
        if content.get("ours") is not None:
            comparison.ours = reading.known_labels(content["ours"], labels, f"{path}: ours")
        comparison.published = reading.read_published(content, settings, tables, labels, path)
        return comparison

    def labels(self) -> list[str]:
        """All columns: the models, and the values of the sweeps."""
        return list(self.models) + [_sweep_label(sweep["model"], sweep["key"], value)
                                    for sweep in self.sweeps for value in sweep["values"]]

    def check_overrides(self, overrides: dict) -> None:
        """Raises ConfigError for a key that the cells differ in: all would become the same one."""
        varied = {"seed", "model", *(sweep["key"] for sweep in self.sweeps)}
        for parts in (self.settings.values(), (table["keys"] for table in self.tables.values()),
                      self.tune.space.values() if self.tune else ()):
            varied |= {key for keys in parts for key in keys}
        named = [{"model": label, **keys} for label, keys in self.models.items()]
        for first, second in itertools.combinations(named, 2):
            if first["model"] == second["model"]:
                varied |= {key for key in first.keys() | second.keys()
                           if first.get(key) != second.get(key)}
        for key in overrides:
            if key in varied:
                raise ConfigError(f"--{key}: is what the cells of {self.path} differ in (its models, "
                                  f"settings, tables, seeds, sweeps or search space); change it there")

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
            files = (*self.files, *reading.config_files(keys, f"{self.path}: models: {model}"))
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
