"""The search space of a comparison and its budget: the same number of trials for every model."""

from dataclasses import dataclass
from pathlib import Path

from recbole_mmdiff.errors import ConfigError, suggest

TUNE_FIELDS = ("trials", "seed", "space")
RANGE_FIELDS = ("low", "high", "log", "step")


@dataclass(frozen=True)
class Tuning:
    """How hyper-parameters are chosen.

    Attributes:
        trials: for every model with something to tune. The first takes the defaults as they are.
        seed: of the search.
        space: label of a model -> key -> a list of choices, or ``{low, high, log, step}``.
    """

    trials: int
    seed: int
    space: dict[str, dict]

    @classmethod
    def read(cls, content, models: dict, path: Path) -> "Tuning | None":
        """The part ``tune`` of a comparison file.

        Raises:
            ConfigError: names the file, the key, and what is accepted.
        """
        if content is None:
            return None
        where = f"{path}: tune"
        if not isinstance(content, dict) or set(content) - set(TUNE_FIELDS) or "space" not in content:
            raise ConfigError(f"{where}: needs trials and space (and takes seed), not {content!r}")
        trials, seed = content.get("trials", 20), content.get("seed", 0)
        if type(trials) is not int or trials < 1:
            raise ConfigError(f"{where}: trials: {trials!r} is no whole number from 1")
        space = {label: keys or {} for label, keys in content["space"].items()}
        for label in space:
            if label not in models:
                raise ConfigError(f"{where}: space: {label!r} is no model of this comparison"
                                  f"{suggest(label, models)}")
        for label in models:
            # A model left out by mistake would be compared untuned with tuned ones.
            if label not in space:
                raise ConfigError(f"{where}: space: there is none for {label}; give one, or "
                                  f"'{label}: {{}}' to run it with its defaults")
        for label, keys in space.items():
            for key, choices in keys.items():
                _check_choices(choices, f"{where}: space: {label}: {key}")
        return cls(trials, seed, space)


def _check_choices(choices, where: str) -> None:
    if isinstance(choices, list) and choices:
        return
    if not isinstance(choices, dict) or set(choices) - set(RANGE_FIELDS) \
            or not {"low", "high"} <= set(choices) \
            or not all(type(choices[end]) in (int, float) for end in ("low", "high")) \
            or choices["low"] >= choices["high"]:
        raise ConfigError(f"{where}: needs a list of choices, or {{low: ..., high: ..., log: True}} "
                          f"with low below high, not {choices!r}")
    if choices.get("log") and (choices["low"] <= 0 or choices.get("step")):
        raise ConfigError(f"{where}: a range on a log scale starts above 0 and has no step")


def suggest_values(trial, space: dict) -> dict:
    """What an optuna trial suggests for each key of a space."""
    values = {}
    for key, choices in space.items():
        if isinstance(choices, list):
            # By position: optuna takes no lists as choices, and layers are lists.
            values[key] = choices[trial.suggest_categorical(key, list(range(len(choices))))]
            continue
        low, high, log = choices["low"], choices["high"], bool(choices.get("log"))
        if type(low) is int and type(high) is int:
            values[key] = trial.suggest_int(key, low, high, log=log, step=choices.get("step") or 1)
        else:
            values[key] = trial.suggest_float(key, low, high, log=log, step=choices.get("step"))
    return values


def examples(choices) -> list:
    """Values of a key that must be accepted: all choices, or both ends."""
    return choices if isinstance(choices, list) else [choices["low"], choices["high"]]
