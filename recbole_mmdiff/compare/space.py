"""The search space of a comparison and its budget: the same number of trials for every model."""

import sys
from dataclasses import dataclass
from pathlib import Path

from recbole_mmdiff.compare.reading import PROTOCOL, mapping, refuse_unknown, typed
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
        refuse_unknown(mapping(content, where), TUNE_FIELDS, where)
        trials, seed = content.get("trials", 20), content.get("seed", 0)
        if typed(trials, int, f"{where}: trials") < 1 or typed(seed, int, f"{where}: seed") < 0:
            raise ConfigError(f"{where}: trials: {trials}, seed: {seed}: use trials from 1 and a seed "
                              f"from 0")
        # In one order: the sampler draws key after key, and the order of a file tells nothing.
        space = {str(label): dict(sorted(mapping(keys, f"{where}: space: {label}").items()))
                 for label, keys in typed(content.get("space"), dict, f"{where}: space").items()}
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
                _check_choices(key, choices, f"{where}: space: {label}: {key}")
        return cls(trials, seed, space)


def _check_choices(key: str, choices, where: str) -> None:
    if key in PROTOCOL | {"model", "valid_metric"}:
        raise ConfigError(f"{where}: is of the protocol, which trials must not choose")
    if typed(choices, (list, dict), where) == []:
        raise ConfigError(f"{where}: needs one choice or more")
    if isinstance(choices, list):
        return
    refuse_unknown(choices, RANGE_FIELDS, where)
    low, high, step = (choices.get(name) for name in ("low", "high", "step"))
    numbers = [typed(value, (int, float), where) for value in (low, high, *([step] if step else []))]
    finite = all(abs(number) <= sys.float_info.max for number in numbers)
    if not finite or low >= high or (step is not None and step <= 0):
        raise ConfigError(f"{where}: needs a list of choices, or {{low: ..., high: ..., log: True}} "
                          f"with low below high and a step above 0, not {choices!r}")
    if choices.get("log") and (low <= 0 or step):
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
        if all(type(value) is int for value in (low, high, choices.get("step") or 1)):
            values[key] = trial.suggest_int(key, low, high, log=log, step=choices.get("step") or 1)
        else:
            values[key] = trial.suggest_float(key, low, high, log=log, step=choices.get("step"))
    return values


def examples(choices) -> list:
    """Values of a key that must be accepted: all choices, or both ends."""
    return choices if isinstance(choices, list) else [choices["low"], choices["high"]]
